"""Pictures in, tokens, pictures out: for rar.py and fid.py.

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
import shutil
import signal
import sys
import time
import urllib.request
import warnings
import zipfile
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if os.name == "posix":  # Windows has no such module
    import fcntl

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from scipy.cluster.vq import kmeans2
from torch import nn
from tqdm import tqdm

# ---- 1. Tokenizers

def nearest(vectors, codes):
    """The number of the nearest code (V, C) to each vector (..., C): int64 (...)."""
    codes = codes.double()  # or TF32 and autocast would change tokens
    # |v - c|^2 without |v|^2, the same for all codes
    return ((codes**2).sum(1) - 2 * vectors.double() @ codes.T).argmin(-1)

class PatchTokenizer(nn.Module):
    """A token is the nearest of `codebook_size` mean patches. It is fitted in seconds.

    Decoding is a linear map of the mean patches of a token and its eight neighbours. Then the
    picture is smoothed between cells and sharpened, as far as it errs.
    """

    def __init__(self, grid_size, patch_size, codebook_size):
        super().__init__()
        self.grid_size, self.patch_size, self.codebook_size = grid_size, patch_size, codebook_size
        self.image_size, channels = grid_size * patch_size, 3 * patch_size**2
        self.register_buffer("codebook", torch.zeros(codebook_size, channels))
        self.register_buffer("decoder", torch.zeros(channels, channels, 3, 3))
        self.register_buffer("decoder_bias", torch.zeros(channels))
        self.register_buffer("grid", torch.tensor(grid_size))
        self.register_buffer("error", torch.tensor(0.0))  # of a decoded pixel, root mean square

    def patches(self, images):
        """(B, 3, H, W) -> (B, T, 3 * patch * patch)"""
        return F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)

    def means(self, tokens):
        """int (B, T) -> the mean patches (B, 3 * patch * patch, grid, grid)"""
        return self.codebook[tokens].transpose(1, 2).unflatten(2, (self.grid_size, -1))

    def encode(self, images):
        """float (B, 3, H, W) in [0, 1] -> int64 (B, T), row by row"""
        return nearest(self.patches(images.to(self.codebook)), self.codebook)

    def decode(self, tokens):
        """int (B, T) -> float (B, 3, H, W) in [0, 1]"""
        pixels = F.conv2d(self.means(tokens), self.decoder, self.decoder_bias, padding=1)
        p, error = self.patch_size, self.error
        image = F.fold(pixels.flatten(2), self.image_size, p, stride=p)
        # A step between cells may be an error. Spread it over half a cell on both sides.
        places = torch.arange(p, device=tokens.device)[:, None]
        falling = (1 - (places + 0.5) / (p / 2)).clamp(min=0)            # to 0 in the middle
        for _ in "xy":
            cells = image.transpose(2, 3).unflatten(2, (-1, p))          # (B, 3, grid, p, S)
            step = (cells[:, :, 1:, :1] - cells[:, :, :-1, -1:]).clamp(-2 * error, 2 * error)
            cells[:, :, 1:] -= step / 2 * falling
            cells[:, :, :-1] += step / 2 * falling.flip(0)
            image = cells.flatten(2, 3)
        # Means are blurred, so raise what differs from its surroundings.
        detail = image - F.avg_pool2d(image, 3, 1, 1, count_include_pad=False)
        return (image + detail.clamp(-error / 2, error / 2)).clamp(0, 1)

    @classmethod
    def fit(cls, images, grid_size, codebook_size):
        """The tokenizer of pictures (B, 3, S, S) in [0, 1]."""
        size = images.shape[-1]
        if size % grid_size:
            raise UserError(f"--grid-size {grid_size} does not divide {size} pixels")
        self = cls(grid_size, size // grid_size, codebook_size)
        random = np.random.default_rng(0)
        patches = self.patches(images).flatten(0, 1).numpy()             # (N, C)
        patches = random.permutation(patches)[:60_000]
        # Codes start from different patches, or all would start from the empty one.
        distinct = np.unique(patches, axis=0)
        if len(distinct) < codebook_size:
            raise UserError(f"--codebook-size {codebook_size}: there are but {len(distinct)} "
                            "different patches")
        codebook = random.permutation(distinct)[:codebook_size]
        for _ in tqdm(range(20), "fitting the tokenizer", leave=False):
            codebook, _ = kmeans2(patches, codebook, iter=1, minit="matrix")
        self.codebook.copy_(torch.from_numpy(codebook))
        self.decoder[:, :, 1, 1] = torch.eye(self.codebook.shape[1])  # the token's own mean
        if self.patch_size <= 16:  # larger ones would take tens of GB
            self.fit_decoder(images[:5_000_000 // patches.shape[1] // grid_size**2])
        again = torch.cat([self.decode(self.encode(part)) for part in images.split(50)])
        self.error.copy_((again - images).square().mean().sqrt())
        return self

    def fit_decoder(self, images):
        """Ridge regression from nine mean patches to what the one in the middle lacks."""
        tokens = torch.cat([self.encode(part) for part in images.split(50)])
        around = F.unfold(self.means(tokens), 3, padding=1)              # (B, 9C, T)
        # In float64, since float32 loses 2 dB.
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
    """A Sequential with names instead of numbers."""
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
        # A picture takes 170 MB. On a CPU, the batch must not change pixels by rounding.
        parts = codes.split(1 if codes.device.type == "cpu" else 16)
        return torch.cat([self.decoder(part) for part in parts]).clamp(0, 1)

def load(path, config=None, names=()):
    """The tokenizer in a file. Its sizes of these names must be as in config."""
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
            raise UserError(f"{path} has {name} {has}, but {flag_of(name)} is {wanted}")
    return tokenizer.eval()

def fit_tokenizer(config, images):
    """The tokenizer that config names: "patch" is fitted to images(), (B, 3, H, W)."""
    if config.tokenizer == "patch":
        return PatchTokenizer.fit(images(), config.grid_size, config.codebook_size)
    path = config.tokenizer
    if path == "released":
        try:
            path = released_tokenizer()
        except UserError as error:
            raise UserError(f"{error}, or give --tokenizer patch") from error
    return load(path, config, ("grid_size", "codebook_size", "image_size"))

def tokenizer_of(config, folder):
    """The tokenizer of the weights in a folder: its tokenizer.pt, or the released one."""
    path = Path(folder, "tokenizer.pt")
    if not path.exists():
        sizes = config.grid_size, config.codebook_size
        if Path(folder, "config.json").exists() or sizes != (16, 1024):
            raise UserError(f"there is no {path}: copy the tokenizer.pt of the weights' run there")
        path = released_tokenizer(folder)
    return load(path, config, ("grid_size", "codebook_size"))

# ---- 2. Photographs

# A huge picture may be a bomb. Pillow warns of it, we refuse it.
warnings.simplefilter("error", Image.DecompressionBombWarning)

def center_crop(image, size):
    """The middle of a picture, (size, size, 3) uint8, as ADM cuts it."""
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError("too long and narrow to enlarge")
    image = image.resize((width, height), Image.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]

CROPS = {"ten": 10, "flip": 2, "center": 1}  # how many each makes of a picture

def crop(image, size, kind):
    """The crops (N, size, size, 3) uint8 of a picture.

    "center" is its middle, and "flip" adds the mirror image. "ten" cuts a square that is a tenth
    larger: four corners, the middle, and the mirror images of all.
    """
    whole, corners = size, [(0, 0)]
    if kind == "ten":
        whole = int(1.1 * size)
        far, middle = whole - size, round((whole - size) / 2)
        corners = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    pixels = center_crop(image, whole)
    sides = [pixels] if kind == "center" else [pixels, pixels[:, ::-1]]
    return np.stack([side[y:y + size, x:x + size] for side in sides for y, x in corners])

def class_folders(folder):
    """The class folders of a data set, sorted: those in train/, if there is one."""
    if not Path(folder).is_dir():
        raise UserError(f"--data {folder}: there is no such folder")
    root = Path(folder, "train")
    if not root.is_dir():
        root = Path(folder)
    found = sorted(path for path in root.glob("[!.]*") if path.is_dir())
    if not found:
        raise UserError(f"--data {folder}: expected DIR/CLASS/PICTURE or DIR/train/CLASS/PICTURE")
    return found

def pictures_in(folder):
    """The files below a folder that have the name of a picture, sorted."""
    readable = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted(Path(root, file) for root, _, files in os.walk(folder, followlinks=True)
                  for file in files if Path(file).suffix.lower() in readable)

def labelled_pictures(folder):
    """Two lists of (class, path), to train on and held out: those in val/, or every twentieth."""
    def labelled(folders):
        return [(c, path) for c, each in enumerate(folders) for path in pictures_in(each)]

    folders, val = class_folders(folder), Path(folder, "val")
    train = labelled(folders)
    if val.is_dir():
        held_out = labelled(val / each.name for each in folders)
    else:
        held_out = train[19::20]
        del train[19::20]
    if not train or not held_out:
        raise UserError(f"--data {folder}: {len(train)} pictures to train on and {len(held_out)} "
                        "held out; expected 20, or a val/ with the classes of train/")
    return train, held_out

def read_picture(file, crops, size):
    """The crops (N, size, size, 3) uint8 of a picture file, or a text: why there are none.

    crops None means the whole picture (1, H, W, 3).
    """
    try:
        with Image.open(file) as image:
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if crops is None:
                return np.array(image.convert("RGB"))[None]
            return crop(image, size, crops)
    except UnidentifiedImageError:
        return "not a picture that Pillow can read"
    except Exception as error:  # Pillow raises all kinds
        return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".split("\n")[0]

def read_pictures(files, crops, size):
    """Yield what read_picture makes of each file. Threads read ahead, for Pillow frees the GIL."""
    upcoming = deque()
    with ThreadPoolExecutor() as pool:
        for file in files:
            upcoming.append(pool.submit(read_picture, file, crops, size))
            if len(upcoming) > 32:
                yield upcoming.popleft().result()
        while upcoming:
            yield upcoming.popleft().result()

def read_all(files, crops, size):
    """read_pictures, but a picture that can't be read is a UserError."""
    for file, pixels in zip(files, read_pictures(files, crops, size)):
        if isinstance(pixels, str):
            raise UserError(f"{file}: {pixels}")
        yield pixels

