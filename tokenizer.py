"""Pictures in, tokens, pictures out.

    python tokenizer.py reconstruct a.jpg b.jpg --out again.png    shows what a tokenizer keeps
"""

import argparse
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
from contextlib import contextmanager
from pathlib import Path

# Without this, threads that spin while they wait make a busy CPU 30 times as slow.
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

@contextmanager
def replacing(path):
    """Yield a path to write to. It is renamed to `path` when all is written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # A full disk names no file.
        raise
    finally:
        part.unlink(missing_ok=True)

# ---- Two tokenizers

def nearest(cells, codes):
    """The numbers (B, T) of the codes (V, C) nearest to cells (B, C, grid, grid), row by row."""
    vectors, codes = cells.flatten(2).mT.double(), codes.double()  # or TF32 changes tokens
    # |v - c|^2 without |v|^2, which is the same for all codes
    return ((codes**2).sum(1) - 2 * vectors @ codes.T).argmin(-1)

def look_up(tokens, codes):
    """int (B, T) and codes (V, C) -> cells (B, C, grid, grid)"""
    return codes[tokens].mT.unflatten(2, (math.isqrt(tokens.shape[1]), -1))

class PatchTokenizer(nn.Module):
    """A token is the nearest of some mean patches. It is fitted in seconds."""

    def __init__(self, grid_size, patch_size, codebook_size):
        super().__init__()
        self.grid_size, self.patch_size, self.codebook_size = grid_size, patch_size, codebook_size
        self.image_size, channels = grid_size * patch_size, 3 * patch_size**2
        self.register_buffer("grid", torch.tensor(grid_size))
        self.register_buffer("codebook", torch.zeros(codebook_size, channels))
        self.register_buffer("decoder", torch.zeros(channels, channels, 3, 3))

    def encode(self, images):
        """float (B, 3, H, W) in [0, 1] -> int64 (B, T), row by row"""
        patches = F.pixel_unshuffle(images.to(self.codebook), self.patch_size)
        return nearest(patches, self.codebook)

    def decode(self, tokens):
        """int (B, T) -> float (B, 3, H, W) in [0, 1]"""
        means, p = look_up(tokens, self.codebook), self.patch_size
        patches = means + F.conv2d(means, self.decoder, padding=1)
        image = F.pixel_shuffle(patches, p)
        # Borders of cells show. So up to 0.15 of a step there becomes a ramp over both half
        # cells. A larger one is an edge of the picture.
        ramp = 1 - (2 * torch.arange(p, device=tokens.device)[:, None] + 1) / p
        ramp = ramp.clamp(min=0)
        for _ in "xy":  # each round transposes the picture
            cells = image.mT.unflatten(2, (-1, p))  # (B, 3, grid, p, S)
            step = (cells[:, :, 1:, :1] - cells[:, :, :-1, -1:]).clamp(-0.15, 0.15)
            cells[:, :, 1:] -= step / 2 * ramp
            cells[:, :, :-1] += step / 2 * ramp.flip(0)
            image = cells.flatten(2, 3)
        return image.clamp(0, 1)

    @classmethod
    def fit(cls, images, grid_size, codebook_size):
        """The tokenizer of pictures (B, 3, S, S) in [0, 1]."""
        self = cls(grid_size, images.shape[-1] // grid_size, codebook_size)
        cells = F.pixel_unshuffle(images, self.patch_size)  # (B, C, grid, grid)

        # k-means begins with patches that differ, if there are enough: equal codes stay equal.
        random = np.random.default_rng(0)
        patches = cells.permute(0, 2, 3, 1).flatten(0, 2).numpy()
        patches = random.permutation(patches)[:60_000]  # (N, C)
        codebook = random.permutation(np.unique(patches, axis=0))
        codebook = np.resize(codebook, self.codebook.shape)
        for _ in tqdm(range(20), "fitting the tokenizer", leave=False):
            codebook, _ = kmeans2(patches, codebook, iter=1, minit="matrix")
        self.codebook.copy_(torch.from_numpy(codebook))

        # Ridge regression from nine mean patches to what the middle one lacks
        cells = cells[:5_000_000 // cells[0].numel()]
        tokens = [nearest(part, self.codebook) for part in cells.split(50)]
        means = look_up(torch.cat(tokens), self.codebook)
        inputs = F.unfold(means, 3, padding=1).mT.flatten(0, 1).double()  # (N, 9C)
        outputs = (cells - means).flatten(2).mT.flatten(0, 1).double()  # (N, C)
        square = inputs.T @ inputs  # in float64, because float32 loses 2 dB
        ridge = square.diagonal().mean() * len(square) / len(inputs)
        square += ridge * torch.eye(len(square))
        solution = torch.linalg.solve(square, inputs.T @ outputs)  # (9C, C)
        self.decoder.copy_(solution.T.unflatten(1, (-1, 3, 3)))
        return self

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
            x = self.nin_shortcut(h)  # Trap: of h. The input is not added at all.
        return h + x

def two_blocks(inputs, outputs):
    return nn.Sequential(ResidualBlock(inputs, outputs), ResidualBlock(outputs, outputs))

def named(**modules):
    """A Sequential with names instead of numbers."""
    return nn.Sequential(OrderedDict(modules))

def encoder():
    """(B, 3, 256, 256) -> (B, 256, 16, 16)"""
    widths = [(128, 128), (128, 128), (128, 256), (256, 256)]
    levels = [named(block=two_blocks(*pair), halve=nn.AvgPool2d(2)) for pair in widths]
    down = nn.Sequential(*levels, named(block=two_blocks(256, 512)))
    return named(
        conv_in=conv(3, 128, bias=False), down=down, mid=two_blocks(512, 512),
        norm_out=norm(512), silu=nn.SiLU(), conv_out=conv(512, 256, 1))

def decoder():
    """(B, 256, 16, 16) -> (B, 3, 256, 256)"""
    up = {}
    for name, *pair in ("4", 512, 512), ("3", 512, 256), ("2", 256, 256), ("1", 256, 128):
        enlarge = nn.Upsample(scale_factor=2)
        last = conv(pair[1], pair[1])
        up[name] = named(block=two_blocks(*pair), enlarge=enlarge, upsample_conv=last)
    up["0"] = named(block=two_blocks(128, 128))
    return named(
        conv_in=conv(256, 512), mid=two_blocks(512, 512), up=named(**up),
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
        codes = self.quantize.embedding.weight
        return nearest(self.encoder(images.to(codes)), codes)

    @torch.no_grad()
    def decode(self, tokens):
        cells = look_up(tokens, self.quantize.embedding.weight).contiguous()
        # A picture takes 170 MB. On a CPU the size of a batch would change pixels by rounding.
        parts = cells.split(16 if cells.is_cuda else 1)
        return torch.cat([self.decoder(part) for part in parts]).clamp(0, 1)

def load(path):
    """A tokenizer of either kind."""
    try:
        state = torch.load(path, "cpu", weights_only=True)
        if "codebook" in state:
            codes, channels = state["codebook"].shape
            tokenizer = PatchTokenizer(int(state["grid"]), math.isqrt(channels // 3), codes)
        else:
            tokenizer = MaskGITVQGAN()
        tokenizer.load_state_dict(state)
    except Exception as error:  # torch raises all kinds
        if getattr(error, "filename", None):
            raise  # It names the file.
        raise UserError(f"{path} is no tokenizer, or it is damaged")
    return tokenizer.eval()

def fetch(repository, file, sha256=None):
    """The path of a file of Hugging Face or its mirror HF_ENDPOINT. Downloaded once."""
    hub = Path(torch.hub.get_dir())
    for path in (Path(file), hub / file, hub / "checkpoints" / file):
        if path.is_file():
            return path
    host = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    url = f"{host.rstrip('/')}/{repository}/resolve/main/{file}"
    try:
        with replacing(path) as part:
            torch.hub.download_url_to_file(url, str(part), hash_prefix=sha256)
            # torch.save writes a zip, and a login page or half a file is none.
            if sha256 is None and not zipfile.is_zipfile(part):
                raise ValueError("it is not that file, or not whole")
    except Exception as error:
        raise UserError(f"cannot download {url}: {error}; retry, or put it at {path}")
    return path

RELEASED = "maskgit-vqgan-imagenet-f16-256.bin"

def released_tokenizer():
    return fetch("fun-research/TiTok", RELEASED)

# ---- Photographs

CROPS = {"ten": 10, "flip": 2, "center": 1}  # of a picture

def center_crop(image, size):
    """The middle of a picture, (size, size, 3) uint8, as ADM cuts it."""
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError("too long and narrow")
    image = image.resize((width, height), Image.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]

def crop(image, size, kind):
    """The crops (N, size, size, 3) uint8 of a picture.

    "center" is its middle, "flip" adds the mirror image, and "ten" are corners and middle
    of a square a tenth larger, and their mirror images.
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
    """An opened picture as one sees it: upright, on white, in 8-bit RGB."""
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
    """Names a file that is no picture, or damaged, and why."""

