"""Pictures in, tokens, pictures out: for rar.py, and for fid.py, which reads pictures.

    1 the two tokenizers   2 photographs   3 the built-in shapes   4 data sets as tokens
    5 pictures on disk     6 the command   7 what all three programs need

    python tokenizer.py reconstruct a.jpg b.jpg --out recon.png     shows what a tokenizer keeps
"""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import http.client
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import urllib.request
import warnings
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from scipy.cluster.vq import kmeans2
from torch import nn
from tqdm import tqdm

# ---- 1. Tokenizers -------------------------------------------------------------------------------

def nearest(vectors, codes):
    """The number of the nearest code (V, C) to each vector (..., C): int64 (...)."""
    # |v - c|^2 without |v|^2, which is the same for all codes
    return ((codes**2).sum(1) - 2 * vectors @ codes.T).argmin(-1)

class PatchTokenizer(nn.Module):
    """A token is the nearest of `codebook_size` mean patches. It is fitted in seconds.

    Decoding is a linear map of the mean patches of a token and its eight neighbours.
    """

    def __init__(self, grid_size, patch_size, codebook_size):
        super().__init__()
        self.grid_size, self.patch_size, self.codebook_size = grid_size, patch_size, codebook_size
        self.image_size, channels = grid_size * patch_size, 3 * patch_size**2
        self.register_buffer("codebook", torch.zeros(codebook_size, channels))
        self.register_buffer("decoder", torch.zeros(channels, channels, 3, 3))
        self.register_buffer("decoder_bias", torch.zeros(channels))
        self.register_buffer("grid", torch.tensor(grid_size))

    def patches(self, images):
        """(B, 3, H, W) -> (B, T, 3 * patch * patch)"""
        return F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)

    def means(self, tokens):
        """int (B, T) -> the mean patches (B, 3 * patch * patch, grid, grid)"""
        grid = (self.grid_size, self.grid_size)
        return self.codebook[tokens].transpose(1, 2).unflatten(2, grid)

    def encode(self, images):
        """float (B, 3, H, W) in [0, 1] -> int64 (B, T), row by row"""
        return nearest(self.patches(images.to(self.codebook)), self.codebook)

    def decode(self, tokens):
        """int (B, T) -> float (B, 3, H, W) in [0, 1]"""
        pixels = F.conv2d(self.means(tokens), self.decoder, self.decoder_bias, padding=1)
        image = F.fold(pixels.flatten(2), self.image_size, self.patch_size, stride=self.patch_size)
        return image.clamp(0, 1)

    @classmethod
    def fit(cls, images, grid_size, codebook_size):
        """The tokenizer of these pictures (B, 3, S, S) in [0, 1], S a multiple of grid_size."""
        if images.shape[-1] % grid_size:
            raise UserError(f"--grid-size {grid_size} does not divide pictures of "
                            f"{images.shape[-1]} pixels a side")
        self = cls(grid_size, images.shape[-1] // grid_size, codebook_size)
        random = np.random.default_rng(0)
        patches = self.patches(images).flatten(0, 1).numpy()             # (N, C)
        patches = patches[random.permutation(len(patches))[:60_000]]
        # All start from different patches, or the many empty ones would take every code.
        distinct = np.unique(patches, axis=0)
        if len(distinct) < codebook_size:
            raise UserError(f"--codebook-size {codebook_size} is more than the {len(distinct)} "
                            "different patches of these pictures")
        codebook = distinct[random.permutation(len(distinct))[:codebook_size]]
        for _ in tqdm(range(20), "fitting the tokenizer", leave=False):
            codebook, _ = kmeans2(patches, codebook, iter=1, minit="matrix")
        self.codebook.copy_(torch.from_numpy(codebook))
        self.decoder[:, :, 1, 1] = torch.eye(self.codebook.shape[1])  # the token's own mean
        if self.patch_size <= 16:  # larger ones would take tens of GB
            self.fit_decoder(images[:5_000_000 // patches.shape[1] // grid_size**2])
        return self

    def fit_decoder(self, images):
        """Ridge regression from nine mean patches to what the one in the middle lacks.

        In float64: float32 loses 2 dB. With few samples the ridge leaves nearly nothing.
        """
        tokens = torch.cat([self.encode(part) for part in images.split(50)])
        around = F.unfold(self.means(tokens), 3, padding=1)              # (B, 9C, T)
        inputs = around.transpose(1, 2).flatten(0, 1).double()           # (N, 9C)
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)  # and a bias
        outputs = (self.patches(images) - self.codebook[tokens]).flatten(0, 1).double()
        square = inputs.T @ inputs
        ridge = square.diagonal().mean() * len(square) / len(inputs)
        square += ridge * torch.eye(len(square))
        solution = torch.linalg.solve(square, inputs.T @ outputs)        # (9C + 1, C)
        self.decoder += solution[:-1].T.unflatten(1, (-1, 3, 3))
        self.decoder_bias.copy_(solution[-1])

class ResidualBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(outputs, outputs, 1, bias=False)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if hasattr(self, "nin_shortcut"):
            return h + self.nin_shortcut(h)  # Trap: of h. The input is not added at all.
        return h + x

def two_blocks(inputs, outputs):
    return nn.Sequential(ResidualBlock(inputs, outputs), ResidualBlock(outputs, outputs))

def named(**modules):
    """A Sequential whose parameters have the names of the release."""
    return nn.Sequential(OrderedDict(modules))

def encoder():
    """(B, 3, 256, 256) in [0, 1] -> (B, 256, 16, 16)"""
    widths = [(128, 128), (128, 128), (128, 256), (256, 256)]
    levels = [named(block=two_blocks(*pair), halve=nn.AvgPool2d(2)) for pair in widths]
    down = nn.Sequential(*levels, named(block=two_blocks(256, 512)))
    return named(conv_in=nn.Conv2d(3, 128, 3, padding=1, bias=False), down=down,
                 mid=two_blocks(512, 512), norm_out=nn.GroupNorm(32, 512, eps=1e-6),
                 silu=nn.SiLU(), conv_out=nn.Conv2d(512, 256, 1))

def decoder():
    """(B, 256, 16, 16) -> (B, 3, 256, 256), about in [0, 1]"""
    widths = {"4": (512, 512), "3": (512, 256), "2": (256, 256), "1": (256, 128)}
    levels = {name: named(block=two_blocks(inputs, outputs), enlarge=nn.Upsample(scale_factor=2),
                          upsample_conv=nn.Conv2d(outputs, outputs, 3, padding=1))
              for name, (inputs, outputs) in widths.items()}  # they run from 4 to 0
    up = named(**levels, **{"0": named(block=two_blocks(128, 128))})
    return named(conv_in=nn.Conv2d(256, 512, 3, padding=1), mid=two_blocks(512, 512), up=up,
                 norm_out=nn.GroupNorm(32, 128, eps=1e-6), silu=nn.SiLU(),
                 conv_out=nn.Conv2d(128, 3, 3, padding=1))

class MaskGITVQGAN(nn.Module):
    """The published tokenizer: 256x256 pixels <-> 16x16 tokens of 1024. Names as in its release."""

    codebook_size, grid_size, image_size = 1024, 16, 256

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = encoder(), decoder()
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(1024, 256)})

    @torch.no_grad()
    def encode(self, images):
        """float (B, 3, 256, 256) in [0, 1] -> int64 (B, 256), row by row"""
        cells = self.encoder(images).flatten(2).transpose(1, 2)          # (B, T, 256)
        return nearest(cells, self.quantize.embedding.weight)

    @torch.no_grad()
    def decode(self, tokens):
        """int (B, 256) -> float (B, 3, 256, 256) in [0, 1]"""
        codes = self.quantize.embedding(tokens)                          # (B, T, 256)
        codes = codes.transpose(1, 2).unflatten(2, (16, 16)).contiguous()
        # One by one on a CPU: as fast, and the batch can't change pixels by rounding.
        parts = codes.split(1 if codes.device.type == "cpu" else len(codes))
        return torch.cat([self.decoder(part) for part in parts]).clamp(0, 1)