def crop_images(files, size):
    """The centre crops (N, 3, size, size) of the files that can be read."""
    items = tqdm(read_pictures(files, "center", size), "reading", len(files), leave=False)
    crops = [item for item in items if not isinstance(item, str)]
    if not crops:
        raise UserError(f"{files[0]} and all others can't be read")
    return to_float(np.concatenate(crops))

# ---- 3. Shapes

SHAPES_SIZE = 32
SHAPES_TRAIN, SHAPES_HELD_OUT = 10_000, 500
GROUND = (22, 25, 37)
COLOURS = ((240, 60, 70), (255, 220, 70), (20, 180, 110), (90, 110, 255))

def box(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]

def polar(radii, angles):
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)

TURN = np.linspace(0, 2 * np.pi, 48, endpoint=False)
CIRCLE = polar(1, TURN)
HEART = np.stack([16 * np.sin(TURN) ** 3, 2 * np.cos(3 * TURN) + np.cos(4 * TURN)
                  + 5 * np.cos(2 * TURN) - 13 * np.cos(TURN) - 2], 1) / 16

# A kind is some polygons within about [-1, 1]^2, y downwards, and perhaps holes in them.
SHAPES = {
    "circle": [CIRCLE],
    "square": [box(-0.9, -0.9, 0.9, 0.9)],
    "triangle": [[(0, -1), (1.1, 0.9), (-1.1, 0.9)]],
    "star": [polar(np.tile([1.1, 0.45], 5), np.arange(10) * np.pi / 5 - np.pi / 2)],
    "cross": [box(-1, -0.33, 1, 0.33), box(-0.33, -1, 0.33, 1)],
    "ring": [CIRCLE],
    "heart": [HEART],
    "crescent": [CIRCLE],
    "arrow": [box(-1, -0.3, 0.05, 0.3), [(0.05, -0.9), (1.1, 0), (0.05, 0.9)]],
    "stripes": [box(-1, y, 1, y + 0.4) for y in (-1, -0.2, 0.6)],
}
HOLES = {"ring": [0.55 * CIRCLE], "crescent": [0.9 * CIRCLE + (0.55, -0.25)]}

