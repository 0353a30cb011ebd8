"""The experiments of the README's section "Try this", as a table.

    python .github/try_this.py        an hour or two; it can be continued

Bits are per token of held-out drawings, in the final and in random order. "In class" are per cent
of 500 samples, as the classifier of shapes_score.py sees them.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from any_order import HALVES, complete
from shapes_score import SHAPES_TRAIN, accuracy, load, sample, train_classifier

import rar

TINY = "--tiny" in sys.argv  # three rows of runs/shapes-tiny
HALVES["middle"] = 8, 8, 24, 24
RANDOM = {"order": "random"}
RUNS = ("", "--anneal 0 0", "--anneal 1 1", "--no-target-aware", "--order spiral_in",
        "--label-dropout 0")
ROWS = [  # flags of training, updates, settings of sampling
    *[(flags, 1500, {}) for flags in RUNS],
    ("--label-dropout 0", 1500, {"scale": 0.0}),
    ("--anneal 1 1", 1500, RANDOM),
    ("--no-target-aware", 750, RANDOM),
    *[("", 1500, {"scale": scale}) for scale in (0.0, 2.0, 8.0)],
    *[("", updates, how) for how in (RANDOM, "middle") for updates in (750, 1500)],
]


def measure(weights, how, classifier):
    each = 1 if TINY else 50  # samples of a class
    labels = torch.arange(10 * each) % 10
    if how == "middle":
        parts = [complete(weights, SHAPES_TRAIN + i, how, each)[1] for i in range(10)]
        images = torch.stack(parts, 1).flatten(0, 1)
    else:
        images = sample(*load(weights, **{"seed": 1} | how), labels)
    line = rar.read_tensors(weights)["log"][-1]
    share = 100 * accuracy(classifier, images, labels)
    return line["final_order_bits"], line["random_order_bits"], share


def main():
    classifier = train_classifier(200 if TINY else SHAPES_TRAIN)
    store = Path("runs/try-tiny.json" if TINY else "runs/try.json")
    found = json.loads(store.read_text()) if store.exists() else {}
    for seed in range(1 if TINY else 3):
        print("| training | updates | sampling | bits | random order | in class |")
        print("|---" * 6 + "|")
        for flags, updates, how in ROWS[-3:] if TINY else ROWS:
            name = f"try/{seed}{flags}".replace(" ", "")
            run = Path("runs", "shapes-tiny" if TINY else name)
            if not (run / "checkpoint-0001500.pt").exists():
                command = f"rar.py train --seed {seed} --out {run} {flags}"
                subprocess.run([sys.executable, *command.split()], check=True, stdout=sys.stderr)
            row = f"| {flags} | {updates} | {how} |"
            figures = found.setdefault(row, [])
            if len(figures) == seed:
                weights = run / f"checkpoint-{updates:07}.pt"
                figures.append(measure(weights, how, classifier))
                rar.write_text(store, json.dumps(found))
            columns = [" / ".join(f"{x:.2f}" for x in column) for column in zip(*figures)]
            print(row, " | ".join(columns), "|")


if __name__ == "__main__":
    main()
