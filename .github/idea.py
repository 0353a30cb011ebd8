"""Draws the README's figure of the idea, idea.png.

    python .github/idea.py [FOLDER]        seconds; the picture goes to .github or FOLDER

Above, r over training, and the orders that rar.py draws at four moments of it, as paths through
4x4 cells. Below, the sequence of a picture of 2x2 cells in the order [2, 0, 3, 1].
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
OUT = Path(sys.argv[1]) if sys.argv[1:] else HERE
sys.path.insert(0, str(HERE.parent))
from rar import randomness, sample_orders  # noqa: E402

UNIT = 3  # everything is drawn three times as large, and then smoothed
INK, GREY, BLUE, RED, PALE = "#1d2430", "#8a93a3", "#2f6fde", "#d8443c", "#eef2f8"
sheet = Image.new("RGB", (1000 * UNIT, 560 * UNIT), "white")
pen = ImageDraw.Draw(sheet)

def at(*numbers):
    return [round(number * UNIT) for number in numbers]

def line(points, colour, width=1.0):
    pen.line([tuple(at(*point)) for point in points], colour, round(width * UNIT), "curve")

def text(x, y, words, colour=INK, size=15, anchor="mm"):
    font = ImageFont.load_default(size * UNIT)
    pen.text(at(x, y), words, colour, font, anchor)

def box(x, y, words, colour=INK, fill="white", width=132, height=32):
    pen.rounded_rectangle(at(x - width / 2, y - height / 2, x + width / 2, y + height / 2),
                          6 * UNIT, fill, colour, UNIT)
    text(x, y, words, colour)

def path(x, y, order, size=58):
    """A picture of 4x4 cells and the way that `order` (16,) takes through them."""
    pen.rectangle(at(x, y, x + size, y + size), PALE)
    cell = size / 4
    points = [(x + (c % 4 + 0.5) * cell, y + (c // 4 + 0.5) * cell) for c in order]
    is_raster = list(order) == sorted(order)
    line(points, BLUE if is_raster else RED, 1.4)
    for (px, py), radius in ((points[0], 3.4), (points[-1], 2)):
        pen.ellipse(at(px - radius, py - radius, px + radius, py + radius), INK)

left, right, top, bottom = 110, 960, 40, 120
line([(left, top - 8), (left, bottom), (right, bottom)], GREY)
curve = [(left + (right - left) * s / 400, bottom - (bottom - top) * randomness(s, 200, 300))
         for s in range(401)]
line(curve, INK, 2.4)
text(left - 12, top, "r = 1", anchor="rm")
text(left - 12, bottom, "0", anchor="rm")
for share, words in ((0.5, "50 %"), (0.75, "75 % of training")):
    text(left + (right - left) * share, bottom + 14, words, GREY, 13)
text(left + 14, top - 20, "each sample is put in a random order with probability r", size=14,
     anchor="lm")
rng = np.random.default_rng(2)
for share in (0.11, 0.37, 0.635, 0.89):
    centre, r = left + (right - left) * share, randomness(share * 400, 200, 300)
    line([(centre, bottom), (centre, bottom - (bottom - top) * r)], GREY, 0.8)
    for i, order in enumerate(sample_orders(6, 16, r, rng=rng).tolist()):
        path(centre - 93 + i % 3 * 64, 152 + i // 3 * 64, order)
text(left - 12, 215, "orders", anchor="rm")

columns, own, following = [230, 400, 570, 740, 910], [None, None, 2, 0, 3], [None, 2, 0, 3, 1]
text(left - 12, 315, "predicts", anchor="rm")
text(left - 12, 385, "network", anchor="rm")
text(left - 12, 455, "token", anchor="rm")
text(left - 12, 493, "+ where it is", GREY, 14, "rm")
text(left - 12, 529, "+ which is next", RED, 14, "rm")
pen.rounded_rectangle(at(left + 50, 364, right + 20, 406), 8 * UNIT, PALE)
text((left + right) / 2 + 35, 385, "causal transformer: a slot sees itself and those before it")
for x, mine, nxt in zip(columns, own, following):
    for start, end in ((438, 408), (362, 334)):
        if end == 408 or nxt is not None:
            line([(x, start), (x, end)], GREY, 1.2)
            line([(x - 4, end + 5), (x, end), (x + 4, end + 5)], GREY, 1.2)
    if nxt is not None:
        box(x, 315, f"token of cell {nxt}", BLUE)
        box(x, 529, f"cell {nxt}", RED, width=84, height=26)
    name = "cls" if x == columns[0] else "class" if x == columns[1] else f"token of cell {mine}"
    box(x, 455, name)
    if mine is not None:
        box(x, 493, f"cell {mine}", GREY, width=84, height=26)
sheet.resize((1000, 560), Image.LANCZOS).quantize(64).save(OUT / "idea.png", optimize=True)
