"""Measures a machine: does the fast path work there, how fast is it, how near the limit?

    python .github/measure.py --out DIR             all seven parts, at most ten minutes each
    python .github/measure.py --out DIR --tiny      all tiny: a minute on a CPU
    python .github/measure.py --out DIR --parts 4 5 --authors CLONE --pairs 5

The last one times bytedance/1d-tokenizer at 942a96f and ours in turn. Figures go to
DIR/figures.jsonl, medians to DIR/summary.txt. On a CPU all but tests and part 4 is tiny.
"""

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fid  # noqa: E402
import rar  # noqa: E402
import tokenizer as tok  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--parts", type=int, nargs="+", choices=range(1, 8), default=range(1, 8))
parser.add_argument("--tiny", action="store_true")
parser.add_argument("--authors")
parser.add_argument("--pairs", type=int, default=1)
parser.add_argument("--data")
parser.add_argument("--part", type=int, default=0)
ARGS = parser.parse_args()

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PRECISIONS = ["bfloat16", "tf32"] if CUDA else ["float32"]
SMALL = ARGS.tiny or not CUDA
FIGURES = ARGS.out.resolve() / "figures.jsonl"

def figure(name, value, unit=""):
    print(f"{ARGS.part}  {name:48} {value:.4g} {unit}", flush=True)
    with open(FIGURES, "a") as file:
        file.write(json.dumps([ARGS.part, name, value, unit]) + "\n")

def seconds(call):
    """The median of the last three of five calls, or of one call that a CPU is slow at."""
    found = []
    while len(found) < 5 and (CUDA or not found or found[0] < 2):
        begin = time.perf_counter()
        call()
        if CUDA:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return float(np.median(found[-3:]))

def autocast_of(precision):
    return tok.choose_device(DEVICE.type, precision)[2]

def equal(a, b):
    return (a == b).float().mean().item()

class Settings(dict):
    __getattr__ = dict.__getitem__

def build(name, batch=1, who="ours"):
    """A model, ours or the authors', and its Config."""
    gc.collect()
    if CUDA:
        torch.compiler.reset()
    classes = 10 if name == "tiny" else 1000
    sizes = dict(batch=batch, micro_batch=batch, num_classes=classes)
    config = dataclasses.replace(rar.PRESETS[name], **sizes)
    kind, sizes = rar.RAR, config
    if who == "theirs":
        sys.path.insert(0, ARGS.authors)
        from modeling.rar import RAR as kind
        generator = Settings(
            hidden_size=config.width, num_hidden_layers=config.depth, dropout=config.dropout,
            num_attention_heads=config.heads, intermediate_size=config.mlp_width,
            image_seq_len=config.grid_size**2, condition_num_classes=config.num_classes,
            attn_drop=config.dropout)
        codes = Settings(codebook_size=config.codebook_size)
        sizes = Settings(model=Settings(generator=generator, vq_model=codes))
    with DEVICE:
        model = kind(sizes).eval()
    for weight in [p for p in model.parameters() if p.ndim > 1]:
        torch.nn.init.kaiming_normal_(weight)  # gates of 0 would idle
    return model, config

# ---- 1. The fast path against the slow one, and the tests
def correctness():
    model, _ = build("tiny")
    inputs = torch.rand(8, 64).to(DEVICE), rar.sample_orders(8, 64, 0.5).to(DEVICE)
    settings = model, torch.arange(8, device=DEVICE), 3.0, 1.0, 0.9
    for precision in ["float32", "bfloat16"] if CUDA else ["float32"]:
        def draw(uniforms, orders):
            with autocast_of(precision):
                return rar.generate(*settings, uniforms=uniforms, orders=orders)

        fast = rar.recorded(draw) if CUDA else draw
        tokens = [fast(*inputs) for _ in range(3)][-1]  # the third is a replay
        with autocast_of(precision):
            same = equal(tokens, rar.generate_slowly(*settings, *inputs))
        figure(f"{precision}: equal tokens, fast and slow", same)
        assert same > 0.9 or precision == "bfloat16"  # which rounds
    tests = [sys.executable, "-m", "pytest", "-q", str(ROOT / "test_rar.py")]
    os.environ.pop("TQDM_DISABLE", None)
    os.execv(sys.executable, tests + ["-k", "test_logits"] * ARGS.tiny)

