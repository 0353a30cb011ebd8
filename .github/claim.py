"""Does annealing help? The paper's claim in small, on 20 classes of Tiny-ImageNet at 32x32.

    python .github/claim.py DIR        70 minutes on two cores; goes on where it was stopped

DIR holds train/CLASS/PICTURE and val/CLASS/PICTURE. Each run is a `python rar.py train` in
runs/claim/, one on each core that this process may use. What came out goes to claim.json, from
which claim_figures.py draws the figures and prints the tables of claim.md.
"""

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from claim_judge import again, load_judge, tok, train_judge

import rar

HOME, CPU = Path("runs/claim"), torch.device("cpu")
FEW = 100                        # photographs of a class; "plenty" are all 500 of them
# The photographs of each regime, and its updates.
REGIMES = {"few": ("few", 1200), "short": ("few", 400), "plenty": ("plenty", 750)}
SCALES = (0, 1.5, 2, 3)          # guidance; 0 is none
COMMON = {"model": "tiny", "image_size": 32, "grid_size": 8, "codebook_size": 512,
          "crops": "flip", "batch": 32, "tokenizer": f"{HOME}/tokenizer.pt"}


def experiments():
    """The runs: {name: (regime, flags)}, the most important first."""
    runs = {}

    def add(regime, start, end, seed, *flags):
        steps, extra = REGIMES[regime][1], [flag.strip("-") for flag in flags]
        runs["-".join([regime, f"{start:g}", f"{end:g}", *extra, str(seed)])] = regime, [
            "--anneal", str(start), str(end), "--seed", str(seed), "--steps", str(steps),
            "--save-every", str(steps // 10), *flags]

    for seed in (0, 1):
        for regime in ("few", "plenty"):
            for pair in ((0, 0), (0.5, 0.75), (1, 1)):
                add(regime, *pair, seed)
        add("plenty", 1, 1, seed, "--no-target-aware")
    for seed in (0, 1):
        for pair in ((0.25, 0.5), (0.75, 1)):
            add("few", *pair, seed)
    add("few", 0, 0, 0, "--dropout", "0.1")
    for pair in ((0, 0), (0.25, 0.5)):
        add("few", *pair, 2)
    for seed in (0, 1):
        add("short", 0, 0, seed)
    return runs


def data_of(photographs, source):
    return source if photographs == "plenty" else str(HOME / photographs)


def prepare(source):
    """Link the few photographs, fit the tokenizer, make the tokens, train the classifier."""
    for each in tok.class_folders(source):
        link = HOME / "few" / "train" / each.name
        link.mkdir(parents=True, exist_ok=True)
        for picture in tok.pictures_in(each)[:FEW]:
            if not (link / picture.name).exists():
                (link / picture.name).symlink_to(picture.resolve())
    if not (HOME / "few" / "val").exists():
        (HOME / "few" / "val").symlink_to((Path(source) / "val").resolve())
    names = tok.class_names(source)
    sizes = {key: COMMON[key] for key in ("image_size", "grid_size", "codebook_size", "crops")}
    for kind in ("plenty", "few"):
        config = dataclasses.replace(rar.PRESETS["tiny"], num_classes=len(names),
                                     class_names=names, data=data_of(kind, source), **sizes)
        made = (HOME / "tokenizer.pt").exists()
        tok.open_data(config, HOME, CPU, fit=not made)
    if not (HOME / "classifier.pt").exists():
        train_judge(source, FEW, tok.load(HOME / "tokenizer.pt"), HOME / "classifier.pt")


def nearest(tokens, rows):
    """The largest share of tokens that each of (N, T) has in common with one of rows (M, T)."""
    parts = np.array_split(tokens.astype(np.uint16), max(1, len(tokens) // 10))
    return np.concatenate([(part[:, None] == rows).mean(2).max(1) for part in parts])


def draw(weights, order, scale, seed, count):
    """Tokens (count, T) and labels (count,) of samples."""
    model, config, _ = rar.load_model(weights, {
        "order": order, "scale": scale, "power": 0.0, "temperature": 1.0, "seed": seed,
        "micro_batch": 250}, CPU)
    labels = torch.arange(count) % config.num_classes
    parts = rar.sample_tokens(model, labels, config, contextlib.nullcontext())
    return torch.cat([tokens for _, tokens in parts]), labels


def score(source, name):
    """Samples of a run in raster order; if it never was annealed, in random order too. The guidance
    scale is that of the least distance on 400 samples of seed 1; told is what 1000 of seed 2 make
    with it. And the share of tokens that they, and held-out photographs, have in common with the
    training picture that they have most in common with."""
    torch.set_num_threads(1)
    folder = HOME / name
    judge, photos, _ = load_judge(source, HOME / "classifier.pt")
    tokenizer = tok.load(HOME / "tokenizer.pt")
    data = tok.open_data(rar.read_config(folder, rar.Config()), folder, CPU)
    result = {"held-out nearest": float(nearest(data.held_out[:, 1:], data.train[:, 1:]).mean())}
    for order in ("raster", "random") if "-1-1-" in name else ("raster",):
        def judged(scale, seed, count):
            tokens, labels = draw(folder / "weights.pt", order, scale, seed, count)
            images = tokenizer.decode(tokens)
            return {"scale": scale, **judge.score(images, labels, photos)}, tokens

        grid = [judged(scale, 1, 400)[0] for scale in SCALES]
        told, tokens = judged(min(grid, key=lambda each: each["distance"])["scale"], 2, 1000)
        near = nearest(tokens.numpy(), data.train[:, 1:])
        result[order] = told | {"nearest": float(near.mean()), "grid": grid}
    tok.write_json(folder / "score.json", result)


def read_log(folder):
    log = folder / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def run_one(name, source, cores):
    """Train the run of this name on a core that is free, and score it."""
    regime, flags = experiments()[name]
    folder, core = HOME / name, cores.get()
    data, steps = data_of(REGIMES[regime][0], source), REGIMES[regime][1]
    common = [x for key, value in COMMON.items()
              for x in ("--" + key.replace("_", "-"), str(value))]
    commands = [[sys.executable, "rar.py", "train", "--data", data, *common, *flags,
                 "--out", str(folder)],
                [sys.executable, __file__, source, name]]
    done = [[line["step"] for line in read_log(folder)][-1:] == [steps],
            (folder / "score.json").exists()]
    for command, finished in zip(commands, done):
        if not finished:
            with open(HOME / f"{name}.txt", "a") as output:
                subprocess.run(command, check=True, stdout=output, stderr=output,
                               env={**os.environ, "OMP_NUM_THREADS": "1"},
                               preexec_fn=lambda: os.sched_setaffinity(0, {core}))
    print("finished", name, flush=True)
    cores.put(core)


def main(source):
    prepare(source)
    cores = queue.Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    with ThreadPoolExecutor(cores.qsize()) as pool:
        list(pool.map(lambda name: run_one(name, source, cores), experiments()))
    judge, photos, labels = load_judge(source, HOME / "classifier.pt")
    results = {"photographs": judge.score(photos, labels, photos),
               "reconstructions": judge.score(again(tok.load(HOME / "tokenizer.pt"), photos),
                                              labels, photos)}
    for name in experiments():
        logged = [{key: line[key] for key in ("step", "final_order_bits", "random_order_bits")}
                  for line in read_log(HOME / name) if "final_order_bits" in line]
        results[name] = {"log": logged, "score": tok.read_json(HOME / name / "score.json")}
    tok.write_json(Path(__file__).with_name("claim.json"), results)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not os.path.isdir(sys.argv[1]):
        sys.exit(__doc__)
    try:
        (score if len(sys.argv) == 3 else main)(*sys.argv[1:])
    except tok.UserError as error:
        sys.exit(f"error: {error}")
