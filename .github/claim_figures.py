"""Draws and tells what came out of claim.py. By itself it draws the 23 earlier runs (claim.json).

    python .github/claim_figures.py [FOLDER]        claim_bits.png goes to .github or FOLDER
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import t as student

HERE = Path(__file__).parent
COLOURS = {"raster": "#c0392b", "annealed": "#1f5fa8", "random": "#7f7f7f"}


def draw(path, panels):
    """Bits against updates: each seed, thin, and their mean. panels are {title: arms}, and arms
    {name: (updates, bits of each seed)}."""
    # Drawn larger, then made smaller: smooth lines.
    image = Image.new("RGB", (880 * len(panels), 800), "white")
    pen = ImageDraw.Draw(image)

    def text(x, y, words, colour="black", anchor="mm", size=23):
        pen.text((x, y), words, colour, ImageFont.load_default(size), anchor)

    curves = [bits for arms in panels.values() for _, seeds in arms.values() for bits in seeds]
    low = math.floor(5 * min(map(min, curves))) / 5
    high = math.ceil(5 * max(bits[-1] for bits in curves)) / 5 + 0.2
    for number, (title, arms) in enumerate(panels.items()):
        x0, y0, y1 = 110 + 880 * number, 100, 700
        x1 = x0 + 600
        last = max(steps[-1] for steps, _ in arms.values())

        def place(step, bits):
            return x0 + (x1 - x0) * step / last, y1 - (y1 - y0) * (bits - low) / (high - low)

        pen.rectangle([place(last / 2, high), place(0.75 * last, low)], "#edf2f9")
        text(place(0.625 * last, low)[0], 80, "r from 1 to 0", COLOURS["annealed"])
        text((x0 + x1) / 2, 30, title, size=30)
        text(x0 - 90, 68, "held-out bits per token", anchor="lm")
        for bits in np.arange(low, high + 0.01, 0.2):
            pen.line([place(0, bits), place(last, bits)], "#dddddd")
            text(x0 - 12, place(0, bits)[1], f"{bits:.1f}", anchor="rm")
        for step in np.linspace(0, last, 6):
            text(place(step, low)[0], y1 + 24, f"{step:.0f}")
        text((x0 + x1) / 2, y1 + 64, "updates")
        pen.line([(x0, y0), (x0, y1), (x1, y1)], "black", 2)

        for name, (steps, seeds) in arms.items():
            mean = np.mean(seeds, axis=0)
            for bits, width in [*((each, 1) for each in seeds), (mean, 5)]:
                shown = [place(s, b) for s, b in zip(steps, bits) if b <= high]
                pen.line(shown, COLOURS[name], width, joint="curve")
            x, y = place(last, mean[-1])
            text(x + 12, y - 14, name, COLOURS[name], "lm")
            text(x + 12, y + 14, f"{mean[-1]:.2f}", COLOURS[name], "lm")
    image.resize((image.width // 2, 400), Image.LANCZOS).save(path, optimize=True)


def print_rows(rows, tell):
    """A line of each row {title: runs}, with a cell for each number that a run has."""
    columns = [*next(iter(rows.values()))[0]]
    print("\n|", " | ".join(["", *columns]), "|\n|" + "---|" * (1 + len(columns)))
    for title, runs in rows.items():
        cells = [tell([run[column] for run in runs]) for column in columns]
        print("|", " | ".join([title, *cells]), "|")


def each(numbers):
    return f"{np.mean(numbers):.3f} ({', '.join(f'{number:.3f}' for number in numbers)})"


def interval(numbers):
    """The mean and half of its 95 % interval, which two seeds make wide."""
    half = student.ppf(0.975, len(numbers) - 1) * np.std(numbers, ddof=1) / len(numbers)**0.5
    return f"{np.mean(numbers):+.3f} ± {half:.3f}"


def report(results, path):
    """Draw the results {arm-seed: score.json}, print a table, and what annealing changes."""
    rows, arms = {}, {}
    for name, result in results.items():
        arm, steps = name.split("-")[0], result.pop("steps")
        arms.setdefault(arm, (steps, []))[1].append(result["raster"]["bits"])
        for order, score in result.items():
            bits = score.pop("bits")
            ends = {"bits, best": min(bits), "at the end": bits[-1]}
            rows.setdefault(f"{arm}, {order} order", []).append(ends | score)
    draw(path, {"a thin line is a seed": arms})
    print_rows(rows, each)
    annealed, changes = rows.pop("annealed, raster order", []), {}
    for title, runs in rows.items():
        changes[f"annealed minus {title}"] = [
            {key: ours[key] - theirs[key] for key in ours} for ours, theirs in zip(annealed, runs)]
    changes = {title: runs for title, runs in changes.items() if len(runs) > 1}
    if changes:
        print_rows(changes, interval)


def main():
    folder = Path(sys.argv[1]) if sys.argv[1:] else HERE
    results = json.loads((HERE / "claim.json").read_text())
    panels = {"2,000 photographs, 19 passes": "few", "10,000 photographs, 2.4 passes": "plenty"}
    pairs = {"raster": "0-0", "random": "1-1", "annealed": "0.5-0.75"}
    for title, regime in panels.items():
        panels[title] = {}
        for arm, pair in pairs.items():
            names = [f"{regime}-{pair}-{seed}" for seed in range(3)]
            logs = [results[name]["log"] for name in names if name in results]
            bits = [[line["final_order_bits"] for line in log] for log in logs]
            panels[title][arm] = [line["step"] for line in logs[0]], bits
    draw(folder / "claim_bits.png", panels)


if __name__ == "__main__":
    main()