def load(path, config=None, names=()):
    """The tokenizer in a file, ours or the released one, with these sizes of the config."""
    state = read_tensors(path)
    with reading(path, "holds no tokenizer"):
        if "quantize.embedding.weight" in state:
            tokenizer = MaskGITVQGAN()
        else:
            codes, channels = state["codebook"].shape
            tokenizer = PatchTokenizer(int(state["grid"]), math.isqrt(channels // 3), codes)
    load_strictly(tokenizer, state, path)
    for name in names:
        has, wanted = getattr(tokenizer, name), getattr(config, name)
        if has != wanted:
            raise UserError(f"{path} has {name} {has}, but --{name.replace('_', '-')} is {wanted}")
    return tokenizer.eval()

def fit_tokenizer(config, images):
    """The tokenizer that config names. "patch" is fitted to images() (B, 3, H, W)."""
    if config.tokenizer == "patch":
        return PatchTokenizer.fit(images(), config.grid_size, config.codebook_size)
    path = released_tokenizer() if config.tokenizer == "released" else config.tokenizer
    return load(path, config, ("grid_size", "codebook_size", "image_size"))

def tokenizer_of(config, folder):
    """The tokenizer of the weights in a folder: its tokenizer.pt, or else the released one."""
    path = Path(folder, "tokenizer.pt")
    if not path.exists():
        of_a_run = Path(folder, "config.json").exists()
        if of_a_run or (config.grid_size, config.codebook_size) != (16, 1024):
            raise UserError(f"there is no {path}: weights need the tokenizer.pt of their run")
        path = released_tokenizer(folder)
    return load(path, config, ("grid_size", "codebook_size"))

# ---- 2. Photographs ------------------------------------------------------------------------------

# Beyond this size Pillow warns that a picture may be a bomb. Here that is an error.
warnings.simplefilter("error", Image.DecompressionBombWarning)

def center_crop(image, size):
    """The middle of a picture, (size, size, 3) uint8, as ADM cuts it.

    A box filter halves it while the short side is twice too long. Then it is scaled bicubically.
    """
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} is too long and narrow to enlarge")
    image = image.resize((width, height), Image.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]

CROPS = {"ten": 10, "flip": 2, "center": 1}  # and how many they make of a picture

def crop(image, size, kind):
    """The crops (N, size, size, 3) uint8 of a picture: its middle, with its mirror image (flip), or
    four corners and the middle of a square a tenth larger, and the same mirrored (ten)."""
    whole, corners = size, [(0, 0)]
    if kind == "ten":
        whole = int(1.1 * size)
        far, middle = whole - size, round((whole - size) / 2)
        corners = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    pixels = center_crop(image, whole)
    sides = [pixels] if kind == "center" else [pixels, pixels[:, ::-1]]
    return np.stack([side[y:y + size, x:x + size] for side in sides for y, x in corners])

LAYOUT = "expected DIR/CLASS/PICTURE, or DIR/train/CLASS/PICTURE and DIR/val/CLASS/PICTURE"

def class_folders(folder):
    """The folders of the classes of a data set, sorted: those in its train/, if it has one."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "there is no such folder"
        raise UserError(f"--data {folder}: {what}; {LAYOUT}")
    root = folder / "train" if (folder / "train").is_dir() else folder
    found = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    if not found:
        raise UserError(f"--data {root} has no class folders; {LAYOUT}")
    return found

def pictures_in(folder):
    """The files below a folder that Pillow can read, by their names, sorted."""
    readable = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in readable)

def labelled_pictures(folder):
    """Two lists of (class, path), to train on and held out: those in val/, or every twentieth."""
    folders, val = class_folders(folder), Path(folder, "val")
    train = [(c, path) for c, each in enumerate(folders) for path in pictures_in(each)]
    held_out = [(c, path) for c, each in enumerate(folders)
                for path in pictures_in(val / each.name)]
    if not val.is_dir():
        train, held_out = [x for i, x in enumerate(train) if i % 20 != 19], train[19::20]
    if not train or not held_out:
        raise UserError(f"--data {folder}: {len(train)} pictures to learn from and {len(held_out)} "
                        "held out; expected 20, or a val/ with class folders named as in train/")
    return train, held_out

def read_picture(file, crops, size):
    """The crops (N, size, size, 3) uint8 of a picture file, or a text: why there are none.

    Without crops, the picture as it is: (1, H, W, 3).
    """
    try:
        with Image.open(file) as image:
            if image.mode.startswith("I"):  # 16 bits: Pillow would clip them, not scale them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if crops is None:
                return np.array(image.convert("RGB"))[None]
            return crop(image, size, crops)
    except UnidentifiedImageError:
        return "not a picture that Pillow can read"
    except Exception as error:  # Pillow's decoders raise all kinds
        return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".split("\n")[0]

def read_pictures(files, crops, size):
    """Yield what read_picture makes of each file. Threads read them: Pillow frees the GIL."""
    with ThreadPoolExecutor() as pool:
        upcoming = ()
        for first in range(0, len(files) + 32, 32):  # the next 32 are read while these are used
            ready, upcoming = upcoming, pool.map(
                lambda file: read_picture(file, crops, size), files[first:first + 32])
            yield from ready

def crop_images(files, size):
    """The centre crops (N, 3, size, size) in [0, 1] of the files that can be read."""
    items = tqdm(read_pictures(files, "center", size), "reading", len(files), leave=False)
    crops = [item for item in items if not isinstance(item, str)]
    if not crops:
        raise UserError(f"{files[0]}: neither this picture nor any other can be read")
    return to_float(np.concatenate(crops))

# ---- 3. Shapes -----------------------------------------------------------------------------------

SHAPES_SIZE = 32
SHAPES_TRAIN, SHAPES_HELD_OUT = 10_000, 500
GROUND = (22, 25, 37)
COLOURS = ((240, 60, 70), (255, 220, 70), (20, 180, 110), (90, 110, 255))

def _box(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]

def _polar(radii, angles):
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)

_TURN = np.linspace(0, 2 * np.pi, 48, endpoint=False)
_CIRCLE = _polar(1, _TURN)
_HEART = np.stack([16 * np.sin(_TURN) ** 3, 2 * np.cos(3 * _TURN) + np.cos(4 * _TURN)
                   + 5 * np.cos(2 * _TURN) - 13 * np.cos(_TURN) - 2], 1) / 16

# A kind is some polygons within about [-1, 1]^2, y downwards, and perhaps a hole in them.
SHAPES = {
    "circle": [_CIRCLE],
    "square": [_box(-0.9, -0.9, 0.9, 0.9)],
    "triangle": [[(0, -1), (1.1, 0.9), (-1.1, 0.9)]],
    "star": [_polar(np.tile([1.1, 0.45], 5), np.arange(10) * np.pi / 5 - np.pi / 2)],
    "cross": [_box(-1, -0.33, 1, 0.33), _box(-0.33, -1, 0.33, 1)],
    "ring": [_CIRCLE],
    "heart": [_HEART],
    "crescent": [_CIRCLE],
    "arrow": [_box(-1, -0.3, 0.05, 0.3), [(0.05, -0.9), (1.1, 0), (0.05, 0.9)]],
    "stripes": [_box(-1, y, 1, y + 0.4) for y in (-1, -0.2, 0.6)],
}
HOLES = {"ring": 0.55 * _CIRCLE, "crescent": 0.9 * _CIRCLE + (0.55, -0.25)}

def draw_shape(index):
    """Picture number `index`, always the same: (32, 32, 3) uint8, of class index % 10."""
    random = np.random.default_rng(index)
    radius = random.uniform(7.5, 12.5)
    room = SHAPES_SIZE / 2 - 1.1 * radius
    centre = SHAPES_SIZE / 2 + random.uniform(-room, room, size=2)
    colour = COLOURS[random.integers(len(COLOURS))]
    # Edges are not smoothed: their blends of colours would use up most of a small codebook.
    image = Image.new("RGB", (SHAPES_SIZE, SHAPES_SIZE), GROUND)
    pen, name = ImageDraw.Draw(image), list(SHAPES)[index % len(SHAPES)]
    polygons = [(points, colour) for points in SHAPES[name]]
    if name in HOLES:
        polygons.append((HOLES[name], GROUND))
    for points, fill in polygons:
        pen.polygon((centre + radius * np.asarray(points)).flatten().tolist(), fill=fill)
    return np.asarray(image)

# ---- 4. Data sets as tokens ----------------------------------------------------------------------

@dataclasses.dataclass
class Data:
    train: np.ndarray         # rows (N, 1 + T) uint16: the class, then the tokens in cell order
    held_out: np.ndarray      # the same
    tokenizer: nn.Module
    images: float             # the number of pictures that the rows to train on were made of

def class_names(data):
    """The names of the classes of a data set, by number. Raises UserError if it is not there."""
    return tuple(SHAPES) if data == "shapes" else tuple(f.name for f in class_folders(data))

def class_numbers(texts, config, source):
    """The numbers of the classes that are named or numbered by `texts`; of all if None."""
    known = {str(number): number for number in range(config.num_classes)}
    known |= {name: number for number, name in enumerate(config.class_names)}
    if texts is None:
        return list(range(config.num_classes))
    for text in texts:
        if text not in known:
            raise UserError(f"--classes {text}: the model of {source} knows {', '.join(known)}")
    return [known[text] for text in texts]

def open_data(config, folder, device, fit=False):
    """The data set config.data as tokens, by the tokenizer.pt in the folder.

    With fit that file is made first, in place of what a start that was broken off left there.
    """
    if len(class_names(config.data)) != config.num_classes:
        raise UserError(f"--data {config.data} has {len(class_names(config.data))} classes, the "
                        f"model {config.num_classes}")
    if config.crops not in CROPS:
        raise UserError(f"--crops {config.crops}: choose from {', '.join(CROPS)}")

    def tokenizer_for(images):
        if fit and RANK == 0:
            fitted = fit_tokenizer(config, images)
            write_tensors(Path(folder, "tokenizer.pt"), fitted.state_dict())
        wait_for_all()
        return tokenizer_of(config, folder).to(device)

    if config.data == "shapes":
        numbers = tqdm(range(SHAPES_TRAIN + SHAPES_HELD_OUT), "drawing shapes", leave=False)
        images = to_float(np.stack([draw_shape(i) for i in numbers]))    # (N, 3, 32, 32)
        tokenizer = tokenizer_for(lambda: images[:SHAPES_TRAIN])
        tokens = [tokenizer.encode(part.to(device)).cpu() for part in images.split(500)]
        labels = np.arange(len(images)) % len(SHAPES)
        rows = np.column_stack([labels, torch.cat(tokens).numpy()]).astype(np.uint16)
        return Data(rows[:SHAPES_TRAIN], rows[SHAPES_TRAIN:], tokenizer, SHAPES_TRAIN)

    train, held_out = labelled_pictures(config.data)
    held_out = held_out[::-(-len(held_out) // 500)]  # enough to tell losses apart
    enough = min(2000, 10**8 // (3 * config.image_size**2) + 1)
    some = [file for _, file in train[::-(-len(train) // enough)]]
    tokenizer = tokenizer_for(lambda: crop_images(some, config.image_size))
    name = Path(config.data).resolve().name
    rows = encode_pictures(train, tokenizer, config.crops, device, f"{name}-train")
    held_out_rows = encode_pictures(held_out, tokenizer, "center", device, f"{name}-held-out")
    return Data(rows, held_out_rows, tokenizer, len(rows) / CROPS[config.crops])

def encode_pictures(pictures, tokenizer, crops, device, name):
    """The rows of (class, picture file) pairs: all crops of a picture, then those of the next.

    They are made once, in runs/tokens/, by all processes together. Each picture has its place in a
    .part file, and a byte in a .marks file: 0 to do, 1 done, 2 left out. So a stopped program can
    go on.
    """
    files = [str(file) for _, file in pictures]
    sizes = [os.path.getsize(file) if os.path.isfile(file) else 0 for file in files]
    about = json.dumps([crops, files, sizes, [c for c, _ in pictures]])
    path = Path("runs/tokens", f"{name}-{digest(digest_of(tokenizer), about)[:12]}.npy")
    part, marks = path.with_suffix(".part"), path.with_suffix(".marks")
    shape = len(files), CROPS[crops], 1 + tokenizer.grid_size**2
    with locked(path.with_suffix(".lock")):
        todo = not path.exists()
        if todo and RANK == 0:
            for each, size in ((part, 2 * math.prod(shape)), (marks, len(files))):
                with writing(each), open(each, "ab") as file:
                    file.truncate(size)
        wait_for_all()
        missing = np.flatnonzero(np.fromfile(marks, np.uint8) == 0) if todo else []
        wait_for_all()  # nobody writes before all have looked
        mine = missing[RANK::WORLD_SIZE]
        items = read_pictures([files[i] for i in mine], crops, tokenizer.image_size)
        for i, item in zip(tqdm(mine, f"encoding {name}", unit=" pictures", leave=False), items):
            mark = b"\2"
            if not isinstance(item, str):
                # Picture by picture, so that no batch can change a token by rounding.
                tokens = tokenizer.encode(to_float(item, device)).cpu().numpy()
                rows = np.insert(tokens, 0, pictures[i][0], axis=1).astype("<u2")
                write_at(part, i * rows.nbytes, rows)
                mark = b"\1"
            write_at(marks, i, mark)
        wait_for_all()
        if todo and RANK == 0:
            pack_rows(path, part, marks, shape, files, crops, tokenizer.image_size)
        wait_for_all()
    with reading(path, "is damaged: remove it, and it is made again"):
        return np.load(path, mmap_mode="r", allow_pickle=False)

def pack_rows(path, part, marks, shape, files, crops, size):
    """Write the token file of the pictures that are done, and name the others."""
    done = np.fromfile(marks, np.uint8) == 1
    bad = np.flatnonzero(~done)
    for i in bad[:20]:
        print(f"left out {files[i]}: {read_picture(files[i], crops, size)}")
    if len(bad) > max(10, len(files) // 1000) or not done.any():
        marks.unlink()  # they are looked at again
        raise UserError(f"{len(bad)} of {len(files)} pictures can't be read, one of them "
                        f"{files[bad[-1]]}: mend or remove them")
    rows = np.memmap(part, "<u2", "r", shape=shape)
    with replacing(path) as beside, open(beside, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {
            "descr": "<u2", "fortran_order": False, "shape": (done.sum() * shape[1], shape[2])})
        for some in np.array_split(np.flatnonzero(done), len(files) // 1000 + 1):
            file.write(np.ascontiguousarray(rows[some]))
    part.unlink()
    marks.unlink()

def write_at(path, place, data):
    with writing(path), open(path, "r+b") as file:
        file.seek(place)
        file.write(data)

# ---- 5. Pictures out -----------------------------------------------------------------------------

COLUMNS = 20

def to_float(pixels, device="cpu"):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [0, 1]. Trap: not in [-1, 1]."""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255

def to_uint8(images):
    """float (B, 3, H, W) -> uint8 (B, H, W, 3)"""
    # Truncated, not rounded, as the authors do: the published FIDs were computed so.
    return (images.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()

def save_grid(path, images, names):
    """A PNG of images (B, 3, H, W) in [0, 1], row by row, with a column for each name."""
    columns, header = len(names), 22
    if columns > COLUMNS:
        columns, names, header = COLUMNS, (), 0
    gap, scale = 4, max(1, 80 // images.shape[2])
    cell = scale * images.shape[2] + gap
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * cell + gap, rows * cell + gap + header), "white")
    for i, pixels in enumerate(to_uint8(images).repeat(scale, 1).repeat(scale, 2)):
        row, column = divmod(i, columns)
        sheet.paste(Image.fromarray(pixels), (gap + column * cell, gap + header + row * cell))
    longest = max((len(str(name)) for name in names), default=1)
    font = ImageFont.load_default(size=min(15, 1.6 * (cell - gap) / longest))
    for column, name in enumerate(names):
        centre = ((column + 0.5) * cell + gap / 2, gap + header / 2)
        ImageDraw.Draw(sheet).text(centre, str(name), fill="black", font=font, anchor="mm")
    with replacing(path) as beside:
        sheet.save(beside, "PNG")

def known_tokens(path, keep, tokenizer, device="cpu"):
    """The tokens (T,) of the cells of a picture that lie within the pixels `keep`, else -1.

    Also returns two images (2, 3, H, W): the picture, and what is kept of it.
    """
    if path is None or keep is None:
        raise UserError("--complete PICTURE needs --keep x0,y0,x1,y1, the pixels that stay, and "
                        "--keep the picture")
    size, grid = tokenizer.image_size, tokenizer.grid_size
    cell, (x0, y0, x1, y1) = size // grid, keep
    cells = torch.zeros(grid, grid, dtype=torch.bool)
    cells[-(-y0 // cell):y1 // cell, -(-x0 // cell):x1 // cell] = True   # whole cells alone
    if cells.all() or not cells.any():
        raise UserError(f"--keep {x0},{y0},{x1},{y1} keeps {cells.sum()} of {grid**2} cells of "
                        f"{cell} pixels: keep some and leave some, of {size} x {size} pixels")
    pixels = read_picture(path, "center", size)
    if isinstance(pixels, str):
        raise UserError(f"{path}: {pixels}")
    image = to_float(pixels)                                             # (1, 3, H, W)
    # The rest is greyed first: an encoder looks beyond a cell, and must not see what is hidden.
    seen = torch.where(cells.kron(torch.ones(cell, cell, dtype=torch.bool)), image, 0.5)
    tokens = tokenizer.encode(seen.to(device)).cpu()[0]
    return torch.where(cells.flatten(), tokens, -1), torch.cat([image, seen])

def open_samples(out, folder, count, size, settings):
    """Where samples go: a path, a folder of numbered PNGs, and the numbers that this process makes.

    The path is that folder, or a grid (.png) or an .npz that is put together in the end.
    settings.json in the folder says how the PNGs were made. Others are not mixed with them.
    """
    new = (Path(folder, f"samples-{n}.png") for n in itertools.count(1))
    path = Path(out) if out else next(path for path in new if not path.exists())
    is_folder = path.is_dir() or str(out).endswith(("/", os.sep))
    is_grid = path.suffix == ".png" and not is_folder
    many = "an .npz, or a folder with a / at its end"
    if not is_folder and path.suffix not in (".png", ".npz"):
        raise UserError(f"--out {out}: name a .png for a grid, {many}")
    if is_grid and count * max(size, 80)**2 > Image.MAX_IMAGE_PIXELS:
        raise UserError(f"--out {path}: {count} are too many for a grid: name {many}")
    store = path if is_folder else path.with_name(path.name + ".parts")
    about = store / "settings.json"
    if path.suffix == ".npz" and path.exists() and not about.exists():
        raise UserError(f"--out {path} is there already: remove it, or name another")
    there = {file.name for file in store.glob("*.png")}
    if there and not (about.exists() and read_json(about) == settings):
        raise UserError(f"--out {store} was made with other settings: remove it, or name another")
    wait_for_all()  # nobody writes before all have looked
    if RANK == 0:
        write_json(about, settings)
    missing = [number for number in range(count) if f"{number:06}.png" not in there]
    return path, store, missing[RANK::WORLD_SIZE]

def save_samples(store, numbers, images):
    """Write images (B, 3, H, W) as PNGs with these numbers."""
    def write(number, pixels):
        with replacing(store / f"{number:06}.png") as beside:
            Image.fromarray(pixels).save(beside, "PNG", compress_level=1)

    with ThreadPoolExecutor() as pool:  # Pillow compresses without the GIL
        list(pool.map(write, numbers, to_uint8(images)))

def pack_samples(path, store, count, names, before=None):
    """Put the pictures together at `path`, unless that is their folder. In a grid, images
    (N, 3, H, W) may come `before`."""
    if path == store:
        return
    files = [store / f"{number:06}.png" for number in range(count)]
    pictures = (read_picture(file, None, None) for file in files)        # each (1, H, W, 3)
    if path.suffix == ".npz":
        write_npz(path, count, tqdm(pictures, "packing", count, leave=False))
    else:
        images = to_float(np.concatenate(list(pictures)))
        if before is not None:
            images, names = torch.cat([before, images]), ["picture", "kept", *names]
        save_grid(path, images, names)
    with contextlib.suppress(OSError):
        for file in (*store.glob("*.png"), store / "settings.json"):  # last: a kill may come
            file.unlink()
        store.rmdir()

def write_npz(path, count, parts):
    """Write an .npz as numpy.savez does, arr_0 uint8 (N, H, W, 3), but piece by piece."""
    with replacing(path) as beside, zipfile.ZipFile(beside, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            for number, pixels in enumerate(parts):
                if number == 0:
                    np.lib.format.write_array_header_1_0(
                        member, {"descr": "|u1", "fortran_order": False,
                                 "shape": (count, *pixels.shape[1:])})
                member.write(np.ascontiguousarray(pixels))

# ---- 6. The command ------------------------------------------------------------------------------

def run(argv):
    parser = Parser(prog="tokenizer.py", description=__doc__.split("\n")[0])
    command = parser.add_subparsers(required=True).add_parser(
        "reconstruct", help="pictures through the tokenizer and back")
    command.add_argument("pictures", nargs="+", help="files and folders")
    command.add_argument("--out", required=True, type=Path, help="the .png or .npz file to write")
    command.add_argument("--tokenizer", help="file or run folder [the released one]")
    command.add_argument("--device", choices=["cuda", "cpu"], help="[cuda, if there is one]")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {args.out}: name a .png file to look at, or an .npz file to score")
    device, _, _ = choose_device(args.device)
    path = Path(args.tokenizer or released_tokenizer())
    tokenizer = load(path / "tokenizer.pt" if path.is_dir() else path).to(device)
    files = [file for name in args.pictures for file in pictures_in(name) or [Path(name)]]

    def pairs():
        for file, pixels in zip(files, read_pictures(files, "center", tokenizer.image_size)):
            if isinstance(pixels, str):  # without it, this would be the score of another set
                raise UserError(f"{file}: {pixels}")
            tokens = tokenizer.encode(to_float(pixels, device))
            yield pixels, to_uint8(tokenizer.decode(tokens))

    bar = tqdm(pairs(), "reconstructing", len(files))
    if args.out.suffix == ".npz":
        write_npz(args.out, len(files), (again for _, again in bar))
    else:
        images = to_float(np.concatenate([pixels for pair in bar for pixels in pair]))
        save_grid(args.out, images, ["picture", "again"] * min(4, len(files)))
    print(f"{args.out}: {len(files)} pictures by {path}")

def main(argv=None):
    """Run the command. Returns its exit code."""
    return exit_code(run, argv)

# ---- 7. What all three programs need -------------------------------------------------------------

class UserError(Exception):
    """A mistake that the user can mend: one line that names the file or flag; exit code 2."""

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose flags can't be abbreviated."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")

def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)

def rectangle(text):
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"must be four numbers, such as 0,0,16,32, not {text}")
    return [int(number) for number in numbers]

def exit_code(function, argv, interrupted="interrupted; the same command goes on"):
    """Call function(argv). Returns the exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    try:
        function(argv)
        return 0
    except UserError as error:
        code, message = 2, f"error: {error}"
    except KeyboardInterrupt as error:
        code, message = 130, str(error) or interrupted
    except BrokenPipeError:  # whoever read our output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        code, message = 2, f"error: {error.filename}: {error.strerror}"
    except (MemoryError, RuntimeError) as error:
        # torch says it in other words on GPUs and on a CPU
        if not re.search("MemoryError|out of memory|DefaultCPUAllocator", repr(error)):
            raise
        code, message = 2, "error: out of memory: lower --micro-batch or --batch, or the model"
    if RANK > 0:
        time.sleep(2)  # if rank 0 says the same, torchrun ends us first
        message = f"rank {RANK}: {message}"
    print(message, file=sys.stderr)
    return code

def choose_device(name, precision=None, on_cuda="float32"):
    """The device, the precision of matrix products, and the autocast context that it takes."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that torch can use")
    device = torch.device(name, LOCAL_RANK) if name == "cuda" else torch.device(name)
    precision = precision or (on_cuda if name == "cuda" else "float32")
    if precision == "tf32" and name == "cpu":
        raise UserError("--precision tf32 exists on cuda alone")
    # In bfloat16, too, the few products that stay float32 may use TF32.
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    # Trap: cuDNN's attention makes a plan for every length, of which sampling has T.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device, precision, torch.autocast(name, torch.bfloat16, precision == "bfloat16")

def send(tensor, device):
    """The tensor on the device. From pinned memory the copy keeps nobody waiting."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)

# Processes: torchrun starts them, and says in the environment who is who.

RANK, LOCAL_RANK, WORLD_SIZE = (
    int(os.environ.get(name, default))
    for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))

@contextlib.contextmanager
def processes(device):
    """Join the processes of torchrun, if it started this one. Rank 0 alone talks."""
    if WORLD_SIZE == 1:
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    # Rank 0 may work alone for long. It is for torchrun to notice who has died.
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    with open(os.devnull, "w") as silence, contextlib.ExitStack() as stack:
        if RANK > 0:
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        yield
    dist.destroy_process_group()  # not after an error: the others would fail before it is told

def sum_over_processes(tensor):
    """Add up a tensor over the processes, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor

def wait_for_all():
    sum_over_processes(torch.zeros(1))

def in_any_process(signals):
    return bool(sum_over_processes(torch.tensor(float(len(signals)))) > 0)

@contextlib.contextmanager
def noting_signals():
    """Yield a list to which Ctrl-C, SIGTERM and SIGHUP are added. A second one strikes at once."""
    noted, before = [], {}

    def note(number, frame):
        noted.append(number)
        signal.signal(number, before[number])
        tqdm.write("stopping after this update", file=sys.stderr)

    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as it is under nohup
            before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

@contextlib.contextmanager
def locked(path, busy=None):
    """Keep other programs out by a lock file, which rank 0 holds for all processes. If another
    program has it, wait, or raise UserError(busy)."""
    with contextlib.ExitStack() as stack:
        if RANK == 0:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(path, "ab"))
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            except BlockingIOError:
                raise UserError(busy) from None
        wait_for_all()
        yield

