"""RAR in one file: Randomized Autoregressive Visual Generation (arXiv 2411.00776).

    python rar.py train              learns ten kinds of drawn shapes: 2 to 3 minutes on two CPU
                                     cores, then 0.63 bits per token of new ones (a guess: 7.6)
    python rar.py train --data DIR   learns your photographs, DIR/CLASS/PICTURE
    python rar.py sample             draws new pictures with the newest run
    python rar.py eval               its bits per token on held-out pictures

A tokenizer (tokenizer.py) cuts a picture into a grid of cells and replaces each cell by a token:
the number of the codebook entry that is most like it. A transformer learns to predict the tokens
one by one, as a language model predicts words. New pictures are drawn from it token by token.

In which order? In raster order, row by row, a token is predicted only from what is above it and to
its left. In random orders it is predicted from any other cells, so the model learns how every cell
depends on every other. All orders share the same weights, so raster order profits from that. RAR
maximises, on average over pictures x and orders o, the sum over i of

    log p(x_o(i) | x_o(1), ..., x_o(i-1), class)

where o(i) is the cell that comes i-th, and x_c the token of cell c.

With probability r a picture's order is drawn from all T! orders, otherwise it is raster. r = 1 is
the objective of permutation language models such as XLNet. But T! orders are more than a model can
learn well, and drawing needs only one. So r is 1 for half of the training, falls to 0 in the third
quarter, and stays there: the model ends on the order in which it will draw. In the paper the FID of
RAR-L, a distance to real pictures, is 3.08 if trained in raster order, 3.01 in random orders, and
2.18 annealed.

Random orders need one more thing: the model must be told which cell is asked for. After cells 2
and 0, the order [2, 0, 3, 1] asks for cell 3, and the order [2, 0, 1, 3] for cell 1. So far the
model sees the same in both, so it could only give both the same answer. A second position
embedding, the target-aware one, tells it the next cell. In a fixed order the next cell follows from
the present one, so after annealing both embeddings could be merged into one (not done here).

A slot is a place in the sequence. Below are the cells [[0, 1], [2, 3]] in the order [2, 0, 3, 1].
The sequence begins with a start token, cls, and the class. These two are never permuted, because
every token is to be predicted from the class. adaLN, which tells each block class and slot, comes
in section 2.

    slot                          0        1        2        3        4
    holds                        cls     class     x_2      x_0      x_3     (x_1 is last: no input)
    row of pos_embed              0        1     2 + [2]  2 + [0]  2 + [3]   (offset 2 + own cell)
    row of target_aware_...       -     2 + [2]  2 + [0]  2 + [3]  2 + [1]   (offset 2 + next cell)
    row of timesteps_...          0        1        2        3        4      (the slot, for adaLN)
    predicts                      -       x_2      x_0      x_3      x_1

Part I is RAR: orders, model, sampling, training. Part II is both loops, fast. Part III is the
program around them.

Shapes: B samples, T cells, S slots (T + 1, or 1 with a cache), V tokens, D channels, H heads.
"""

import math
import os
from functools import lru_cache

# For OpenMP, or else threads that spin while they wait make a busy CPU 30 times as slow.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# ---- Part I: RAR

# ---- 1. Orders: random at first, then less and less

def randomness(step, start, end):
    """r in update `step`: 1 before `start`, 0 from `end` on, a line between (paper, 3.2)."""
    if step < start:
        return 1.0
    if step >= end:
        return 0.0
    return (end - step) / (end - start)

def sample_orders(batch, length, r, order=None, rng=None):
    """Orders (B, T): [b, i] is the cell that comes i-th in sample b. Each row is random with
    probability r, else it is `order` (T,), by default raster."""
    rng = rng or np.random.default_rng()
    order = np.arange(length) if order is None else np.asarray(order)
    is_random = rng.random((batch, 1)) < r
    # What sorts random numbers is a random permutation.
    permutations = rng.random((batch, length)).argsort(axis=1)
    return torch.from_numpy(np.where(is_random, permutations, order))

# ---- 2. The model: a causal transformer. Parameters are named as in the released weights

def causal(q, k, v, dropout):
    """Attention of each slot to itself and the slots before it. All (B, H, S, D/H)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)

class Attention(nn.Module):
    """Multi-head attention. Queries and keys are normalised, which keeps large models stable."""

    def __init__(self, config):
        super().__init__()
        D, head_width = config.width, config.width // config.heads
        self.heads = config.heads
        self.qkv = nn.Linear(D, 3 * D)
        self.q_norm = nn.LayerNorm(head_width, eps=1e-6)
        self.k_norm = nn.LayerNorm(head_width, eps=1e-6)
        self.proj = nn.Linear(D, D)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, attend):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, S, 3, H, D/H)
        q, k, v = qkv.unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, S, D/H)

        x = attend(q, k, v, self.dropout.p if self.training else 0.0)
        x = x.transpose(1, 2).flatten(2)  # (B, S, D)
        return self.dropout(self.proj(x))

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.dropout(F.gelu(self.fc1(x)))
        return self.dropout(self.fc2(x))

class Block(nn.Module):
    """A transformer block with adaLN, as in DiT: a linear layer maps the sum of the embeddings of
    class and slot to six vectors, the modulation. They shift and scale what enters attention and
    MLP, and gate what leaves them. So each block is told class and slot directly, not through the
    sequence only. Unlike DiT's, the norms have weights of their own, as in the released models."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.mlp = MLP(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x, modulation, attend=causal):
        """(B, S, D) -> (B, S, D). The modulation (B, S, 6D) and the function that attends are
        arguments, because the cache of section 6 passes its own."""
        (shift_attn, scale_attn, gate_attn,
         shift_mlp, scale_mlp, gate_mlp) = modulation.chunk(6, dim=-1)  # (B, S, D) each
        x = x + gate_attn * self.attn(self.norm1(x) * (1 + scale_attn) + shift_attn, attend)
        x = x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)
        return x