def draw_shape(index):
    """Picture number `index`, always the same: (32, 32, 3) uint8, of class index % 10."""
    random = np.random.default_rng(index)
    radius = random.uniform(7.5, 12.5)
    room = SHAPES_SIZE / 2 - 1.1 * radius
    centre = SHAPES_SIZE / 2 + random.uniform(-room, room, size=2)
    colour = COLOURS[random.integers(len(COLOURS))]
    # Edges are not smoothed: blended colours would use up a small codebook.
    image = Image.new("RGB", (SHAPES_SIZE, SHAPES_SIZE), GROUND)
    name = list(SHAPES)[index % len(SHAPES)]
    polygons = [(points, colour) for points in SHAPES[name]]
    polygons += [(points, GROUND) for points in HOLES.get(name, [])]
    for points, fill in polygons:
        corners = centre + radius * np.asarray(points)                   # (N, 2)
        ImageDraw.Draw(image).polygon(corners.flatten().tolist(), fill=fill)
    return np.asarray(image)

# ---- 4. Data sets as tokens

@dataclasses.dataclass
class Data:
    train: np.ndarray     # rows (N, 1 + T) uint16: the class, then the tokens in cell order
    held_out: np.ndarray  # the same
    tokenizer: nn.Module
    images: float         # how many pictures the rows to train on were made of

