"""Does annealing help? Three arms that differ in --anneal only, judged in the same way.

    python .github/claim.py DIR [--seeds 3]

DIR has train/CLASS/PICTURE and val/CLASS/PICTURE. After each run, what is known is told, and drawn
in runs/claim-*. It can be continued.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import torch
from claim_figures import report
from claim_judge import photographs
from photos import DEVICE, open_judge, resized

import rar
from tokenizer import labelled_pictures

parser = argparse.ArgumentParser()
parser.add_argument("source", metavar="DIR")
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--tiny", action="store_true")
ARGS = parser.parse_args()
KIND = "tiny" if ARGS.tiny else DEVICE.type
OUT, SAMPLES, ALONE = Path(f"runs/claim-{KIND}"), 20 if ARGS.tiny else 2000, Lock()

ARMS = {"raster": "0 0", "annealed": "0.5 0.75", "random": "1 1"}
SHARE, FLAGS = {  # one photograph of how many is learned
    "cuda": (1, "--model small --image-size 64 --grid-size 16 --codebook-size 1024 --width 512 "
             "--depth 8 --mlp-width 2048 --dropout 0.1 --lr 0.001 --steps 1500 --save-every 150 "
             "--compile"),
    "cpu": (5, "--model tiny --codebook-size 512 --width 192 --depth 6 --heads 6 --mlp-width 768 "
            "--crops center --batch 32 --lr 0.0027 --steps 600 --save-every 75 "
            "--precision bfloat16"),
    "tiny": (5, "--model tiny --image-size 16 --grid-size 4 --width 16 --depth 1 "
             "--batch 4 --steps 4 --save-every 2")}[KIND]


def train(arm, seed, folder, count):
    words = (f"--photographs {count} {FLAGS} --anneal {ARMS[arm]} --seed {seed} --scale 0 "
             f"--out {folder} --data")
    with open(f"{folder}.txt", "a") as output:
        subprocess.run([sys.executable, "rar.py", "train", *words.split(), ARGS.source],
                       check=True, stdout=output, stderr=output,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})


def score(arm, folder, judge, held_out):
    """What a run is worth, in each order of sampling"""
    def judged(order, guidance, seed, count):
        model, config, _ = rar.load_model(folder, {
            "order": order, "scale": guidance, "power": 0.0, "temperature": 1.0, "seed": seed,
            "precision": "bfloat16"})
        tokenizer = rar.open_tokenizer(config, folder).to(DEVICE)
        labels = torch.arange(count, device=DEVICE) % config.num_classes
        batches = rar.sample_tokens(model, labels, config)
        images = [resized(tokenizer.decode(tokens), 32) for _, tokens in batches]
        return judge.score(torch.cat(images), labels, held_out)

    log = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    log = [line for line in log if "final_order_bits" in line]
    result, first = {"steps": [line["step"] for line in log]}, OUT / f"{arm}-0/score.json"
    for order in ("raster", "random") if arm == "random" else ("raster",):
        if first.exists():  # that of the arm's first run
            best = json.loads(first.read_text())[order]["guidance"]
        else:
            best = min((1.5, 2, 3), key=lambda g: judged(order, g, 1, SAMPLES // 5)["distance"])
        key = "final_order_bits" if order == "raster" else "random_order_bits"
        result[order] = {"bits": [line[key] for line in log], "guidance": best,
                         **judged(order, best, 2, SAMPLES)}
        unguided = judged(order, 0.0, 2, SAMPLES)
        result[order] |= {f"unguided {name}": value for name, value in unguided.items()}
    rar.write_text(folder / "score.json", json.dumps(result))


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    pictures, held_out = labelled_pictures(ARGS.source)
    held_out, labels = photographs(held_out, DEVICE)
    # If some are left, the judge learns what the models do not learn.
    others = [pair for i, pair in enumerate(pictures) if i % SHARE] or pictures
    judge = open_judge(others, 1 + max(labels).item(), OUT / "judge.pt", 1 if ARGS.tiny else 15)

    def run(arm, seed):
        folder = OUT / f"{arm}-{seed}"
        if not (folder / "score.json").exists():
            train(arm, seed, folder, len(pictures) // SHARE)
            with ALONE:
                score(arm, folder, judge, held_out)

    runs = [(arm, seed) for seed in range(ARGS.seeds) for arm in ARMS]
    runs = runs[:5] if ARGS.tiny else runs
    run(*runs[0])  # makes the tokens
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(run, *zip(*runs)):
            results = {path.parent.name: json.loads(path.read_text())
                       for path in sorted(OUT.glob("*/score.json"))}
            rar.write_text(OUT / "claim.json", json.dumps(results))
            report(results, OUT / "claim.png")


if __name__ == "__main__":
    main()
