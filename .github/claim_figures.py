"""Draws claim_bits.png and claim_when.png from claim.json, and prints the tables of claim.md.

    python .github/claim_figures.py [FOLDER]        a second; the pictures go to .github or FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
OUT = Path(sys.argv[1]) if sys.argv[1:] else HERE
RESULTS = json.loads((HERE / "claim.json").read_text())
SCHEDULES = {"raster": ("0-0", "#c0392b"), "annealed": ("0.5-0.75", "#1f5fa8"),
             "always random": ("1-1", "#7f7f7f")}
PAIRS = ("0-0", "0.25-0.5", "0.5-0.75", "0.75-1", "1-1")
ZOOM = 2  # drawn larger, then made smaller: smooth lines


class Sheet:
    def __init__(self, width, height):
        self.image = Image.new("RGB", (width * ZOOM, height * ZOOM), "white")
        self.pen = ImageDraw.Draw(self.image)

    def line(self, points, colour, width=1.0):
        points = [(x * ZOOM, y * ZOOM) for x, y in points]
        self.pen.line(points, colour, round(width * ZOOM), joint="curve")

    def text(self, x, y, text, colour="black", anchor="mm", size=13):
        font = ImageFont.load_default(size=size * ZOOM)
        self.pen.text((x * ZOOM, y * ZOOM), text, colour, font, anchor=anchor)

    def box(self, x0, y0, x1, y1, colour):
        self.pen.rectangle([v * ZOOM for v in (x0, y0, x1, y1)], colour)

    def dot(self, x, y, radius, fill, edge):
        self.pen.ellipse([v * ZOOM for v in (x - radius, y - radius, x + radius, y + radius)],
                         fill, edge, ZOOM)

    def save(self, name):
        size = (self.image.width // ZOOM, self.image.height // ZOOM)
        self.image.resize(size, Image.LANCZOS).save(OUT / name, optimize=True)


def runs(regime, pair, *flags):
    """The runs of this schedule, one for each seed."""
    names = ("-".join([regime, pair, *flags, str(seed)]) for seed in range(9))
    return [RESULTS[name] for name in names if name in RESULTS]


def curve(run, key="final_order_bits"):
    return [line["step"] for line in run["log"]], [line[key] for line in run["log"]]


def draw_bits():
    """Held-out bits against updates: the mean of two seeds, and each of them, thin."""
    sheet, low, high, top, bottom = Sheet(880, 400), 5.2, 7.0, 50, 350
    panels = {"few": (60, 360, 1200, "2,000 photographs, 19 passes"),
              "plenty": (490, 770, 750, "10,000 photographs, 2.4 passes")}

    def place(x0, x1, last, step, bits):
        return (x0 + (x1 - x0) * step / last,
                bottom - (bottom - top) * (min(bits, high) - low) / (high - low))

    for regime, (x0, x1, last, title) in panels.items():
        sheet.text((x0 + x1) / 2, 16, title, size=15)
        sheet.box(x0 + (x1 - x0) / 2, top, x0 + (x1 - x0) * 0.75, bottom, "#edf2f9")
        sheet.text(x0 + (x1 - x0) * 0.625, top - 10, "r from 1 to 0", "#1f5fa8", size=11)
        for bits in np.arange(low, high + 0.01, 0.2):
            y = place(x0, x1, last, 0, bits)[1]
            sheet.line([(x0, y), (x1, y)], "#dddddd", 0.5)
            sheet.text(x0 - 6, y, f"{bits:.1f}", anchor="rm", size=11)
        for step in range(0, last + 1, last // 4 if last % 4 == 0 else 150):
            sheet.text(place(x0, x1, last, step, low)[0], bottom + 12, str(step), size=11)
        sheet.line([(x0, top), (x0, bottom), (x1, bottom)], "black", 1)
        sheet.text((x0 + x1) / 2, bottom + 32, "updates")
        for name, (pair, colour) in SCHEDULES.items():
            curves = [curve(run) for run in runs(regime, pair)]
            if not curves:
                continue
            mean = list(zip(curves[0][0], np.mean([bits for _, bits in curves], axis=0)))
            shown = [i for i, (_, bits) in enumerate(mean) if bits <= high]
            for steps, bits in curves:
                sheet.line([place(x0, x1, last, steps[i], bits[i]) for i in shown], colour, 0.7)
            points = [place(x0, x1, last, *mean[i]) for i in shown]
            sheet.line(points, colour, 2.2)
            sheet.text(points[-1][0] + 6, points[-1][1] - 7, name, colour, "lm")
            sheet.text(points[-1][0] + 6, points[-1][1] + 7, f"{mean[-1][1]:.2f}", colour, "lm")
    sheet.text(8, 34, "held-out bits per token, raster order", anchor="lm", size=12)
    sheet.save("claim_bits.png")


def draw_when():
    """The five pairs: r over training, held-out bits at the end, distance of the samples; a dot is
    a seed. Hollow: raster's best bits on the way; always random in random order."""
    sheet, height, top, blue = Sheet(880, 330), 46, 60, "#1f5fa8"
    strip, columns = (110, 330), {
        "held-out bits per token": (390, 600, 5.4, 7.0, 0.4, 1),
        "Frechet distance of samples": (650, 860, 2.0, 4.5, 0.5, 1)}
    bottom = top + len(PAIRS) * height
    sheet.text(sum(strip) / 2, 24, "r over training", size=14)
    for title, (x0, x1, low, high, tick, digits) in columns.items():
        sheet.text((x0 + x1) / 2, 24, title, size=14)
        for value in np.arange(low, high + 0.01, tick):
            x = x0 + (x1 - x0) * (value - low) / (high - low)
            sheet.line([(x, top - 14), (x, bottom)], "#dddddd", 0.5)
            sheet.text(x, bottom + 12, f"{value:.{digits}f}", size=11)
    for row, pair in enumerate(PAIRS):
        y, (start, end) = top + (row + 0.4) * height, map(float, pair.split("-"))
        of, (x0, x1) = runs("few", pair), strip
        sheet.text(x0 - 14, y, pair.replace("-", " to "), anchor="rm")
        for x in range(x0, x1):
            at = (x - x0) / (x1 - x0)
            r = 1.0 if at < start else (end - at) / (end - start) if at < end else 0.0
            sheet.box(x, y + 12 - 24 * r, x + 1, y + 12, "#8fb2dc")
        sheet.line([(x0, y + 12), (x1, y + 12)], "black", 0.7)
        solid = [[curve(run)[1][-1] for run in of],
                 [run["score"]["raster"]["distance"] for run in of]]
        hollow, note = [[], []], ""
        if pair == "0-0":
            hollow, note = [[min(curve(run)[1]) for run in of], []], "best on the way"
        if pair == "1-1":
            hollow = [[curve(run, "random_order_bits")[1][-1] for run in of],
                      [run["score"]["random"]["distance"] for run in of]]
            note = "in random order"
        for (x0, x1, low, high, *_), *kinds in zip(columns.values(), solid, hollow):
            for numbers, fill in zip(kinds, (blue, "white")):
                at = [x0 + (x1 - x0) * (number - low) / (high - low) for number in numbers]
                for x in at:
                    sheet.dot(x, y, 5, fill, blue if fill == "white" else "white")
                if at and fill == "white":
                    sheet.text(np.mean(at), y - 14, note, blue, size=11)
    sheet.save("claim_when.png")