class RAR(nn.Module):
    """p(picture | class), token by token, with the sizes of a Config (section 8)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, T = config.width, config.grid_size**2

        # cls comes from ViT. Nothing is predicted in its slot, but the released models have it.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        # Rows for V tokens, then one that is unused, the classes, and "no class".
        self.embeddings = nn.Embedding(config.codebook_size + config.num_classes + 2, D)
        # The released tables are longer than needed. Rows 0 to T + 1 of pos_embed are used, 2 to
        # T + 1 of the target-aware one, 0 to T of timesteps.
        self.pos_embed = nn.Parameter(torch.zeros(1, T + 1024, D))
        self.target_aware_pos_embed = nn.Parameter(torch.zeros(1, T + 1024, D))
        self.timesteps_embeddings = nn.Parameter(torch.zeros(1, T + 100, D))

        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))
        self.adaln_before_head = nn.ModuleDict({"adaLN_modulation": modulation})
        self.lm_head = nn.Linear(D, config.codebook_size)

        # The authors' 0.02 suits 768 channels and more. Narrower models learn slowly with it.
        std = 0.02 * max(1.0, math.sqrt(768 / D))
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and name != "cls_token":
                nn.init.trunc_normal_(parameter, std=std)
            # adaLN starts at 0. Its gates are closed then, so at first a block passes x on.
            if "adaLN_modulation" in name or name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens, labels, orders):
        """Logits (B, T, V), of which [b, i] predicts tokens[b, orders[b, i]].
        tokens (B, T) in cell order; labels (B,), num_classes meaning "no class"; orders (B, T)."""
        in_order = tokens.gather(1, orders)
        x = torch.cat([self.prompt(labels), self.embeddings(in_order[:, :-1])], dim=1)
        x = x + self.position_embeddings(orders)  # (B, T + 1, D)

        condition = self.class_and_slot(labels, 0, x.shape[1])
        for block in self.blocks:
            x = block(x, block.adaLN_modulation(condition))
        logits = self.head(x, self.adaln_before_head.adaLN_modulation(condition))
        return logits[:, 1:]  # Slot 1 predicts the first token.

    def prompt(self, labels):
        """What the first two slots hold, cls and class: (B, 2, D)."""
        cls = self.cls_token.expand(len(labels), 1, -1)
        classes = self.embeddings(self.config.codebook_size + 1 + labels)
        return torch.cat([cls, classes[:, None]], dim=1)

    def position_embeddings(self, orders):
        """Where the token of each slot lies, plus where the next one lies: (B, T + 1, D)."""
        rows = 2 + orders
        first_two = self.pos_embed[:, :2].expand(len(orders), -1, -1)
        own = F.embedding(rows[:, :-1], self.pos_embed[0])
        embeddings = torch.cat([first_two, own], dim=1)
        if self.config.target_aware:
            # Slot 1, the class, already asks for a cell: the first one of the order.
            embeddings[:, 1:] += F.embedding(rows, self.target_aware_pos_embed[0])
        return embeddings

    def class_and_slot(self, labels, start, stop):
        """What adaLN is told in slots start .. stop - 1: (B, stop - start, D)."""
        classes = self.embeddings(self.config.codebook_size + 1 + labels)
        # Trap: "timesteps" are slots, not steps in time.
        return classes[:, None] + self.timesteps_embeddings[:, start:stop]

    def head(self, x, modulation):
        """Logits (B, S, V) of x (B, S, D), under a modulation (B, S, 2D)."""
        scale, shift = modulation.chunk(2, dim=-1)  # Trap: here scale comes before shift.
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)  # without weights, as in DiT
        return self.lm_head(x * (1 + scale) + shift)

def training_loss(model, tokens, labels, orders):
    """The mean cross entropy in nats, and the fraction of tokens predicted right.

    The loss begins near ln V, that of a guess among V tokens. It ends near 6 for the released
    models, because textures can't be predicted, and near 0.44 (0.63 bits) for the drawn shapes."""
    logits = model(tokens, labels, orders)  # (B, T, V)
    targets = tokens.gather(1, orders)  # (B, T)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return loss, (logits.argmax(-1) == targets).float().mean()

# ---- 3. Sampling, slowly. Tests compare part II with this loop and with that of section 4

def guidance_weight(step, steps, scale, power):
    """The weight g of classifier-free guidance for token `step` of `steps` (paper, 4.1). Tokens
    are drawn from u + g (c - u), with logits c given the class and u without it. With g above 1,
    what the class makes likelier becomes likelier still: pictures get more typical, less varied. g
    goes from 1 to `scale`. A larger power delays it; with power 0 it is `scale` throughout."""
    return 1 + (scale - 1) * (1 - math.cos(math.pi * (step / steps) ** power)) / 2