# ---- 2. The second batch is recorded, later ones replay it
def recording():
    name, batch = ("tiny", 4) if SMALL else ("RAR-B", 128)
    for precision in PRECISIONS:
        model, config = build(name, batch)
        labels, numbers, tokens = torch.arange(batch), 4 * list(range(batch)), []
        batches = rar.sample_tokens(model, labels, config, autocast_of(precision), numbers)
        for number in range(1, 5):
            begin = time.perf_counter()
            tokens.append(next(batches)[1].cpu())
            title = f"{name}, {precision}: batch {number}"
            figure(title, time.perf_counter() - begin, "s")
            figure(title, equal(tokens[-1], tokens[0]), "as in batch 1")
            if CUDA:
                free, total = torch.cuda.mem_get_info()
                figure(title, (total - free - torch.cuda.memory_reserved()) / 1e9, "GB of driver")

# ---- 3. Attention of one query
def attention():
    kernels = [SDPBackend.FLASH_ATTENTION] + [SDPBackend.EFFICIENT_ATTENTION] * CUDA
    rows, options = (2, 2) if SMALL else (256, 16), dict(device=DEVICE, dtype=torch.bfloat16)
    for width in (48, 64, 80, 88):
        q = torch.randn(*rows, 1, width, **options)
        # Eight layers: one would stay in a GPU's cache.
        layers = torch.randn(8, 2, *rows, 257, width, **options)
        for length in (64, 128, 256):
            cache = layers[..., :length, :]
            for kernel in kernels:
                def attend():
                    with sdpa_kernel(kernel):
                        return [F.scaled_dot_product_attention(q, k, v) for k, v in cache][0]

                took = seconds(rar.recorded(attend) if CUDA else attend)
                title = f"{kernel.name}, width {width}, {length} keys"
                figure(title, took / len(cache) * 1e6, "us")
                figure(title, cache.nbytes / took / 1e12, "TB/s")

# ---- 4. Sampling; part 6 measures the pixels
def measured_limits(precision):
    """Bytes/s of copies, and FLOP/s of 20 matrix products."""
    autocast_of(precision)
    a, b = torch.ones(2, 2**26, device=DEVICE)
    bandwidth = 2 * a.nbytes / seconds(lambda: b.copy_(a))
    figure("copies", bandwidth / 1e12, "TB/s")
    size = 8192 if CUDA else 1024
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a = torch.randn(size, size, device=DEVICE, dtype=dtype)
    peak = 20 * 2 * size**3 / seconds(lambda: [a @ a for _ in range(20)])
    figure(f"matrix products, {precision}", peak / 1e12, "TFLOP/s")
    return bandwidth, peak

def least_seconds(model, config, precision, bandwidth, peak):
    """The limit: a token reads weights or makes products, and reads half a cache."""
    adaln = sum(p.numel() for block in model.blocks for p in block.adaLN_modulation.parameters())
    others = sum(p.numel() for p in model.blocks.parameters()) - adaln
    B, T, size = config.batch, config.grid_size**2, 2 if precision == "bfloat16" else 4
    reading = (others + adaln / rar.AHEAD) * size / bandwidth
    products = 2 * (others * 2 * B + adaln * (B + 1)) / peak
    cache = 2 * config.depth * 2 * B * T / 2 * config.width * size
    return T * (max(reading, products) + cache / bandwidth)

def sampler(limits, who, name, batch, precision):
    """A call, and its least seconds."""
    model, config = build(name, batch, who)
    least = least_seconds(model, config, precision, *limits[precision])
    labels, autocast = torch.arange(batch) % config.num_classes, autocast_of(precision)
    if who == "theirs":
        settings = labels.to(DEVICE), config.scale, config.temperature, config.power
        return lambda: model.generate(*settings), least
    if who == "fused":
        rar.compile_halves(model)
    elif not CUDA:  # as rar.py sample
        rar.pack(model)
    batches = rar.sample_tokens(model, labels.repeat(9), config, autocast)
    return lambda: next(batches), least

def in_turn(make, limits, kinds, name, batch):
    """Time the kinds in turn."""
    for _ in range(ARGS.pairs):
        first = None
        for who, precision in kinds:
            if dict(ours=False, fused=not CUDA, theirs=not ARGS.authors)[who]:
                continue
            call, least = make(limits, who, name, batch, precision)
            took = seconds(call)
            del call
            first = first or took
            title = f"{name}, {batch}, {precision}, {who}"
            figure(title, batch / took, "images/s")
            figure(title, least / took, "of the limit")
            figure(title, took / first, "times the first")

def sampling():
    limits = {precision: measured_limits(precision) for precision in PRECISIONS}
    kinds = [("ours", precision) for precision in PRECISIONS]
    more = [("fused", "bfloat16"), ("theirs", PRECISIONS[-1])]  # theirs as released, in TF32
    cases = [("RAR-B", 128), ("RAR-XL", 128), ("RAR-B", 64), ("RAR-B", 256), ("RAR-L", 128),
             ("RAR-XXL", 128)]
    if SMALL:
        cases = [("tiny" if ARGS.tiny else "RAR-B", 4)]
    for case in cases:
        in_turn(sampler, limits, kinds + more * (case in cases[:2]), *case)

