"""Pictures, files and the command line, so that rar.py can be about the method alone.

    UserError, Parser, knob     a user's mistake in one line; flags that are fields of a dataclass
    replacing, read_*, write_*  the one place that writes files; one reader for every format
    Run                         the folder of a training run, its progress bar and Ctrl-C
    draw_shape                  the built-in data: ten kinds of shapes, drawn with Pillow
    PatchTokenizer              pictures <-> tokens: k-means codes of patches, a linear decoder
    open_data                   a data set as rows of (class, tokens)
    save_grid                   a labelled picture of pictures
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.cluster.vq import kmeans2
from torch import nn
from tqdm import tqdm

# ---- Mistakes and flags --------------------------------------------------------------------------

class UserError(Exception):
    """A mistake that the user can mend: one line that names the file or flag; exit code 2."""

def knob(default, why, low=-math.inf, high=math.inf):
    """A dataclass field that is also a flag: its default, its reason, and its limits."""
    return dataclasses.field(default=default, metadata={"why": why, "limits": (low, high)})

def knobs_of(config):
    return [field for field in dataclasses.fields(config) if "why" in field.metadata]

def flag(field):
    return "--" + field.name.replace("_", "-")

def check_knobs(config):
    for field in knobs_of(config):
        value, (low, high) = getattr(config, field.name), field.metadata["limits"]
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, str) and not (low <= number <= high and number < math.inf):
                limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                raise UserError(f"{flag(field)} must be {limits}, not {number}")

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with commands that are called with
    (args, the knobs that were given, device, autocast)."""

    commands = None

    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")

    def command(self, name, function, about, config, knobs=None):
        """Add a command with flags for the named knobs of a dataclass, or for all of them."""
        if self.commands is None:
            self.commands = self.add_subparsers(required=True)
        command = self.commands.add_parser(name, help=about, description=about)
        self.commands.metavar = " | ".join(self.commands.choices)
        for field in knobs_of(config):
            if knobs is None or field.name in knobs:
                several = isinstance(field.default, tuple)
                kind = type(field.default[0] if several else field.default)
                command.add_argument(flag(field), type=kind, help=field.metadata["why"],
                                     nargs=len(field.default) if several else None)
        command.add_argument("--device", choices=["cuda", "mps", "cpu"], help="[the best there is]")
        command.add_argument("--precision", choices=["float32", "tf32", "bfloat16"],
                             help="of matrix products [bfloat16 on cuda, else float32]")
        command.set_defaults(function=function, config=config)
        return command

    def run(self, argv):
        """Call the command that argv names. Returns the exit code."""
        try:
            args = self.parse_args(argv)
            given = {field.name: getattr(args, field.name, None) for field in knobs_of(args.config)}
            knobs = {name: tuple(value) if isinstance(value, list) else value
                     for name, value in given.items() if value is not None}
            args.function(args, knobs, *choose_device(args.device, args.precision))
            return 0
        except torch.OutOfMemoryError:
            print("error: out of memory: lower --micro-batch", file=sys.stderr)
            return 2
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as error:
            print(str(error) or "interrupted", file=sys.stderr)
            return 130

def whole_number(low):
    """A type for argparse: an integer from `low` up to what a seed can be."""
    def number(text):
        if not low <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {text}")
        return int(text)
    return number