def read_picture(path, size=None, crops="center"):
    """The crops (N, size, size, 3) uint8 of a picture file. Without a size, all of it.

    An OSError is the system's, and the picture may be right.
    """
    content = io.BytesIO(Path(path).read_bytes())
    try:
        image = as_seen(Image.open(content))
        return np.array(image)[None] if size is None else crop(image, size, crops)
    except MemoryError:
        raise
    except Exception as error:  # all kinds, some with an address in memory
        reason = re.split("[<\n]", str(error))[0]
        raise DamagedPicture(f"{path}: {reason}")

def read_ahead(files, size, crops="center"):
    """Yield a future of read_picture for each file. Threads read the next 32."""
    upcoming = deque()
    with ThreadPoolExecutor() as pool:
        for file in tqdm(files, "pictures", leave=False):
            upcoming.append(pool.submit(read_picture, file, size, crops))
            if len(upcoming) > 32:
                yield upcoming.popleft()
        yield from upcoming

def read_crops(files, size):
    """The centre crops (N, 3, size, size) of those files that can be read."""
    futures = read_ahead(files, size)
    crops = [future.result() for future in futures if not future.exception()]
    if not crops:
        raise UserError("none of the pictures can be read")
    return to_float(np.concatenate(crops))

def class_folders(folder):
    """The class folders of a data set, sorted: those in train/, if there is one."""
    root = Path(folder, "train")
    root = root if root.is_dir() else Path(folder)
    # val/ is held out, runs/ is ours, and __MACOSX is macOS's.
    others = {Path(each).resolve() for each in ("runs", f"{folder}/val", root / "__MACOSX")}
    found = sorted(path for path in root.glob("*") if path.is_dir()
                   and path.name[0] != "." and path.resolve() not in others)
    if not found:
        raise UserError(f"--data {folder}: expected DIR/CLASS/PICTURE")
    if all(path.name.isdecimal() for path in found):
        found.sort(key=lambda path: int(path.name))
    return found