# ---- 5. Training
def trainer(peak, who, name, batch, precision):
    """A call, an update at r = 1, and its least seconds."""
    model, config = build(name, batch, who)
    if who == "theirs":
        model.forward = lambda tokens, labels, orders: model.forward_fn(
            tokens, model.preprocess_condition(labels), orders=orders)[:, :-1]
    optimizer, autocast = rar.make_optimizer(model.train(), config), autocast_of(precision)
    rows = np.random.default_rng(0).integers(192, size=(10_000, 1 + config.grid_size**2))
    rows[:, 0] %= config.num_classes

    def update():
        rar.train_step(model, optimizer, config, rar.draw_batch(rows, config, 1), 1, autocast)

    if who == "fused":
        rar.compile_halves(model)
    count = sum(p.numel() for p in model.blocks.parameters())
    return update, 6 * count * batch * (config.grid_size**2 + 1) / peak

def training():
    peak = 989e12 if CUDA else measured_limits("float32")[1]  # of an H100 or H200
    kinds = [(who, PRECISIONS[0]) for who in ("ours", "fused", "theirs")]
    for name in ["tiny"] if SMALL else ["RAR-B", "RAR-XL", "RAR-L", "RAR-XXL"]:
        in_turn(trainer, peak, kinds, name, 64 if SMALL else rar.PRESETS[name].micro_batch)

# ---- 6. The published tokenizer, and Inception
def pictures():
    count = 1 if SMALL else 60
    with DEVICE:
        tokenizer = tok.MaskGITVQGAN()
        inception = fid.Inception().eval().to(memory_format=torch.channels_last)
        images = F.interpolate(torch.rand(count, 3, 32, 32), 256, mode="bilinear")
    pixels = torch.from_numpy(tok.to_uint8(images))

    def encode():  # ten crops at a time
        return torch.cat([tokenizer.encode(part) for part in images.split(10)])

    autocast_of("float32")
    figure("Inception", count / seconds(lambda: inception(pixels)), "pictures/s")
    tokens = encode()
    with autocast_of("bfloat16"):
        figure("equal codes in bfloat16", equal(encode(), tokens))
    autocast_of(PRECISIONS[-1])
    figure("encoder", count / seconds(encode), "pictures/s")
    figure("decoder", count / seconds(lambda: tokenizer.decode(tokens)), "pictures/s")

# ---- 7. Raster, random or annealed orders (of shapes without --data)
def learning():
    flags = "--steps 1 --width 32".split() if SMALL else []
    if ARGS.data:
        flags += "--model small --image-size 64 --grid-size 16 --data".split() + [ARGS.data]
    runs = [(seed, anneal) for seed in "01" for anneal in ("0 0", "1 1", "0.25 0.5")]
    for seed, anneal in runs[:1] if SMALL else runs:
        out = FIGURES.with_name(f"run-{time.time():.0f}")
        more = ["--out", str(out), "--seed", seed, "--anneal", *anneal.split()]
        assert rar.main(["train", *flags, *more]) == 0
        last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
        figure(f"held out: anneal {anneal}, seed {seed}", last["final_order_bits"], "bits/token")

# ---- All of it
PARTS = [correctness, recording, attention, sampling, training, pictures, learning]

def main():
    os.environ["TQDM_DISABLE"] = "1"
    if ARGS.tiny:
        os.environ["OMP_NUM_THREADS"] = "1"  # two would wait for each other
    FIGURES.parent.mkdir(parents=True, exist_ok=True)
    FIGURES.touch()
    old, codes, found = len(FIGURES.read_text().splitlines()), [], {}
    for part in ARGS.parts:
        begin = time.time()
        command = ["timeout", "-k", "9", "600", sys.executable, *sys.argv, "--part", str(part)]
        codes.append(subprocess.call(command))
        title = f"part {part}, {PARTS[part - 1].__name__}: exit code {codes[-1]}"
        figure(title, time.time() - begin, "s")

    for part, name, value, unit in map(json.loads, FIGURES.read_text().splitlines()[old:]):
        found.setdefault(f"{part}  {name:48} {{:.4g}} {unit}", []).append(value)
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    lines = [f"\n{device}, torch {torch.__version__}, {time.ctime()}, {ARGS}"]
    lines += [words.format(np.median(values)) for words, values in found.items()]
    print(*lines, sep="\n")
    with open(FIGURES.with_name("summary.txt"), "a") as file:
        print(*lines, sep="\n", file=file)
    return any(codes)

if __name__ == "__main__":
    sys.exit(PARTS[ARGS.part - 1]() if ARGS.part else main())
