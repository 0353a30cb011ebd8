"""Pictures in, tokens, pictures out. The command shows what a tokenizer keeps of a picture:

    python tokenizer.py reconstruct a.jpg b.jpg --out again.png
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import zipfile
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# OpenMP's threads spin while they wait for each other, so beside other programs an update
# took 2 s instead of 0.06. This bound, which only libgomp reads, keeps the idle speed.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy.cluster.vq import kmeans2
from torch import nn
from tqdm import tqdm

class UserError(ValueError):
    """A mistake of the user: one line that names the file or flag, and the mend."""

@contextlib.contextmanager
def replacing(path):
    """Yield a path to write to. It is renamed to `path` when all is written, or removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

# ---- Two tokenizers

def nearest(vectors, codes):
    """The number of the nearest code (V, C) to each vector (..., C): int64 (...)."""
    codes = codes.double()  # because TF32 and autocast would change tokens
    # |v - c|^2 without |v|^2, which is the same for all codes
    return ((codes**2).sum(1) - 2 * vectors.double() @ codes.T).argmin(-1)

class PatchTokenizer(nn.Module):
    """A token is the nearest of `codebook_size` mean patches. It is fitted in seconds.

    The decoder is linear: it sees the mean patches of a token and of its eight neighbours.
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
        return F.pixel_unshuffle(images, self.patch_size).flatten(2).transpose(1, 2)

    def means(self, tokens):
        """int (B, T) -> the mean patches (B, 3 * patch * patch, grid, grid)"""
        return self.codebook[tokens].transpose(1, 2).unflatten(2, (self.grid_size, -1))

    def encode(self, images):
        """float (B, 3, H, W) in [0, 1] -> int64 (B, T), row by row"""
        return nearest(self.patches(images.to(self.codebook)), self.codebook)

    def decode(self, tokens):
        """int (B, T) -> float (B, 3, H, W) in [0, 1]"""
        p, error = self.patch_size, self.error
        image = F.conv2d(self.means(tokens), self.decoder, self.decoder_bias, padding=1)
        image = F.pixel_shuffle(image, p)
        # The borders of cells show. A step there may be an edge of the picture, but what two
        # errors explain becomes a ramp over half a cell on both sides.
        ramp = 1 - (torch.arange(p, device=image.device)[:, None] + 0.5) / (p / 2)
        ramp = ramp.clamp(min=0)
        for _ in "xy":  # each round transposes the picture
            cells = image.transpose(2, 3).unflatten(2, (-1, p))  # (B, 3, grid, p, S)
            step = (cells[:, :, 1:, :1] - cells[:, :, :-1, -1:]).clamp(-2 * error, 2 * error)
            cells[:, :, 1:] -= step / 2 * ramp
            cells[:, :, :-1] += step / 2 * ramp.flip(0)
            image = cells.flatten(2, 3)
        # Means are blurred, because details of patches cancel out. So what differs from its
        # surroundings is raised, by half an error at most.
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
        patches = self.patches(images).flatten(0, 1).numpy()  # (N, C)
        patches = random.permutation(patches)[:60_000]
        # k-means begins with different patches, because equal codes would stay equal.
        distinct = np.unique(patches, axis=0)
        if len(distinct) < codebook_size:
            raise UserError(f"--codebook-size {codebook_size}: only {len(distinct)} patches differ")
        codebook = random.permutation(distinct)[:codebook_size]
        codebook, _ = kmeans2(patches, codebook, iter=20, minit="matrix")
        self.codebook.copy_(torch.from_numpy(codebook))
        self.decoder[:, :, 1, 1] = torch.eye(self.codebook.shape[1])  # the token's own mean
        if self.patch_size <= 16:  # larger ones would take tens of GB
            self.fit_decoder(images[:5_000_000 // patches.shape[1] // grid_size**2])
        again = torch.cat([self.decode(self.encode(part)) for part in images.split(50)])
        self.error.copy_((again - images).square().mean().sqrt())
        return self

    def fit_decoder(self, images):
        """Ridge regression: from nine mean patches to what the middle one lacks."""
        tokens = torch.cat([self.encode(part) for part in images.split(50)])
        inputs = F.unfold(self.means(tokens), 3, padding=1)  # (B, 9C, T)
        inputs = inputs.transpose(1, 2).flatten(0, 1).double()  # float32 would lose 2 dB
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)  # and a bias
        outputs = (self.patches(images) - self.codebook[tokens]).flatten(0, 1).double()
        square = inputs.T @ inputs
        ridge = square.diagonal().mean() * len(square) / len(inputs)
        square += ridge * torch.eye(len(square))
        solution = torch.linalg.solve(square, inputs.T @ outputs)  # (9C + 1, C)
        self.decoder += solution[:-1].T.unflatten(1, (-1, 3, 3))
        self.decoder_bias.copy_(solution[-1])

def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)

def conv(inputs, outputs, size=3, bias=True):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=bias)

class ResidualBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), conv(inputs, outputs, bias=False)
        self.norm2, self.conv2 = norm(outputs), conv(outputs, outputs, bias=False)
        if inputs != outputs:
            self.nin_shortcut = conv(outputs, outputs, 1, bias=False)

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
    return named(conv_in=conv(3, 128, bias=False), down=down, mid=two_blocks(512, 512),
                 norm_out=norm(512), silu=nn.SiLU(), conv_out=conv(512, 256, 1))

def decoder():
    """(B, 256, 16, 16) -> (B, 3, 256, 256), about in [0, 1]"""
    widths = {"4": (512, 512), "3": (512, 256), "2": (256, 256), "1": (256, 128)}
    levels = {name: named(block=two_blocks(inputs, outputs), enlarge=nn.Upsample(scale_factor=2),
                          upsample_conv=conv(outputs, outputs))
              for name, (inputs, outputs) in widths.items()}
    up = named(**levels, **{"0": named(block=two_blocks(128, 128))})
    return named(conv_in=conv(256, 512), mid=two_blocks(512, 512), up=up,
                 norm_out=norm(128), silu=nn.SiLU(), conv_out=conv(128, 3))

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
        codes = self.quantize.embedding.weight
        cells = self.encoder(images.to(codes))  # (B, 256, 16, 16)
        return nearest(cells.flatten(2).transpose(1, 2), codes)

    @torch.no_grad()
    def decode(self, tokens):
        """int (B, 256) -> float (B, 3, 256, 256) in [0, 1]"""
        codes = self.quantize.embedding(tokens)  # (B, T, 256)
        codes = codes.transpose(1, 2).unflatten(2, (16, 16)).contiguous()
        # In parts, because a picture takes 170 MB. On a CPU, where rounding depends on the
        # size of a batch, one by one.
        parts = codes.split(1 if codes.device.type == "cpu" else 16)
        return torch.cat([self.decoder(part) for part in parts]).clamp(0, 1)

def load(path):
    """The tokenizer in a file, of either kind."""
    try:
        state = torch.load(path, "cpu", weights_only=True)
        if "quantize.embedding.weight" in state:
            tokenizer = MaskGITVQGAN()
        else:
            codes, channels = state["codebook"].shape
            tokenizer = PatchTokenizer(int(state["grid"]), math.isqrt(channels // 3), codes)
        tokenizer.load_state_dict(state)
    except OSError:
        raise
    except Exception as error:  # torch raises all kinds
        raise UserError(f"{path} is no tokenizer, or it is damaged") from error
    return tokenizer.eval()

RELEASED = "maskgit-vqgan-imagenet-f16-256.bin"

def released_tokenizer():
    """The path of the published tokenizer, which is downloaded if it is not here."""
    for path in (Path(RELEASED), Path(torch.hub.get_dir(), RELEASED)):
        if path.is_file():
            return path
    return fetch("fun-research/TiTok", RELEASED)

def fetch(repository, file, sha256=None):
    """The path of a file of Hugging Face, or of its mirror HF_ENDPOINT. Downloaded once."""
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    if path.exists():
        return path
    host = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    url = f"{host.rstrip('/')}/{repository}/resolve/main/{file}"
    try:
        with replacing(path) as part:
            torch.hub.download_url_to_file(url, str(part), hash_prefix=sha256)
            # torch.save writes a zip. A login page is none, nor is half a file.
            if sha256 is None and not zipfile.is_zipfile(part):
                raise ValueError("what came is not that file, or not all of it")
    except Exception as error:  # of the network, the disk or the hash
        raise UserError(f"cannot download {url}: {error}; retry, or put it at {path}") from error
    return path

# ---- Photographs

CROPS = {"ten": 10, "flip": 2, "center": 1}  # how many each makes of a picture

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

def crop(image, size, kind):
    """The crops (N, size, size, 3) uint8 of a picture.

    "center" is its middle, and "flip" adds the mirror image. "ten" cuts a square that is a
    tenth larger: four corners, the middle, and the mirror images of all.
    """
    whole, corners = size, [(0, 0)]
    if kind == "ten":
        whole = int(1.1 * size)
        far, middle = whole - size, round((whole - size) / 2)
        corners = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    pixels = center_crop(image, whole)
    sides = [pixels] if kind == "center" else [pixels, pixels[:, ::-1]]
    return np.stack([side[y:y + size, x:x + size] for side in sides for y, x in corners])

def as_seen(image):
    """An opened picture as it is to be seen: upright, on white, in 8-bit RGB."""
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF is no damaged picture
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip it
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):  # nothing says which number is white
        raise ValueError("not 8-bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

class DamagedPicture(UserError):
    """Which file is no picture that can be read, and why."""

def read_picture(path, size=None, crops="center"):
    """The crops (N, size, size, 3) uint8 of a picture file. Without a size, all of it.

    Raises DamagedPicture, or OSError where the system fails and the picture may be right.
    """
    content = io.BytesIO(Path(path).read_bytes())
    try:
        image = as_seen(Image.open(content))
        return np.array(image)[None] if size is None else crop(image, size, crops)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises all kinds, some with addresses in memory
        reason = re.split("[<\n]", f"{type(error).__name__}: {error}")[0]
        raise DamagedPicture(f"{path}: {reason}") from error

def read_ahead(files, size, crops="center", purpose="reading"):
    """Yield a future of read_picture for each file. Threads read the next 32."""
    upcoming = deque()
    with ThreadPoolExecutor() as pool:  # Pillow works without the GIL
        for file in tqdm(files, purpose, leave=False):
            upcoming.append(pool.submit(read_picture, file, size, crops))
            if len(upcoming) > 32:
                yield upcoming.popleft()
        yield from upcoming

def read_crops(files, size):
    """The centre crops (N, 3, size, size) of those files that are not damaged."""
    crops = []
    for future in read_ahead(files, size):
        with contextlib.suppress(DamagedPicture):
            crops.append(future.result())
    if not crops:
        raise UserError(f"{files[0]} and all other pictures are damaged")
    return to_float(np.concatenate(crops))

def class_folders(folder):
    """The class folders of a data set, sorted: those in train/, if there is one."""
    root = Path(folder, "train")
    if not root.is_dir():
        root = Path(folder)
    # val/ is held out, runs/ is ours, and macOS adds __MACOSX to its archives.
    others = {Path(each).resolve() for each in ("runs", f"{folder}/val", root / "__MACOSX")}
    found = sorted(path for path in root.iterdir() if path.is_dir()
                   and path.name[0] != "." and path.resolve() not in others)
    if not found:
        raise UserError(f"--data {folder}: expected DIR/CLASS/PICTURE or DIR/train/CLASS/PICTURE")
    if all(path.name.isdecimal() for path in found):
        found.sort(key=lambda path: int(path.name))
    return found

READABLE = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
UNREADABLE = {".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".nef", ".arw"} - READABLE

def pictures_in(folder, endings=READABLE, seen=None):
    """The files in and below a folder that are named like pictures, sorted."""
    here = Path(folder).resolve()
    seen = {*here.parents} if seen is None else seen
    seen.add(here)  # because links may lead up, or to one folder twice
    found = []
    for path in sorted(Path(folder).iterdir()):
        if path.name[0] == ".":
            continue
        if path.suffix.lower() in endings:
            found.append(path)
        elif path.is_dir() and path.resolve() not in seen:
            found += pictures_in(path, endings, seen)
    return found

def labelled_pictures(folder):
    """Two lists of (class, path), to train on and held out: those in val/, or about 5 %.

    Without val/ the name of a file decides, so a new picture moves no other one.
    """
    def say(paths, what):
        if paths:
            text = f"--data {folder}: {len(paths)} {what}, such as {paths[0]}"
            print(text, file=sys.stderr)  # which can print all names, also those not in UTF-8

    folders, val = class_folders(folder), Path(folder, "val")
    train = [(n, path) for n, each in enumerate(folders) for path in pictures_in(each)]
    if val.is_dir():
        number = {each.name: n for n, each in enumerate(folders)}
        pairs = [(number.get(path.relative_to(val).parts[0]), path) for path in pictures_in(val)]
        held_out = [pair for pair in pairs if pair[0] is not None]
        say([path for n, path in pairs if n is None],
            f"of {len(pairs)} pictures in val/ are ignored, because train/ lacks their classes")
    else:
        hashes = [hashlib.sha256(os.fsencode(path.name)).hexdigest() for _, path in train]
        limit = max("0ccc", min(hashes, default=""))  # 5 % are below 0ccc; at least one is taken
        held_out = [pair for pair, each in zip(train, hashes) if each <= limit]
        train = [pair for pair, each in zip(train, hashes) if each > limit]
    say(pictures_in(folder, UNREADABLE), "files are ignored, because Pillow can't read their kind")
    for purpose, pairs in (("to train on", train), ("held out", held_out)):
        present = {n for n, _ in pairs}
        say([each for n, each in enumerate(folders) if n not in present],
            f"of {len(folders)} classes have no pictures {purpose}")
    if not train or not held_out:
        raise UserError(f"--data {folder}: {len(train)} pictures to train on and {len(held_out)} "
                        "held out; expected more, or a val/ with the classes of train/")
    return train, held_out

# ---- Shapes

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
    # Edges are not smoothed, because blended colours would use up a small codebook.
    image = Image.new("RGB", (SHAPES_SIZE, SHAPES_SIZE), GROUND)
    name = list(SHAPES)[index % len(SHAPES)]
    polygons = [(points, colour) for points in SHAPES[name]]
    polygons += [(points, GROUND) for points in HOLES.get(name, [])]
    for points, fill in polygons:
        corners = centre + radius * np.asarray(points)  # (N, 2)
        ImageDraw.Draw(image).polygon(corners.flatten().tolist(), fill=fill)
    return np.asarray(image)

def draw_shapes(count):
    """The first pictures: float (count, 3, 32, 32)"""
    return to_float(np.stack([draw_shape(i) for i in range(count)]))

# ---- Rows of tokens: uint16 (1 + T,), the class, then the tokens in cell order

def fingerprint(module, *parts):
    """12 hex digits that change with a module's tensors, and with the parts."""
    sha = hashlib.sha256(repr(parts).encode())
    for tensor in module.state_dict().values():
        sha.update(tensor.cpu().numpy().tobytes())
    return sha.hexdigest()[:12]