READABLE = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
UNREADABLE = {".heic", ".heif", ".avif", ".jxl"} - READABLE

def pictures_in(folder, endings=READABLE, seen=None):
    """The files in and below a folder that are named like pictures, sorted."""
    here, found = Path(folder).resolve(), []
    seen = seen or {*here.parents}
    seen.add(here)  # because links may lead up, or to one folder twice
    for path in sorted(Path(folder).iterdir()):
        if path.name[0] != "." and path.suffix.lower() in endings:
            found.append(path)
        elif path.name[0] != "." and path.is_dir() and path.resolve() not in seen:
            found += pictures_in(path, endings, seen)
    return found

def labelled_pictures(folder):
    """Two lists of (class, path), to train on and held out: those in val/, or about 5 %.

    Without val/ the name of a file decides, so a new picture moves no other one.
    """
    def note(paths, what):
        if paths:
            print(f"--data {folder}: {len(paths)} {what}: {paths[0]}")

    folders, val = class_folders(folder), Path(folder, "val")
    train = [(n, path) for n, each in enumerate(folders) for path in pictures_in(each)]
    if val.is_dir():
        number = {each.name: n for n, each in enumerate(folders)}
        pairs = [(number.get(path.relative_to(val).parts[0]), path) for path in pictures_in(val)]
        held_out = [pair for pair in pairs if pair[0] is not None]
        note([path for n, path in pairs if n is None],
             f"of {len(pairs)} pictures in val/ have no class in train/")
    else:
        hashes = {pair: hashlib.sha256(os.fsencode(pair[1].name)).hexdigest() for pair in train}
        limit = max("0ccc", min(hashes.values(), default=""))  # 5 % are below 0ccc, or take one
        held_out = [pair for pair in train if hashes[pair] <= limit]
        train = [pair for pair in train if hashes[pair] > limit]
    note(pictures_in(folder, UNREADABLE), "files are of a kind that Pillow can't read")
    for purpose, pairs in (("to train on", train), ("held out", held_out)):
        present = {n for n, _ in pairs}
        note([each for n, each in enumerate(folders) if n not in present],
             f"of {len(folders)} classes have no pictures {purpose}")
    if not train or not held_out:
        raise UserError(f"--data {folder}: {len(train)} pictures to train on, "
                        f"{len(held_out)} held out: add some")
    return train, held_out

# ---- Shapes

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