def choose_device(name, precision):
    """The device, and the autocast context in which networks run on it; weights stay float32."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    name = name or next(name for name in there if there[name])
    if not there[name]:
        raise UserError(f"--device {name}: this machine has no such device that torch can use")
    precision = precision or ("bfloat16" if name == "cuda" else "float32")
    if precision == "tf32" and name != "cuda":
        raise UserError(f"--precision tf32 exists on cuda alone, and this is {name}")
    # in bfloat16 the few products that stay float32, such as the logits', may use TF32 too
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    return torch.device(name), torch.autocast(name, torch.bfloat16, precision == "bfloat16")

# ---- Files ---------------------------------------------------------------------------------------

@contextlib.contextmanager
def replacing(path):
    """Yield a path beside `path` to write to, and rename it to `path` once it is whole.

    Whoever reads `path` finds the old file or the new one, never half of one. Every file that we
    write goes through here, except the log, which grows by whole lines.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise UserError(f"cannot write {path}: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)

def write_tensors(path, tensors):
    with replacing(path) as beside:
        torch.save(tensors, beside)

def write_json(path, value):
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n")

def read_json(path):
    """The JSON object in a file. Raises UserError if there is none."""
    try:
        value = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold one JSON object")
    return value

def read_tensors(path):
    """The dictionary that torch.save wrote to a file; nothing in the file is ever executed.

    torch.load does not look at the checksums in the file, so they are verified first: a flipped
    bit in a weight would otherwise go unnoticed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        value = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever a foreign file makes the two parsers raise
        raise UserError(f"{path} is not a PyTorch file of tensors, or only part of one") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged or holds no dictionary of tensors")
    return value

def load_strictly(module, state, path):
    """Copy a state dict into a module; UserError at the first name or shape that differs."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in state.items()}
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            here = f"{found[name]}" if name in found else "missing"
            there = f"{wanted[name]}" if name in wanted else "none of that name"
            raise UserError(f"{path} does not fit the model: {name} is {here}, expected {there}")
    module.load_state_dict(state)

def newest_weights():
    """The weights.pt of the run in runs/ that was saved last, or None."""
    files = Path("runs").glob("*/weights.pt")
    return max(files, key=lambda file: file.stat().st_mtime, default=None)

def find_weights(path):
    """The weights file that is meant by a file, by a run folder, or by None: the newest run's."""
    if path is None:
        if (newest := newest_weights()) is None:
            raise UserError("there is no run in runs/ yet: make one with python rar.py train, "
                            "or name a file with --weights")
        return newest
    path = Path(path) / "weights.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"--weights: there is no file {path}")
    return path

def read_weights(path):
    """A RAR's state dict, and the sizes in its Config as they follow from the shapes."""
    state = read_tensors(path)
    try:
        ids, width = state["embeddings.weight"].shape
        codebook_size = len(state["lm_head.bias"])
        return state, {
            "width": width, "codebook_size": codebook_size, "num_classes": ids - codebook_size - 2,
            "depth": sum(name.endswith(".attn.qkv.bias") for name in state),
            "heads": width // len(state["blocks.0.attn.q_norm.bias"]),
            "mlp_width": len(state["blocks.0.mlp.fc1.bias"]),
            "grid_size": math.isqrt(state["pos_embed"].shape[1] - 1024)}
    except (KeyError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path} holds no weights of a RAR") from error

def read_config(folder, kind):
    """The dataclass `kind` from the config.json in a folder; its defaults if there is no file."""
    path = Path(folder) / "config.json"
    if not path.exists():
        return kind()
    values = read_json(path)
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except (TypeError, UserError) as error:
        raise UserError(f"{path} is not the config of a run: {error}") from error

def check_folder(folder, given):
    """Raise UserError, before the work rather than after it, if no file can be put in `folder`."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{given}: {there} is not a folder that can be written to")

def picture_path(out, folder):
    """The PNG file that --out names, or a new one in the folder."""
    numbers = range(1, sys.maxsize)
    new = next(p for p in (Path(folder) / f"samples-{n}.png" for n in numbers) if not p.exists())
    path = Path(out) if out else new
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"--out {path}: name a file that ends in .png")
    check_folder(path.parent, f"--out {path}")
    return path

def held_out_text(config, result):
    return "held-out " + ", ".join(
        f"{result[key + '_bits']:.3f} bits/token in {name} order "
        f"({result[key + '_accuracy']:.0%} of tokens right)"
        for name, key in ((config.order, "final_order"), ("random", "random_order")))

class Run:
    """The folder of a training run: config.json, tokenizer.pt, checkpoint.pt (all that is needed to
    go on), weights.pt (names as released), log.jsonl, and the previews step-*.png."""

    # What may change while a run goes on, since no weight follows from it but by rounding.
    free = ("micro_batch", "log_every", "save_every", "scale", "power", "temperature")

    def __init__(self, folder, config):
        self.folder, self.config, self.stopped = Path(folder), config, False
        check_folder(self.folder, f"--run {folder}")

    def load(self, model, optimizer):
        """Copy the checkpoint, if there is one, into both. Returns the updates that were made.
        Raises UserError if the checkpoint is that of another config."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return 0
        saved = read_config(self.folder, type(self.config))
        for field in dataclasses.fields(saved):
            old, new = getattr(saved, field.name), getattr(self.config, field.name)
            if old != new and field.name not in self.free:
                raise UserError(f"{self.folder} holds a run with {flag(field)} {old}, not {new}: "
                                "name another folder with --run")
        state = read_tensors(path)
        if state.keys() != {"updates", "model", "optimizer"}:
            raise UserError(f"{path} is not the checkpoint of a run")
        load_strictly(model, state["model"], path)
        optimizer.load_state_dict(state["optimizer"])
        return state["updates"]

    def save(self, step, model, optimizer):
        weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        write_tensors(self.folder / "checkpoint.pt", {
            "updates": step + 1, "model": weights, "optimizer": optimizer.state_dict()})
        write_tensors(self.folder / "weights.pt", weights)

    def updates(self, first):
        """Yield the updates first .. steps - 1 under a progress bar. On Ctrl-C or SIGTERM, the one
        in hand is the last: `stopped` is set, to be saved before the next is asked for."""
        write_json(self.folder / "config.json", dataclasses.asdict(self.config))
        # what was logged after the checkpoint is made again
        self.log_path, kept = self.folder / "log.jsonl", []
        if self.log_path.exists():
            lines = self.log_path.read_text().splitlines()
            kept = [x for x in lines if x.endswith("}") and json.loads(x)["step"] <= first]
        with replacing(self.log_path) as beside:
            beside.write_text("".join(line + "\n" for line in kept))

        def note(number, frame):
            self.stopped = True
            signal.signal(number, previous[number])  # the second one strikes at once

        previous = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=self.config.steps, initial=first,
                        bar_format="step {n}/{total}{postfix}, {remaining} left |{bar}|")
        self.logged, self.clock = first, time.perf_counter()
        try:
            with self.bar:
                for step in range(first, self.config.steps):
                    yield step
                    if self.stopped:
                        return
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def is_milestone(self, step):
        done = step + 1
        return done % self.config.save_every == 0 or done == self.config.steps

    def preview(self, step):
        return self.folder / f"step-{step + 1:06}.png"

    def report(self, step, line):
        """Move the bar, and on every log_every-th update log what the step said of itself."""
        done = step + 1
        self.bar.update()
        if done == 1 or done % self.config.log_every == 0 or self.is_milestone(step):
            rate = (done - self.logged) * self.config.batch / (time.perf_counter() - self.clock)
            line = {key: float(value) for key, value in line.items()} | {"images_per_second": rate}
            self.log(step, line)
            self.bar.set_postfix_str(
                f"loss {line['loss']:.3f}, r {line['r']:.2f}, {rate:,.0f} images/s")
            if not math.isfinite(line["loss"]):
                raise UserError(f"the loss is {line['loss']} after {done} updates; {self.folder} "
                                "keeps the checkpoint before that. Try a lower --lr or --clip")

    def report_held_out(self, step, result):
        self.log(step, result)
        self.bar.write(f"step {step + 1}: {held_out_text(self.config, result)}")

    def log(self, step, line):
        try:
            with open(self.log_path, "a") as file:
                file.write(json.dumps({"step": step + 1} | line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.log_path}: {error.strerror}") from error
        self.logged, self.clock = step + 1, time.perf_counter()

    def say_what_next(self):
        """Say how it ended and what to type next. Raises KeyboardInterrupt if it was stopped."""
        if self.stopped:
            raise KeyboardInterrupt(f"stopped; {self.folder} is saved, the same command goes on")
        print(f"{self.folder} is finished: {self.config.steps} updates. "
              f"Look at {self.preview(self.config.steps - 1)}")
        is_newest = newest_weights() == self.folder / "weights.pt"
        print("next: python rar.py sample" + ("" if is_newest else f" --weights {self.folder}"))

# ---- Built-in data: shapes -----------------------------------------------------------------------

SHAPES_SIZE = 32
SHAPES_TRAIN, SHAPES_HELD_OUT = 10_000, 500
GROUND = (22, 25, 37)
COLOURS = ((240, 60, 70), (255, 220, 70), (20, 180, 110), (90, 110, 255))

def _circle(radius=1.0, x=0.0, y=0.0):
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1)

