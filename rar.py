"""RAR in one file: Randomized Autoregressive Visual Generation (arXiv 2411.00776).

    python rar.py train              learns ten kinds of drawn shapes: 2 to 3 minutes on two CPU
                                     cores, then 0.63 bits per token on new drawings
    python rar.py train --data DIR   learns your photographs, DIR/CLASS/PICTURE
    python rar.py sample             draws new pictures with the newest run
    python rar.py eval               its bits per token on held-out pictures

A tokenizer (tokenizer.py) replaces each cell of a picture, a patch of pixels, by a token: the
number of the codebook entry that stands for it. A transformer learns to predict the tokens one by
one, as a language model predicts words. New pictures are drawn from it.

In which order? Row by row ("raster"), a token is predicted only from what is above it and to its
left. Random orders teach a model to use context from all sides, but there are too many to master.
So RAR starts with random orders and ends with raster order. The probability of a random order is r.
It is 1 for half of the training, then falls to 0 in the third quarter, and stays 0. The paper's FID
of RAR-L (less is better) is 3.08 in raster order, 3.01 in random orders, and 2.18 annealed.

One thing is added. After cells 2 and 0, the order [2, 0, 3, 1] asks for cell 3. The order
[2, 0, 1, 3] asks for cell 1. The model has seen the same in both, so it could only answer the same.
A second position embedding, the target-aware one, tells it the next cell. With a fixed order, the
two could be added up into one.

A slot is a place in the sequence, and x_c the token of cell c. Below are the cells [[0, 1], [2, 3]]
in the order [2, 0, 3, 1]. The sequence begins with a start token, cls, and the class.

    slot                          0        1        2        3        4
    holds                        cls     class     x_2      x_0      x_3     (x_1 is not needed)
    row of pos_embed              0        1       2 + 2    2 + 0    2 + 3   (2 + its own cell)
    row of target_aware_...       -       2 + 2    2 + 0    2 + 3    2 + 1   (2 + the next cell)
    row of timesteps_...          0        1        2        3        4      (slot, for adaLN)
    predicts                      -       x_2      x_0      x_3      x_1

Part I is the method: 1 orders, 2 model, 3 sampling, 4 training. Part II is the program: 5 sampling
with a cache, 6 training that resumes, 7 settings, 8 commands, 9 scan orders, CUDA graphs.

Shapes: B samples, T cells, S slots, V tokens in the codebook, D channels, H heads.
"""

import math
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# ---- Part I: RAR
# ---- 1. Orders: random at first, then less and less
def randomness(step, start, end):
    """r in update `step`: 1 before `start`, 0 from `end` on, a line between (Section 3.2)."""
    if step < start:
        return 1.0
    if step >= end:
        return 0.0
    return (end - step) / (end - start)

def sample_orders(batch, length, r, order=None, rng=None):
    """Orders (B, T): [b, i] is the cell that comes i-th in sample b. Each row is random with
    probability r, else `order` (T,), by default raster."""
    rng = rng or np.random.default_rng()
    order = np.arange(length) if order is None else np.asarray(order)
    is_random = rng.random((batch, 1)) < r
    # Sorting noise gives a random permutation.
    permutations = rng.random((batch, length)).argsort(axis=1)
    return torch.from_numpy(np.where(is_random, permutations, order))

