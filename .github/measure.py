"""Measures on a GPU what nobody has measured yet, the most important first.

    python .github/measure.py --out DIR                 ten minutes, or --minutes
    python .github/measure.py --out DIR --only photo    steps that begin so
    python .github/measure.py --out DIR --tiny          try it, on a CPU, too

Each step is a process. First come those that time nothing, side by side. A figure goes to
DIR/figures.jsonl and DIR/summary.txt at once. --authors is a clone of their code to time, too,
--data are photographs to learn, --golden are the golden files of fid.py.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
from authors import authors_model
from torch import distributed, nn

import fid
import rar

parser = argparse.ArgumentParser()
parser.add_argument("--tiny", action="store_true")
parser.add_argument("--minutes", type=float, default=10)
for name in ("out", "only", "step", "authors", "data", "golden"):  # step is for its own use
    parser.add_argument(f"--{name}", default="")
ARGS = parser.parse_args()
TINY, CUDA, OUT = ARGS.tiny, torch.cuda.is_available(), Path(ARGS.out)
DEVICE = torch.device("cuda" if CUDA else "cpu")
BACKEND = "inductor" if CUDA else "eager"  # which compiles nothing, so a CPU need not wait

SIZES = ("RAR-B", "RAR-XL", "RAR-XXL")
SIDE_BY_SIDE = [*(f"compile {size}" for size in SIZES), "logits", "processes", "tests"]
IN_TURN = [
    *(f"sampling {size} {precision} {who}" for size in SIZES[:2] for who in ("ours", "theirs")
      for precision in ("tf32", "bfloat16")),
    *(f"training {size} {who}" for who in ("compiled", "theirs", "eager") for size in SIZES),
    "sampling RAR-B bfloat16 compiled", "sample-tf32", "sample-bfloat16", "shapes", "inception",
    "scores", "photographs"]
NEEDS = {"theirs": ARGS.authors, "photographs": ARGS.data, "inception": ARGS.golden,
         "scores": ARGS.golden}
if TINY:
    SIDE_BY_SIDE = ["logits", "processes"]
    IN_TURN = ["sampling RAR-B bfloat16 compiled", "training RAR-B compiled", "inception"]

def say(text, file="summary.txt"):
    with open(OUT / file, "a") as out:
        print(text, file=out)

def figure(name, value, unit, step=ARGS.step):
    say(f"{step:32} {name:14} {value:9.4g} {unit}")
    say(json.dumps([step, name, value, unit]), "figures.jsonl")

def speed(call, count, amount, unit):
    """Time a call, then `count` more for a median."""
    seconds = []
    for _ in range(1 + count):
        begin = time.perf_counter()
        call()
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    took = np.median(seconds[1:])
    figure("first", seconds[0], "s")
    figure("speed", amount / took, unit)
    if CUDA:
        figure("memory", torch.cuda.max_memory_reserved() / 1e9, "GB")
    return took

def build(size, batch, who="ours", **changes):
    """A model with random weights, and its Config."""
    torch.manual_seed(0)
    if TINY:
        size, batch, changes = "tiny", min(batch, 8), changes | dict(depth=1, num_classes=10)
    changes = dict(batch=batch, micro_batch=batch) | changes
    config = dataclasses.replace(rar.PRESETS[size], **changes)
    with DEVICE:
        model = authors_model(ARGS.authors, config) if who == "theirs" else rar.RAR(config)
    for weight in [p for p in model.parameters() if p.ndim > 1]:
        nn.init.kaiming_normal_(weight)  # Gates of 0 would switch the blocks off.
    return model.eval(), config

# ---- Sampling, tokens only

def sampling(size, precision, who):
    model, config = build(size, 128, who)
    labels = torch.arange(config.batch) % config.num_classes
    config.precision = precision
    rar.set_precision(precision)
    if precision == "bfloat16" and who != "theirs":
        rar.to_bfloat16(model)
    for block in model.blocks if who == "compiled" else []:
        block.compile(dynamic=True, backend=BACKEND)
    # On a GPU the first batch is recorded, and the others replay it.
    call = rar.sample_tokens(model, labels.repeat(4), config).__next__
    if who == "theirs":
        def call():
            with rar.autocast(config), torch.no_grad():
                model.generate(labels.to(DEVICE), config.scale, config.temperature, config.power)
    speed(call, 1 if who == "theirs" else 3, config.batch, "images/s")

def logits():
    """Of the loop, on a GPU recorded, against those of one forward pass in float32."""
    model, config = build("RAR-B", 8)
    T, seen = config.grid_size**2, []
    rar.set_precision("float32")
    tokens = torch.randint(config.codebook_size, (8, T), device=DEVICE)
    labels, orders = torch.arange(8, device=DEVICE), rar.sample_orders(8, T, 0.5).to(DEVICE)
    with torch.no_grad():
        right = model(tokens, labels, orders)  # (8, T, V)
    # What is drawn does not matter, because all tokens are known.
    rar.draw = lambda logits, *_: seen.append(logits) or logits.argmax(-1)

    def loop(known):
        seen.clear()
        with rar.autocast(config):
            rar.generate(model, labels, 0, 0, 1, orders=orders, known=known)
        return torch.stack(seen, 1)

    for precision in ("float32", "bfloat16"):
        config.precision = precision
        rar.set_precision(precision)
        if precision == "bfloat16":
            rar.to_bfloat16(model)
        found = (rar.recorded(loop, tokens) if CUDA else loop)(tokens)
        error = ((found - right).abs().max() / right.std()).item()
        figure(precision, error, "standard deviations at most")
        assert error < 1e-3 or precision == "bfloat16"

# ---- Training, in random orders

def trainer(size, who, batch, **changes):
    """A function that makes an update and returns the loss; the model and its Config."""
    model, config = build(size, batch, who, **changes)
    optimizer, config.precision = rar.make_optimizer(model.train(), config), "bfloat16"
    rar.set_precision("bfloat16")
    rows = np.random.default_rng(0).integers(10, size=(10_000, 1 + config.grid_size**2))
    steps = iter(range(config.steps))
    if who == "compiled":
        model.compile(backend=BACKEND)

    def update():
        step = next(steps)
        *batch, _ = rar.draw_batch(rows, config, step)
        return rar.train_step(model, optimizer, config, batch, step)[0]
    return update, model, config

def training(size, who, count=8):
    """With the preset's micro-batch. Does it fit?"""
    update, model, config = trainer(size, who, rar.PRESETS[size].micro_batch)
    took = speed(update, count, config.batch, "samples/s")
    weights = sum(p.numel() for p in model.blocks.parameters())
    products = 6 * weights * config.batch * (config.grid_size**2 + 1)
    figure("of 989 TFLOP/s", 100 * products / took / 989e12, "%")

