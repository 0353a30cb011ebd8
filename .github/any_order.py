"""What a model for any order can do that the final one can't, on the run of `rar.py train`.

    python .github/any_order.py [RUN]        about three minutes on two cores

orders.png has the six scan orders as maps of rank, with samples by the checkpoint where annealing
begins, and by the final weights. completions.png has held-out drawings, what is kept of them, and
four completions of each. The classifier of shapes_score.py scores 400 more.
"""

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from shapes_score import accuracy, load, sample, train_classifier

import rar
from rar import SHAPES_TRAIN
from tokenizer import SHAPES, draw_shape, known_tokens, save_grid, to_uint8

ORDERS = ("raster", "z_curve", "subsample", "alternate", "spiral_out", "spiral_in")
HALVES = {"left": (0, 0, 16, 32), "right": (16, 0, 32, 32),
          "top": (0, 0, 32, 16), "bottom": (0, 16, 32, 32)}


def heat(values):
    """Grey values (N, N) from 0 to 1 as colours (N, N, 3) from dark blue to yellow."""
    stops = np.array([[30, 30, 90], [150, 50, 120], [240, 120, 60], [255, 230, 90]])
    x = values[..., None] * (len(stops) - 1)
    low = np.minimum(x.astype(int), len(stops) - 2)
    below, above = stops[low[..., 0]], stops[low[..., 0] + 1]
    return (below * (1 - x + low) + above * (x - low)).astype(np.uint8)


def draw_orders(run, checkpoint, path):
    labels, cell, gap, left = torch.tensor([0, 3, 5, 6, 8]), 64, 6, 80
    columns = 1 + 2 * len(labels)
    width, height = left + columns * (cell + gap) + 2 * gap, 24 + len(ORDERS) * (cell + gap)
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    heads = ((0, "rank"), (1, "where annealing begins: any order"),
             (1 + len(labels), "at the end: raster order"))
    for column, text in heads:
        pen.text((left + column * (cell + gap) + gap * (column > 0), 4), text, "black", font)

    for row, name in enumerate(ORDERS):
        y = 24 + row * (cell + gap)
        pen.text((4, y + cell / 2), name, "black", font, anchor="lm")
        ranks = rar.scan_order(name, 8).argsort().view(8, 8).numpy()
        pictures = [heat(ranks / ranks.max())]
        for weights in (checkpoint, run):
            pictures += [*to_uint8(sample(*load(weights, order=name, seed=1), labels))]
        for column, pixels in enumerate(pictures):
            x = left + column * (cell + gap) + gap * (column > 0) + gap * (column > len(labels))
            sheet.paste(Image.fromarray(pixels).resize((cell, cell), Image.NEAREST), (x, y))
    sheet.save(path)


def complete(checkpoint, index, half, count):
    """What is seen of drawing `index` (2, 3, H, W), and completions of it (count, 3, H, W)."""
    model, config, tokenizer = load(checkpoint, seed=index)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "drawing.png")
        Image.fromarray(draw_shape(index)).save(file)
        known, before = known_tokens(file, HALVES[half], tokenizer)
    labels = torch.full((count,), index % len(SHAPES))
    return before, sample(model, config, tokenizer, labels, known)


def draw_completions(checkpoint, path):
    shown = []
    for index, half in zip((0, 3, 5, 16, 8, 27), [*HALVES, "left", "top"]):
        before, images = complete(checkpoint, SHAPES_TRAIN + index, half, 4)
        shown += [*before, *images]
    save_grid(path, torch.stack(shown), 2 * ["picture", "kept", "1", "2", "3", "4"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, help="a run's folder [the newest]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder [.github]")
    parser.add_argument("--tiny", action="store_true", help="see that it works, in seconds")
    args = parser.parse_args()
    run = args.run or rar.find_weights(None).parent
    config = rar.read_config(run)
    annealing_starts = math.ceil(config.anneal[0] * config.steps)
    checkpoint = run / f"checkpoint-{annealing_starts:07}.pt"

    draw_orders(run, checkpoint, args.out / "orders.png")
    draw_completions(checkpoint, args.out / "completions.png")
    count = 2 if args.tiny else 100
    classifier = train_classifier(200 if args.tiny else SHAPES_TRAIN)
    indices = range(SHAPES_TRAIN, SHAPES_TRAIN + count)
    labels = torch.tensor(indices) % len(SHAPES)
    for half in HALVES:
        images = torch.cat([complete(checkpoint, index, half, 1)[1] for index in indices])
        share = accuracy(classifier, images, labels)
        print(f"completions from the {half} half in their class: {share:.0%} of {count}")


if __name__ == "__main__":
    main()