# ---- 2. The model: a causal transformer. Parameters have the names of the released weights
def causal(q, k, v, dropout):
    """Attention of each slot to itself and the slots before it. All (B, H, S, D/H)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)

class Block(nn.Module):
    """A transformer block that is told class and slot by adaLN, as in DiT. A linear layer maps the
    sum of their embeddings to six vectors, the modulation: a shift and a scale for the input of
    attention, a gate for its output, and the same for the MLP."""

    def __init__(self, config):
        super().__init__()
        D, head_width = config.width, config.width // config.heads
        self.heads = config.heads
        self.dropout = nn.Dropout(config.dropout)
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = nn.ModuleDict({
            "qkv": nn.Linear(D, 3 * D),
            "q_norm": nn.LayerNorm(head_width, eps=1e-6),
            "k_norm": nn.LayerNorm(head_width, eps=1e-6),
            "proj": nn.Linear(D, D)})
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.mlp = nn.ModuleDict({
            "fc1": nn.Linear(D, config.mlp_width), "fc2": nn.Linear(config.mlp_width, D)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x, modulation, attend=causal):
        """(B, S, D) -> (B, S, D), under modulation (B, S, 6D). Section 5 attends with a cache."""
        q, k, v = self.before(x, modulation)
        attended = attend(q, k, v, self.dropout.p if self.training else 0.0)
        return self.after(x, attended, modulation)

    def before(self, x, modulation):
        """Before attention: queries, keys and values (B, H, S, D/H)."""
        shift, scale = modulation.chunk(6, dim=-1)[:2]  # (B, S, D) each
        x = self.norm1(x) * (1 + scale) + shift
        qkv = self.attn.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, S, 3, H, D/H)
        q, k, v = qkv.unbind(2)
        q, k = self.attn.q_norm(q), self.attn.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def after(self, x, attended, modulation):
        """After attention: the output (B, S, D)."""
        gate1, shift, scale, gate2 = modulation.chunk(6, dim=-1)[2:]
        attended = attended.transpose(1, 2).flatten(2)  # (B, S, D)
        x = x + gate1 * self.dropout(self.attn.proj(attended))
        hidden = F.gelu(self.mlp.fc1(self.norm2(x) * (1 + scale) + shift))
        return x + gate2 * self.dropout(self.mlp.fc2(self.dropout(hidden)))

class RAR(nn.Module):
    """p(picture | class), token by token. `embeddings` has rows for V tokens, an unused one, the
    classes and "no class". Slot 0 predicts nothing, but the released weights have it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, T = config.width, config.grid_size**2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.embeddings = nn.Embedding(config.codebook_size + config.num_classes + 2, D)
        # As long as the released tables: T + 2 rows are used.
        self.pos_embed = nn.Parameter(torch.zeros(1, T + 1024, D))
        self.target_aware_pos_embed = nn.Parameter(torch.zeros(1, T + 1024, D))
        self.timesteps_embeddings = nn.Parameter(torch.zeros(1, T + 100, D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))
        self.adaln_before_head = nn.ModuleDict({"adaLN_modulation": modulation})
        self.lm_head = nn.Linear(D, config.codebook_size)

        std = 0.02 * max(1.0, math.sqrt(768 / D))  # with 0.02, narrow ones learn slowly
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and name != "cls_token":
                nn.init.trunc_normal_(parameter, std=std)
            # With gates of 0, blocks add nothing at first.
            if "adaLN_modulation" in name or name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens, labels, orders):
        """Logits (B, T, V), of which [b, i] predicts tokens[b, orders[b, i]].
        tokens (B, T) in cell order; labels (B,), num_classes meaning "no class"; orders (B, T)."""
        in_order = tokens.gather(1, orders)
        held = torch.cat([self.prompt(labels), self.embeddings(in_order[:, :-1])], dim=1)
        x = held + self.places(orders)  # (B, T + 1, D)

        # adaLN needs class and slot alone. With few classes, it runs once for each class.
        few = self.config.num_classes < len(labels)
        classes = torch.arange(self.config.num_classes + 1).to(labels) if few else labels
        pick = partial(torch.index_select, dim=0, index=labels) if few else nn.Identity()
        condition = self.condition(classes, 0, x.shape[1])
        for block in self.blocks:
            x = block(x, pick(block.adaLN_modulation(condition)))
        x = self.head(x, pick(self.adaln_before_head.adaLN_modulation(condition)))
        return x[:, 1:]  # without slot 0

    def prompt(self, labels):
        """What slots 0 and 1 hold: (B, 2, D)."""
        cls = self.cls_token.expand(len(labels), 1, -1)
        classes = self.embeddings(self.config.codebook_size + 1 + labels)
        return torch.cat([cls, classes[:, None]], dim=1)

    def places(self, orders):
        """Both position embeddings of all slots: (B, T + 1, D)."""
        rows = 2 + orders
        first_two = self.pos_embed[:, :2].expand(len(orders), -1, -1)
        places = torch.cat([first_two, F.embedding(rows[:, :-1], self.pos_embed[0])], dim=1)
        if self.config.target_aware:  # from slot 1 on
            places[:, 1:] += F.embedding(rows, self.target_aware_pos_embed[0])
        return places

    def condition(self, labels, start, stop):
        """What adaLN is told in slots start .. stop - 1: (B, S, D)."""
        # Slot 1 of the prompt is the class. Trap: "timesteps" are slots, not steps in time.
        return self.prompt(labels)[:, 1:] + self.timesteps_embeddings[:, start:stop]

    def head(self, x, modulation):
        """Logits (B, S, V) of x (B, S, D), under modulation (B, S, 2D)."""
        scale, shift = modulation.chunk(2, dim=-1)  # Trap: here scale comes before shift.
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return self.lm_head(x * (1 + scale) + shift)

def training_loss(model, tokens, labels, orders):
    """The mean cross entropy in nats, and the fraction of tokens predicted right."""
    logits = model(tokens, labels, orders)  # (B, T, V)
    targets = tokens.gather(1, orders)  # (B, T)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return loss, (logits.argmax(-1) == targets).float().mean()

# ---- 3. Sampling, slowly
def guidance_weight(step, steps, scale, power):
    """The weight g of classifier-free guidance for token `step` of `steps` (Section 4.1). Tokens
    are drawn from u + g (c - u), with logits c given the class and u without it. g rises from 1 to
    `scale`. A larger power delays it; with power 0 it is `scale` throughout."""
    return 1 + (scale - 1) * (1 - math.cos(math.pi * (step / steps) ** power)) / 2