# Polygons within about [-1, 1]^2, y downwards. The second of ring and crescent is a hole.
SHAPES = {
    "circle": [CIRCLE],
    "square": [box(-0.9, -0.9, 0.9, 0.9)],
    "triangle": [[(0, -1), (1.1, 0.9), (-1.1, 0.9)]],
    "star": [polar(np.tile([1.1, 0.45], 5), np.arange(10) * np.pi / 5 - np.pi / 2)],
    "cross": [box(-1, -0.33, 1, 0.33), box(-0.33, -1, 0.33, 1)],
    "ring": [CIRCLE, 0.55 * CIRCLE],
    "heart": [HEART],
    "crescent": [CIRCLE, 0.9 * CIRCLE + (0.55, -0.25)],
    "arrow": [box(-1, -0.3, 0.05, 0.3), [(0.05, -0.9), (1.1, 0), (0.05, 0.9)]],
    "stripes": [box(-1, y, 1, y + 0.4) for y in (-1, -0.2, 0.6)],
}

def draw_shape(index):
    """Picture number `index`, always the same: (32, 32, 3) uint8, of class index % 10."""
    random = np.random.default_rng(index)
    radius = random.uniform(7.5, 12.5)
    room = 16 - 1.1 * radius
    centre = 16 + random.uniform(-room, room, size=2)
    colour = COLOURS[random.integers(len(COLOURS))]
    # Edges are not smoothed, because mixed colours would use up a small codebook.
    image = Image.new("RGB", (32, 32), GROUND)
    name = list(SHAPES)[index % 10]
    for i, points in enumerate(SHAPES[name]):
        fill = GROUND if i and name in ("ring", "crescent") else colour
        corners = centre + radius * np.asarray(points)  # (N, 2)
        ImageDraw.Draw(image).polygon(corners.flatten().tolist(), fill=fill)
    return np.asarray(image)

def draw_shapes(count):
    """The first pictures: float (count, 3, 32, 32)"""
    return to_float(np.stack([draw_shape(i) for i in range(count)]))

# ---- Rows of tokens: uint16 (1 + T,), the class, then the tokens in cell order

def fingerprint(module, *parts):
    """12 hex digits of a module's tensors and the parts."""
    sha = hashlib.sha256(repr(parts).encode())
    for tensor in module.state_dict().values():
        sha.update(tensor.cpu().numpy().tobytes())
    return sha.hexdigest()[:12]

@contextmanager
def rows_file(path, columns):
    """Yield an .npy file to write rows to."""
    write_header = np.lib.format.write_array_header_1_0
    about = {"descr": "<u2", "fortran_order": False, "shape": (0, columns)}
    with replacing(path) as part, open(part, "wb") as file:
        write_header(file, about)
        begin = file.tell()
        yield file
        about["shape"] = (file.tell() - begin) // (2 * columns), columns
        file.seek(0)  # numpy leaves room for any number of rows
        write_header(file, about)