def _star():
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.1, 0.45)[:, None]
    return radii * np.stack([np.cos(angles), np.sin(angles)], 1)

def _heart():
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2], 1) / 16

# A kind is a list of polygons within about [-1, 1]^2, y downwards; True fills with the ground.
SHAPES = {
    "circle": [(_circle(), False)],
    "square": [([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)], False)],
    "triangle": [([(0, -1), (1.1, 0.9), (-1.1, 0.9)], False)],
    "star": [(_star(), False)],
    "cross": [([(-1, -0.33), (1, -0.33), (1, 0.33), (-1, 0.33)], False),
              ([(-0.33, -1), (0.33, -1), (0.33, 1), (-0.33, 1)], False)],
    "ring": [(_circle(), False), (_circle(0.55), True)],
    "heart": [(_heart(), False)],
    "crescent": [(_circle(), False), (_circle(0.9, 0.55, -0.25), True)],
    "arrow": [([(-1, -0.3), (0.05, -0.3), (0.05, -0.9), (1.1, 0), (0.05, 0.9), (0.05, 0.3),
                (-1, 0.3)], False)],
    "stripes": [([(-1, y), (1, y), (1, y + 0.4), (-1, y + 0.4)], False) for y in (-1, -0.2, 0.6)],
}

def draw_shape(index):
    """Picture number `index`, always the same: (32, 32, 3) uint8 of class index % 10."""
    random = np.random.default_rng(index)
    radius = random.uniform(7.5, 12.5)
    room = SHAPES_SIZE / 2 - 1.1 * radius
    centre = SHAPES_SIZE / 2 + random.uniform(-room, room, size=2)
    colour = COLOURS[random.integers(len(COLOURS))]
    # Edges are not smoothed: their blends of colours would use up most of a small codebook.
    image = Image.new("RGB", (SHAPES_SIZE, SHAPES_SIZE), GROUND)
    pen = ImageDraw.Draw(image)
    for points, hole in list(SHAPES.values())[index % len(SHAPES)]:
        corners = centre + radius * np.asarray(points)
        pen.polygon([tuple(corner) for corner in corners], fill=GROUND if hole else colour)
    return np.asarray(image)