def draw(logits, temperature, uniforms):
    """Draw tokens (B,) from softmax(logits (B, V) / temperature): the first whose cumulative
    probability exceeds uniforms (B,), random numbers from 0 to 1, one for each picture."""
    if temperature < 1e-30:
        return logits.argmax(-1)
    logits = logits - logits.amax(-1, keepdim=True)  # so that none is infinite
    cumulative = torch.softmax(logits / temperature, dim=-1).cumsum(-1)
    # By rounding, the last sum may be below 1, so uniforms are scaled by it.
    return (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(-1)

@torch.no_grad()
def generate_slowly(model, labels, scale, power, temperature, uniforms, orders):
    """Draw tokens (B, T), in cell order, for labels (B,). orders[b, i] is the cell of draw i of
    picture b, and uniforms[b, i] decides the draw. Each draw runs the whole sequence. Attention is
    causal, so tokens that are not drawn yet (0) change nothing."""
    no_class = torch.full_like(labels, model.config.num_classes)
    tokens = torch.zeros_like(orders)
    for t in range(orders.shape[1]):
        logits = model(tokens, labels, orders)[:, t]  # (B, V)
        if scale not in (0, 1):  # these are no guidance
            g = guidance_weight(t, orders.shape[1], scale, power)
            unconditional = model(tokens, no_class, orders)[:, t]
            logits = unconditional + g * (logits - unconditional)
        token = draw(logits, temperature, uniforms[:, t])
        tokens.scatter_(1, orders[:, t:t + 1], token[:, None])
    return tokens

# ---- 4. Training, plainly
def learning_rate(step, steps, warmup, peak, floor):
    """A line from 0 to `peak` at update `warmup`, then half a cosine to `floor` at `steps`."""
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2

def make_optimizer(model, config):
    """AdamW, with weight decay where the authors have it."""
    decayed = dict(params=[], weight_decay=config.weight_decay)
    others = dict(params=[], weight_decay=0.0)
    for name, parameter in model.named_parameters():
        # Trap: adaln_before_head is spared by its "ln", blocks.*.adaLN_modulation is not.
        is_spared = parameter.ndim < 2 or "ln" in name or "embed" in name
        group = others if is_spared else decayed
        group["params"].append(parameter)
    return torch.optim.AdamW([decayed, others], betas=config.betas, fused=True)

@lru_cache(maxsize=2)  # ImageNet's 12.8 million take 0.7 s
def shuffled(count, seed, epoch):
    """The rows as an epoch visits them. The 1 keeps its numbers apart from an update's."""
    return np.random.default_rng((seed, epoch, 1)).permutation(count)

def whole_batch(rows, config, step, order=None):
    """The batch of update `step`, of rows (N, 1 + T) of a class and tokens in cell order. Seed
    and step decide it: tokens (B, T), labels (B,), orders (B, T), seeds (B,) for dropout, and r."""
    B, N, steps = config.batch, len(rows), config.steps
    index = [shuffled(N, config.seed, i // N)[i % N] for i in range(step * B, (step + 1) * B)]
    batch = torch.from_numpy(rows[index].astype(np.int64))  # (B, 1 + T)
    labels, tokens = batch[:, 0], batch[:, 1:]

    rng = np.random.default_rng((config.seed, step))
    # Guidance compares with a model without class, so some samples lose theirs.
    labels[rng.random(B) < config.label_dropout] = config.num_classes
    r = randomness(step, config.anneal[0] * steps, config.anneal[1] * steps)
    orders = sample_orders(B, tokens.shape[1], r, order, rng)
    return tokens, labels, orders, rng.integers(2**63, size=B), r

def update(model, optimizer, config, step):
    """Make update `step` from the gradients. Returns their norm and the learning rate."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    lr = learning_rate(step, config.steps, config.warmup * config.steps, config.lr, config.min_lr)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)  # DDP sums them in place
    return norm, lr

def train_plainly(model, rows, config):
    """Make all updates of a training on rows (N, 1 + T)."""
    optimizer = make_optimizer(model, config)
    for step in tqdm(range(config.steps), "training"):
        tokens, labels, orders, _, _ = whole_batch(rows, config, step)
        loss, _ = training_loss(model, tokens, labels, orders)
        loss.backward()
        update(model, optimizer, config, step)

# ---- Part II: the program
import argparse
import dataclasses
import inspect
import json
import re
from pathlib import Path

import tokenizer as tok
from tokenizer import UserError

# ---- 5. Sampling with a cache: the same tokens, but each slot runs once
AHEAD = 32  # slots whose modulations are made together

@torch.no_grad()
def generate(model, labels, scale, power, temperature, *, uniforms=None, orders=None, known=None):
    """As generate_slowly, with a cache. uniforms and orders are random and raster by default. known
    (B, T), in cell order, holds tokens that stay, or -1. """
    B, T, device = len(labels), model.config.grid_size**2, labels.device
    uniforms = torch.rand(B, T, device=device) if uniforms is None else uniforms
    orders = (torch.arange(T, device=device) if orders is None else orders).expand(B, T)
    drawn, K = torch.full_like(orders, -1), 0  # in slot order; K are known
    if known is not None:  # int() waits, so there is no CUDA graph
        drawn = known.to(device).expand(B, T).gather(1, orders)
        come_first = (drawn >= 0).all(dim=0).int().cumprod(0)  # (T,), in all pictures
        K = min(int(come_first.sum()), T - 1)

    # With guidance every picture is two sequences: all with their class, then all without, which
    # share one entry of classes. row tells each sequence its entry.
    classes = torch.cat([labels, torch.full_like(labels[:1], model.config.num_classes)])
    row, copies = torch.arange(B, device=device), 1
    if scale not in (0, 1):
        row, copies = torch.cat([row, torch.full_like(row, B)]), 2
    places = model.places(orders)  # (B, T + 1, D)
    layers = [part.adaLN_modulation for part in (*model.blocks, model.adaln_before_head)]
    caches = [{} for _ in model.blocks]

    for t in range(K, T):
        if t == K:  # run slots 0 .. K + 1: the prompt and the known tokens
            first = 0
            held = model.embeddings(drawn[:, :K]).repeat(copies, 1, 1)
            x = torch.cat([model.prompt(classes[row]), held], dim=1)
            condition = model.condition(classes, 0, K + 2)  # (B + 1, K + 2, D)
            modulations = (layer(condition)[row] for layer in layers)
        else:  # run slot t + 1, which holds the newest token
            first = t + 1
            x = model.embeddings(drawn[:, t - 1]).repeat(copies, 1)[:, None]
            ahead = (t - K - 1) % AHEAD
            if ahead == 0:  # make those of the next slots: they need no tokens
                tables = modulations = None  # or memory holds two sets
                condition = model.condition(classes, first, first + AHEAD)
                tables = [layer(condition) for layer in layers]  # (B + 1, AHEAD, 6D or 2D)
            modulations = (table[row, ahead, None] for table in tables)
        x = x + places[:, first:t + 2].repeat(copies, 1, 1)  # (copies * B, S, D)
        for block, cache in zip(model.blocks, caches):
            x = block(x, next(modulations), partial(attend_cached, cache, first, T + 1))
        with torch.autocast(device.type, enabled=False):  # guidance would amplify rounding
            logits = model.head(x[:, -1:], next(modulations)[:, -1:].float())[:, 0]

        if copies == 2:
            conditional, unconditional = logits.chunk(2)
            g = guidance_weight(t, T, scale, power)
            logits = unconditional + g * (conditional - unconditional)  # (B, V)
        token = draw(logits, temperature, uniforms[:, t])
        drawn[:, t] = torch.where(drawn[:, t] < 0, token, drawn[:, t])
    return torch.empty_like(drawn).scatter_(1, orders, drawn)

def attend_cached(cache, first, slots, q, k, v, dropout):
    """Attention of the slots from `first` on to themselves and the cached slots before."""
    stop, is_prompt = first + k.shape[2], first == 0
    if is_prompt:  # make room for all slots; autocast makes k float32, but not v
        cache["both"] = v.new_empty(2, *v.shape[:2], slots, v.shape[3])
    keys, values = cache["both"][:, :, :, :stop]
    keys[:, :, first:], values[:, :, first:] = k, v
    # After the prompt there is one slot, and it sees all.
    return F.scaled_dot_product_attention(q, keys, values, is_causal=is_prompt)

def pack(model):
    """Store the weights of linear layers as oneDNN wants them: a CPU draws twice as fast."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and torch.backends.mkldnn.is_available():
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
            layer.forward = partial(torch.ops.mkldnn._linear_pointwise, W=weight, B=layer.bias,
                                    attr="none", scalars=[], algorithm="")
            layer.weight = None

def compile_halves(model):
    """Fuse what each block does before and after attention, which alone knows lengths."""
    for block in model.blocks:
        block.before, block.after = torch.compile(block.before), torch.compile(block.after)

def image_uniforms(seed, numbers, length):
    """Uniforms (B, length) that depend on the seed and the pictures' numbers alone."""
    streams = [np.random.Generator(np.random.Philox(key=(seed, i))) for i in numbers]
    return torch.from_numpy(np.stack([s.random(length, dtype=np.float32) for s in streams]))

def image_orders(config, numbers, known=None):
    """The orders (B, T) of pictures. Cells whose token is known come first."""
    T = config.grid_size**2
    if config.order == "random":  # the first T uniforms of a picture decide its draws
        orders = image_uniforms(config.seed, numbers, 2 * T)[:, T:].argsort(dim=1, stable=True)
    else:
        orders = scan_order(config.order, config.grid_size).expand(len(numbers), T)
    if known is not None:
        is_open = (known[orders] < 0).int()
        orders = orders.gather(1, is_open.argsort(dim=1, stable=True))  # sorted: 0 before 1
    return orders

def sample_tokens(model, labels, config, autocast, numbers=None, known=None):
    """Yield numbers (B,) and tokens (B, T) of pictures, batch by batch. Picture i depends on
    labels[i], weights, settings and i alone. known (T,) holds tokens that all are given, or -1."""
    device = model.cls_token.device
    numbers = range(len(labels)) if numbers is None else numbers

    def draw_all(labels, uniforms, orders):
        with autocast:
            return generate(model, labels, config.scale, config.power, config.temperature,
                            uniforms=uniforms, orders=orders, known=known)

    if device.type == "cuda" and known is None:
        draw_all = recorded(draw_all)
    for start in tqdm(range(0, len(numbers), config.micro_batch), "sampling", leave=False):
        part = list(numbers[start:start + config.micro_batch])
        uniforms = image_uniforms(config.seed, part, config.grid_size**2)
        inputs = labels[part], uniforms, image_orders(config, part, known)
        yield torch.tensor(part), draw_all(*[x.to(device) for x in inputs])

# ---- 6. Training: the same updates, resumable, on any number of GPUs
def draw_batch(rows, config, step, rank=0, processes=1):
    """The share of process `rank` in a whole_batch."""
    *batch, r = whole_batch(rows, config, step, scan_order(config.order, config.grid_size))
    mine = slice(rank * config.batch // processes, (rank + 1) * config.batch // processes)
    return *[x[mine] for x in batch], r

def train_step(network, optimizer, config, batch, step, autocast):
    """Make one update. Returns what is logged, as tensors, so that no GPU is waited for."""
    tokens, labels, orders, seeds, r = batch
    device = next(network.parameters()).device
    processes, sums = config.batch // len(tokens), 0
    for start in range(0, len(tokens), config.micro_batch):
        stop = start + config.micro_batch
        torch.manual_seed(int(seeds[start]))
        inputs = [tok.send(x[start:stop], device) for x in (tokens, labels, orders)]
        fraction = len(inputs[0]) / config.batch
        # As DDP.no_sync does it: only the last micro-batch exchanges gradients.
        network.require_backward_grad_sync = stop >= len(tokens)
        with autocast:
            loss, accuracy = training_loss(network, *inputs)
        # DDP averages gradients. We want their sum, as each loss is a fraction of the batch's.
        (loss * fraction * processes).backward()
        sums = sums + fraction * torch.stack([loss.detach(), accuracy])
    norm, lr = update(network, optimizer, config, step)
    loss, accuracy = tok.sum_over_processes(sums)
    return dict(loss=loss, accuracy=accuracy, r=r, lr=lr, gradient_norm=norm)

@torch.no_grad()
def evaluate(model, rows, config, autocast):
    """Bits per token and accuracy on rows (N, 1 + T), in the final and random orders."""
    rows, result = torch.from_numpy(rows.astype(np.int64)), {}
    order = scan_order(config.order, config.grid_size)
    for name, r in (("final_order", 0), ("random_order", 1)):
        rng, sums = np.random.default_rng(0), 0
        orders = sample_orders(len(rows), len(order), r, order, rng)
        for part in torch.arange(len(rows)).split(config.micro_batch):
            inputs = [x[part].to(model.cls_token.device) for x in (rows[:, 1:], rows[:, 0], orders)]
            with autocast:
                sums = sums + len(part) * torch.stack(training_loss(model, *inputs))
        nats, accuracy = (sums / len(rows)).tolist()
        result |= {f"{name}_bits": nats / math.log(2), f"{name}_accuracy": accuracy}
    return result

def train(config, folder, device, autocast):
    """Make the updates that the run in `folder` still lacks."""
    torch.manual_seed(config.seed)
    model = RAR(config).to(device)
    optimizer = make_optimizer(model, config)
    done = resume(folder, config, model, optimizer)
    if config.init and done == 0:
        load_init(model, config.init)
    data = tok.open_data(config, folder, device, fit=done == 0)
    network = model
    if tok.WORLD_SIZE > 1:
        network = nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=True, find_unused_parameters=not config.target_aware)
    if config.compile:
        compile_halves(model)
    annealing_starts = math.ceil(config.anneal[0] * config.steps)
    bar = tqdm(range(done, config.steps), "training", config.steps, initial=done)
    with bar, tok.noting_signals() as signals:
        for step in bar:
            batch = draw_batch(data.train, config, step, tok.RANK, tok.WORLD_SIZE)
            figures = train_step(network.train(), optimizer, config, batch, step, autocast)

            done = step + 1
            stopping = tok.in_any_process(signals)
            milestone = done % config.save_every == 0 or done in (annealing_starts, config.steps)
            logged = milestone or done == 1 or done % config.log_every == 0
            if logged or stopping:  # only here is the device waited for
                line = {"step": done} | {name: float(value) for name, value in figures.items()}
                line["passes"] = done * config.batch / data.images
                if not math.isfinite(line["loss"] + line["gradient_norm"]):
                    raise UserError(f"update {done}: loss or gradient is NaN: lower --lr")
                bar.set_postfix({name: line[name] for name in ("loss", "r", "passes")})
            if milestone and tok.RANK == 0:
                line |= evaluate(model.eval(), data.held_out, config, autocast)
                bar.write(f"update {done}: {in_words(config, line)}")
                save_preview(folder, done, model, data, config, autocast)
            if logged and tok.RANK == 0:
                with tok.writing(folder / "log.jsonl"), open(folder / "log.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
            if (milestone or stopping) and tok.RANK == 0:
                save_checkpoint(folder, done, model, optimizer, annealing_starts)
            if stopping:
                raise KeyboardInterrupt("stopped and saved; the same command goes on")
    print(f"finished: look at {folder}/step-{config.steps:06}.png\nnext: python rar.py sample")

def in_words(config, result):
    return (f"held-out {result['final_order_bits']:.3f} bits/token in {config.order} order, "
            f"{result['random_order_bits']:.3f} bits/token in random order")

def save_preview(folder, done, model, data, config, autocast):
    labels = torch.arange(min(60, 5 * config.num_classes)) % config.num_classes
    batches = sample_tokens(model, labels, config, autocast)
    images = [data.tokenizer.decode(tokens).cpu() for _, tokens in batches]
    tok.save_grid(folder / f"step-{done:06}.png", torch.cat(images), config.class_names)

def checkpoints(folder):
    return sorted(folder.glob("checkpoint-[0-9]*.pt"), reverse=True)  # the newest first

def save_checkpoint(folder, done, model, optimizer, annealing_starts):
    """Keep the last two and the one where annealing starts."""
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    state = dict(updates=done, model=weights, optimizer=optimizer.state_dict())
    tok.write_tensors(folder / f"checkpoint-{done:07}.pt", state)
    tok.write_tensors(folder / "weights.pt", weights)
    for path in checkpoints(folder)[2:]:
        if path.name != f"checkpoint-{annealing_starts:07}.pt":
            path.unlink(missing_ok=True)

def resume(folder, config, model, optimizer):
    """Load the newest checkpoint, if any. Returns how many updates it has had."""
    found, done = checkpoints(folder), 0
    weights, log = folder / "weights.pt", folder / "log.jsonl"
    if found:
        for name, old in vars(read_config(folder, config)).items():
            if old != getattr(config, name) and name not in FREE:
                raise UserError(f"{folder} has {tok.flag_of(name)} {old}: name another --out")
        state = tok.read_tensors(found[0])
        with tok.reading(found[0], "is no checkpoint of a run"):
            done = state["updates"]
            optimizer.load_state_dict(state["optimizer"])
            tok.load_strictly(model, state["model"], found[0])
        if tok.RANK == 0:  # a kill may have come between the two files
            tok.write_tensors(weights, state["model"])
    elif weights.exists():
        raise UserError(f"{weights} has no checkpoint beside it: name another --out")
    if tok.RANK == 0:
        tok.write_json(folder / "config.json", dataclasses.asdict(config))
    if tok.RANK == 0 and log.exists():  # what follows the checkpoint is made again
        lines = [x for x in log.read_text().splitlines(True) if x.endswith("}\n")]
        with tok.replacing(log) as beside:
            beside.write_text("".join(x for x in lines if json.loads(x)["step"] <= done))
    return done

# ---- 7. Settings
SAMPLING = ("order", "seed", "scale", "power", "temperature")
FREE = ("micro_batch", "compile", "log_every", "save_every", *SAMPLING[2:])

@dataclasses.dataclass
class Config:
    """The settings of a run, by default RAR-B's (Tables 1, 4, 6). What has a comment is a flag."""
    num_classes: int = 1000
    class_names: tuple = ()
    data: str = "shapes"  # shapes, or a folder of class folders
    image_size: int = 256  # pixels a side
    crops: str = "ten"  # of photographs: ten, flip (two) or center
    photographs: int = 10**9  # at most so many, evenly from all classes
    tokenizer: str = "released"  # released (fetched), patch (fitted to the data), or a file
    grid_size: int = 16  # cells a side
    codebook_size: int = 1024  # number of different tokens
    width: int = 768  # channels of a token
    depth: int = 24  # number of blocks
    heads: int = 16  # number of attention heads
    mlp_width: int = 3072  # hidden channels of an MLP
    dropout: float = 0.1  # fraction of activations set to 0
    init: str = ""  # weights to start from
    anneal: tuple = (0.5, 0.75)  # fractions of training between which r falls from 1 to 0
    target_aware: bool = True  # tell each slot which cell it predicts
    label_dropout: float = 0.1  # fraction of samples without class, for guidance
    steps: int = 250_000  # number of updates
    batch: int = 2048  # samples of an update
    lr: float = 4e-4  # learning rate after warm-up
    min_lr: float = 1e-5  # learning rate at the end
    warmup: float = 0.25  # fraction of training in which lr rises
    weight_decay: float = 0.03  # AdamW's weight decay
    betas: tuple = (0.9, 0.96)  # AdamW's betas
    clip: float = 1.0  # largest norm of the gradients
    # These may change when a run goes on.
    micro_batch: int = 64  # in memory at once; sample takes 128 on GPUs of 40 GB
    compile: bool = False  # use torch.compile, for GPUs
    log_every: int = 100  # updates between lines of the log
    save_every: int = 5000  # updates between checkpoints
    # These decide what a sample is like. All but order and seed may change, too.
    order: str = "raster"  # order of cells; a wrong name lists all
    seed: int = 0  # of weights and batches; for sample it is 1
    scale: float = 16.0  # guidance at the last token; 0 is none
    power: float = 2.75  # how late guidance sets in; 0 is at once
    temperature: float = 1.0  # of the draws; 0 is greedy

    def __post_init__(self):
        most = dict(anneal=1, warmup=1, dropout=.99, label_dropout=.99, betas=.9999, grid_size=128)
        for name, value in vars(self).items():
            if isinstance(value, list):  # as argparse and JSON have it
                setattr(self, name, tuple(value))
            default, high = getattr(Config, name), most.get(name, 2**63 - 1)
            low = int(type(default) is int and default > 0)
            for number in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(number, (int, float)) and not low <= number <= high:  # or NaN
                    raise UserError(f"{tok.flag_of(name)} must be {low} to {high}, not {number}")
        if self.width % self.heads:
            raise UserError(f"--heads {self.heads} does not divide --width {self.width}")
        if self.min_lr > self.lr:
            raise UserError("--min-lr is above --lr")
        if self.anneal[0] > self.anneal[1]:
            raise UserError("--anneal ends before it starts")

HELP = dict(re.findall(r"    (\w+): .* = .*  # (.*)", inspect.getsource(Config)))

WITHOUT_GPU = dict(width=128, depth=4, heads=8, mlp_width=512, dropout=0.0, image_size=32,
                   grid_size=8, tokenizer="patch", warmup=0.05, log_every=20)
PRESETS = {  # with micro-batches for 80 GB
    "tiny": Config(**WITHOUT_GPU, crops="center", codebook_size=192, label_dropout=0.2, steps=1500,
                   batch=16, lr=4e-3, save_every=500, scale=1.65, power=0.0, temperature=0.8),
    "small": Config(**WITHOUT_GPU, crops="flip", photographs=60_000, codebook_size=2048,
                    anneal=(0.25, 0.5), steps=1400, batch=64, lr=3e-3, save_every=350,
                    scale=4.0, power=1.0, temperature=0.95),
    "RAR-S": Config(depth=12, steps=20_000, batch=256, micro_batch=128, save_every=1000),
    "RAR-B": Config(),
    "RAR-L": Config(width=1024, mlp_width=4096, scale=15.5, power=2.5, temperature=1.02),
    "RAR-XL": Config(width=1280, depth=32, mlp_width=5120, micro_batch=32,
                     scale=6.9, power=1.5, temperature=1.02),
    "RAR-XXL": Config(width=1408, depth=40, mlp_width=6144, micro_batch=16,
                      scale=8.0, power=1.2, temperature=1.02),
}

def read_config(folder, default):
    path = folder / "config.json"
    with tok.reading(path):
        return Config(**tok.read_json(path)) if path.exists() else default

# ---- 8. Commands
def train_command(args, knobs, device, autocast):
    data, gpu = knobs.get("data", "shapes"), tok.gpu_gigabytes(device) >= 16
    names = tok.class_names(data)
    count = 0 if data == "shapes" else len(tok.labelled_pictures(data)[0])
    choices = [
        ("tiny", "drawn shapes", data == "shapes"),
        ("RAR-B", "1000 classes and a GPU", gpu and len(names) == 1000),
        ("RAR-S", "2,000 photographs or more and a GPU", gpu and count >= 2000),
        ("small", "photographs without a GPU of 16 GB", True)]
    preset, why = next((preset, why) for preset, why, fits in choices if fits)
    preset = args.model or preset
    chosen = dict(num_classes=len(names), class_names=names)
    if data == "shapes":
        chosen |= dict(image_size=32, grid_size=8, codebook_size=192, tokenizer="patch")
    elif preset == "small":
        chosen |= dict(codebook_size=min(2048, 4 * count), steps=min(1400, max(300, count)))
        if count < 2000:  # or they would be learned by heart
            chosen |= dict(crops="ten", dropout=0.2)
    config = dataclasses.replace(PRESETS[preset], **chosen | knobs)
    scan_order(config.order, config.grid_size)  # refuses a wrong name
    if config.batch % tok.WORLD_SIZE:
        raise UserError(f"--batch {config.batch} is not a multiple of {tok.WORLD_SIZE} processes")
    folder = Path(args.out or f"runs/{Path(data).resolve().name}-{preset}")
    print(f"{folder}: --model {preset} for {why}: {len(names)} classes, {config.steps:,} updates, "
          f"size {config.image_size}, {config.grid_size**2} tokens of {config.codebook_size}")
    if preset == "small":
        print(f"about {math.ceil(config.steps / 160)} minutes on two CPU cores; better pictures: "
              "more --steps, --image-size 64 --grid-size 16, or a GPU of 16 GB")
    with tok.locked(folder / ".lock", f"{folder} is in use by another training: wait"):
        train(config, folder, device, autocast)

def sample_command(args, knobs, device, autocast):
    knobs = dict(micro_batch=128 if tok.gpu_gigabytes(device) >= 40 else 64) | knobs
    model, config, folder = load_model(args.weights, knobs, device)
    classes = tok.class_numbers(args.classes, config, folder)
    count = args.count or min(60, 5 * len(classes))
    labels = torch.tensor(classes)[torch.arange(count) % len(classes)]
    tokenizer = tok.tokenizer_of(config, folder).to(device)
    known, before = tok.known_tokens(args.complete, args.keep, tokenizer, device)
    final = scan_order(read_config(folder, Config()).order, config.grid_size)
    if config.anneal[0] < 1 and not final.equal(image_orders(config, [0], known)[0]):
        print("these weights are annealed to another order: take a checkpoint from before that")

    settings = {name: getattr(config, name) for name in SAMPLING} | dict(
        classes=classes, precision=args.precision, weights=tok.digest_of(model),
        tokenizer=tok.digest_of(tokenizer), known=None if known is None else known.tolist())
    if knobs.get("compile"):
        compile_halves(model)
    elif device.type == "cpu" and args.precision == "float32":
        pack(model)
    path, store, missing = tok.open_samples(args.out, folder, count, tokenizer.image_size, settings)
    batches = sample_tokens(model, labels, config, autocast, missing, known)
    tok.save_samples(store, ((part, tokenizer.decode(tokens)) for part, tokens in batches))
    names = config.class_names or range(config.num_classes)
    columns = labels.tolist() if args.complete else classes
    tok.pack_samples(path, store, count, [names[c] for c in columns], before)
    print(f"{path}: {count:,} pictures, seed {config.seed}")

def eval_command(args, knobs, device, autocast):
    model, config, folder = load_model(args.weights, knobs, device)
    data = tok.open_data(config, folder, device, held_out_only=True)
    print(f"{folder}: {in_words(config, evaluate(model, data.held_out, config, autocast))}")

def load_model(path, knobs, device):
    """The model at a path, its Config and folder. Sizes are read off the weights. Other settings
    are those of knobs, of the config.json beside them, or of the preset of that size."""
    path = find_weights(path)
    checkpoint = tok.read_tensors(path)
    state = checkpoint.get("model", checkpoint)
    with tok.reading(path, "holds no weights of a RAR"):
        (rows, D), V = state["embeddings.weight"].shape, len(state["lm_head.bias"])
        sizes = dict(
            width=D, codebook_size=V, num_classes=rows - V - 2,
            depth=sum(name.endswith(".attn.qkv.bias") for name in state),
            heads=D // len(state["blocks.0.attn.q_norm.bias"]),
            mlp_width=len(state["blocks.0.mlp.fc1.bias"]),
            grid_size=math.isqrt(state["pos_embed"].shape[1] - 1024))
    alike = [c for c in PRESETS.values() if (c.width, c.depth) == (D, sizes["depth"])]
    config = read_config(path.parent, [*alike, Config()][0])
    if 0 < checkpoint.get("updates", 0) <= math.ceil(config.anneal[0] * config.steps):
        knobs = {"anneal": (1.0, 1.0)} | knobs  # all orders were random so far: any will do
    with torch.device("meta"):  # initial weights would take long
        model = RAR(dataclasses.replace(config, **sizes, **knobs))
    tok.load_strictly(model, state, path, assign=True)
    return model.to(device, torch.float32).eval(), model.config, path.parent

def find_weights(path):
    """The weights file of a path, run or released model. None is the newest run."""
    if path in tok.RELEASED_MODELS:
        return tok.fetch_released(path)
    runs = Path("runs").glob("*/weights.pt")
    path = path or max(runs, key=lambda file: file.stat().st_mtime, default="runs/*/weights.pt")
    path = Path(path, "weights.pt") if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"no weights file {path}: make one with python rar.py train")
    return path

def load_init(model, path):
    """Start from other weights. Embeddings of other classes start anew."""
    other, config, _ = load_model(path, {}, torch.device("cpu"))
    state, table = other.state_dict(), model.embeddings.weight.detach().cpu()
    if config.num_classes != model.config.num_classes and config.width == table.shape[1]:
        print(f"{path} has other classes: their embeddings start anew")
        kept = state["embeddings.weight"][:config.codebook_size + 1]
        state["embeddings.weight"] = torch.cat([kept, table[len(kept):]])
    tok.load_strictly(model, state, path)

def add_flags(command, function, names, on_cuda="tf32"):
    command.set_defaults(function=function, on_cuda=on_cuda)
    for name in names:
        default = getattr(Config, name)
        options = dict(type=type(default))
        if isinstance(default, tuple):
            options = dict(type=float, nargs=len(default))
        if isinstance(default, bool):
            options = dict(action=argparse.BooleanOptionalAction)
        command.add_argument(tok.flag_of(name), help=f"{HELP[name]} [{default}]", **options)
    command.add_argument("--device", choices=["cuda", "cpu"])
    command.add_argument("--precision", choices=["float32", "tf32", "bfloat16"],
                         help=f"of matrix products [{on_cuda} on cuda, else float32]")

def run(argv):
    parser = tok.Parser(prog="rar.py")
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="train a model", description="[defaults of RAR-B]")
    train.add_argument("--model", choices=PRESETS, help="preset of the settings [by the data]")
    train.add_argument("--out", help="folder of the run [runs/DATA-MODEL]")
    sample = commands.add_parser("sample", help="draw pictures")
    sample.add_argument("--classes", nargs="+", help="numbers or names [all]")
    sample.add_argument("--count", type=tok.positive, help="pictures [5 of each class]")
    sample.add_argument("--out", help="X.png for a grid, X.npz, or X/ for a PNG each [a new grid]")
    sample.add_argument("--complete", metavar="PICTURE", help="picture to complete")
    sample.add_argument("--keep", type=tok.rectangle, help="X0,Y0,X1,Y1: pixels of the square")
    evaluation = commands.add_parser("eval", help="held-out bits per token")
    add_flags(train, train_command, HELP, "bfloat16")
    add_flags(sample, sample_command, [*SAMPLING, "micro_batch", "compile"])
    add_flags(evaluation, eval_command, ["data", "order", "micro_batch"])
    for command in (sample, evaluation):
        command.add_argument("--weights", help="file, run, or RAR-B .. RAR-XXL [the newest run]")
    sample.set_defaults(seed=1)  # seed 0 would draw the preview again
    args = parser.parse_args(argv)
    knobs = {name: getattr(args, name) for name in HELP if getattr(args, name, None) is not None}
    device, args.precision, autocast = tok.choose_device(args.device, args.precision, args.on_cuda)
    with tok.processes(device):
        args.function(args, knobs, device, autocast)

def main(argv=None):
    return tok.exit_code(run, argv)

# ---- 9. Scan orders, and the fast path on GPUs
@lru_cache
def scan_order(name, grid_size):
    """The cells (T,) in the order in which a scan of Fig. 6 visits them; cell = row * N + column.
    The pictures tell when each cell has its turn; spiral_out is spiral_in backwards.

      alternate       spiral_in       subsample        z_curve
     0  1  2  3      0 11 10  9      0  4  1  5      0  1  4  5
     7  6  5  4      1 12 15  8      8 12  9 13      2  3  6  7
     8  9 10 11      2 13 14  7      2  6  3  7      8  9 12 13
    15 14 13 12      3  4  5  6     10 14 11 15     10 11 14 15
    """
    N, half = grid_size, (grid_size + 1) // 2
    grid = np.arange(N * N).reshape(N, N)
    orders = {"raster": grid.flatten()}
    rows = [row[::-1] if number % 2 else row for number, row in enumerate(grid)]
    orders["alternate"] = np.concatenate(rows)

    # Down the left side; then take it away, and turn what is left
    spiral, rest = [], grid.T
    while rest.size:
        spiral.extend(rest[0])
        rest = np.rot90(rest[1:])
    orders |= {"spiral_in": np.array(spiral), "spiral_out": np.array(spiral[::-1])}

    # The first cell of each quarter, then the second of each. Trap: lexsort's last key counts most.
    row, column = np.divmod(np.arange(N * N), N)
    orders["subsample"] = np.lexsort((column // half, row // half, column % half, row % half))

    # Quarter by quarter, and each of them likewise
    def z_curve(part):
        if part.size < 2:
            return part.flatten()
        quarters = [q for half in np.array_split(part, 2) for q in np.array_split(half, 2, axis=1)]
        return np.concatenate([z_curve(quarter) for quarter in quarters])
    orders["z_curve"] = z_curve(grid)

    if name not in orders:
        raise UserError(f"--order {name}: choose from {', '.join(orders)}; to sample, also random")
    return torch.from_numpy(orders[name])

def recorded(function):
    """A function of tensors as a CUDA graph, which starts small kernels faster than Python does.
    The first call with some shapes warms up, the second is recorded, and later ones replay it."""
    graphs = {}

    def run(*inputs):
        key = tuple(x.shape for x in inputs)
        if key not in graphs:
            graphs[key] = None
            return function(*inputs)
        if graphs[key] is None:
            held, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads
                graphs[key] = graph, held, function(*held)
        graph, held, output = graphs[key]
        for own, x in zip(held, inputs):
            own.copy_(x)
        graph.replay()
        return output.clone()
    return run

if __name__ == "__main__":
    raise SystemExit(main())