# Files

@contextlib.contextmanager
def writing(path):
    """Turn what the disk refuses inside into a UserError that names the path."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error  # torch.save makes a RuntimeError of a full disk, and of a CUDA error too
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise UserError(f"cannot write {path}: {cause.strerror or cause}") from error

@contextlib.contextmanager
def reading(path, wrong=None):
    """Turn whatever a damaged file raises inside into a UserError that names the path."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        why = f": {str(error) or type(error).__name__}" if wrong is None else f" {wrong}"
        raise UserError(f"{path}{why}") from error

@contextlib.contextmanager
def replacing(path, ending=".part"):
    """Yield a path beside `path`, which is renamed to it when what is written there is whole."""
    path = Path(path)
    beside = path.parent / (path.name + ending)  # with_name would refuse "."
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)

def write_tensors(path, tensors):
    with replacing(path) as beside, open(beside, "wb") as file:  # a file says why it is full
        torch.save(tensors, file)

def write_json(path, value):
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n")

def read_json(path):
    """The JSON object in a file. Raises UserError if there is none."""
    with reading(path):
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict):
            raise ValueError("expected a JSON object")
        return value

def read_tensors(path):
    """The dictionary that torch.save wrote to a file. Nothing in the file is ever executed."""
    with reading(path, "is not a PyTorch file of tensors, or it is damaged"):
        with zipfile.ZipFile(path) as archive:
            if any(m.compress_type != zipfile.ZIP_STORED for m in archive.infolist()):
                raise ValueError("torch.save compresses nothing, a bomb does")
            if archive.testzip() is not None:  # torch.load does not look at checksums
                raise ValueError("a checksum differs")
        value = torch.load(path, "cpu", weights_only=True, mmap=True)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no dictionary of tensors")
    return value