# ---- Pictures <-> tokens -------------------------------------------------------------------------

class PatchTokenizer(nn.Module):
    """A token is the nearest of `codebook_size` mean patches; no network, fitted in seconds.

    Encoding looks at one patch at a time. Decoding a token looks at the mean patches of its 3x3
    neighbourhood: one linear map, which is a 3x3 convolution over the grid of mean patches.
    """

    def __init__(self, grid_size, patch_size, codebook_size):
        super().__init__()
        channels = 3 * patch_size**2
        self.register_buffer("codebook", torch.zeros(codebook_size, channels))
        self.register_buffer("decoder", torch.zeros(channels, channels, 3, 3))
        self.register_buffer("decoder_bias", torch.zeros(channels))
        self.register_buffer("grid", torch.tensor(grid_size))

    @property
    def codebook_size(self):
        return len(self.codebook)

    @property
    def grid_size(self):
        return int(self.grid)

    @property
    def patch_size(self):
        return math.isqrt(self.codebook.shape[1] // 3)

    @property
    def image_size(self):
        return self.grid_size * self.patch_size

    def patches(self, images):
        """(B, 3, H, W) -> (B, T, 3 * patch * patch)"""
        return F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)

    def encode(self, images):
        """float (B, 3, H, W) in [0, 1] -> int64 (B, T), row by row."""
        patches = self.patches(images.to(self.codebook))  # (B, T, C)
        # |p - c|^2 without |p|^2, which is the same for every code c
        distances = (self.codebook**2).sum(1) - 2 * patches @ self.codebook.T  # (B, T, V)
        return distances.argmin(-1)

    def decode(self, tokens):
        """int (B, T) -> float (B, 3, H, W) in [0, 1]."""
        pixels = F.conv2d(self._means(tokens), self.decoder, self.decoder_bias, padding=1)
        image = F.fold(pixels.flatten(2), self.image_size, self.patch_size, stride=self.patch_size)
        return image.clamp(0, 1)

    def _means(self, tokens):
        means = self.codebook[tokens]  # (B, T, C)
        return means.transpose(1, 2).unflatten(2, (self.grid_size, self.grid_size))

    @classmethod
    def fit(cls, images, grid_size, codebook_size):
        """The tokenizer of these pictures (B, 3, S, S) in [0, 1], S a multiple of grid_size."""
        if images.shape[-1] % grid_size:
            raise UserError(f"--grid-size {grid_size} does not divide pictures of "
                            f"{images.shape[-1]} pixels a side")
        self = cls(grid_size, images.shape[-1] // grid_size, codebook_size)
        random = np.random.default_rng(0)
        patches = self.patches(images).flatten(0, 1).numpy()  # (N, C)
        patches = patches[random.permutation(len(patches))[:100_000]]
        # Starting from patches that all differ keeps the many empty ones from taking every code.
        distinct = np.unique(patches, axis=0)
        if len(distinct) < codebook_size:
            raise UserError(f"--codebook-size {codebook_size} is more than the {len(distinct)} "
                            "different patches of these pictures")
        start = distinct[random.permutation(len(distinct))[:codebook_size]]
        codebook, _ = kmeans2(patches, start, iter=20, minit="matrix")
        self.codebook.copy_(torch.from_numpy(codebook))

        # Ridge regression from a 3x3 neighbourhood's means to the patch in its middle, in float64:
        # float32 loses 2 dB here.
        images = images[:2000]
        around = F.unfold(self._means(self.encode(images)), 3, padding=1)  # (B, 9C, T)
        inputs = around.transpose(1, 2).flatten(0, 1).double()  # (N, 9C)
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)  # and a bias
        outputs = self.patches(images).flatten(0, 1).double()  # (N, C)
        square = inputs.T @ inputs + 1e-3 * torch.eye(inputs.shape[1])
        solution = torch.linalg.solve(square, inputs.T @ outputs)  # (9C + 1, C)
        self.decoder.copy_(solution[:-1].T.unflatten(1, (-1, 3, 3)))
        self.decoder_bias.copy_(solution[-1])
        return self

