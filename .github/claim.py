"""Does annealing help? The paper's claim in small, on 20 classes of Tiny-ImageNet at 32x32.

    python .github/claim.py DIR        70 minutes on two cores; goes on where it was stopped

DIR holds train/CLASS/PICTURE and val/CLASS/PICTURE. Each run is a `python rar.py train` in
runs/claim/, one on each core that this process may use. What came out goes to claim.json, of
which claim_figures.py makes the figures and tables of claim.md. --tiny leaves claim.json alone.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from claim_judge import Judge, again, nearest_share, photographs

import rar
import tokenizer as tok

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("source", metavar="DIR")
parser.add_argument("--tiny", action="store_true", help="see that it works, in half a minute")
parser.add_argument("--score", metavar="RUN", help="for its own use: score this run")
ARGS = parser.parse_args()
TINY, CPU = ARGS.tiny, torch.device("cpu")

HOME = Path("runs/claim-tiny" if TINY else "runs/claim")
FEW = 3 if TINY else 100  # photographs of a class; "plenty" are all 500 of them
# The photographs of each regime, and its updates.
REGIMES = {"few": ("few", 1200), "short": ("few", 400), "plenty": ("plenty", 750)}
if TINY:
    REGIMES = {name: (photographs, 4) for name, (photographs, _) in REGIMES.items()}
SCALES = (0, 2) if TINY else (0, 1.5, 2, 3)  # of guidance; 0 is none
COMMON = {"model": "tiny", "image_size": 32, "grid_size": 8, "crops": "flip",
          "batch": 4 if TINY else 32, "codebook_size": 16 if TINY else 512,
          "tokenizer": str(HOME / "tokenizer.pt")}


def experiments():
    """The runs: {name: (regime, flags)}, the most important first."""
    runs = {}

    def add(regime, start, end, seed, *flags):
        steps, extra = REGIMES[regime][1], [flag.strip("-") for flag in flags]
        runs["-".join([regime, f"{start:g}", f"{end:g}", *extra, str(seed)])] = regime, [
            "--anneal", str(start), str(end), "--seed", str(seed), "--steps", str(steps),
            "--save-every", str(max(2, steps // 10)), *flags]

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
    if TINY:
        return {name: runs[name] for name in ("few-0-0-0", "plenty-1-1-no-target-aware-0")}
    return runs


def data_of(kind):
    return ARGS.source if kind == "plenty" else str(HOME / "few")


def open_rows(kind, tokenizer):
    """The rows of tokens to train on and the held-out ones. They are made once."""
    names, *pairs = rar.find_data(data_of(kind))
    sizes = {key: COMMON[key] for key in ("image_size", "grid_size", "codebook_size", "crops")}
    config = dataclasses.replace(rar.PRESETS["tiny"], num_classes=len(names), class_names=names,
                                 data=data_of(kind), **sizes)
    if tokenizer is None:
        tokenizer = rar.make_tokenizer(config, pairs[0])
        rar.write_tensors(HOME / "tokenizer.pt", tokenizer.state_dict())
    return rar.open_rows(config, *pairs, tokenizer)


def open_tokenizer():
    path = HOME / "tokenizer.pt"
    return tok.load(path) if path.exists() else None


def prepare():
    """Link the few photographs, fit the tokenizer, make the tokens, train the classifier."""
    folders = tok.class_folders(ARGS.source)
    for each in folders:
        link = HOME / "few" / "train" / each.name
        link.mkdir(parents=True, exist_ok=True)
        for picture in tok.pictures_in(each)[:FEW]:
            if not (link / picture.name).exists():
                (link / picture.name).symlink_to(picture.resolve())
    if not (HOME / "few" / "val").exists():
        (HOME / "few" / "val").symlink_to(Path(ARGS.source, "val").resolve())
    for kind in ("plenty", "few"):
        open_rows(kind, open_tokenizer())

    if not (HOME / "classifier.pt").exists():
        # It does not learn from the few, so copies of them gain nothing with it.
        others = [(number, path) for number, each in enumerate(folders)
                  for path in tok.pictures_in(each)[FEW:]]
        images, labels = photographs(others)
        judge = Judge(len(folders))
        judge.learn(images, again(open_tokenizer(), images), labels, passes=1 if TINY else 15)
        rar.write_tensors(HOME / "classifier.pt", judge.state_dict())


def open_judge():
    """The classifier, and the held-out photographs and their labels."""
    judge = Judge(len(tok.class_folders(ARGS.source)))
    judge.load_state_dict(rar.read_tensors(HOME / "classifier.pt"))
    return judge.eval(), *photographs(tok.labelled_pictures(ARGS.source)[1])


def draw(weights, order, scale, seed, count):
    """Tokens (count, T) and labels (count,) of samples."""
    model, config, _ = rar.load_model(weights, {
        "order": order, "scale": scale, "power": 0.0, "temperature": 1.0, "seed": seed,
        "micro_batch": 250}, CPU)
    labels = torch.arange(count) % config.num_classes
    batches = rar.sample_tokens(model, labels, config, contextlib.nullcontext())
    return torch.cat([tokens for _, tokens in batches]), labels


def score(name):
    """Score samples of a run in raster order; if it was never annealed, in random order, too.

    Guidance is the scale with the least distance on 400 samples of seed 1. With it 1,000 samples
    of seed 2 are scored. Also told is the share of tokens that they, and held-out photographs,
    have in common with the nearest training picture."""
    torch.set_num_threads(1)
    judge, photos, _ = open_judge()
    tokenizer = open_tokenizer()
    rows, held_out = open_rows(REGIMES[experiments()[name][0]][0], tokenizer)
    result = {"held-out nearest": nearest_share(held_out[:, 1:], rows)}
    for order in ("raster", "random") if "-1-1-" in name else ("raster",):
        def judged(scale, seed, count):
            count = 20 if TINY else count
            tokens, labels = draw(HOME / name / "weights.pt", order, scale, seed, count)
            return {"scale": scale, **judge.score(tokenizer.decode(tokens), labels, photos)}, tokens

        grid = [judged(scale, 1, 400)[0] for scale in SCALES]
        best = min(grid, key=lambda each: each["distance"])["scale"]
        told, tokens = judged(best, 2, 1000)
        result[order] = told | {"nearest": nearest_share(tokens, rows), "grid": grid}
    rar.write_text(HOME / name / "score.json", json.dumps(result))


def read_log(folder):
    log = folder / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def run_one(name, cores):
    """Train the run of this name on a core that is free, and score it."""
    regime, flags = experiments()[name]
    kind, steps = REGIMES[regime]
    folder, core = HOME / name, cores.get()
    common = [word for key, value in COMMON.items()
              for word in ("--" + key.replace("_", "-"), str(value))]
    train = [sys.executable, "rar.py", "train", "--data", data_of(kind), *common, *flags,
             "--out", str(folder)]
    is_trained = [line["step"] for line in read_log(folder)][-1:] == [steps]
    is_scored = (folder / "score.json").exists()
    for command, finished in ((train, is_trained),
                              ([sys.executable, *sys.argv, "--score", name], is_scored)):
        if not finished:
            with open(HOME / f"{name}.txt", "a") as output:
                subprocess.run(command, check=True, stdout=output, stderr=output,
                               env={**os.environ, "OMP_NUM_THREADS": "1"},
                               preexec_fn=lambda: os.sched_setaffinity(0, {core}))
    print("finished", name, flush=True)
    cores.put(core)


def main():
    prepare()
    cores = queue.Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    with ThreadPoolExecutor(cores.qsize()) as pool:
        list(pool.map(lambda name: run_one(name, cores), experiments()))

    judge, photos, labels = open_judge()
    reconstructions = again(open_tokenizer(), photos)
    results = {"photographs": judge.score(photos, labels, photos),
               "reconstructions": judge.score(reconstructions, labels, photos)}
    for name in experiments():
        logged = [{key: line[key] for key in ("step", "final_order_bits", "random_order_bits")}
                  for line in read_log(HOME / name) if "final_order_bits" in line]
        scored = json.loads((HOME / name / "score.json").read_text())
        results[name] = {"log": logged, "score": scored}
    rar.write_text(HOME / "claim.json" if TINY else Path(__file__).with_name("claim.json"),
                   json.dumps(results))


if __name__ == "__main__":
    score(ARGS.score) if ARGS.score else main()
