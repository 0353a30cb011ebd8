"""What a model for any order can do that the final one can't; on the run of `python rar.py train`.

    python .github/any_order.py [RUN]        about three minutes on two cores

Writes orders.png (the six scan orders as maps of rank, samples in each by the checkpoint where
annealing begins, and by the final weights) and completions.png (held-out drawings, what is kept of
them, and four completions each), and scores 400 completions with the classifier of shapes_score.py.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from shapes_score import accuracy, drawings, load, sample, tok, train_classifier

import rar

ORDERS = ("raster", "z_curve", "subsample", "alternate", "spiral_out", "spiral_in")
HALVES = {"left": "0,0,16,32", "right": "16,0,32,32", "top": "0,0,32,16", "bottom": "0,16,32,32"}


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
    sheet = Image.new("RGB", (left + columns * (cell + gap) + 2 * gap,
                              24 + len(ORDERS) * (cell + gap)), "white")
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
            pictures += [*tok.to_uint8(sample(*load(weights, order=name, seed=1), labels))]
        for column, pixels in enumerate(pictures):
            x = left + column * (cell + gap) + gap * (column > 0) + gap * (column > len(labels))
            sheet.paste(Image.fromarray(pixels).resize((cell, cell), Image.NEAREST), (x, y))
    sheet.save(path)


def complete(checkpoint, index, half, count):
    """What is seen of held-out drawing `index` (2, 3, H, W), and completions (count, 3, H, W)."""
    model, config, tokenizer = load(checkpoint, seed=index)
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        Image.fromarray(tok.draw_shape(index)).save(file.name)
        known, before = tok.known_tokens(file.name, tok.rectangle(HALVES[half]), tokenizer)
    labels = torch.full((count,), index % len(tok.SHAPES))
    return before, sample(model, config, tokenizer, labels, known)


if __name__ == "__main__":
    if sys.argv[1:] and not os.path.exists(sys.argv[1]):
        sys.exit(__doc__)
    torch.set_num_threads(1)  # so that the classifier is the same on every machine
    here = Path(__file__).parent
    run = Path(sys.argv[1] if len(sys.argv) > 1 else rar.find_weights(None).parent)
    checkpoint = run / "checkpoint-0000750.pt"
    draw_orders(run, checkpoint, here / "orders.png")
    first = tok.SHAPES_TRAIN
    shown = []
    for index, half in zip((0, 3, 5, 16, 8, 27), [*HALVES, "left", "top"]):
        before, images = complete(checkpoint, first + index, half, 4)
        shown.append(torch.cat([before, images]))
    names = ["picture", "kept", "1", "2", "3", "4"]
    tok.save_grid(here / "completions.png", torch.cat([torch.cat(shown[i:i + 2])
                                                       for i in (0, 2, 4)]), names * 2)
    classifier = train_classifier(*drawings(0, tok.SHAPES_TRAIN))
    for half in HALVES:
        images = torch.cat([complete(checkpoint, first + i, half, 1)[1] for i in range(100)])
        labels = torch.arange(first, first + 100) % len(tok.SHAPES)
        print(f"completions from the {half} half in their class: "
              f"{accuracy(classifier, images, labels):.0%} of 100")