def draw(logits, temperature, uniforms):
    """Draw tokens (B,) from softmax(logits (B, V) / temperature): the first whose cumulative
    probability exceeds uniforms (B,), random numbers from 0 to 1, one for each picture."""
    if temperature < 1e-30:
        return logits.argmax(-1)
    # Without their maximum, logits stay finite when a small temperature divides them.
    logits = logits - logits.amax(-1, keepdim=True)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    cumulative = probabilities.cumsum(-1)
    # By rounding the last sum may be below 1, and a uniform above it would give no token.
    return (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(-1)

@torch.no_grad()
def generate_slowly(model, labels, scale, power, temperature, uniforms, orders):
    """Draw tokens (B, T), in cell order, for labels (B,). orders[b, i] is the cell of draw i of
    picture b, and uniforms[b, i] decides the draw. (First model.eval(), or dropout disturbs.)"""
    no_class = torch.full_like(labels, model.config.num_classes)
    tokens = torch.zeros_like(orders)
    for t in range(orders.shape[1]):
        # Attention is causal, so the tokens that are not drawn yet, 0, change nothing.
        logits = model(tokens, labels, orders)[:, t]  # (B, V)

        # 0 and 1 switch guidance off. (By the formula 0 would end at u, without the class. As in
        # the authors' code, it does not.)
        if scale not in (0, 1):
            g = guidance_weight(t, orders.shape[1], scale, power)
            unconditional = model(tokens, no_class, orders)[:, t]
            logits = unconditional + g * (logits - unconditional)

        token = draw(logits, temperature, uniforms[:, t])
        tokens.scatter_(1, orders[:, t:t + 1], token[:, None])
    return tokens

# ---- 4. Training, plainly

def learning_rate(step, steps, warmup, peak, floor):
    """A line from 0 to `peak` at update `warmup`, then half a cosine to `floor` at `steps`. (So
    the very first update changes nothing, as in the authors' code.)"""
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2

def make_optimizer(model, config):
    """AdamW, with weight decay where the authors have it: matrices of blocks, lm_head, cls."""
    decayed = dict(params=[], weight_decay=config.weight_decay)
    others = dict(params=[], weight_decay=0.0)
    for name, parameter in model.named_parameters():
        # Trap: case counts. adaln_before_head is spared by its "ln", blocks.*.adaLN_... is not.
        is_spared = parameter.ndim < 2 or "ln" in name or "embed" in name
        group = others if is_spared else decayed
        group["params"].append(parameter)
    return torch.optim.AdamW([decayed, others], betas=config.betas, fused=True)

@lru_cache(maxsize=2)  # A batch may lie in two epochs, and 12.8 million rows take 0.7 s.
def shuffled(count, seed, epoch):
    """Numbers of rows (count,) in the order of an epoch, each of which has an order of its own."""
    # The 1 keeps these numbers apart from those of update `epoch`, whose key is (seed, step).
    return np.random.default_rng((seed, epoch, 1)).permutation(count)

def whole_batch(rows, config, step, rng):
    """Tokens (B, T) and labels (B,) of update `step`, of rows (N, 1 + T) that hold a class and
    tokens in cell order. It is a function of seed and step, so a run can stop and go on."""
    B, N = config.batch, len(rows)
    # Sample i of the endless stream lies in epoch i // N.
    index = [shuffled(N, config.seed, i // N)[i % N] for i in range(step * B, (step + 1) * B)]
    batch = torch.from_numpy(rows[index].astype(np.int64))  # (B, 1 + T)
    labels, tokens = batch[:, 0], batch[:, 1:]

    # Guidance needs predictions without class, too, so some samples are shown without theirs.
    labels[rng.random(B) < config.label_dropout] = config.num_classes
    return tokens, labels

def update(model, optimizer, config, step):
    """Make update `step` from the gradients. Returns their norm and the learning rate."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    # config has the warm-up, like the annealing, as a fraction of all updates.
    lr = learning_rate(step, config.steps, config.warmup * config.steps, config.lr, config.min_lr)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return norm, lr

def train_plainly(model, rows, config, order=None):
    """Train on rows (N, 1 + T), first in random orders and in the end in `order` (T,), by default
    raster. `step` counts from 0, but the log of part II from 1."""
    optimizer = make_optimizer(model, config)
    start, end = config.anneal[0] * config.steps, config.anneal[1] * config.steps
    for step in tqdm(range(config.steps), "training"):
        rng = np.random.default_rng((config.seed, step))
        tokens, labels = whole_batch(rows, config, step, rng)
        r = randomness(step, start, end)
        orders = sample_orders(*tokens.shape, r, order, rng)

        loss, _ = training_loss(model, tokens, labels, orders)
        loss.backward()
        update(model, optimizer, config, step)
        optimizer.zero_grad()


# You have read RAR. What follows makes it fast and safe.
# ---- Part II: the two loops, fast

import json
from pathlib import Path

import torch.distributed as dist

from tokenizer import CROPS, UserError, replacing, save_grid

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# ---- 5. Scan orders: the paper's five besides raster

ORDERS = ("raster", "alternate", "spiral_in", "spiral_out", "subsample", "z_curve")

def scan_order(name, grid_size):
    """The cells (T,) as a scan of Fig. 6 visits them. The pictures number the cells so.

      alternate       spiral_in       subsample        z_curve
     0  1  2  3      0 11 10  9      0  4  1  5      0  1  4  5
     7  6  5  4      1 12 15  8      8 12  9 13      2  3  6  7
     8  9 10 11      2 13 14  7      2  6  3  7      8  9 12 13
    15 14 13 12      3  4  5  6     10 14 11 15     10 11 14 15
    """
    N, half = grid_size, (grid_size + 1) // 2
    row, column = np.divmod(np.arange(N * N), N)
    # A spiral goes through rings. In each, row + column grows up to the lower right corner, and
    # falls on the way back, above the diagonal. (4 N is more than any sum.)
    ring = np.minimum.reduce([row, column, N - 1 - row, N - 1 - column])
    along = np.where(row < column, 4 * N - row - column, row + column)

    # Cells are sorted by these keys. Trap: the last one counts most.
    keys = {
        "raster": (column, row),
        "alternate": (column * (-1)**row, row),
        "spiral_in": (along, ring),
        "spiral_out": (-along, -ring),
        # The first cells of all quarters, then the second ones
        "subsample": (column // half, row // half, column % half, row % half),
        # Binary digits of column and row in turn: quarter by quarter, and so on within each
        "z_curve": [digits >> i & 1 for i in range(8) for digits in (column, row)],
    }
    return torch.from_numpy(np.lexsort(keys[name]))

# ---- 6. Sampling with a cache: the same tokens, but each slot runs once

class Cache:
    """Keys and values of one block, (2, B, H, S, D/H), for all slots that have run."""

    def __init__(self, slots):
        self.slots, self.filled = slots, 0

    def attend(self, q, k, v, dropout):
        """Attention of the next slot to itself and to those before. All (B, H, 1, D/H)."""
        if self.filled == 0:
            # In v's type: autocast makes v bfloat16, but k's norm gives float32.
            self.kept = v.new_empty(2, *v.shape[:2], self.slots, v.shape[3])
        self.kept[0, :, :, self.filled] = k[:, :, 0]
        self.kept[1, :, :, self.filled] = v[:, :, 0]
        self.filled += 1

        # The slot sees all before, so there is no mask. For one query on a GPU, two matrix products
        # take at most half of the time of PyTorch's attention.
        keys, values = self.kept[:, :, :, :self.filled]
        scores = (q * q.shape[-1]**-0.5) @ keys.mT  # (B, H, 1, slots)
        return scores.softmax(-1) @ values

AHEAD = 32  # slots whose modulations are made together, for the reason given in generate

@torch.no_grad()
def generate(model, labels, scale, power, temperature, *, uniforms=None, orders=None, known=None):
    """As generate_slowly, but with a cache. By default uniforms are random and orders raster.
    known (B, T), in cell order, holds given tokens, or -1. They should come first in an order,
    or the draws before them do not see them."""
    B, T, device = len(labels), model.config.grid_size**2, labels.device
    if uniforms is None:
        uniforms = torch.rand(B, T, device=device)
    if orders is None:
        orders = torch.arange(T, device=device).expand(B, T)
    tokens = torch.full((B, T), -1, device=device)
    if known is not None:
        tokens.copy_(known)

    # With guidance a picture is two sequences: first come all with their class, then all without.
    # adaLN's tables have a row for each picture, and a last one for "no class".
    copies = 1 if scale in (0, 1) else 2
    classes = F.pad(labels, (0, 1), value=model.config.num_classes)  # (B + 1,)
    table_row = torch.arange(copies * B, device=device).clamp(max=B)  # 0 .. B - 1, then B only

    # What enters the blocks, but for the tokens, which are not drawn yet
    inputs = model.position_embeddings(orders).repeat(copies, 1, 1)  # (copies * B, T + 1, D)
    inputs[:, :2] += model.prompt(classes[table_row])
    caches = [Cache(T + 1) for _ in model.blocks]
    for slot in range(T + 1):
        # adaLN is a third of all weights and needs class and slot only, so it runs ahead: its
        # weights are read 32 times less often. (All 256 slots would take too much memory.)
        if slot % AHEAD == 0:
            tables = None  # or memory would hold the old ones and the new
            condition = model.class_and_slot(classes, slot, slot + AHEAD)  # (B + 1, 32, D)
            tables = [block.adaLN_modulation(condition) for block in model.blocks]
            head_table = model.adaln_before_head.adaLN_modulation(condition).float()

        x = inputs[:, slot, None]  # (copies * B, 1, D)
        if slot > 1:
            x = x + model.embeddings(token).repeat(copies, 1, 1)
        for block, table, cache in zip(model.blocks, tables, caches):
            modulation = table[table_row, slot % AHEAD, None]  # (copies * B, 1, 6D)
            x = block(x, modulation, cache.attend)
        if slot == 0:  # cls predicts nothing.
            continue

        # In float32 also under autocast, because guidance would amplify rounding.
        with torch.autocast(device.type, enabled=False):
            logits = model.head(x, head_table[table_row, slot % AHEAD, None])[:, 0]
        t = slot - 1
        if copies == 2:
            logits, unconditional = logits.chunk(2)  # (B, V) each
            g = guidance_weight(t, T, scale, power)
            logits = unconditional + g * (logits - unconditional)

        token = draw(logits, temperature, uniforms[:, t])[:, None]  # (B, 1)
        cell = orders[:, t, None]
        given = tokens.gather(1, cell)
        token = torch.where(given < 0, token, given)
        tokens.scatter_(1, cell, token)
    return tokens

def image_uniforms(seed, numbers, length):
    """Uniforms (B, length) that depend on the seed and the pictures' numbers only."""
    streams = [np.random.Generator(np.random.Philox(key=(seed, i))) for i in numbers]
    return torch.from_numpy(np.stack([s.random(length, dtype=np.float32) for s in streams]))

def image_orders(config, numbers, known=None):
    """The orders (B, T) of pictures. Cells whose token is known (T,) come first."""
    T = config.grid_size**2
    if config.order == "random":
        # The first T uniforms of a picture decide its draws. The next T are its cells' turns: the
        # smaller one's turn, the earlier the cell comes.
        turns = image_uniforms(config.seed, numbers, 2 * T)[:, T:]
    else:
        turns = scan_order(config.order, config.grid_size).argsort().expand(len(numbers), T)
    if known is not None:
        turns = turns - T * (known >= 0)  # before all others
    return turns.argsort(dim=1, stable=True)

def autocast(config):
    """The context in which matrix products are in bfloat16, if the settings say so."""
    return torch.autocast(DEVICE.type, torch.bfloat16, config.precision == "bfloat16")

def sample_tokens(model, labels, config, numbers=None, known=None):
    """Yield numbers and tokens (B, T) of pictures, batch by batch. Up to rounding, picture i
    depends on labels[i], weights, settings and i only. known (T,) holds given tokens, or -1."""
    B = config.micro_batch
    if numbers is None:
        numbers = list(range(len(labels)))
    given = None if known is None else known.to(DEVICE)

    def draw_all(labels, uniforms, orders):
        with autocast(config):
            return generate(model, labels, config.scale, config.power, config.temperature,
                            uniforms=uniforms, orders=orders, known=given)

    for start in tqdm(range(0, len(numbers), B), "sampling", leave=False):
        batch = numbers[start:start + B]
        uniforms = image_uniforms(config.seed, batch, config.grid_size**2)
        orders = image_orders(config, batch, known)
        inputs = [x.to(DEVICE) for x in (labels[batch], uniforms, orders)]
        if DEVICE.type == "cuda" and start == 0 and len(numbers) > B:
            draw_all = recorded(draw_all, *inputs)
        yield batch, draw_all(*inputs)

def recorded(function, *inputs):
    """The function as a CUDA graph, because a GPU runs small kernels faster than Python starts
    them. It keeps these inputs' size: fewer rows are filled up with those of the call before."""
    function(*inputs)  # In a first call libraries prepare themselves, which can't be recorded.
    graph = torch.cuda.CUDAGraph()
    # thread_local, because NCCL's threads may use the GPU meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = function(*inputs)

    def replay(*others):
        rows = len(others[0])
        for x, other in zip(inputs, others):
            x[:rows] = other
        graph.replay()
        return output[:rows].clone()
    return replay

# ---- 7. Training that can be continued, on any number of GPUs

# torchrun starts a process for each GPU and tells it its number, its rank.
TOLD = os.environ if dist.is_torchelastic_launched() else {}
RANK, WORLD_SIZE = int(TOLD.get("RANK", 0)), int(TOLD.get("WORLD_SIZE", 1))

def draw_batch(rows, config, step, rank=0, processes=1):
    """The share of process `rank` in update `step`: tokens, labels, orders, and r."""
    rng = np.random.default_rng((config.seed, step))
    tokens, labels = whole_batch(rows, config, step, rng)
    r = randomness(step, config.anneal[0] * config.steps, config.anneal[1] * config.steps)
    orders = sample_orders(*tokens.shape, r, scan_order(config.order, config.grid_size), rng)
    mine = slice(rank, None, processes)
    return tokens[mine], labels[mine], orders[mine], r

def micro_batches(batch, config):
    """Tokens, labels and orders on the device, in parts that fit into its memory."""
    if DEVICE.type == "cuda":  # From pinned memory they are copied while Python goes on.
        batch = [x.contiguous().pin_memory() for x in batch]
    batch = [x.to(DEVICE, non_blocking=True) for x in batch]
    return zip(*[x.split(config.micro_batch) for x in batch])

def train_step(model, optimizer, config, batch, step):
    """Make update `step` of tokens, labels and orders. Returns loss, accuracy, gradient norm and
    learning rate. They are not read, so nothing waits for the GPU."""
    sums = 0
    for inputs in micro_batches(batch, config):
        with autocast(config):
            loss, accuracy = training_loss(model, *inputs)
        # Over all micro-batches and processes these fractions of the batch add up to 1.
        fraction = len(inputs[0]) / config.batch
        (loss * fraction).backward()
        sums += fraction * torch.stack([loss.detach(), accuracy])

    # The processes began with the same weights. With the same gradients they stay the same.
    for parameter in model.parameters():
        if parameter.grad is not None:
            sum_over_processes(parameter.grad)
    norm, lr = update(model, optimizer, config, step)
    optimizer.zero_grad()
    return *sum_over_processes(sums), norm, lr

@torch.no_grad()
def evaluate(model, rows, config):
    """Bits per token on rows (N, 1 + T), in the final and in random orders."""
    order = scan_order(config.order, config.grid_size)
    rows = torch.from_numpy(rows.astype(np.int64))
    labels, tokens = rows[:, 0], rows[:, 1:]
    bits = {}
    for name, r in (("final_order_bits", 0), ("random_order_bits", 1)):
        # For all rows at once, because orders must not depend on the micro-batch.
        orders = sample_orders(*tokens.shape, r, order, np.random.default_rng(0))
        nats = 0
        for inputs in micro_batches([tokens, labels, orders], config):
            with autocast(config):
                # Not model(...), which torch.compile would compile again for these sizes.
                loss, _ = training_loss(model.forward, *inputs)
            nats += loss.item() * len(inputs[0])
        bits[name] = nats / len(rows) / math.log(2)
    return bits

def in_words(config, bits):
    return (f"held-out {bits['final_order_bits']:.3f} bits/token in {config.order} order, "
            f"{bits['random_order_bits']:.3f} in random order")

def train(config, folder, tokenizer, rows, held_out):
    """Make the updates that the run in `folder` still lacks."""
    torch.manual_seed(config.seed)
    model = RAR(config).to(DEVICE)
    optimizer = make_optimizer(model, config)
    done, log = load_checkpoint(folder, model, optimizer)
    if config.init and not done:
        load_init(model, config)
    if config.compile and DEVICE.type == "cuda":
        model.compile()  # in place, so parameters keep their names

    # r begins to fall after `annealing` updates. Milestones have a preview and a checkpoint, and
    # the updates in `logged` a line of the log.
    annealing = math.ceil(config.anneal[0] * config.steps)
    milestones = {annealing, config.steps, *range(0, config.steps, config.save_every)}
    logged = {1, *milestones, *range(0, config.steps, config.log_every)}
    bar = tqdm(range(done, config.steps), "training", config.steps, initial=done)
    with bar, noting_signals() as signals:
        for step in bar:
            *batch, r = draw_batch(rows, config, step, RANK, WORLD_SIZE)

            # Dropout depends on update and process only, so a run that goes on has the same.
            torch.manual_seed(hash((config.seed, step, RANK)))
            model.train()
            results = train_step(model, optimizer, config, batch, step)

            done = step + 1
            stop = in_any_process(signals)
            if done not in logged and not stop:
                continue
            # Only from here on does Python wait for the GPU.
            loss, accuracy, norm, lr = map(float, results)
            if not math.isfinite(loss + norm):
                raise UserError(f"update {done}: loss or gradient is not finite: lower --lr")
            passes = done * config.batch * CROPS[config.crops] / len(rows)
            bar.set_postfix(loss=loss, r=r, passes=passes)

            if RANK == 0:
                line = dict(step=done, loss=loss, accuracy=accuracy, r=r, lr=lr,
                            gradient_norm=norm, passes=passes)
                if done in milestones:
                    line |= evaluate(model.eval(), held_out, config)
                    bar.write(f"update {done}: {in_words(config, line)}")
                    save_preview(folder, done, model, tokenizer, config)
                if done in logged:  # A stop has no line: the log ends as if there had been none.
                    log.append(line)
                    write_text(folder / "log.jsonl", "\n".join(map(json.dumps, log)) + "\n")
                if done in milestones or stop:
                    save_checkpoint(folder, done, model, optimizer, log, annealing)
            if stop:
                wait_for_all()  # or else torchrun might end rank 0 while it saves
                raise KeyboardInterrupt

def save_preview(folder, done, model, tokenizer, config):
    labels = torch.arange(min(60, 5 * config.num_classes)) % config.num_classes
    batches = sample_tokens(model, labels, config)
    images = torch.cat([tokenizer.decode(tokens).cpu() for _, tokens in batches])
    names = config.class_names or range(config.num_classes)
    save_grid(folder / f"step-{done:06}.png", images, names)

def checkpoints(folder):
    """Files of checkpoints, sorted by the number of updates, so the newest is last."""
    return sorted(folder.glob("checkpoint-[0-9]*.pt"))

def load_checkpoint(folder, model, optimizer):
    """Go back to the newest checkpoint. Returns the number of its updates, and their log."""
    if not checkpoints(folder):
        return 0, []
    newest = checkpoints(folder)[-1]
    state = read_tensors(newest)
    with reading(newest):  # refuses those of earlier editions, which have no log
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["updates"], state["log"]

def save_checkpoint(folder, done, model, optimizer, log, annealing):
    """Keep the last two, and the one where annealing starts: its model knows every order."""
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    state = dict(updates=done, model=weights, optimizer=optimizer.state_dict(), log=log)
    write_tensors(folder / "weights.pt", weights)
    write_tensors(folder / f"checkpoint-{done:07}.pt", state)
    for path in checkpoints(folder)[:-2]:
        if path.name != f"checkpoint-{annealing:07}.pt":
            path.unlink()

# What follows holds nothing of the method: it is the program around the two loops.
# ---- Part III: the program

import argparse
import datetime
import inspect
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

from PIL import Image
from torch.utils.mkldnn import to_mkldnn

from tokenizer import (
    SHAPES, PatchTokenizer, class_folders, draw_shapes, encode_shards, fetch, fingerprint,
    import_jsonl, join_shards, known_tokens, labelled_pictures, load, read_crops,
    released_tokenizer, to_float, to_uint8)

# ---- 8. Settings

@dataclass
class Config:
    """The settings of a run, by default RAR-B's (Tables 1, 4, 6). What has a comment is a flag of
    `train`, and the comment is its help."""
    num_classes: int = 1000
    class_names: tuple = ()
    model: str = "RAR-B"  # preset of the others
    data: str = "shapes"  # shapes, a folder of class folders, or a .jsonl of tokens
    image_size: int = 256  # pixels a side, if the tokenizer is patch
    crops: str = "ten"  # of photographs: ten, flip (two) or center
    photographs: int = 10**9  # at most so many, evenly from all classes
    tokenizer: str = "released"  # released, patch (fitted to the data), or a file; not with --init
    grid_size: int = 16  # cells a side
    codebook_size: int = 1024  # different tokens
    width: int = 768  # channels
    depth: int = 24  # blocks
    heads: int = 16  # of attention
    mlp_width: int = 3072  # hidden channels
    dropout: float = 0.1  # fraction of activations
    init: str = ""  # weights to start from: a run, or RAR-B with --model RAR-B
    anneal: tuple = (0.5, 0.75)  # fractions of training between which r falls to 0
    target_aware: bool = True  # tell slots which cell comes next
    label_dropout: float = 0.1  # fraction of samples without class
    steps: int = 250_000  # updates
    batch: int = 2048  # samples of an update
    warmup: float = 0.25  # fraction of training in which lr rises
    weight_decay: float = 0.03  # of AdamW
    betas: tuple = (0.9, 0.96)  # of AdamW
    order: str = "raster"  # of cells
    seed: int = 0  # of all random numbers; for sample it is 1
    # A run that goes on may change what follows (MAY_CHANGE).
    lr: float = 4e-4  # learning rate after warm-up
    min_lr: float = 1e-5  # learning rate at the end
    clip: float = 1.0  # largest norm of gradients
    micro_batch: int = 64  # samples in memory at once
    precision: str = ""  # of matrix products; on a new GPU bfloat16 for train, else tf32
    compile: bool = True  # on a GPU, which takes a minute; not for tiny and small
    log_every: int = 100  # updates between lines of the log
    save_every: int = 5000  # updates between checkpoints
    scale: float = 16.0  # guidance at the last token; 0 and 1 are none
    power: float = 2.75  # how late guidance sets in; 0 is at once
    temperature: float = 1.0  # of draws; 0 takes the likeliest token

    def __post_init__(self):
        for name, value in vars(self).items():
            kind = type(getattr(Config, name))
            least = 1 if kind is int and name != "seed" else 0
            if kind in (int, float) and not value >= least:
                raise UserError(f"{name} = {value} is too small")
        if not 0 <= self.anneal[0] <= self.anneal[1] <= 1:
            raise UserError("--anneal wants two fractions of training, in order")
        if self.width % self.heads:
            raise UserError("--heads must divide --width")
        if self.tokenizer == "patch" and self.image_size % self.grid_size:
            raise UserError("--grid-size must divide --image-size")

# Each flag with its help, read off the lines above
HELP = dict(re.findall(r"    (\w+): .* = .*  # (.*)", inspect.getsource(Config)))
SAMPLING = ("order", "seed", "scale", "power", "temperature", "precision")
MAY_CHANGE = [*HELP][[*HELP].index("lr"):]

WITHOUT_GPU = dict(width=128, depth=4, heads=8, mlp_width=512, dropout=0.0, image_size=32,
                   grid_size=8, tokenizer="patch", warmup=0.05, log_every=20, compile=False)
PRESETS = {  # Their micro-batches fit into 80 GB. fit_micro_batch lowers them on smaller GPUs.
    "tiny": Config(**WITHOUT_GPU, crops="center", codebook_size=192, label_dropout=0.2, steps=1500,
                   batch=16, lr=4e-3, save_every=500, scale=1.65, power=0.0, temperature=0.8),
    "small": Config(**WITHOUT_GPU, crops="flip", photographs=60_000, codebook_size=2048,
                    anneal=(0.25, 0.5), steps=1400, batch=64, lr=3e-3, save_every=350,
                    # More than 32 MB are slow on a CPU, because glibc asks the system for them each
                    # time. Logits of 64 would be 34 MB.
                    micro_batch=16, scale=4.0, power=1.0, temperature=0.95),
    "RAR-S": Config(depth=12, steps=20_000, batch=256, micro_batch=128, save_every=1000),
    "RAR-B": Config(),
    "RAR-L": Config(width=1024, mlp_width=4096, scale=15.5, power=2.5, temperature=1.02),
    "RAR-XL": Config(width=1280, depth=32, mlp_width=5120, micro_batch=32,
                     scale=6.9, power=1.5, temperature=1.02),
    "RAR-XXL": Config(width=1408, depth=40, mlp_width=6144, micro_batch=16,
                      scale=8.0, power=1.2, temperature=1.02),
}

def read_config(folder):
    """The Config of a run, or None."""
    path = Path(folder, "config.json")
    if path.exists():
        with reading(path):
            return Config(**json.loads(path.read_text()))

def fit_micro_batch(config, given, parameter_bytes, activation_bytes):
    """Lower the preset's micro-batch to what fits into 85 % of the GPU's memory. The bytes, of a
    parameter and of a channel of a slot in a block, were measured."""
    if DEVICE.type == "cpu" or "micro_batch" in given:
        return
    memory = torch.cuda.get_device_properties(DEVICE).total_memory
    weights = parameter_bytes * 18 * config.depth * config.width**2  # in blocks
    sample = activation_bytes * config.depth * config.width * (config.grid_size**2 + 1)
    fits = max(1, int((0.85 * memory - weights) / sample))
    if fits < config.micro_batch:
        print(f"--micro-batch is {fits}, because the GPU has {memory / 1e9:.0f} GB")
        config.micro_batch = fits

# ---- 9. Data

SHAPES_TRAIN, SHAPES_HELD_OUT = 10_000, 500

def find_data(data):
    """Names of classes, and (class, path) pairs to train on and held out."""
    if data == "shapes":
        return [*SHAPES], [], []
    if not Path(data).exists():
        raise UserError(f"--data {data}: no such file or folder")
    if data.endswith(".jsonl"):
        return [], [], []
    return [folder.name for folder in class_folders(data)], *labelled_pictures(data)

def by_value(names):
    """Names of classes to be compared: class 007 is class 7."""
    return [str(int(name)) if name.isdecimal() else name for name in names]

def evenly(items, most):
    """At most so many items, evenly from all of them."""
    count = min(len(items), most)
    return [items[i * len(items) // count] for i in range(count)]

def make_tokenizer(config, pictures):
    """The tokenizer of a new run."""
    if config.init:  # Tokens must mean the same as for the weights to start from.
        return open_tokenizer(config, find_weights(config.init).parent)
    if config.tokenizer != "patch":
        return load(released_tokenizer() if config.tokenizer == "released" else config.tokenizer)
    if config.data == "shapes":
        images = draw_shapes(SHAPES_TRAIN)
    else:
        some = evenly(pictures, min(2000, 10**8 // (3 * config.image_size**2)))
        images = read_crops([path for _, path in some], config.image_size)
    return PatchTokenizer.fit(images, config.grid_size, config.codebook_size)

def open_tokenizer(config, folder):
    """The tokenizer of the weights in a folder: its own, or the released one."""
    path, sizes = folder / "tokenizer.pt", (config.grid_size, config.codebook_size)
    is_ours = path.exists() or read_config(folder)  # or else weights without a run
    tokenizer = load(path if is_ours else released_tokenizer()).to(DEVICE)
    if sizes != (tokenizer.grid_size, tokenizer.codebook_size):
        raise UserError(f"the tokenizer of {folder} has another --grid-size or --codebook-size")
    return tokenizer

def open_rows(config, pictures, held_out, tokenizer):
    """Rows to train on and held-out ones, uint16 (N, 1 + T): a class, then tokens in cell order."""
    if config.data == "shapes":
        images = draw_shapes(SHAPES_TRAIN + SHAPES_HELD_OUT)
        tokens = torch.cat([tokenizer.encode(part).cpu() for part in images.split(500)])
        rows = np.insert(tokens.numpy(), 0, np.arange(len(images)) % len(SHAPES), axis=1)
        return np.split(rows.astype(np.uint16), [SHAPES_TRAIN])

    source = Path(config.data).resolve()
    if source.suffix == ".jsonl":
        sizes = config.num_classes, config.grid_size**2, config.codebook_size
        key = fingerprint(tokenizer, sizes, source, source.stat().st_mtime_ns)
        paths = [Path(f"runs/tokens/{source.stem}-{key}-{part}.npy")
                 for part in ("train", "held-out")]
        if RANK == 0 and not all(path.exists() for path in paths):
            import_jsonl(source, *paths, *sizes)
        wait_for_all()
        return [np.load(path, mmap_mode="r") for path in paths]

    rows = []
    if pictures:  # eval has none, because it needs held-out rows only
        rows = encoded(pictures, tokenizer, config.crops, f"{source.name}-train")
    return rows, encoded(evenly(held_out, 500), tokenizer, "center", f"{source.name}-held-out")

def encoded(pictures, tokenizer, crops, name):
    """The rows of (class, path) pairs. Made once, by all processes together."""
    changed = [path.stat().st_mtime_ns for _, path in pictures]
    path = Path(f"runs/tokens/{name}-{fingerprint(tokenizer, crops, pictures, changed)}.npy")
    if in_any_process(not path.exists()):
        shards = path.with_suffix(".shards")
        encode_shards(pictures, tokenizer, crops, shards, RANK, WORLD_SIZE)
        wait_for_all()
        if RANK == 0 and not path.exists():  # Another program may have joined them meanwhile.
            # Again, in case that shards of the others are missing on this disk
            encode_shards(pictures, tokenizer, crops, shards)
            join_shards(shards, path)
        wait_for_all()
    return np.load(path, mmap_mode="r")

# ---- 10. Commands

def train_command(args, given):
    """Train a model."""
    folder, config, pictures, held_out = choose_config(args.out, given)
    print(f"{folder}: --model {config.model}, {config.num_classes} classes, "
          f"{config.steps:,} updates")
    if config.model == "small":
        print("on a GPU, fine-tuning RAR-B is better: see the README")
    if config.compile and DEVICE.type == "cuda":
        print("compiling takes a minute; --no-compile does without")
    if config.batch < WORLD_SIZE:
        raise UserError(f"--batch {config.batch} is less than the {WORLD_SIZE} processes")

    set_precision(config.precision)
    wait_for_all()  # All have looked into the folder.
    with lock(folder):
        if RANK == 0:
            write_text(folder / "config.json", json.dumps(vars(config), indent=1))
            if not checkpoints(folder):
                tokenizer = make_tokenizer(config, pictures)
                write_tensors(folder / "tokenizer.pt", tokenizer.state_dict())
        wait_for_all()
        tokenizer = open_tokenizer(config, folder)
        rows, held_out = open_rows(config, pictures, held_out, tokenizer)
        train(config, folder, tokenizer, rows, held_out)
    print(f"look at {folder}/step-{config.steps:06}.png\n"
          f"next: python rar.py sample --weights {folder}")

def choose_config(out, given):
    """The folder of a run, its Config, and its (class, path) pairs to train on and held out."""
    old = read_config(out) if out else None
    data = given.get("data", old.data if old else "shapes").rstrip("/")
    names, pictures, held_out = find_data(data)
    given |= dict(data=data, num_classes=len(names) or 1000, class_names=names)

    preset = "RAR-B"
    if data == "shapes":
        preset = "tiny"
    elif pictures and (DEVICE.type == "cpu" or len(names) < 1000):
        preset = "small"
    preset = given.get("model", preset)
    folder = Path(out or f"runs/{Path(data).resolve().name.removesuffix('.jsonl')}-{preset}")

    config = read_config(folder)
    if not config and any(path.suffix != ".part" for path in folder.glob("[!.]*")):
        raise UserError(f"{folder} holds other files: choose another --out")
    if not checkpoints(folder):
        config = new_config(preset, given, len(pictures))
        fit_micro_batch(config, given, 16, 80 if config.compile else 105)

    # A run that goes on is changed by the flags that are given, if they may.
    is_finished = Path(folder, f"checkpoint-{config.steps:07}.pt").exists()
    for name, value in given.items():
        before = getattr(config, name)
        if value != before:
            if is_finished or name not in MAY_CHANGE:
                raise UserError(f"{folder} has {name} = {str(before)[:60]}: choose another --out")
            print(f"{folder}: {name} was {before} and is {value} from now on")
    return folder, replace(config, **given), evenly(pictures, config.photographs), held_out

def new_config(preset, given, count):
    """A preset, changed as the data want it, and then as the user does."""
    chosen = dict(model=preset, precision=usual_precision("bfloat16"))
    if given["data"] == "shapes":
        chosen |= dict(image_size=32, grid_size=8, codebook_size=192, tokenizer="patch",
                       crops="center")
    count = min(count, given.get("photographs", count))
    if preset == "small" and 0 < count < 2000:  # seen so often that they'd be memorised
        chosen |= dict(codebook_size=min(2048, 4 * count), steps=min(1400, max(300, count)),
                       crops="ten", dropout=0.2, save_every=100)
    theirs = read_config(find_weights(given["init"]).parent) if "init" in given else None
    if theirs:
        sizes = "image_size grid_size codebook_size width depth heads mlp_width"
        chosen |= {name: getattr(theirs, name) for name in sizes.split()}
    return replace(PRESETS[preset], **(chosen | given))

def sample_command(args, given):
    """Draw pictures."""
    model, trained, folder = load_model(args.weights, {})
    usual = dict(micro_batch=64 if DEVICE.type == "cpu" else 128,
                 precision=usual_precision("tf32"))
    config = replace(trained, **(usual | given))
    fit_micro_batch(config, given, 4, 25)
    set_precision(config.precision)
    tokenizer = open_tokenizer(config, folder)
    size = tokenizer.image_size

    names = config.class_names or [str(i) for i in range(config.num_classes)]
    classes = args.classes or names
    for name in classes:
        if name not in names:
            raise UserError(f"--classes {name}: choose from {len(names)}: {', '.join(names[:20])}")
    count = min(60, 5 * len(classes)) if args.count is None else args.count
    if count < 1:
        raise UserError(f"--count {count}: ask for a picture or more")
    labels = torch.tensor([names.index(classes[i % len(classes)]) for i in range(count)])

    known = None
    if args.complete:
        known, _ = known_tokens(args.complete, args.keep or (0, 0, size, size // 2), tokenizer)
    elif args.keep:
        raise UserError("--keep is for --complete PICTURE")

    final = scan_order(trained.order, config.grid_size)
    if config.anneal[0] < 1 and not final.equal(image_orders(config, [0], known)[0]):
        print(f"weights annealed to {trained.order} order: for another one, take a checkpoint from "
              "before that")

    settings = {name: getattr(config, name) for name in SAMPLING} | dict(
        classes=classes, weights=fingerprint(model), known=args.complete and known.tolist())
    path = Path(args.out or folder / f"samples-{fingerprint(tokenizer, settings, count)}.png")
    if args.out and path.is_file():
        raise UserError(f"{path} is there already: choose another --out")
    if path.suffix not in (".png", ".npz", "") and not path.is_dir():
        raise UserError(f"--out {path}: name a .png for a grid, an .npz, or a folder")

    # Pictures are numbered PNGs at first, so that a stopped command can continue.
    store = Path(f"{path}.parts") if path.suffix in (".png", ".npz") else path
    if RANK == 0:
        note_settings(store, settings)
    wait_for_all()
    files = [store / f"{number:06}.png" for number in range(count)]
    missing = [number for number in range(count)[RANK::WORLD_SIZE] if not files[number].exists()]

    if config.precision == "bfloat16":
        to_bfloat16(model)
    elif DEVICE.type == "cpu" and torch.backends.mkldnn.is_available():
        to_mkldnn(model.blocks)  # in place, and faster for a few rows
    with ThreadPoolExecutor() as pool:
        for numbers, tokens in sample_tokens(model, labels, config, missing, known):
            pixels = to_uint8(tokenizer.decode(tokens))
            list(pool.map(save_png, [files[number] for number in numbers], pixels))
    wait_for_all()

    if RANK == 0 and path != store:
        put_together(path, files, size, classes)
        shutil.rmtree(store)
    print(f"{path}: {count:,} pictures, seed {config.seed}")

def put_together(path, files, size, names):
    """Write the pictures of a store as one grid or .npz, which the ending of `path` decides."""
    pixels = np.empty((len(files), size, size, 3), np.uint8)
    for i, file in enumerate(tqdm(files, "reading", leave=False)):
        pixels[i] = Image.open(file)
    if path.suffix == ".png":
        save_grid(path, to_float(pixels), names)
    else:
        with replacing(path) as part, open(part, "wb") as file:
            np.savez(file, arr_0=pixels)

def to_bfloat16(model):
    """Store what autocast would cast in every batch."""
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear):
            layer.to(torch.bfloat16)

def note_settings(folder, settings):
    """Note how the PNGs in a folder are made, so that no others get there."""
    path, text = folder / "settings.json", json.dumps(settings)
    noted = path.read_text() if path.exists() else ""
    if noted != text and any(each.suffix != ".part" for each in folder.glob("[!.]*")):
        raise UserError(f"{folder} holds other files, or pictures of other settings: choose "
                        "another --out")
    write_text(path, text)

def save_png(path, pixels):
    with replacing(path) as part:
        Image.fromarray(pixels).save(part, "PNG", compress_level=1)

def eval_command(args, given):
    """Bits per token on held-out pictures."""
    model, config, folder = load_model(
        args.weights, dict(precision=usual_precision("tf32")) | given)
    set_precision(config.precision)
    names, _, held_out = find_data(config.data)
    ours, theirs = by_value(names), by_value(config.class_names or names)
    if names and (sorted(ours) != sorted(theirs) or len(ours) != config.num_classes):
        others = ", ".join(sorted({*ours} ^ {*theirs})[:10])
        raise UserError(f"--data {config.data} has {len(ours)} classes, the model "
                        f"{config.num_classes}; not in both: {others}")
    held_out = [(theirs.index(ours[number]), path) for number, path in held_out]
    tokenizer = open_tokenizer(config, folder)
    _, rows = open_rows(config, [], held_out, tokenizer)
    print(f"{folder}: {in_words(config, evaluate(model, rows, config))}")

def load_model(path, given, device=None):
    """The model at a path, its Config and folder. Sizes are read off the weights, other settings
    are given, or in the config.json beside them, or in the preset of that width."""
    path = find_weights(path)
    checkpoint = read_tensors(path)
    state = checkpoint.get("model", checkpoint)
    with reading(path):
        (rows, D), V = state["embeddings.weight"].shape, len(state["lm_head.bias"])
        sizes = dict(
            width=D, codebook_size=V, num_classes=rows - V - 2,
            depth=sum(name.endswith(".attn.qkv.bias") for name in state),
            heads=D // len(state["blocks.0.attn.q_norm.bias"]),
            mlp_width=len(state["blocks.0.mlp.fc1.bias"]),
            grid_size=math.isqrt(state["pos_embed"].shape[1] - 1024))
        presets = {preset.width: preset for preset in PRESETS.values()}
        config = read_config(path.parent) or presets.get(D, Config())
        if 0 < checkpoint.get("updates", 0) <= math.ceil(config.anneal[0] * config.steps):
            given = {"anneal": (1.0, 1.0)} | given  # Not annealed yet, so it knows every order.
        config = replace(config, **sizes | given)

        with torch.device("meta"):  # no memory, because weights are assigned below
            model = RAR(config)
        model.load_state_dict(state, assign=True)
    return model.to(device or DEVICE, torch.float32).eval(), config, path.parent

RELEASED_MODELS = {  # file and SHA-256
    "RAR-B": ("rar_b.bin", "cbbf4b27dc36afae77fdb2fe0d6b9b5b7446eae45f1a9f91d442ab0b315b9ebf"),
    "RAR-L": ("rar_l.bin", "edad8e9905e20a5df14eeee0d5d04c1be48b16a7751b4b3f4954a6dec8ad87d5"),
    "RAR-XL": ("rar_xl.bin", "7b4cec5c76f18dc7a3ea055a6b0cc4c5748c533768eed71564a88d897c762bc8"),
    "RAR-XXL": ("rar_xxl.bin", "85aba44fef7aecfd879829077e541f09da4c29da3b1fd374837601d7322bf6ff"),
}

def find_weights(path):
    """The weights file of a path, run or released model. None is the newest run."""
    if path in RELEASED_MODELS:
        path = fetch("yucornetto/RAR", *RELEASED_MODELS[path])
        released_tokenizer()
        return path
    runs = Path("runs").glob("*/weights.pt")
    path = Path(path or max(runs, key=os.path.getmtime, default="runs/*/weights.pt"))
    path = path / "weights.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no weights file {path}: make one with python rar.py train, or name "
                        "RAR-B .. RAR-XXL")
    return path

def load_init(model, config):
    """Start from the weights of --init. Classes that they lack begin as "no class"."""
    other, theirs, _ = load_model(config.init, {}, "cpu")
    state, first, no_class = other.state_dict(), config.codebook_size + 1, theirs.num_classes
    places = {name: place for place, name in enumerate(by_value(theirs.class_names))}
    classes = [places.get(name, no_class) for name in by_value(config.class_names)]
    if not (places and classes):  # Token files name no classes, so their places count.
        n = config.num_classes
        classes = range(n) if n == no_class else n * [no_class]
    with reading(config.init):
        rows = [*range(first), *[first + place for place in classes], -1]
        state["embeddings.weight"] = state["embeddings.weight"][rows]
        model.load_state_dict(state)

def run_command(argv):
    parser = argparse.ArgumentParser(prog="rar.py")
    commands = parser.add_subparsers(required=True)
    for name, function, settings in (
            ("train", train_command, HELP),
            ("eval", eval_command, ["data", "order", "precision", "micro_batch"]),
            ("sample", sample_command, [*SAMPLING, "micro_batch"])):
        command = commands.add_parser(name, help=function.__doc__)
        command.set_defaults(function=function)
        flag = command.add_argument

        orders = ORDERS + ("random",) * (name == "sample")
        choices = dict(model=PRESETS, crops=CROPS, order=orders,
                       precision=["float32", "tf32", "bfloat16"])
        for setting in settings:
            default = getattr(Config, setting)
            options = dict(type=type(default), choices=choices.get(setting))
            if type(default) is tuple:
                options = dict(type=float, nargs=2)
            if type(default) is bool:
                options = dict(action=argparse.BooleanOptionalAction)
            shown = f" [RAR-B: {default}]" if name == "train" and default != "" else ""
            flag("--" + setting.replace("_", "-"), help=HELP[setting] + shown, **options)
        if name == "train":
            flag("--out", help="folder of the run [runs/DATA-MODEL]")
        else:
            flag("--weights", help="file, run, or RAR-B .. RAR-XXL [the newest run]")

    # What is left is about sample, the last of them. Seed 0 would draw the preview again.
    command.set_defaults(seed=1)
    flag("--classes", nargs="+", help="names, or numbers of released models [all]")
    flag("--count", type=int, help="pictures [5 of each class]")
    flag("--out", help="X.png for a grid, X.npz, or X for a PNG each [a grid in the run]")
    flag("--complete", metavar="PICTURE", help="picture to complete")
    flag("--keep", type=int, nargs=4, metavar=("X0", "Y0", "X1", "Y1"),
         help="pixels of its central square that stay [the upper half]")
    args = parser.parse_args(argv)

    given = {name: value for name, value in vars(args).items()
             if name in HELP and value is not None}
    if DEVICE.type == "cuda":
        torch.cuda.set_device(int(TOLD.get("LOCAL_RANK", 0)))
    if WORLD_SIZE > 1:  # The others may wait for rank 0 for long.
        dist.init_process_group(timeout=datetime.timedelta(days=1))
    if RANK > 0:  # The first process speaks for all.
        sys.stdout = sys.stderr = open(os.devnull, "w")
    weights = given.get("init") or getattr(args, "weights", None)
    if RANK == 0 and weights in RELEASED_MODELS:
        find_weights(weights)  # or else all processes would download it
    wait_for_all()
    args.function(args, given)

def main(argv=None):
    """Run a command. Returns its exit code: 0, 2 for a mistake, or 130 for Ctrl-C. A process of
    torchrun ends here."""
    stderr = sys.stderr
    sys.stdout.reconfigure(errors="backslashreplace")  # or a name not in UTF-8 can't be printed
    try:
        run_command(argv)
        code = 0
    except KeyboardInterrupt:
        code, message = 130, "interrupted: run the same command to continue"
    except (UserError, OSError) as error:
        code, message = 2, f"error: {error}"
    except (MemoryError, RuntimeError) as error:
        if not re.search("MemoryError|(of|allocate) memory", repr(error)):
            raise
        code, message = 2, "error: out of memory: lower --micro-batch"
    finally:
        sys.stderr = stderr  # for tracebacks
    if code:
        time.sleep(2 * (RANK > 0))  # What all have to say, rank 0 says. Then torchrun ends us.
        print(message, file=stderr)
    if WORLD_SIZE > 1:
        # Trap: at the usual end of Python, 1 of 35 runs aborted in C++ ("terminate called").
        sys.stdout.flush()
        os._exit(code)
    return code

# ---- 11. Processes and files

def usual_precision(on_gpu):
    """`on_gpu`, but float32 on CPUs, and on older GPUs, which have no TF32 and emulate bfloat16."""
    is_new = DEVICE.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    return on_gpu if is_new else "float32"

def set_precision(precision):
    """Of matrix products in float32. (autocast makes them bfloat16.)"""
    if DEVICE.type == "cuda" and precision != usual_precision(precision):
        raise UserError(f"--precision {precision} needs a GPU of compute capability 8 or more")
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "float32"

def sum_over_processes(tensor):
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor

def in_any_process(flag):
    return sum_over_processes(torch.tensor(int(bool(flag)))).item() > 0

def wait_for_all():
    in_any_process(False)

@contextmanager
def noting_signals():
    """Yield a list that collects Ctrl-C, SIGTERM and SIGHUP. A second one of the same kind strikes
    at once. (One of another kind doesn't, because after Ctrl-C torchrun sends SIGTERM, too.)"""
    def note(number, frame):
        tqdm.write("stopping after this update", file=sys.stderr)
        noted.append(number)
        signal.signal(number, signal.default_int_handler)

    noted = []
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}
    before = {number: signal.signal(number, note) for number in numbers
              if signal.getsignal(number) is not signal.SIG_IGN}  # as it is under nohup
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def lock(folder):
    """A file in the folder of a run. While it is open, no other training run starts there."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / f".lock-{RANK}", "ab")
    try:
        import fcntl  # which Windows has not
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another training run: choose another --out")
    except (ImportError, OSError):
        pass  # Some file systems have no locks.
    return file

def write_text(path, text):
    with replacing(path) as part:
        part.write_text(text)

def write_tensors(path, tensors):
    with replacing(path) as part, open(part, "wb") as file:
        try:
            torch.save(tensors, file)
        except RuntimeError as error:  # It can hide the OSError of a full disk.
            raise error.__context__ or error

@contextmanager
def reading(path):
    """Make one line that names the file of any error, of which torch has many kinds."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit the model, or is damaged: {reason}")

def read_tensors(path):
    """The dictionary that torch.save wrote to a file. Nothing in it is executed."""
    with reading(path):
        return dict(torch.load(path, "cpu", weights_only=True, mmap=True))

if __name__ == "__main__":
    sys.exit(main())