def load(path):
    """The tokenizer in a file. Raises UserError if the file holds none."""
    state = read_tensors(path)
    try:
        (codes, channels), grid_size = state["codebook"].shape, int(state["grid"])
        self = PatchTokenizer(grid_size, math.isqrt(channels // 3), codes)
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} holds no tokenizer") from error
    load_strictly(self, state, path)
    return self

# ---- Data sets -----------------------------------------------------------------------------------

@dataclasses.dataclass
class Data:
    """Rows are (N, 1 + T) uint16: the class, then the tokens in cell order."""

    train: np.ndarray
    held_out: np.ndarray
    tokenizer: nn.Module

def class_names(data):
    """The names of the classes in a data set, by number. UserError if there is no such data."""
    if data != "shapes":
        raise UserError(f"--data {data}: there is no such data; the built-in data is 'shapes'")
    return tuple(SHAPES)

def class_numbers(texts, config):
    """The numbers of the classes that are named or numbered by `texts`; of all if None."""
    if texts is None:
        return list(range(config.num_classes))
    names = {name: number for number, name in enumerate(config.class_names)}
    names |= {str(number): number for number in range(config.num_classes)}
    for text in texts:
        if text not in names:
            there = f": {', '.join(config.class_names)}" if config.class_names else ""
            raise UserError(f"--classes {text}: there are 0 to {config.num_classes - 1}{there}")
    return [names[text] for text in texts]

def open_data(config, folder, fit=False):
    """The data set config.data as tokens, by the tokenizer.pt in the folder. With `fit`, that is
    fitted to the data and put there first."""
    class_names(config.data)
    path, count = Path(folder) / "tokenizer.pt", SHAPES_TRAIN + SHAPES_HELD_OUT
    images = np.stack([draw_shape(i) for i in tqdm(range(count), "drawing shapes", leave=False)])
    images = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255  # (N, 3, 32, 32)
    if fit:
        tokenizer = PatchTokenizer.fit(
            images[:SHAPES_TRAIN], config.grid_size, config.codebook_size)
        write_tensors(path, tokenizer.state_dict())
    else:
        tokenizer = load(path)
    if (tokenizer.grid_size, tokenizer.codebook_size) != (config.grid_size, config.codebook_size):
        raise UserError(f"{path} makes {tokenizer.grid_size} x {tokenizer.grid_size} tokens of "
                        f"{tokenizer.codebook_size}, the model {config.grid_size} x "
                        f"{config.grid_size} of {config.codebook_size}")
    labels = np.arange(count) % len(SHAPES)
    tokens = torch.cat([tokenizer.encode(batch) for batch in images.split(500)])
    rows = np.concatenate([labels[:, None], tokens.numpy()], 1).astype(np.uint16)
    return Data(rows[:SHAPES_TRAIN], rows[SHAPES_TRAIN:], tokenizer)

# ---- Pictures ------------------------------------------------------------------------------------

def to_uint8(images):
    """float (B, 3, H, W) -> uint8 (B, H, W, 3). Truncated, not rounded: the authors' choice, and
    with it the published FIDs were computed."""
    return (images.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

def save_grid(path, images, names):
    """A PNG of images (B, 3, H, W) in [0, 1], row by row, a column for each name, under it. With
    more than 16 names it is 16 columns without names."""
    columns, names = (len(names), names) if len(names) <= 16 else (16, ())
    pixels = to_uint8(images)
    scale = max(1, 80 // pixels.shape[1])  # small pictures are enlarged without smoothing
    height, width = pixels.shape[1] * scale, pixels.shape[2] * scale
    gap, header = 4, 22 if names else 0
    rows = math.ceil(len(pixels) / columns)
    size = (columns * (width + gap) + gap, rows * (height + gap) + gap + header)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for column, name in enumerate(names):
        centre = (gap + column * (width + gap) + width / 2, gap + header / 2)
        pen.text(centre, str(name), fill="black", font=font, anchor="mm")
    for i, picture in enumerate(pixels):
        row, column = divmod(i, columns)
        corner = (gap + column * (width + gap), gap + header + row * (height + gap))
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.NEAREST), corner)
    with replacing(path) as beside:
        sheet.save(beside, format="PNG")
