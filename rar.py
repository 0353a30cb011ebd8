"""RAR in one file: Randomized Autoregressive Visual Generation (arXiv 2411.00776).

A picture is a grid of tokens (tokenizer.py). Train an ordinary causal transformer on them, with one
trick: with probability r a sample's tokens are put in a random order. r starts at 1 and is annealed
to 0, so the model ends as a raster-order generator that has learned context from all sides.

    r = 1 ----------------.
                            ' .
        0                       '---------
          0 %            50 %  75 %   100 % of training

    python rar.py train                  on built-in shapes, in minutes, without a GPU
    python rar.py train --data imagenet  on photographs: a folder with a folder for each class
    python rar.py sample                 pictures of the newest run
    python rar.py eval                   its bits per token on held-out pictures

A slot is a place in the sequence, a cell one in the picture. In a random order the tokens so far do
not tell which cell is next, so each slot is told where the token is that it has to predict: by a
second position embedding, the target-aware one. For a picture of 2x2 cells [[0, 1], [2, 3]] in the
order o = [2, 0, 3, 1], where x_c is the token of cell c:

    slot                          0        1        2        3        4
    holds                        cls     class     x_2      x_0      x_3     (x_1 is never read)
    row of pos_embed              0        1       2 + 2    2 + 0    2 + 3   (2 + its cell)
    row of target_aware_...       -       2 + 2    2 + 0    2 + 3    2 + 1   (2 + the next cell)
    row of timesteps_...          0        1        2        3        4      (the slot)
    predicts                      -       x_2      x_0      x_3      x_1

The class enters twice: in slot 1, and in every slot by adaLN (adaptive LayerNorm): a linear layer
of each block makes of class + slot embedding a shift and a scale of what attention and MLP read,
and a gate, the factor on what they add. Shapes: B samples, T cells, S slots in one call (T + 1 in
training), V different tokens, D channels, H heads. Contents:

    Configuration    Config, whose fields are the flags, and PRESETS
    The idea         randomness (r), sample_orders, scan_order
    The model        RAR.run_slots makes the sequence above; Block and Attention; training_loss
    Sampling         all_slots, newest_slot (what runs for a token), draw_slots (the loop), generate
    Training         learning_rate, draw_batch (an update's randomness), train_step, train
    Command line     train, sample, eval, bench
    The fast path    tabled_slots, recorded_on_cuda: remove it, and all still works
"""

import contextlib
import dataclasses
import math
import sys
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import tokenizer as tok  # pictures <-> tokens, and all about files, flags and processes
from tokenizer import UserError, knob

# ---- Configuration -------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Config:
    """All that a run depends on. A knob(default, meaning, least=0, most=1e9) is a flag of its name.
    Defaults are RAR-B's (Tables 1, 4, 6), but train begins with a preset: --model, or by --data."""
    # The data, from which num_classes and class_names follow
    data: str = knob("shapes", "shapes, drawn on the spot; a folder of class folders; or a .jsonl")
    num_classes: int = 1000
    class_names: tuple = ()
    image_size: int = knob(256, "pixels a side", 1, 4096)
    crops: str = knob("ten", "of a photograph: ten, flip or center")
    tokenizer: str = knob("patch", "patch, fitted to the data; released, fetched; or a file")
    grid_size: int = knob(16, "cells a side: a picture is T = grid_size^2 tokens", 1, 64)
    codebook_size: int = knob(1024, "V, the number of different tokens", 1, 65536)
    # The network
    width: int = knob(768, "D, channels of a token", 1, 2**14)
    depth: int = knob(24, "transformer blocks", 1, 2**10)
    heads: int = knob(16, "attention heads, which share the width", 1, 2**10)
    mlp_width: int = knob(3072, "hidden channels of each block's MLP", 1, 2**16)
    dropout: float = knob(0.1, "against overfitting in 400 epochs; a short run needs none", 0, 0.99)
    init: str = knob("", "weights file to start from in place of random weights")
    # The method
    # r falls from 1 to 0 between these fractions: 0 0 is never random, 1 1 always
    anneal: tuple = knob((0.5, 0.75), "fractions of training where r leaves 1, arrives at 0", 0, 1)
    order: str = knob("raster", "scan once r is 0; a wrong name lists all; or, in sample, random")
    target_aware: bool = knob(True, "tell each token which cell is next; for the ablation")
    label_dropout: float = knob(0.1, "share trained without class: guidance asks for both", 0, 1)
    # The optimisation
    steps: int = knob(250_000, "updates; 250,000 of batch 2048 are the paper's 400 epochs", 1)
    batch: int = knob(2048, "samples of an update, over all processes", 1, 1e6)
    micro_batch: int = knob(64, "samples in memory at once; an update adds up their gradients", 1)
    recompute: bool = knob(False, "compute activations twice instead of keeping them in memory")
    compile: bool = knob(False, "fuse element-wise work by torch.compile, for GPUs")
    lr: float = knob(4e-4, "AdamW's learning rate after the warm-up", 0, 1)
    min_lr: float = knob(1e-5, "learning rate at the end of its cosine", 0, 1)
    warmup: float = knob(0.25, "fraction of training in which the learning rate rises", 0, 1)
    weight_decay: float = knob(0.03, "of matrices, by the rule in make_optimizer", 0, 1)
    betas: tuple = knob((0.9, 0.96), "AdamW's averaging of gradients and their squares", 0, 0.9999)
    clip: float = knob(1.0, "the norm to which a larger gradient is shortened", 1e-6)
    seed: int = knob(0, "of all randomness: weights, batches, orders, pictures", 0, 2**63 - 1)
    log_every: int = knob(100, "updates between two lines of the log", 1)
    save_every: int = knob(5000, "updates between checkpoints; held-out loss, preview too", 1)
    keep_every: int = knob(0, "keep each checkpoint of so many updates, beside the last two")
    # Sampling
    scale: float = knob(16.0, "guidance at the end of a picture; 0 or 1 is none", 0, 1e6)
    power: float = knob(2.75, "how late guidance sets in; 0 is the same guidance throughout")
    temperature: float = knob(1.0, "of the softmax; 0 takes the likeliest token")

    def __post_init__(self):
        tok.check_knobs(self)
        if self.width % self.heads:
            raise UserError(f"--heads {self.heads} does not divide --width {self.width}")
        if self.min_lr > self.lr:
            raise UserError(f"--min-lr {self.min_lr} is above --lr {self.lr}")
        if self.anneal[0] > self.anneal[1]:
            raise UserError("--anneal {} {} ends before it starts".format(*self.anneal))