def compile(size):
    """The compiler keeps what it makes on the disk. (Its times mean nothing.)"""
    training(size, "compiled", 1)

def processes():
    """Compiled, as in a process of torchrun, with two micro-batches: the plain losses?"""
    distributed.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", rank=0, world_size=1,
                                   store=distributed.HashStore())
    changes = dict(depth=4, dropout=0.0, steps=20, warmup=0.0)
    plain, *_ = trainer("RAR-B", "eager", 8, **changes)
    other, *_ = trainer("RAR-B", "compiled", 8, **changes, micro_batch=4)
    rar.WORLD_SIZE = 2  # so that gradients are summed, here over one process
    errors = [abs(plain() - other()).item() for _ in range(5)]
    figure("losses", max(errors), "nats of difference")

# ---- Inception, with random weights

def inception():
    weights, count = {}, 1 if TINY else 128
    for entry in json.loads(Path(ARGS.golden, "keys_shapes.json").read_text())["keys"]:
        weights[entry["key"]] = tensor = torch.ones(entry["shape"], device=DEVICE)
        if tensor.ndim > 1:
            nn.init.kaiming_normal_(tensor)
    rar.write_tensors(OUT / "inception.pt", weights)
    pixels = torch.randint(256, (count, 256, 256, 3), dtype=torch.uint8, device=DEVICE)
    np.save(OUT / "noise.npy", pixels.cpu())
    speed(lambda: fid.inception(pixels, weights), 5, count, "pictures/s")

# ---- All of it

def start(step, end):
    """Run a step in a process of its own, until `end`."""
    begin, output = time.time(), OUT / f"output/{step}.txt"
    is_command = step.split()[0] not in globals()
    command = [sys.executable, *sys.argv, "--step", step]
    if is_command:
        command = ["bash", ".github/gpu.sh", step, ARGS.out, ARGS.data, ARGS.golden]
    limit = ["timeout", "-k", "9", f"{max(0.1, end - begin)}"]  # exit code 124
    with open(output, "w") as file:
        code = subprocess.call([*limit, *command], stdout=file, stderr=file)
    figure(f"exit code {code}", time.time() - begin, "s", step)
    if code or is_command:
        say(output.read_text()[-1500:])
    return code

def main():
    begin, codes = time.time(), []
    Path(OUT, "output").mkdir(parents=True, exist_ok=True)
    os.environ |= {"TQDM_DISABLE": "1", "PYTHON": sys.executable}
    say(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}")
    for steps, share, at_once in ((SIDE_BY_SIDE, 0.4, os.cpu_count()), (IN_TURN, 1, 1 + TINY)):
        steps = [step for step in steps if step.startswith(ARGS.only)
                 and all(NEEDS.get(word, True) for word in step.split())]
        end = begin + 60 * ARGS.minutes * (1 if ARGS.only else share)
        with ThreadPoolExecutor(at_once) as pool:
            codes += pool.map(start, steps, [end] * len(steps))
    print((OUT / "summary.txt").read_text())
    return any(codes)

if __name__ == "__main__":
    name, *sizes = (ARGS.step or "main").split()
    sys.exit(globals()[name](*sizes))