def told(numbers, digits):
    """The mean, and in brackets each seed."""
    numbers = list(numbers)
    each = ", ".join(f"{number:.{digits}f}" for number in numbers)
    return f"{np.mean(numbers):.{digits}f} ({each})"


def print_samples(title, of, order="raster"):
    scores = [run["score"][order] for run in of if order in run["score"]]
    if not scores:
        return
    best = [min(curve(run)[1]) for run in of]
    last = [run["log"][-1]["final_order_bits"] for run in of]
    print("|", " | ".join([
        title, told(best, 2), told(last, 2), " ".join(f"{s['scale']:g}" for s in scores),
        told((100 * s["accuracy"] for s in scores), 1), told((s["distance"] for s in scores), 2),
        told((100 * s["grid"][0]["accuracy"] for s in scores), 1),
        told((s["grid"][0]["distance"] for s in scores), 2),
        told((100 * s["nearest"] for s in scores), 1)]), "|")


if __name__ == "__main__":
    draw_bits()
    draw_when()
    print({key: RESULTS[key] for key in ("photographs", "reconstructions")})
    for regime in ("few", "short", "plenty"):
        near = [r["score"]["held-out nearest"] for n, r in RESULTS.items() if n.startswith(regime)]
        print(f"\n{regime}: held-out photographs have {near[0]:.1%} of the nearest's tokens\n"
              "| schedule | best bits | last bits | scale | accuracy, % | distance | "
              "unguided: accuracy | distance | tokens of the nearest, % |")
        for pair in PAIRS:
            for order in ("raster", "random"):
                print_samples(f"{pair}, {order} order", runs(regime, pair), order)
            print_samples(f"{pair}, dropout", runs(regime, pair, "dropout", "0.1"))
    for title, flags in (("with", ()), ("without", ("no-target-aware",))):
        for key in ("random_order_bits", "final_order_bits"):
            numbers = [curve(run, key)[1][-1] for run in runs("plenty", "1-1", *flags)]
            print(f"{title} target-aware embedding, {key}: {told(numbers, 3)}")