PRESETS = {
    "tiny": Config(  # for the built-in shapes: two minutes on two cores
        width=128, depth=4, heads=8, mlp_width=512, dropout=0.0, image_size=32, grid_size=8,
        codebook_size=192, num_classes=10, label_dropout=0.2, steps=1500, batch=16, lr=4e-3,
        warmup=0.05, log_every=20, save_every=500, scale=1.65, power=0.0, temperature=0.8),
    "small": Config(  # for photographs without a GPU
        width=192, depth=6, heads=12, mlp_width=768, dropout=0.0, image_size=64, steps=500,
        batch=8, lr=3e-3, warmup=0.05, log_every=20, save_every=250, scale=2.0, power=1.0),
    # micro-batches are meant for 80 GB in bfloat16
    "RAR-S": Config(depth=12, micro_batch=128),  # no sampling settings are published: those of B
    "RAR-B": Config(),
    "RAR-L": Config(width=1024, mlp_width=4096, scale=15.5, power=2.5, temperature=1.02),
    "RAR-XL": Config(width=1280, depth=32, mlp_width=5120, micro_batch=32,
                     scale=6.9, power=1.5, temperature=1.02),
    "RAR-XXL": Config(width=1408, depth=40, mlp_width=6144, micro_batch=16,
                      scale=8.0, power=1.2, temperature=1.02),
}

# ---- The idea: orders, and how often they are random ---------------------------------------------

def randomness(step, start, end):
    """r, with which probability each sample of an update is put in a random order (Section 3.2).
    r = 1 before start, then (end - step) / (end - start) until end, then 0. In the paper start is
    125,000, end 187,500. Another curve must be exactly 1 before start, and allow start == end."""
    if step < start:
        return 1.0
    return (end - step) / (end - start) if step < end else 0.0

def sample_orders(batch, length, r, order=None, rng=None):
    """Orders (B, T), each of its own: a random permutation with probability r, else `order` (T,).
    orders[b, i] is the cell that comes i-th in sample b. None is raster order."""
    rng = np.random.default_rng() if rng is None else rng
    order = np.arange(length) if order is None else np.asarray(order)
    is_random = rng.random((batch, 1)) < r
    permutations = rng.random((batch, length)).argsort(axis=1)
    return torch.from_numpy(np.where(is_random, permutations, order))