def load_strictly(module, state, path):
    """Copy a state dict into a module. Raises UserError for a name or shape that differs."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in state.items()}
    for name in wanted | found:
        here, there = found.get(name, "missing"), wanted.get(name, "none of that name")
        if here != there:
            raise UserError(f"{path} does not fit the model: {name} is {here}, expected {there}")
    module.load_state_dict(state)

def digest(*parts):
    """SHA-256 of arrays and texts."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part))
    return sha.hexdigest()

def digest_of(module):
    return digest(*(tensor.cpu().numpy() for tensor in module.state_dict().values()))

# Downloads

RELEASED = "maskgit-vqgan-imagenet-f16-256.bin"
RELEASED_MODELS = {  # and the SHA-256 of each
    "RAR-B": ("rar_b.bin", "cbbf4b27dc36afae77fdb2fe0d6b9b5b7446eae45f1a9f91d442ab0b315b9ebf"),
    "RAR-L": ("rar_l.bin", "edad8e9905e20a5df14eeee0d5d04c1be48b16a7751b4b3f4954a6dec8ad87d5"),
    "RAR-XL": ("rar_xl.bin", "7b4cec5c76f18dc7a3ea055a6b0cc4c5748c533768eed71564a88d897c762bc8"),
    "RAR-XXL": ("rar_xxl.bin", "85aba44fef7aecfd879829077e541f09da4c29da3b1fd374837601d7322bf6ff"),
}