@contextlib.contextmanager
def rows_file(path, columns):
    """Yield an .npy file to write uint16 rows to. They are counted in the end."""
    def header(rows):
        about = {"descr": "<u2", "fortran_order": False, "shape": (rows, columns)}
        np.lib.format.write_array_header_1_0(file, about)

    with replacing(path) as part, open(part, "wb") as file:
        header(0)
        begin = file.tell()
        yield file
        rows = (file.tell() - begin) // (2 * columns)
        file.seek(0)  # numpy leaves room for any number of rows
        header(rows)

def encode_shards(pictures, tokenizer, crops, folder, rank=0, processes=1):
    """Turn (class, path) pairs into rows, in folder/00000.npz, 00001.npz, ...

    A shard has the rows of some pictures: all crops of one, then those of the next. Which,
    depends on `pictures` only. So after a stop any number of processes can go on.
    """
    count = min(1000, math.ceil(len(pictures) / 16))
    bounds = [len(pictures) * n // count for n in range(count + 1)]
    paths = [Path(folder, f"{n:05}.npz") for n in range(count)]
    shards = {paths[n]: pictures[bounds[n]:bounds[n + 1]]
              for n in range(rank, count, processes) if not paths[n].exists()}
    files = [file for shard in shards.values() for _, file in shard]
    futures = read_ahead(files, tokenizer.image_size, crops, "encoding")
    for path, shard in shards.items():
        rows, left_out = [np.empty((0, 1 + tokenizer.grid_size**2))], []
        for (label, _), future in zip(shard, futures):
            try:
                # Picture by picture, because in a larger batch rounding would change tokens.
                tokens = tokenizer.encode(to_float(future.result()))  # (crops, T)
                rows.append(np.insert(tokens.cpu().numpy(), 0, label, axis=1))
            except DamagedPicture as error:
                left_out.append(str(error))
        rows = np.concatenate(rows).astype("<u2")
        with replacing(path) as part, open(part, "wb") as file:
            np.savez(file, rows=rows, left_out=np.array(left_out, str), of=[len(pictures), count])

def join_shards(folder, path):
    """Make one .npy of the shards in a folder, and remove them. One is in memory at a time."""
    files, left_out = sorted(Path(folder).glob("*.npz")), []
    with rows_file(path, np.load(files[0])["rows"].shape[1]) as target:
        for file in files:
            with np.load(file, allow_pickle=False) as shard:
                target.write(shard["rows"].tobytes())
                left_out += shard["left_out"].tolist()
                pictures, count = shard["of"]
        for text in left_out:
            print(f"left out {text}", file=sys.stderr)
        if len(files) != count:
            raise UserError(f"{folder} has {len(files)} of {count} shards: let all processes "
                            "write to one folder")
        if len(left_out) > min(max(10, pictures // 1000), pictures - 1):
            raise UserError(f"{len(left_out)} of {pictures} pictures are damaged: mend or remove "
                            "them")
    shutil.rmtree(folder)

def import_jsonl(file, train, held_out, num_classes, length, codebook_size):
    """Turn lines {"class_id": int, "tokens": [int, ...]} into two .npy files of rows.

    The published file has the ten crops of a picture in ten lines, and class after class. So
    blocks of ten lines are held out, spread evenly: a twentieth of them, but at most 500.
    """
    with open(file, "rb") as lines:
        count = sum(1 for _ in tqdm(lines, "counting lines", leave=False))
    if count <= 10:
        raise UserError(f"{file} has {count} lines: expected more than the ten to hold out")
    blocks = math.ceil(count / 10)
    every = min(blocks, max(20, math.ceil(blocks / 500)))
    # `train` is opened first and so renamed last: where it is, both are.
    with rows_file(train, 1 + length) as most, rows_file(held_out, 1 + length) as rest, \
            open(file, "rb") as lines:
        for n, line in enumerate(tqdm(lines, "reading tokens", count, leave=False)):
            try:
                entry = json.loads(line)
                row = [entry["class_id"], *entry["tokens"]]
                if {*map(type, row)} != {int} or len(row) != 1 + length:
                    raise ValueError
                if min(row) < 0 or row[0] >= num_classes or max(row[1:]) >= codebook_size:
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                raise UserError(f'{file}, line {n + 1}: expected {{"class_id": below {num_classes}'
                                f', "tokens": [{length} below {codebook_size}]}}') from None
            (most if (n // 10 + 1) % every else rest).write(np.array(row, "<u2").tobytes())

# ---- Pictures out

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
    size = scale * images.shape[2]
    cell = size + gap
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * cell + gap, rows * cell + gap + header), "white")
    for i, pixels in enumerate(to_uint8(images).repeat(scale, 1).repeat(scale, 2)):
        row, column = divmod(i, columns)
        sheet.paste(Image.fromarray(pixels), (gap + column * cell, gap + header + row * cell))
    font = ImageFont.load_default(size=min(15, 1.6 * size / max(map(len, names), default=1)))
    for column, name in enumerate(names):
        centre = (column + 0.5) * cell + gap / 2, gap + header / 2
        ImageDraw.Draw(sheet).text(centre, name, fill="black", font=font, anchor="mm")
    with replacing(path) as part:
        sheet.save(part, "PNG")

def known_tokens(path, keep, tokenizer):
    """The tokens (T,) of a picture's cells within the pixels `keep` = (x0, y0, x1, y1).

    Others are -1. Also returns two images (2, 3, H, W): the picture, and what is kept of it.
    """
    size, grid = tokenizer.image_size, tokenizer.grid_size
    cell = size // grid
    x0, y0, x1, y1 = keep
    cells = torch.zeros(grid, grid, dtype=torch.bool)
    cells[-(-y0 // cell):y1 // cell, -(-x0 // cell):x1 // cell] = True  # only whole cells
    if cells.all() or not cells.any():
        raise UserError(f"--keep holds {cells.sum()} of {grid**2} cells of {cell} pixels: "
                        "hold some, but not all")
    image = to_float(read_picture(path, size))  # (1, 3, H, W)
    # The rest becomes grey before it is encoded, because an encoder looks beyond a cell.
    seen = torch.where(cells.kron(torch.ones(cell, cell, dtype=torch.bool)), image, 0.5)
    tokens = tokenizer.encode(seen)[0].cpu()
    return torch.where(cells.flatten(), tokens, -1), torch.cat([image, seen])

# ---- The command

def reconstruct(pictures, out, path, device):
    """Save pictures as a tokenizer keeps them: beside the originals, or as .npz files of both."""
    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {out}: name a .png to look at, or an .npz to score")
    files = []
    for each in pictures:
        files += pictures_in(each) if each.is_dir() else [each]
    if not files:
        raise UserError(f"{pictures[0]} has no pictures")
    beside = out.with_name(f"{out.stem}-originals.npz")
    if {out.resolve(), beside.resolve()} & {file.resolve() for file in files}:
        raise UserError(f"--out {out} is one of the pictures: choose another --out")
    torch.backends.cudnn.allow_tf32 = False  # because it would change tokens
    tokenizer = load(path / "tokenizer.pt" if path.is_dir() else path).to(device)
    originals, again = [], []
    for future in read_ahead(files, tokenizer.image_size):
        originals.append(future.result())  # (1, H, W, 3)
        tokens = tokenizer.encode(to_float(originals[-1]))
        again.append(to_uint8(tokenizer.decode(tokens)))
    if out.suffix == ".png":
        pairs = [pixels for pair in zip(originals, again) for pixels in pair]
        save_grid(out, to_float(np.concatenate(pairs)), ["picture", "again"] * min(4, len(files)))
    else:
        for target, pixels in ((beside, originals), (out, again)):
            with replacing(target) as part, open(part, "wb") as file:
                np.savez(file, arr_0=np.concatenate(pixels))

def main(argv=None):
    parser = argparse.ArgumentParser(prog="tokenizer.py")
    parser.add_argument("command", choices=["reconstruct"])
    parser.add_argument("pictures", nargs="+", type=Path, help="files and folders")
    parser.add_argument("--out", required=True, type=Path, help=".png to look at, .npz to score")
    parser.add_argument("--tokenizer", type=Path, help="file or run [the published one]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        path = args.tokenizer or released_tokenizer()
        reconstruct(args.pictures, args.out, path, args.device)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