def encode_shards(pictures, tokenizer, crops, folder, rank=0, processes=1):
    """Turn (class, path) pairs into rows: folder/00000.npz, 00001.npz, ...

    What is in them depends on `pictures` only, so any number of processes can continue.
    """
    count = min(1000, math.ceil(len(pictures) / 16))
    bounds = [len(pictures) * n // count for n in range(count + 1)]
    paths = [Path(folder, f"{n:05}.npz") for n in range(count)]
    mine = [n for n in range(rank, count, processes) if not paths[n].exists()]
    shards = {paths[n]: pictures[bounds[n]:bounds[n + 1]] for n in mine}
    files = [file for shard in shards.values() for _, file in shard]
    futures = read_ahead(files, tokenizer.image_size, crops)
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
            np.savez(file, rows=rows, left_out=np.array(left_out, str), of=len(pictures))

def join_shards(folder, path):
    """Make one .npy of the shards in a folder, which is removed."""
    files, left_out = sorted(Path(folder).glob("*.npz")), []
    with rows_file(path, np.load(files[0])["rows"].shape[1]) as target:
        for file in files:
            with np.load(file) as shard:
                target.write(shard["rows"].tobytes())
                left_out += shard["left_out"].tolist()
                pictures = int(shard["of"])
        for text in left_out:
            print(f"left out {text}")
        if len(left_out) > min(max(10, pictures // 1000), pictures - 1):
            raise UserError(f"{len(left_out)} of {pictures} pictures are damaged: remove them")
    shutil.rmtree(folder)

def import_jsonl(file, train, held_out, num_classes, length, codebook_size):
    """Turn lines {"class_id": int, "tokens": [int, ...]} into two .npy files of rows.

    Ten lines are crops of one picture, so blocks of ten are held out: a twentieth, at most
    500, and evenly spread, because classes follow each other.
    """
    with open(file, "rb") as lines:
        blocks = math.ceil(sum(1 for _ in lines) / 10)
    every = max(2, min(blocks, max(20, math.ceil(blocks / 500))))
    # `train` is opened first and so renamed last: where it is, both are.
    with (rows_file(train, 1 + length) as most, rows_file(held_out, 1 + length) as rest,
          open(file, "rb") as lines):
        for n, line in enumerate(tqdm(lines, "reading tokens", 10 * blocks, leave=False)):
            try:
                entry = json.loads(line)
                row = [entry["class_id"], *entry["tokens"]]
                if ({*map(type, row)} != {int} or len(row) != 1 + length or min(row) < 0
                        or row[0] >= num_classes or max(row[1:]) >= codebook_size):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{file}, line {n + 1}: expected a class_id below {num_classes}, "
                                f"{length} tokens below {codebook_size}")
            target = rest if n // 10 % every == every - 1 else most
            target.write(np.array(row, "<u2").tobytes())

# ---- Pictures out

def to_float(pixels):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [0, 1]. Trap: not in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255

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
    longest = max(map(len, names), default=1)
    font = ImageFont.load_default(size=min(15, 1.6 * (cell - gap) / longest))
    for column, name in enumerate(names):
        centre = (column + 0.5) * cell + gap / 2, gap + header / 2
        ImageDraw.Draw(sheet).text(centre, name, fill="black", font=font, anchor="mm")
    with replacing(path) as part:
        sheet.save(part, "PNG")

def known_tokens(path, keep, tokenizer):
    """The tokens (T,) of cells within the pixels `keep` = (x0, y0, x1, y1), others -1.

    Also returns the picture and what is kept of it, (2, 3, H, W).
    """
    size, grid = tokenizer.image_size, tokenizer.grid_size
    cell = size // grid
    x0, y0, x1, y1 = keep
    cells = torch.zeros(grid, grid, dtype=torch.bool)
    cells[-(-y0 // cell):y1 // cell, -(-x0 // cell):x1 // cell] = True  # only whole cells
    if cells.all() or not cells.any():
        raise UserError(f"--keep holds {cells.sum()} of {grid**2} cells: hold some, but not all")
    image = to_float(read_picture(path, size))  # (1, 3, H, W)
    # The rest becomes grey before it is encoded, because an encoder looks beyond a cell.
    seen = torch.where(cells.kron(torch.ones(cell, cell, dtype=torch.bool)), image, 0.5)
    tokens = tokenizer.encode(seen)[0].cpu()
    return torch.where(cells.flatten(), tokens, -1), torch.cat([image, seen])

# ---- The command

def reconstruct(pictures, out, path, device):
    """Save pictures as a tokenizer keeps them, and the originals."""
    beside = out.with_name(f"{out.stem}-originals.npz")
    files = []
    for each in pictures:
        files += each.is_dir() and pictures_in(each) or [each]
    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {out}: name a .png or an .npz")
    if {out.resolve(), beside.resolve()} & {file.resolve() for file in files}:
        raise UserError(f"--out {out} would replace a picture")
    torch.backends.cudnn.allow_tf32 = False  # It would change tokens.
    tokenizer = load(path / "tokenizer.pt" if path.is_dir() else path).to(device)
    originals, again = [], []
    for future in read_ahead(files, tokenizer.image_size):
        originals.append(future.result())  # (1, H, W, 3)
        tokens = tokenizer.encode(to_float(originals[-1]))
        again.append(to_uint8(tokenizer.decode(tokens)))
    if out.suffix == ".png":
        pairs = [pixels for pair in zip(originals, again) for pixels in pair]
        save_grid(out, to_float(np.concatenate(pairs)), ["picture", "again"] * min(4, len(files)))
        return
    for target, pixels in ((beside, originals), (out, again)):
        with replacing(target) as part, open(part, "wb") as file:
            np.savez(file, arr_0=np.concatenate(pixels))

def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["reconstruct"])
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path, help=".png or .npz")
    parser.add_argument("--tokenizer", type=Path, help="file or run [the published one]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        path = args.tokenizer or released_tokenizer()
        reconstruct(args.pictures, args.out, path, args.device)
        print(f"{args.out}: pictures as {path} keeps them")
    except (UserError, OSError) as error:
        print("error:", error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