def fetch_released(model):
    """The path of the weights of a released model, which are fetched once, with the tokenizer."""
    if RANK == 0:
        released_tokenizer()
        fetch_hub("yucornetto/RAR", *RELEASED_MODELS[model])
    wait_for_all()
    return fetch_hub("yucornetto/RAR", *RELEASED_MODELS[model])

def released_tokenizer(*folders):
    """The path of the released tokenizer: in these folders, where it may be, or fetched."""
    for folder in (*folders, ".", torch.hub.get_dir()):
        if Path(folder, RELEASED).is_file():
            return Path(folder, RELEASED)
    return fetch_hub("fun-research/TiTok", RELEASED)

def fetch_hub(repository, file, sha256=None):
    """The path of a file of Hugging Face, or of the mirror that HF_ENDPOINT names."""
    host = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return fetch(f"{host.rstrip('/')}/{repository}/resolve/main/{file}", sha256)

def fetch(url, sha256=None):
    """The path of the file at a URL, which is downloaded once, into torch.hub's folder.

    It must have this SHA-256. Where none is known, it must be a zip, as torch.save writes.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.split("/")[-1])
    if path.exists():
        return path
    with replacing(path, f".{os.getpid()}.part") as beside:  # two may download it at once
        try:
            with urllib.request.urlopen(url, timeout=60) as response, open(beside, "wb") as file:
                size = response.length
                bar = tqdm(desc=f"downloading {url}", total=size, unit="B", unit_scale=True)
                while chunk := response.read(2**20):
                    file.write(chunk)
                    bar.update(len(chunk))
            if size is not None and beside.stat().st_size != size:
                raise ValueError("the connection broke")
            if sha256 is not None and digest(np.memmap(beside, mode="r")) != sha256:
                raise ValueError(f"its SHA-256 is not {sha256}")
            if sha256 is None and not zipfile.is_zipfile(beside):
                raise ValueError("what came is not a PyTorch file")
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UserError(f"cannot download {url}: {error}. Try again, or get the file some "
                            f"other way and put it at {path}") from error
    return path

if __name__ == "__main__":
    sys.exit(main())