def scan_order(name, grid_size):
    """The cells (T,) as one of the scans of Fig. 6 visits them; cell = row * grid_size + column."""
    cell, half = np.arange(grid_size**2), (grid_size + 1) // 2
    row, column = np.divmod(cell, grid_size)
    spiral, rest = [], cell.reshape(grid_size, grid_size).T
    while rest.size:  # go down the left side, take it away, turn the rest
        spiral, rest = [*spiral, *rest[0]], np.rot90(rest[1:])
    z_rank = sum((column >> b & 1) << 2 * b | (row >> b & 1) << 2 * b + 1 for b in range(8))
    quarter, within = 2 * (row // half) + column // half, half * (row % half) + column % half
    orders = {  # a new entry is a new --order; argsort turns ranks (when a cell comes) into orders
        "raster": cell,
        "spiral_in": np.array(spiral),
        "spiral_out": np.array(spiral[::-1]),
        "z_curve": z_rank.argsort(),
        "subsample": (4 * within + quarter).argsort(),
        "alternate": np.where(row % 2, cell - column + grid_size - 1 - column, cell),
    }
    if name not in orders:
        raise UserError(f"--order {name}: choose from {', '.join(orders)}; in sampling also random")
    return torch.from_numpy(orders[name])

# ---- The model: a causal transformer with adaLN; parameters are named as the authors' ------------

def modulate(x, shift, scale):  # all (B, S, D)
    return x * (1 + scale) + shift

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.q_norm = nn.LayerNorm(config.width // config.heads, eps=1e-6)
        self.k_norm = nn.LayerNorm(config.width // config.heads, eps=1e-6)
        self.proj = nn.Linear(config.width, config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, start, cache):  # (B, S, D), slot of x[:, 0], (2, B, H, T + 1, D/H) or None
        B, S, D = x.shape
        qkv = self.qkv(x).view(B, S, 3, self.heads, D // self.heads)  # (B, S, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                          # 3 x (B, H, S, D/H)
        q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            cache[0, :, :, start:start + S], cache[1, :, :, start:start + S] = k, v
            k, v = cache[:, :, :, :start + S]                         # 2 x (B, H, start + S, D/H)
        # A slot sees itself and those before it. After a cache comes one slot alone: it sees all.
        assert start == 0 or S == 1
        x = F.scaled_dot_product_attention(
            q, k, v, is_causal=start == 0, dropout_p=self.drop.p if self.training else 0.0)
        return self.drop(self.proj(x.transpose(1, 2).reshape(B, S, D)))

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(config.width, config.mlp_width), gelu=nn.GELU(),
            drop1=nn.Dropout(config.dropout),
            fc2=nn.Linear(config.mlp_width, config.width), drop2=nn.Dropout(config.dropout)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(self, x, condition, start, cache, modulation=None):
        """x (B, S, D) to the same, under condition (B, S, D); or under its modulation (B, S, 6D),
        where that is known already (see tabled_slots)."""
        modulation = self.adaLN_modulation(condition) if modulation is None else modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)  # each (B, S, D)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), start, cache)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))

class RAR(nn.Module):
    """p(x | class) = prod_i p(x_o[i] | x_o[0], ..., x_o[i-1], class), for any order o of the cells.
    Rows of `embeddings`: 0 .. V-1 the tokens, V an unused mask, V+1+c class c, and
    V+1+num_classes "no class"."""

    def __init__(self, config):
        super().__init__()
        D, T, self.config = config.width, config.grid_size**2, config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.embeddings = nn.Embedding(config.codebook_size + config.num_classes + 2, D)
        # as long as the authors' tables; only the first T + 2 rows are used
        self.pos_embed = nn.Parameter(torch.zeros(1, T + 1024, D))
        self.target_aware_pos_embed = nn.Parameter(torch.zeros(1, T + 1024, D))
        self.timesteps_embeddings = nn.Parameter(torch.zeros(1, T + 100, D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.adaln_before_head = nn.ModuleDict(
            {"adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))})
        self.lm_head = nn.Linear(D, config.codebook_size)
        std = 0.02 * max(1.0, math.sqrt(768 / D))  # narrow models learn far too slowly with 0.02
        for table in (self.pos_embed, self.target_aware_pos_embed, self.timesteps_embeddings):
            nn.init.trunc_normal_(table, std=std)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for module in [*self.blocks, self.adaln_before_head]:  # with gates of 0 blocks add nothing
            nn.init.zeros_(module.adaLN_modulation[1].weight)

    def forward(self, tokens, labels, orders):
        """Teacher forcing: logits (B, T, V), of which [b, i] predicts tokens[b, orders[b, i]].
        tokens (B, T) in cell order; labels (B,) in 0 .. num_classes, the last meaning no class;
        orders (B, T), the cell that comes i-th."""
        prefix = tokens.gather(1, orders)[:, :-1]  # the last token predicts nothing
        return self.run_slots(prefix, labels, orders)[:, 1:]

    def run_slots(self, prefix, labels, orders, start=0, cache=None):
        """Logits (B, S, V) of slots start.. of [cls, class, x_o[0], ..., x_o[n-1]]. Slot i + 2
        holds x_o[i], slot i + 1 predicts it. prefix (B, n): these x_o, in full whatever start is.
        What enters the blocks: in slot i + 2 embedding + pos_embed[2 + o[i]] +
        target_aware_...[2 + o[i + 1]]; in slot 1 the rows are 1 and 2 + o[0]. Only slots from
        start on pass through: cache (see empty_cache) keeps keys and values of those before."""
        B, stop = len(prefix), prefix.shape[1] + 2
        class_id = self.config.codebook_size + 1 + labels                      # (B,)
        held = self.embeddings(torch.cat([class_id[:, None], prefix], dim=1))  # (B, stop - 1, D)
        x = torch.cat([self.cls_token.expand(B, 1, -1), held], dim=1)          # (B, stop, D)
        # The row of slot s in the position tables: 0 cls, 1 class, 2 + c the token of cell c. What
        # a slot has to predict is what the next one holds, so its target is position[:, s + 1].
        position = torch.arange(2, device=orders.device).expand(B, 2)
        position = torch.cat([position, 2 + orders], dim=1)                    # (B, T + 2)
        if self.config.target_aware:
            target = F.embedding(position[:, 2:stop + 1], self.target_aware_pos_embed[0])
            x = x + F.pad(target, (0, 0, 1, 0))                                # cls has no target
        x = x + F.embedding(position[:, :stop], self.pos_embed[0])
        x = x[:, start:]                                                       # (B, S, D)
        # Trap: "timesteps" are slots, 0 for cls: neither cells nor, as in diffusion, noise levels.
        condition = self.embeddings(class_id)[:, None] + self.timesteps_embeddings[:, start:stop]
        for i, block in enumerate(self.blocks):
            arguments = x, condition, start, None if cache is None else cache[i]
            if self.config.recompute and self.training:
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return self.head(x, self.adaln_before_head.adaLN_modulation(condition))

    def head(self, x, modulation):
        """Logits (B, S, V) of x (B, S, D), modulated by (B, S, 2D)."""
        scale, shift = modulation.chunk(2, -1)  # Trap: here scale comes before shift.
        x = modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale)
        with torch.autocast(x.device.type, enabled=False):  # guidance would amplify rounding
            return self.lm_head(x.float())

    def empty_cache(self, batch):
        """Room for the keys and values of all blocks and slots: (depth, 2, B, H, T + 1, D/H)."""
        c, device = self.config, self.cls_token.device
        shape = (c.depth, 2, batch, c.heads, c.grid_size**2 + 1, c.width // c.heads)
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else torch.float32
        return torch.empty(shape, dtype=dtype, device=device)

def training_loss(model, tokens, labels, orders):
    """-log p(x_o[i] | x_o[0], ..., x_o[i-1], class) in nats, and whether the likeliest token is the
    right one, averaged over samples and slots. Arguments as in RAR.forward."""
    logits = model(tokens, labels, orders)  # (B, T, V)
    targets = tokens.gather(1, orders)      # (B, T), in slot order as the logits are
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return loss, (logits.argmax(-1) == targets).float().mean()

# ---- Sampling ------------------------------------------------------------------------------------

SAMPLING = ("order", "scale", "power", "temperature", "seed")  # knobs that decide a picture

def guidance_weight(step, steps, scale, power):
    """Classifier-free guidance: a token is drawn from u + g (c - u), c being the logits given the
    class, u those without it. g > 1 exaggerates what the class changes: pictures are more typical
    of it and vary less. g = 1 + (scale - 1) (1 - cos(pi (t/T)^power)) / 2 for token t = step of
    T = steps: 1, which is c alone, at first, and nearly scale at last. Power 0: always scale."""
    return 1 + (scale - 1) * (1 - math.cos(math.pi * (step / steps) ** power)) / 2

def draw(logits, temperature, uniforms):
    """Draw from softmaxes by inverting their cumulative sums: logits (B, V), uniforms (B,) in
    [0, 1) -> (B,), the first token whose cumulative probability exceeds the uniform. Not
    torch.multinomial: the uniform belongs to its image, so no batch can change a picture. The
    uniform is scaled by the last sum, 1 but for rounding, so that there always is such a token, of
    probability above 0. Logits are guided already; one that is set to -inf is never drawn."""
    if temperature < 1e-30:
        return logits.argmax(-1)
    logits = logits - logits.amax(-1, keepdim=True)  # or a low temperature makes them infinite
    cumulative = torch.softmax(logits / temperature, -1).cumsum(-1)  # (B, V)
    return (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(-1)

def all_slots(model, classes, class_of, orders):
    """A predictor: a function from the tokens drawn so far (B, t), in slot order, to the logits
    (B, V) of the next; called T times. This one runs all t + 2 slots each time: slow, obvious, the
    test of the others. B counts sequences here, two an image with guidance: b is of class
    classes[class_of[b]], its order is orders[b]. classes (C,) are distinct, for tabled_slots."""
    return lambda drawn: model.run_slots(drawn, classes[class_of], orders)[:, -1]

def newest_slot(model, classes, class_of, orders):
    """The same with a cache: slot t + 1, which holds the newest token and predicts the next, is the
    only one that runs. At first these are slots 0 and 1."""
    labels, cache = classes[class_of], model.empty_cache(len(class_of))

    def next_logits(drawn):
        t = drawn.shape[1]
        return model.run_slots(drawn, labels, orders, t + 1 if t else 0, cache)[:, -1]
    return next_logits

def draw_slots(model, settings, classes, class_of, orders, uniforms, given):
    """The tokens (B, T) of B images, in slot order, drawn one after the other. nB sequences pass
    through the network: with guidance n = 2, all images with class, then all without; else n = 1.
    classes (C,), class_of (nB,): as above. given (B, T), in slot order: tokens that stay, or -1.
    settings: T weights of guidance, or () for none; temperature; a predictor; new SAMPLING knobs go
    here. They are a key of recorded_on_cuda, for which nothing here is random or read back."""
    weights, temperature, predict = settings
    (B, T), n = orders.shape, len(class_of) // len(orders)
    next_logits = predict(model, classes, class_of, orders.repeat(n, 1))
    drawn = torch.empty(B, 0, dtype=torch.long, device=orders.device)   # (B, t)
    for t in range(T):
        logits = next_logits(drawn.repeat(n, 1))                        # (nB, V)
        if weights:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + weights[t] * (conditional - unconditional)  # (B, V)
        token = draw(logits, temperature, uniforms[:, t])
        token = torch.where(given[:, t] >= 0, given[:, t], token)
        drawn = torch.cat([drawn, token[:, None]], dim=1)
    return drawn

predictor, recorded = newest_slot, lambda loop: loop  # replaced by the last lines of this file

@torch.no_grad()
def generate(model, labels, scale, power, temperature, *, uniforms=None, orders=None, known=None,
             predict=None, loop=draw_slots):
    """Tokens (B, T), in cell order, of pictures of classes labels (B,). scale 0 or 1: no guidance.
    uniforms (B, T) decide the draws slot by slot; by default they are random. orders (B, T) or
    (T,): the cell that comes i-th; by default raster. known (B, T), in cell order, holds given
    tokens or -1; given cells stand first in their order. predict is all_slots, newest_slot or
    tabled_slots, by default the fastest; loop is draw_slots, or recorded(draw_slots)."""
    B, T, device = len(labels), model.config.grid_size**2, labels.device
    orders = (torch.arange(T, device=device) if orders is None else orders).expand(B, T)
    uniforms = torch.rand(B, T, device=device) if uniforms is None else uniforms
    given = torch.full_like(orders, -1)                                 # (B, T), in slot order
    if known is not None:
        given = known.gather(1, orders)
        if ((given[:, 1:] >= 0) & (given[:, :-1] < 0)).any():
            raise ValueError("the cells that `known` gives must stand first in `orders`")
    weights = ()
    if scale not in (0, 1):  # every image is there twice, the second time without its class
        weights = tuple(guidance_weight(t, T, scale, power) for t in range(T))
        labels = torch.cat([labels, torch.full_like(labels, model.config.num_classes)])
    classes, class_of = labels.unique(return_inverse=True)              # (C,), (nB,)
    settings = weights, temperature, predict or predictor
    drawn = loop(model, settings, classes, class_of, orders, uniforms, given)
    return torch.empty_like(drawn).scatter_(1, orders, drawn)           # cell order again

def image_uniforms(seed, numbers, length):
    """Uniforms (B, length), a function of (seed, image number) alone; the first of them are the
    same whatever the length."""
    streams = [np.random.Generator(np.random.Philox(key=(seed, i))) for i in numbers]
    return torch.from_numpy(np.stack([s.random(length, dtype=np.float32) for s in streams]))

def image_orders(config, numbers, known=None):
    """Orders (B, T) of the images of these numbers: one scan for all, or "random", each its own.
    The cells of tokens that are known, (T,) or else -1, come first, otherwise as they were."""
    T = config.grid_size**2
    if config.order == "random":  # by the second T uniforms: the first decide the draws
        orders = image_uniforms(config.seed, numbers, 2 * T)[:, T:].argsort(dim=1, stable=True)
    else:
        orders = scan_order(config.order, config.grid_size).expand(len(numbers), T)
    if known is not None:
        orders = orders.gather(1, (known[orders] < 0).int().argsort(dim=1, stable=True))
    return orders

def sample_tokens(model, labels, config, autocast, numbers=None, known=None):
    """Yield, batch by batch, image numbers (B,) and their tokens (B, T), for `numbers` or for all.
    Image i is of class labels[i], by the sampling settings of config; it depends on these, the
    weights, the seed and i alone. known (T,) holds tokens that all images are given, or -1."""
    numbers = torch.arange(len(labels)) if numbers is None else torch.tensor(numbers).long()
    device, loop = model.cls_token.device, recorded(draw_slots)
    with tqdm(total=len(numbers), desc="sampling", unit=" pictures", leave=False) as bar:
        for part in numbers.split(config.micro_batch) if len(numbers) else ():
            orders = image_orders(config, part.tolist(), known)             # (B, T)
            uniforms = image_uniforms(config.seed, part.tolist(), orders.shape[1])
            kept = None if known is None else known.expand_as(orders).to(device)
            with autocast:
                tokens = generate(
                    model, labels[part].to(device), config.scale, config.power, config.temperature,
                    uniforms=uniforms.to(device), orders=orders.to(device), known=kept,
                    loop=loop)
            yield part, tokens
            bar.update(len(part))

# ---- Training ------------------------------------------------------------------------------------

def learning_rate(step, steps, warmup, peak, floor):
    """Linear from 0 to peak at step `warmup`, then half a cosine to floor at `steps`."""
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2

def make_optimizer(model, config):
    """AdamW that decays what the authors' does. Trap: the rule is case-sensitive, so it exempts
    adaln_before_head ("ln"), and decays blocks.*.adaLN_modulation, and cls_token too."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or "ln" in name or "embed" in name
        (others if plain else decayed).append(parameter)
    return torch.optim.AdamW([{"params": decayed, "weight_decay": config.weight_decay},
                              {"params": others, "weight_decay": 0.0}],
                             betas=config.betas, fused=True)

@lru_cache(maxsize=2)
def shuffled(count, seed, epoch):
    return np.random.default_rng((seed, epoch, 1)).permutation(count)  # 1: not the key of a step

def draw_batch(rows, config, step, rank=0, processes=1):
    """What process `rank` sees of update `step`, of rows (N, 1 + T), class first: tokens (b, T),
    labels (b,), orders (b, T) and dropout's seeds (b,) of its share b = B / processes; and r.

    The one rule of randomness: everything random about an update is a function of (seed, step, row
    of the global batch); dropout masks, of the micro-batch's first row. No generator's state
    outlives the update: a run resumes exactly, and processes can share a batch's rows."""
    epochs, index = np.divmod(step * config.batch + np.arange(config.batch), len(rows))
    for epoch in np.unique(epochs):  # every pass over the rows has its own permutation
        now = epochs == epoch
        index[now] = shuffled(len(rows), config.seed, int(epoch))[index[now]]
    r = randomness(step, config.anneal[0] * config.steps, config.anneal[1] * config.steps)
    order = scan_order(config.order, config.grid_size)
    rng = np.random.default_rng((config.seed, step))
    dropped = torch.from_numpy(rng.random(config.batch) < config.label_dropout)
    orders = sample_orders(config.batch, len(order), r, order, rng)
    seeds = rng.integers(2**63, size=config.batch)
    share = config.batch // processes
    mine = slice(rank * share, (rank + 1) * share)
    batch = torch.from_numpy(rows[index[mine]].astype(np.int64))  # (b, 1 + T): class, tokens
    labels = batch[:, 0].masked_fill(dropped[mine], config.num_classes)
    return batch[:, 1:], labels, orders[mine], seeds[mine], r

def train_step(network, optimizer, config, batch, step, autocast):
    """One update with the batch that draw_batch gave to this process. network is the model, wrapped
    if there are several processes. Returns what the log says; nothing is read back from the device
    here, which would make it idle."""
    tokens, labels, orders, seeds, r = batch
    device, means = next(network.parameters()).device, 0
    processes = config.batch // len(tokens)
    for first in range(0, len(tokens), config.micro_batch):
        last = first + config.micro_batch
        torch.manual_seed(int(seeds[first]))  # of the dropout masks
        inputs = [tok.send(x[first:last], device) for x in (tokens, labels, orders)]
        fraction = len(inputs[0]) / config.batch
        # Processes exchange gradients once an update, with the last micro-batch. DDP takes their
        # average: times `processes` it is the sum, which the shares of the batch make a mean.
        more_to_come = processes > 1 and last < len(tokens)
        with network.no_sync() if more_to_come else contextlib.nullcontext():
            with autocast:
                loss, accuracy = training_loss(network, *inputs)
            (loss * fraction * processes).backward()
        means = means + fraction * torch.stack([loss.detach(), accuracy])
    norm = nn.utils.clip_grad_norm_(network.parameters(), config.clip)
    lr = learning_rate(step, config.steps, config.warmup * config.steps, config.lr, config.min_lr)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    loss, accuracy = tok.sum_over_processes(means)
    return {"loss": loss, "accuracy": accuracy, "r": r, "lr": lr, "gradient_norm": norm}

@torch.no_grad()
def evaluate(model, rows, config, autocast):
    """Bits per token and accuracy over rows (N, 1 + T), in the final order and in random orders."""
    device, result = model.cls_token.device, {}
    rows = torch.from_numpy(rows.astype(np.int64))
    order = scan_order(config.order, config.grid_size)
    for name, r in (("final_order", 0), ("random_order", 1)):
        orders = sample_orders(len(rows), len(order), r, order, np.random.default_rng(0))
        sums = torch.zeros(2, device=device)
        for part in torch.arange(len(rows)).split(config.micro_batch):
            inputs = (x[part].to(device) for x in (rows[:, 1:], rows[:, 0], orders))
            with autocast:
                sums += len(part) * torch.stack(training_loss(model, *inputs))
        nats, accuracy = (sums / len(rows)).tolist()
        result |= {f"{name}_bits": nats / math.log(2), f"{name}_accuracy": accuracy}
    return result

def train(config, run, device, autocast):
    """Make the updates that the run still lacks; its weights, log and previews go to its folder.
    Under torchrun the processes share each batch, and rank 0 does all that is not an update."""
    torch.manual_seed(config.seed)
    model = RAR(config).to(device)
    optimizer = make_optimizer(model, config)
    first = run.load(model, optimizer)
    if config.init and first == 0:
        tok.init_weights(model, config.init)
    with tok.rank_zero_first():
        data = tok.open_data(config, run.folder, device, first == tok.RANK == 0 and run.hold)
    tok.check_same_on_all(config, data.train)
    network = model
    if tok.WORLD_SIZE > 1:
        network = DistributedDataParallel(model, gradient_as_bucket_view=True,
                                          find_unused_parameters=not config.target_aware)
    if config.compile:  # for the updates; what is rare is done by `model` itself
        network = torch.compile(network)
    labels = torch.arange(min(60, 5 * config.num_classes)) % config.num_classes  # of the previews
    with ThreadPoolExecutor(1) as ahead:  # draws the next batch during an update
        def load(step):
            return ahead.submit(draw_batch, data.train, config, step, tok.RANK, tok.WORLD_SIZE)

        upcoming = load(first)
        images = len(data.train) / tok.CROPS[config.crops]  # which make 10, 2 or 1 row
        for step in run.updates(first, images):  # ends early on Ctrl-C
            batch, upcoming = run.wait_for(upcoming), load(step + 1)
            line = train_step(network.train(), optimizer, config, batch, step, autocast)
            run.report(step, line,
                       lambda: evaluate(model.eval(), data.held_out, config, autocast))
            if run.milestone and tok.RANK == 0:
                drawn = [data.tokenizer.decode(tokens).cpu()
                         for _, tokens in sample_tokens(model.eval(), labels, config, autocast)]
                preview = torch.cat([data.examples, *drawn])                # (N, 3, H, W)
                tok.save_grid(run.folder / f"step-{step + 1:06}.png", preview, config.class_names)
            if run.milestone or run.stopped:
                run.save(step, model, optimizer)
    run.say_what_next()

# ---- Command line --------------------------------------------------------------------------------

def train_command(args, knobs, device, autocast):
    names, model, recipe, why = tok.recipe(knobs.get("data", "shapes"))
    model = args.model or model
    config = dataclasses.replace(
        PRESETS[model], num_classes=len(names), class_names=names, **(recipe | knobs))
    print(f"{config.data} ({why}): --model {model}, {config.image_size} pixels, --tokenizer "
          f"{config.tokenizer}, --crops {config.crops}")
    scan_order(config.order, config.grid_size)  # refuses a wrong name before anything is written
    folder = args.out or f"runs/{tok.title(config.data)}-{model}"
    train(config, tok.Run(folder, config), device, autocast)

def on_device(model, device):
    """The model there, to sample from."""
    if device.type == "cpu":  # a matrix by columns is read a third faster for a handful of rows
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.T.contiguous().T
    return model.to(device)

def load_model(path, knobs, device):
    """The model of a weights file, checkpoint or run (None: the newest run), its config, and its
    folder. To weights without a config.json belong the settings of the preset of their size."""
    path = tok.find_weights(path)
    state, sizes, updates = tok.read_weights(path)
    alike = [preset for preset in PRESETS.values()
             if (preset.width, preset.depth) == (sizes["width"], sizes["depth"])]
    config = tok.read_config(path.parent, [*alike, Config()][0])
    start, end = (fraction * config.steps for fraction in config.anneal)
    if updates and randomness(updates - 1, start, end) == 1:
        knobs = {"anneal": (1.0, 1.0)} | knobs  # r was 1 up to here: check_order allows any order
    config = dataclasses.replace(config, **sizes, **knobs)
    model = RAR(config)
    tok.load_strictly(model, state, path)
    return on_device(model, device).eval(), config, path.parent

def sample_command(args, knobs, device, autocast):
    model, config, folder = load_model(tok.chosen_weights(args), knobs, device)
    classes = tok.class_numbers(args.classes, config, folder)
    count = args.count or min(60, 5 * len(classes))
    labels = torch.tensor(classes)[torch.arange(count) % len(classes)]
    tokenizer = tok.tokenizer_of(config, folder).to(device)
    settings = {name: getattr(config, name) for name in SAMPLING} | {
        "classes": classes, "precision": args.precision,
        "weights": tok.digest_of(model), "tokenizer": tok.digest_of(tokenizer)}
    known = before = None
    if args.complete or args.keep:
        known, before = tok.known_tokens(args.complete, args.keep, tokenizer, device)
        settings["known"] = known.tolist()
    check_order(config, tok.read_config(folder, config).order, known)
    samples = tok.Samples(args.out, folder, count, tokenizer.image_size, settings, args.gif)
    for numbers, tokens in sample_tokens(model, labels, config, autocast, samples.missing, known):
        samples.put(numbers, tokenizer.decode(tokens))
    names = config.class_names or range(config.num_classes)
    names = [names[c] for c in (labels if args.complete else classes)]
    samples.finish(names, before, image_orders(config, range(count), known) if args.gif else None)
    source = args.model or args.weights or folder
    print(f"{samples.path}: {count:,} pictures by {source}, seed {config.seed}")

def check_order(config, trained, known):
    """Weights that ended in the order `trained` know others less well, as config.anneal tells. Say
    so, or refuse to complete a picture whose known tokens (T,) don't come first in that order."""
    order = image_orders(config, [0], known)[0]  # (T,)
    if config.anneal[0] == 1 or order.equal(scan_order(trained, config.grid_size)):
        return
    advice = (f"these weights ended in {trained} order; weights for any order are the checkpoint "
              "where annealing begins, and those of a run with --anneal 1 1")
    if known is not None:
        raise UserError(f"--keep: the cells that are kept don't come first: {advice}")
    print(f"--order {config.order}: {advice}")

def eval_command(args, knobs, device, autocast):
    model, config, folder = load_model(tok.chosen_weights(args), knobs, device)
    data = tok.open_data(config, folder, device)
    result = evaluate(model, data.held_out, config, autocast)
    print(f"{folder}, {len(data.held_out):,} pictures: {tok.held_out_text(config, result)}")

def timed(function, device):
    """Seconds of a call, the median of three after one to warm up."""
    seconds = []
    for _ in tqdm(range(4), "timing", leave=False):
        begin = time.perf_counter()
        function()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds[1:])[1]

def bench_command(args, knobs, device, autocast):
    B = args.batch
    c = dataclasses.replace(PRESETS[args.model], batch=B, micro_batch=B, **knobs)
    model, T, D = on_device(RAR(c), device), c.grid_size**2, c.width
    patches = tok.PatchTokenizer(c.grid_size, c.image_size // c.grid_size, c.codebook_size)
    tokenizer = (tok.MaskGITVQGAN() if c.image_size == 256 else patches).to(device)
    labels, tokens = torch.arange(B) % c.num_classes, torch.randint(c.codebook_size, (B, T))
    rows = torch.cat([labels[:, None], tokens], 1).numpy().astype(np.uint16)
    labels, tokens, loop = labels.to(device), tokens.to(device), recorded(draw_slots)
    dtype = torch.bfloat16 if args.precision == "bfloat16" else torch.float32
    n = 1024 if device.type == "cpu" else 8192
    matrix = torch.randn(n, n, device=device, dtype=dtype)
    source, copy = torch.zeros(2, n * 2**16, device=device)

    def sample():
        with autocast:
            generate(model.eval(), labels, 4.0, 1.0, 1.0, loop=loop)

    flops = 2 * n**3 / timed(lambda: matrix @ matrix, device)               # FLOP/s
    bandwidth = 2 * source.nbytes / timed(lambda: copy.copy_(source), device)   # bytes/s
    sampling = timed(sample, device)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    pixels = timed(lambda: tokenizer.decode(tokens), device)
    model = RAR(c).to(device)
    network, optimizer = torch.compile(model, disable=not c.compile), make_optimizer(model, c)
    training = timed(lambda: train_step(network.train(), optimizer, c, draw_batch(rows, c, 0), 0,
                                        autocast), device)
    # The least that a token can take: weights read or multiplied, and the cache so far read. adaLN
    # has a row for each image and one for all that are without class.
    adaln = (6 * c.depth + 2) * D**2
    others = c.depth * (4 * D**2 + 2 * D * c.mlp_width) + D * c.codebook_size
    cache = 2 * c.depth * D * (T / 2) * 2 * B * dtype.itemsize
    bound = T * (max((adaln + others) * dtype.itemsize / bandwidth,
                     2 * (2 * B * others + (B + 1) * adaln) / flops) + cache / bandwidth)
    work = 6 * B * (T + 1) * (adaln + others + c.depth * (T + 1) * D)  # attention is causal: half
    result = {
        "model": args.model, "images": B, "device": tok.device_name(device),
        "precision": args.precision, "torch": torch.__version__,
        "sampling_tokens_per_second": B * T / sampling, "sampling_images_per_second": B / sampling,
        "share_of_bound": bound / sampling, "decoded_images_per_second": B / (sampling + pixels),
        "sampling_memory_gb": memory, "training_samples_per_second": B / training,
        "training_utilisation": work / training / flops, "measured_flop_per_second": flops,
        "measured_bytes_per_second": bandwidth}
    print(*(f"{name:28}{value:,.4g}" if isinstance(value, float) else f"{name:28}{value}"
            for name, value in result.items()), sep="\n")
    if args.json:
        tok.write_json(args.json, result)

def main(argv=None):
    """Run a command. Returns its exit code: 0, 2 for a user's mistake, 130 if interrupted."""
    parser = tok.Parser(prog="rar.py", description=__doc__.split("\n")[0])
    train = parser.command("train", train_command, "train a model [RAR-B's defaults]", Config,
                           precision="bfloat16")
    train.add_argument("--model", choices=PRESETS, help="preset of all flags [by the data]")
    train.add_argument("--out", help="folder to train in, or to go on in [runs/DATA-MODEL]")
    sample = parser.command("sample", sample_command, "draw pictures", Config,
                            (*SAMPLING, "micro_batch"))
    sample.set_defaults(seed=1, micro_batch=64)  # seed 0 would draw the previews again
    sample.add_argument("--classes", nargs="+", help="numbers or names, taken in turn [all]")
    sample.add_argument("--count", type=tok.whole_number(1, 10**7),
                        help="pictures [5 of each class]")
    sample.add_argument("--out", help="a .png for a grid, an .npz, or a folder with a / at its end "
                        "for a PNG each [a new grid in the folder of the run]")
    sample.add_argument("--gif", action="store_true", help="animate how the tokens arrive, too")
    sample.add_argument("--complete", metavar="PICTURE", help="draw what --keep does not keep")
    sample.add_argument("--keep", type=tok.rectangle, metavar="X0,Y0,X1,Y1",
                        help="pixels of the square that is cut from the picture's middle")
    evaluation = parser.command("eval", eval_command, "held-out bits per token and accuracy",
                                Config, ("data", "order", "micro_batch"))
    bench = parser.command("bench", bench_command, "time sampling and training on this machine",
                           Config, ("compile",), precision="bfloat16")
    bench.add_argument("--model", choices=PRESETS, default="RAR-B", help="preset [RAR-B]")
    bench.add_argument("--batch", type=tok.whole_number(1, 10**5), default=4, help="images [4]")
    bench.add_argument("--json", help="file to write the figures to, too")
    for command in (sample, evaluation):
        command.add_argument("--weights", help="weights file or run folder [the newest run]")
        command.add_argument("--pretrained", action="store_true",
                             help="the released weights of --model, which are fetched once")
        command.add_argument("--model", choices=tok.RELEASED_MODELS, help="for --pretrained")
    return parser.run(argv)

# ---- The fast path: without this section everything works as well --------------------------------

AHEAD = 32  # slots whose adaLN outputs are computed at once

def tabled_slots(model, classes, class_of, orders):
    """As newest_slot, but what does not depend on the tokens drawn is looked up. The two position
    embeddings become one table. adaLN's outputs follow from (class, slot) alone: they are computed
    for AHEAD slots at once, and for each class once. Those layers are a third of the weights, which
    a step would otherwise read again for every token. Up to rounding the tokens are the same."""
    class_embedding = model.embeddings(model.config.codebook_size + 1 + classes)[:, None]
    positions = F.embedding(2 + orders[:, :-1], model.pos_embed[0])  # (B, T - 1, D): slots 2 .. T
    if model.config.target_aware:
        positions = positions + F.embedding(2 + orders[:, 1:], model.target_aware_pos_embed[0])
    cache, tables = model.empty_cache(len(class_of)), []

    def next_logits(drawn):
        t = drawn.shape[1]
        if t == 0:
            return model.run_slots(drawn, classes[class_of], orders, 0, cache)[:, -1]
        k = (t - 1) % AHEAD  # where slot t + 1, which runs now, is in the tables
        if k == 0:
            condition = class_embedding + model.timesteps_embeddings[:, t + 1:t + 1 + AHEAD]
            tables.clear()  # not two sets of them at once
            tables.extend(layer.adaLN_modulation(condition)                    # (C, AHEAD, 6D|2D)
                          for layer in (*model.blocks, model.adaln_before_head))
        x = (model.embeddings(drawn[:, -1]) + positions[:, t - 1])[:, None]    # (B, 1, D)
        for block, table, own in zip(model.blocks, tables, cache):
            x = block(x, None, t + 1, own, table[class_of, k, None])           # its row: (B, 1, 6D)
        return model.head(x, tables[-1][class_of, k, None])[:, 0]              # (B, V)
    return next_logits

def recorded_on_cuda(loop):
    """draw_slots as one CUDA graph: a GPU runs these small kernels faster than Python can launch
    them. The first call for some shapes and settings just runs, which also warms up the libraries;
    the second records, and from then on the whole loop is one launch. Inputs and output of a graph
    stay where they were in memory, hence the copies. autocast must begin with each call: the copies
    of weights that it keeps would otherwise be from outside the graph."""
    called, graphs = set(), {}

    def run(model, settings, *inputs):
        key = model, settings, *(x.shape for x in inputs)
        if inputs[0].device.type != "cuda" or key not in called:
            called.add(key)
            return loop(model, settings, *inputs)
        if key not in graphs:
            buffers, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads
                graphs[key] = graph, buffers, loop(model, settings, *buffers)
        graph, buffers, drawn = graphs[key]
        for buffer, x in zip(buffers, inputs):
            buffer.copy_(x)
        graph.replay()
        return drawn.clone()
    return run

predictor, recorded = tabled_slots, recorded_on_cuda

if __name__ == "__main__":
    sys.exit(main())