def class_names(data):
    return tuple(SHAPES) if data == "shapes" else tuple(f.name for f in class_folders(data))

def class_numbers(texts, config, source):
    """The numbers of classes that are given as numbers or names. None means all."""
    numbers = range(config.num_classes)
    if texts is None:
        return list(numbers)
    known = {str(n): n for n in numbers} | dict(zip(config.class_names, numbers))
    for text in texts:
        if text not in known:
            raise UserError(f"--classes {text}: the model of {source} knows {', '.join(known)}")
    return [known[text] for text in texts]

def open_data(config, folder, device, fit=False, held_out_only=False):
    """The Data of config.data, by the tokenizer.pt in the folder. With fit it is made first.
    With held_out_only there is nothing to train on."""
    classes = len(class_names(config.data))
    if classes != config.num_classes:
        raise UserError(f"--data {config.data} has {classes} classes, not {config.num_classes}")
    if config.crops not in CROPS:
        raise UserError(f"--crops {config.crops}: choose from {', '.join(CROPS)}")

    def tokenizer_for(images):
        if fit and RANK == 0:
            fitted = fit_tokenizer(config, images)
            write_tensors(Path(folder, "tokenizer.pt"), fitted.state_dict())
        wait_for_all()
        return tokenizer_of(config, folder).to(device)

    if config.data == "shapes":
        count = SHAPES_TRAIN + SHAPES_HELD_OUT
        images = to_float(np.stack([draw_shape(i) for i in range(count)]))  # (N, 3, 32, 32)
        tokenizer = tokenizer_for(lambda: images[:SHAPES_TRAIN])
        tokens = [tokenizer.encode(part.to(device)).cpu() for part in images.split(500)]
        labels = np.arange(len(images)) % len(SHAPES)
        rows = np.column_stack([labels, torch.cat(tokens).numpy()]).astype(np.uint16)
        return Data(rows[:SHAPES_TRAIN], rows[SHAPES_TRAIN:], tokenizer, SHAPES_TRAIN)

    train, held_out = labelled_pictures(config.data)
    if len(train) > config.photographs:
        print(f"{config.photographs:,} of {len(train):,} photographs, evenly from all classes")
        train = [train[i * len(train) // config.photographs] for i in range(config.photographs)]
    held_out = held_out[::-(-len(held_out) // 500)]  # at most 500
    enough = min(2000, 10**8 // (3 * config.image_size**2) + 1)
    some = [file for _, file in train[::-(-len(train) // enough)]]
    tokenizer = tokenizer_for(lambda: crop_images(some, config.image_size))
    name = Path(config.data).resolve().name
    train = [] if held_out_only else encode_pictures(
        train, tokenizer, config.crops, device, f"{name}-train")
    held_out = encode_pictures(held_out, tokenizer, "center", device, f"{name}-held-out")
    return Data(train, held_out, tokenizer, len(train) / CROPS[config.crops])

def encode_pictures(pictures, tokenizer, crops, device, name):
    """The rows of (class, picture file) pairs: all crops of a picture, then those of the next.

    All processes make them once, in runs/tokens/. Each picture has its place in a .part file, and a
    byte in a .marks file, which is 1 when it is done. So a stopped program can go on.
    """
    files = [file for _, file in pictures]
    sizes = [os.path.getsize(file) if os.path.isfile(file) else 0 for file in files]
    about = repr([crops, sizes, pictures])
    path = Path("runs/tokens", f"{name}-{digest(digest_of(tokenizer), about)[:12]}.npy")
    part, marks = path.with_suffix(".part"), path.with_suffix(".marks")
    shape = len(files), CROPS[crops], 1 + tokenizer.grid_size**2
    with locked(path.with_suffix(".lock")):
        todo = not path.exists()
        if todo and RANK == 0:
            for each, size in ((part, 2 * math.prod(shape)), (marks, len(files))):
                with writing(each):
                    each.touch()
                    os.truncate(each, size)
        wait_for_all()
        missing = np.flatnonzero(~np.fromfile(marks, bool)) if todo else []
        wait_for_all()  # nobody writes before all have looked
        mine = missing[RANK::WORLD_SIZE]
        items = read_pictures([files[i] for i in mine], crops, tokenizer.image_size)
        bad, few = [], min(max(10, len(files) // 1000), len(files) - 1)
        for i, item in zip(tqdm(mine, f"encoding {name}", leave=False), items):
            if isinstance(item, str):
                bad.append(f"{files[i]}: {item}")
                if len(bad) > few:
                    raise UserError(f"{len(bad)} pictures can't be read: remove them; {bad[-1]}")
                continue
            # Picture by picture, so that no batch can change a token by rounding.
            tokens = tokenizer.encode(to_float(item, device)).cpu().numpy()
            rows = np.insert(tokens, 0, pictures[i][0], axis=1).astype("<u2")
            write_at(part, i * rows.nbytes, rows)
            write_at(marks, i, b"\1")
        wait_for_all()
        if todo and RANK == 0:
            done = np.fromfile(marks, bool)
            good = np.flatnonzero(done)
            for i in np.flatnonzero(~done):
                print(f"left out {files[i]}, which can't be read")
            rows = np.memmap(part, "<u2", "r", shape=shape)
            with replacing(path) as beside, open(beside, "wb") as file:
                write_array(file, len(good) * CROPS[crops], (rows[i] for i in good))
            part.unlink()
            marks.unlink()
        wait_for_all()
    with reading(path, "is damaged: remove it, and it is made again"):
        return np.load(path, mmap_mode="r", allow_pickle=False)

def write_array(file, count, parts):
    """Write an .npy of `count` rows part by part."""
    for number, part in enumerate(parts):
        if number == 0:
            shape = (count, *part.shape[1:])
            np.lib.format.write_array_header_1_0(
                file, {"descr": part.dtype.str, "fortran_order": False, "shape": shape})
        file.write(np.ascontiguousarray(part))

def write_at(path, place, data):
    with writing(path), open(path, "r+b") as file:
        file.seek(place)
        file.write(data)

# ---- 5. Pictures out

def to_float(pixels, device="cpu"):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [0, 1]. Trap: not in [-1, 1]."""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255

def to_uint8(images):
    """float (B, 3, H, W) -> uint8 (B, H, W, 3), not rounded, as for the published FIDs"""
    return (images.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()

def save_grid(path, images, names):
    """A PNG of images (B, 3, H, W) in [0, 1], row by row, with a column for each name."""
    columns, header = len(names), 22
    if columns > 20:  # too narrow for names
        columns, names, header = 20, (), 0
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
    """The tokens (T,) of a picture's cells that lie within the pixels `keep`. Others are -1.

    Also returns two images (2, 3, H, W): the picture, and what is kept of it. Both may be None.
    """
    if path is None and keep is None:
        return None, None
    if path is None or keep is None:
        raise UserError("--complete PICTURE and --keep X0,Y0,X1,Y1 need each other")
    size, grid = tokenizer.image_size, tokenizer.grid_size
    cell = size // grid
    x0, y0, x1, y1 = keep
    cells = torch.zeros(grid, grid, dtype=torch.bool)
    cells[-(-y0 // cell):y1 // cell, -(-x0 // cell):x1 // cell] = True   # whole cells alone
    if cells.all() or not cells.any():
        raise UserError(f"--keep holds {cells.sum()} of {grid**2} cells of {cell} pixels: "
                        "hold some, but not all")
    [pixels] = read_all([path], "center", size)
    image = to_float(pixels)                                             # (1, 3, H, W)
    # The rest becomes grey before it is encoded, for an encoder looks beyond a cell.
    seen = torch.where(cells.kron(torch.ones(cell, cell, dtype=torch.bool)), image, 0.5)
    tokens = tokenizer.encode(seen.to(device)).cpu()[0]
    return torch.where(cells.flatten(), tokens, -1), torch.cat([image, seen])

def open_samples(out, folder, count, size, settings):
    """Where samples go: a path, a folder of numbered PNGs, and the numbers that this process makes.

    A grid (.png) or an .npz is made of the PNGs in the end. settings.json says how they were made.
    """
    new = (Path(folder, f"samples-{n}.png") for n in itertools.count(1))
    path = Path(out) if out else next(path for path in new if not path.exists())
    kind, store = path.suffix, Path(f"{path}.parts")
    if path.is_dir() or str(out).endswith(("/", os.sep)):
        kind, store = "folder", path
    if kind not in ("folder", ".png", ".npz"):
        raise UserError(f"--out {out}: name a .png for a grid, an .npz, or a folder/")
    if kind == ".png" and count * max(size, 80)**2 > Image.MAX_IMAGE_PIXELS:
        raise UserError(f"--out {path}: {count} are too many for a grid: name an .npz or a folder/")
    about = store / "settings.json"
    if kind == ".npz" and path.exists() and not about.exists():
        raise UserError(f"--out {path} is there already: remove it")
    there = {file.name for file in store.glob("*.png")}
    if there and not (about.exists() and read_json(about) == settings):
        raise UserError(f"--out {store} was made with other settings: remove it")
    wait_for_all()  # nobody writes before all have looked
    if RANK == 0:
        write_json(about, settings)
    missing = [number for number in range(count) if f"{number:06}.png" not in there]
    return path, store, missing[RANK::WORLD_SIZE]

def save_samples(store, batches):
    """Write numbers (B,) and images (B, 3, H, W) as PNGs, while the next batch is drawn."""
    def write(number, pixels):
        with replacing(store / f"{number:06}.png") as beside:
            Image.fromarray(pixels).save(beside, "PNG", compress_level=1)

    jobs = []
    with ThreadPoolExecutor() as pool:  # Pillow compresses without the GIL
        for numbers, images in batches:
            for job in jobs:
                job.result()
            jobs = [pool.submit(write, *pair) for pair in zip(numbers.tolist(), to_uint8(images))]
    for job in jobs:
        job.result()

def pack_samples(path, store, count, names, before=None):
    """Make the grid or .npz at `path`. In a grid, images (N, 3, H, W) may come `before`."""
    wait_for_all()
    if path == store or RANK > 0:
        return
    files = [store / f"{number:06}.png" for number in range(count)]
    pictures = read_all(files, None, None)                               # each (1, H, W, 3)
    if path.suffix == ".npz":
        write_npz(path, count, tqdm(pictures, "packing", count, leave=False))
    else:
        images = to_float(np.concatenate(list(pictures)))
        if before is not None:
            images, names = torch.cat([before, images]), ["picture", "kept", *names]
        save_grid(path, images, names)
    with contextlib.suppress(OSError):
        for file in (*store.glob("*.png"), store / "settings.json"):  # settings last, for kills
            file.unlink()
        store.rmdir()

def write_npz(path, count, parts):
    """Write an .npz of `count` pictures that come in parts uint8 (N, H, W, 3)."""
    with replacing(path) as beside, zipfile.ZipFile(beside, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            write_array(member, count, parts)

# ---- 6. The command

def run(argv):
    parser = Parser(prog="tokenizer.py", description=__doc__.split("\n")[0])
    command = parser.add_subparsers(required=True).add_parser(
        "reconstruct", help="pictures through the tokenizer and back")
    command.add_argument("pictures", nargs="+", help="files and folders")
    command.add_argument("--out", required=True, type=Path, help=".png or .npz to write")
    command.add_argument("--tokenizer", help="file or run folder [the released one]")
    command.add_argument("--device", choices=["cuda", "cpu"], help="[cuda, if there is one]")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {args.out}: name a .png to look at, or an .npz to score")
    device, _, _ = choose_device(args.device)
    path = Path(args.tokenizer or released_tokenizer())
    tokenizer = load(path / "tokenizer.pt" if path.is_dir() else path).to(device)
    files = [file for name in args.pictures for file in pictures_in(name) or [Path(name)]]

    def pairs():
        for pixels in read_all(files, "center", tokenizer.image_size):
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
    return exit_code(run, argv, "interrupted")

# ---- 7. What all three programs need

class UserError(Exception):
    """A mistake of the user: one line that names the file or flag. Exit code 2."""

class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")

def flag_of(name):
    return "--" + name.replace("_", "-")

def positive(text):
    if not 1 <= int(text) <= 10**9:
        raise argparse.ArgumentTypeError(f"must be from 1 to 1,000,000,000, not {text}")
    return int(text)

def rectangle(text):
    if not re.fullmatch(r"\d+,\d+,\d+,\d+", text):
        raise argparse.ArgumentTypeError(f"must be four numbers, such as 0,0,16,32, not {text}")
    return [int(number) for number in text.split(",")]

def exit_code(function, argv, interrupted="interrupted; the same command goes on"):
    """Call function(argv). Returns 0, 2 for a user's mistake, or 130 for Ctrl-C."""
    try:
        function(argv)
        return 0
    except KeyboardInterrupt as error:
        code, message = 130, str(error) or interrupted
    except BrokenPipeError:  # whoever read our output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        code, message = 2, f"error: {error}"
    except (MemoryError, RuntimeError) as error:
        # torch has other words for it on a CPU
        if not re.search("MemoryError|out of memory|DefaultCPUAllocator", repr(error)):
            raise
        code, message = 2, "error: out of memory: lower --micro-batch or --batch"
    if RANK > 0:
        time.sleep(2)  # if rank 0 says the same, torchrun ends us first
        message = f"rank {RANK}: {message}"
    print(message, file=sys.stderr)
    return code

def choose_device(name, precision=None, on_cuda="float32"):
    """The device, the precision of matrix products, and its autocast context."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU")
    device = torch.device(f"cuda:{LOCAL_RANK}" if name == "cuda" else name)
    precision = precision or (on_cuda if name == "cuda" else "float32")
    if precision == "tf32" and name == "cpu":
        raise UserError("--precision tf32 needs --device cuda")
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    # Trap: cuDNN's attention makes a plan for every length, of which sampling has T.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device, precision, torch.autocast(name, torch.bfloat16, precision == "bfloat16")

def gpu_gigabytes(device):
    if device.type == "cpu":
        return 0
    return torch.cuda.get_device_properties(device).total_memory / 1e9

def send(tensor, device):
    """The tensor on the device. Nobody waits for a copy from pinned memory."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)

# Processes of torchrun

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

@contextlib.contextmanager
def processes(device):
    """Join the processes of torchrun, if there are any. Rank 0 alone talks."""
    if WORLD_SIZE == 1:
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    # Rank 0 may work alone for long. torchrun notices who has died.
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    if RANK == 0:
        yield
    else:
        with open(os.devnull, "w") as silence:
            with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
                yield
    dist.destroy_process_group()  # not after an error, or the others would fail first

def sum_over_processes(tensor):
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor

def wait_for_all():
    sum_over_processes(torch.zeros(1))

def in_any_process(signals):
    return sum_over_processes(torch.tensor(len(signals))).item() > 0

@contextlib.contextmanager
def noting_signals():
    """Yield a list that collects Ctrl-C, SIGTERM and SIGHUP. A second one strikes at once."""
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
    """Hold a lock file. If another program holds it, wait, or raise UserError(busy)."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")
    with file:
        if RANK == 0 and os.name == "posix":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            except BlockingIOError:
                raise UserError(busy) from None
        wait_for_all()
        yield

# Files

@contextlib.contextmanager
def writing(path):
    """Turn what the disk refuses into a UserError that names the path."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save turns a full disk into a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror or cause}") from error

@contextlib.contextmanager
def reading(path, wrong=None):
    """Turn what a damaged file raises into a UserError that names the path."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        raise UserError(f"{path} {wrong}" if wrong else f"{path}: {error}") from error

@contextlib.contextmanager
def replacing(path, ending=".part"):
    """Yield a path to write to. It is renamed to `path` when all is written."""
    path = Path(path)
    beside = Path(f"{path}{ending}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()

def write_tensors(path, tensors):
    with replacing(path) as beside, open(beside, "wb") as file:  # a file says why it is full
        torch.save(tensors, file)

def write_json(path, value):
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n")

def read_json(path):
    with reading(path):
        return json.loads(Path(path).read_text())

def read_tensors(path):
    """The dictionary that torch.save wrote to a file. Nothing in it is executed."""
    with reading(path, "is not a dictionary of tensors by torch.save, or is damaged"):
        with zipfile.ZipFile(path) as archive:
            # torch.save compresses nothing, a bomb does. torch.load ignores checksums.
            if any(member.compress_type for member in archive.infolist()) or archive.testzip():
                raise ValueError
        value = torch.load(path, "cpu", weights_only=True, mmap=True)
        if not isinstance(value, dict):
            raise ValueError
        return value

def load_strictly(module, state, path, assign=False):
    """Copy a state dict into a module, or assign it. Names and shapes must agree."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in state.items()}
    for name in wanted | found:
        here, there = found.get(name, "missing"), wanted.get(name, "unknown")
        if here != there:
            raise UserError(f"{path} does not fit the model: {name} is {here}, expected {there}")
    module.load_state_dict(state, assign=assign)

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
RELEASED_MODELS = {  # file and SHA-256
    "RAR-B": ("rar_b.bin", "cbbf4b27dc36afae77fdb2fe0d6b9b5b7446eae45f1a9f91d442ab0b315b9ebf"),
    "RAR-L": ("rar_l.bin", "edad8e9905e20a5df14eeee0d5d04c1be48b16a7751b4b3f4954a6dec8ad87d5"),
    "RAR-XL": ("rar_xl.bin", "7b4cec5c76f18dc7a3ea055a6b0cc4c5748c533768eed71564a88d897c762bc8"),
    "RAR-XXL": ("rar_xxl.bin", "85aba44fef7aecfd879829077e541f09da4c29da3b1fd374837601d7322bf6ff"),
}

def fetch_released(model):
    """The path of a released model's weights. They and the tokenizer are fetched once."""
    if RANK == 0:
        released_tokenizer()
        fetch_hub("yucornetto/RAR", *RELEASED_MODELS[model])
    wait_for_all()
    return fetch_hub("yucornetto/RAR", *RELEASED_MODELS[model])

def released_tokenizer(*folders):
    """The path of the released tokenizer, which is fetched if need be."""
    for folder in (*folders, ".", torch.hub.get_dir()):
        if Path(folder, RELEASED).is_file():
            return Path(folder, RELEASED)
    return fetch_hub("fun-research/TiTok", RELEASED)

def fetch_hub(repository, file, sha256=None):
    """The path of a file of Hugging Face, or of its mirror HF_ENDPOINT."""
    host = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return fetch(f"{host.rstrip('/')}/{repository}/resolve/main/{file}", sha256)

def fetch(url, sha256=None):
    """The path of the file at a URL, which is downloaded once, into torch.hub's folder."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.split("/")[-1])
    if path.exists():
        return path
    with replacing(path, f".{os.getpid()}.part") as beside:  # two may download it at once
        try:
            with urllib.request.urlopen(url, timeout=60) as response, open(beside, "wb") as file:
                with tqdm.wrapattr(file, "write", response.length, desc=url) as target:
                    shutil.copyfileobj(response, target)
            is_whole = zipfile.is_zipfile(beside)  # as torch.save writes
            if sha256 is not None:
                is_whole = digest(np.memmap(beside, mode="r")) == sha256
            if not is_whole:
                raise ValueError("it is not that file, or not whole")
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UserError(f"cannot download {url}: {error}; retry or put it at {path}") from error
    return path

if __name__ == "__main__":
    sys.exit(main())
