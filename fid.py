"""FID, sFID, Inception Score, precision and recall, as ADM's evaluator computes them.

The published scores of ImageNet generators come from one TensorFlow 1 script. This file computes
the same numbers with PyTorch, from the same files:

    python fid.py rar_b.npz VIRTUAL_imagenet256_labeled.npz     samples, then reference: all five
    python fid.py recon.npz FOLDER --crop 256                   rFID: reconstructions and originals
    python fid.py FOLDER --crop 256 --save-stats val.npz        statistics, to be a reference later

Either side is a folder of pictures, an .npz file with `arr_0` or an .npy file, both uint8
(N, H, W, 3), or an .npz file of statistics. What can't be computed from these is said.
"""

import contextlib
import dataclasses
import io
import math
import os
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import tokenizer as tok  # reads pictures, fetches files, reports mistakes
from tokenizer import UserError

# ---- The scores ----------------------------------------------------------------------------------

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means (D,) and covariances (D, D).

    On pool features it is FID (Heusel 2017), on spatial ones sFID (Nash 2021). With S = R^T R, the
    trace of (S1 S2)^(1/2) is the sum of the singular values of R1 R2^T. That is always real, and S
    may be singular, as it is with fewer samples than dimensions.
    """
    roots = []
    for sigma in (sigma1, sigma2):
        values, vectors = np.linalg.eigh(sigma)
        roots.append(np.sqrt(np.maximum(values, 0))[:, None] * vectors.T)  # (D, D)
    singular = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False)      # (D,)
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * singular.sum()
    return max(0.0, float(distance))  # rounding can make -1e-12 of equals

def inception_score(logits):
    """exp of the mean KL(p(y | x) || p(y)) of logits (N, 1008) (Salimans 2016).

    The published number is the mean over splits of 5,000 consecutive samples. Trap: if samples come
    class after class, it collapses.
    """
    log_p = logits.double().log_softmax(1)                # (N, 1008)
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))  # (1008,)
    return (log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item()

def precision_recall(samples, reference, k=3, block=1024):
    """The fraction of samples on the reference's manifold, and the reverse (Kynkäänniemi 2019).

    Both are pool features, (N, 2048) and (M, 2048). Around each point is a ball that reaches to its
    third neighbour. The manifold is the union of these balls, with their borders.
    """
    samples, reference = on_grid(samples, reference)
    fractions = []
    for points, centres in ((samples, reference), (reference, samples)):
        # k + 1: the nearest point is the point itself
        radii = torch.cat([distances.topk(k + 1, largest=False).values[:, k]
                           for distances in squared_distances(centres, centres, block)])
        inside = torch.cat([(distances <= radii).any(1)
                            for distances in squared_distances(points, centres, block)])
        fractions.append(inside.double().mean().item())
    return fractions

def on_grid(*sets):
    """Vectors (N, D) in steps of 2^-25 of the longest, about the precision of float32.

    Squared distances are then whole numbers below 2^53, exact in float64. So they do not depend on
    blocks, and equal points have distance 0.
    """
    longest = max(float(vectors.norm(dim=1).max()) for vectors in sets)
    step = 2.0 ** (math.ceil(math.log2(max(longest, 1e-30))) - 25)
    return [(vectors / step).round() for vectors in sets]

def squared_distances(points, centres, block):
    """Yield float64 (block, M) for each block of points (N, D), to centres (M, D) on one grid."""
    squares = [(part.double() ** 2).sum(1) for part in centres.split(block)]
    for part in tqdm(points.split(block), "distances", leave=False, disable=len(points) < 5000):
        part = part.double()
        distances = torch.cat([torch.addmm(square, part, other.double().T, alpha=-2)
                               for square, other in zip(squares, centres.split(block))], 1)
        yield distances.add_((part**2).sum(1, keepdim=True))

class Moments:
    """Mean and covariance of vectors that come in batches, in float64.

    Sums are taken about the first batch's mean. A large mean would drown a small variance.
    """

    count = 0

    def add(self, vectors):
        vectors = vectors.double()  # (B, D)
        if self.count == 0:
            self.origin, self.sum, self.products = vectors.mean(0), 0, 0
        vectors = vectors - self.origin
        self.count += len(vectors)
        self.sum = self.sum + vectors.sum(0)  # (D,)
        self.products = self.products + vectors.T @ vectors  # (D, D)

    def result(self):
        mean = self.sum / self.count
        covariance = self.products - self.count * torch.outer(mean, mean)
        covariance /= self.count - 1  # ddof 1, as in numpy.cov
        return (self.origin + mean).cpu().numpy(), covariance.cpu().numpy()

# ---- Inception -----------------------------------------------------------------------------------

def resize(images, size=299):
    """(B, 3, H, W) -> (B, 3, 299, 299), as TensorFlow 1 does it.

    Trap: output i lies at i * H / 299, not half a pixel further on. Shrinking smooths nothing.
    """
    for axis in (3, 2):
        length = images.shape[axis]
        position = torch.arange(size, device=images.device) * torch.tensor(length / size)
        low = position.floor().long()  # (299,)
        high = (low + 1).clamp(max=length - 1)
        weight = (position - low).view(-1, *[1] * (3 - axis))
        first = images.index_select(axis, low)
        second = images.index_select(axis, high)
        images = first + (second - first) * weight
    return images

class Conv(nn.Module):
    """Convolution, batch norm and ReLU. With stride 1 the size stays, unless `padded` is False."""

    def __init__(self, inputs, outputs, kernel, stride=1, padded=True):
        super().__init__()
        padding = "same" if padded and stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)

halve = partial(F.max_pool2d, kernel_size=3, stride=2)
maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1,
                  count_include_pad=False)  # Trap: torchvision's network counts the padding.

class Mixed(nn.Module):
    """Branches side by side. A branch is a chain of convolutions (outputs, kernel, stride).

    A list at the end of a chain is two convolutions of the same input. branch_pool starts from the
    pooled input.
    """

    def __init__(self, inputs, pool, **branches):
        super().__init__()
        self.pool = pool
        self.chains = {}  # branch: for each step the names of its convolutions
        for branch, chain in branches.items():
            self.chains[branch] = []
            width = inputs
            for number, step in enumerate(chain, 1):
                name = f"{branch}_{number}" if len(chain) > 1 else branch
                convs = {name: step}
                if isinstance(step, list):
                    convs = {name + "a": step[0], name + "b": step[1]}
                for each, (outputs, *more) in convs.items():
                    self.add_module(each, Conv(width, outputs, *more))
                self.chains[branch].append(list(convs))
                width = outputs

    def forward(self, x):
        outputs = []
        for branch, chain in self.chains.items():
            h = [self.pool(x) if branch == "branch_pool" else x]
            for names in chain:
                h = [getattr(self, name)(h[0]) for name in names]
            outputs += h
        return torch.cat(outputs, 1)

def mixed_5(inputs, pooled):
    return Mixed(inputs, average, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                 branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pooled, 1)])

def mixed_6(width):
    wide = (width, (1, 7))
    tall = (width, (7, 1))
    return Mixed(768, average, branch1x1=[(192, 1)], branch7x7=[(width, 1), wide, (192, (7, 1))],
                 branch7x7dbl=[(width, 1), tall, wide, tall, (192, (1, 7))],
                 branch_pool=[(192, 1)])

def mixed_7(inputs, pool):
    both = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(inputs, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), both],
                 branch3x3dbl=[(448, 1), (384, 3), both], branch_pool=[(192, 1)])

class Inception(nn.Module):
    """The Inception v3 of 2015, with the names of its PyTorch release. torchvision has another one.

    uint8 (B, H, W, 3) -> pool (B, 2048), spatial (B, 2023), logits (B, 1008)
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padded=False)
        self.Mixed_5b = mixed_5(192, 32)
        self.Mixed_5c = mixed_5(256, 64)
        self.Mixed_5d = mixed_5(288, 64)
        self.Mixed_6a = Mixed(288, halve, branch3x3=[(384, 3, 2)],
                              branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)], branch_pool=[])
        self.Mixed_6b = mixed_6(128)
        self.Mixed_6c = mixed_6(160)
        self.Mixed_6d = mixed_6(160)
        self.Mixed_6e = mixed_6(192)
        self.Mixed_7a = Mixed(768, halve, branch3x3=[(192, 1), (320, 3, 2)], branch7x7x3=[
            (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], branch_pool=[])
        self.Mixed_7b = mixed_7(1280, average)
        self.Mixed_7c = mixed_7(2048, maximum)  # a slip of the original, and part of it since
        self.fc = nn.Linear(2048, 1008)

    @torch.no_grad()
    def forward(self, pixels):
        x = pixels.to(self.fc.weight.device).permute(0, 3, 1, 2).float()
        x = (resize(x) - 128) / 128  # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halve(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # Trap: (17, 17, 7), channels last.
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool = x.mean((2, 3))  # of 8x8 cells
        return pool, spatial, pool @ self.fc.weight.T  # Trap: logits without their bias.

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

def read_weights(path):
    """The tensors in a file. The published one alone may be older than torch's zip format."""
    if zipfile.is_zipfile(path):
        return tok.read_tensors(path)
    with tok.reading(path, "is not a PyTorch file of tensors, or it is damaged"):
        if tok.digest(np.memmap(path, mode="r")) != SHA256:
            raise ValueError
        return torch.load(path, "cpu", weights_only=True)

def load_inception(path, device):
    """Inception with the published weights, or with those of a file."""
    path = path or tok.fetch(URL, SHA256)
    model = Inception()
    counters = {name: count for name, count in model.state_dict().items()
                if name.endswith("num_batches_tracked")}  # not in every file, and of no effect
    tok.load_strictly(model, read_weights(path) | counters, path)
    return model.eval().to(device, memory_format=torch.channels_last)  # nearly twice as fast

# ---- Samples and reference -----------------------------------------------------------------------

KINDS = {"pool": ("mu", "sigma", 2048), "spatial": ("mu_s", "sigma_s", 2023)}  # ADM's names

@dataclasses.dataclass
class Side:
    """Samples or reference: pictures, stored statistics, or both. `measure` adds the rest."""
    path: Path
    count: int | None = None  # pictures, here or behind the statistics; None if unknown
    batches: object = None  # batch size -> iterator over uint8 (B, H, W, 3)
    moments: dict = dataclasses.field(default_factory=dict)  # kind: (mean, covariance)
    size: str = "256x256"
    features: torch.Tensor | None = None  # (N, 2048)
    inception_score: float | None = None

def open_side(path, crop):
    """The Side at a path. Raises UserError if there is nothing in it to score."""
    if path.is_dir():
        files = tok.pictures_in(path)
        side = Side(path, len(files), partial(folder_batches, files, crop))
    elif path.is_file():
        with tok.reading(path):
            side = open_arrays(path)
    else:
        raise UserError(f"there is neither a file nor a folder {path}")
    if side.batches and side.count < 4:  # third neighbours
        raise UserError(f"{path}: scores need at least 4 pictures, and there are {side.count}")
    return side

def open_arrays(path):
    side = Side(path)
    members = ["arr_0.npy"]
    if path.suffix != ".npy":
        if not zipfile.is_zipfile(path):
            raise ValueError("neither a whole .npz file, nor an .npy file, nor a folder")
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            for kind, (mean, covariance, width) in KINDS.items():
                if f"{mean}.npy" in members:
                    side.moments[kind] = (read_member(archive, mean, (width,)),
                                          read_member(archive, covariance, (width, width)))
            if "count.npy" in members:
                side.count = int(read_member(archive, "count", ()))
    if "arr_0.npy" in members:
        with open_array(path) as (shape, _):
            side.count = shape[0]
        side.batches = partial(array_batches, path)
    elif not side.moments:
        raise ValueError(f"neither pictures (arr_0) nor statistics (mu, sigma), but {members}")
    return side

def read_member(archive, name, shape):
    """An array of an .npz file, read whole so that zipfile compares its checksum."""
    member = io.BytesIO(archive.read(f"{name}.npy"))
    array = np.lib.format.read_array(member, allow_pickle=False).astype(np.float64)
    if array.shape != shape:
        raise ValueError(f"{name} is {array.shape}, and Inception's is {shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return array

@contextlib.contextmanager
def open_array(path):
    """Yield the shape of the pictures in an array file, and the file at its first pixel."""
    if path.suffix == ".npy":
        file = open(path, "rb")
        size = path.stat().st_size
    else:
        archive = zipfile.ZipFile(path)
        file = archive.open("arr_0.npy")
        size = archive.getinfo("arr_0.npy").file_size
    with file:
        np.lib.format.read_magic(file)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or is_fortran:
            first = ", channels first" if len(shape) == 4 and shape[1] == 3 else ""
            raise ValueError(f"it holds {dtype} {shape}{first}; expected uint8 from 0 to 255, "
                             "(N, H, W, 3), not in Fortran order")
        if size - file.tell() != math.prod(shape):
            raise ValueError(f"{size - file.tell():,} bytes of pixels, not {math.prod(shape):,}")
        yield shape, file

def array_batches(path, batch):
    """The pictures in an array file, piece by piece: ADM's 50,000 are 9.8 GB."""
    with tok.reading(path), open_array(path) as (shape, file):
        for first in range(0, shape[0], batch):
            part = (min(batch, shape[0] - first), *shape[1:])
            yield np.frombuffer(bytearray(file.read(math.prod(part))), np.uint8).reshape(part)
        file.read(1)  # Trap: zipfile compares the checksum at the very end.

def folder_batches(files, crop_size, batch):
    """The pictures of the files, as they are or cut as tokenizer.py reconstruct cuts them."""
    items = tok.read_pictures(files, "center" if crop_size else None, crop_size)
    size = None
    for first in range(0, len(files), batch):
        pictures = []
        for file, item in zip(files[first:first + batch], items):
            if isinstance(item, str):  # without it, this would be the score of another set
                raise UserError(f"{file}: {item}")
            size = size or size_of(item)
            if size_of(item) != size:
                raise UserError(f"{files[0]} is {size}, but {file} {size_of(item)}: cut all to one "
                                "size, with --crop 256 for example")
            pictures.append(item)
        yield np.concatenate(pictures)

def size_of(pixels):
    return f"{pixels.shape[2]}x{pixels.shape[1]}"

def measure(side, inception, batch, keep_features):
    """Go through the pictures once, for Inception Score, features, and missing statistics."""
    device = inception.fc.weight.device
    moments = {kind: Moments() for kind in KINDS}
    if keep_features:
        side.features = torch.empty(side.count, KINDS["pool"][2], device=device)
    split = torch.empty(0, 1008, device=device)
    scores = []
    done = 0
    with tqdm(total=side.count, desc=side.path.name, unit=" images", leave=False) as bar:
        for pixels in side.batches(batch):
            pool, spatial, logits = inception(torch.from_numpy(pixels))
            moments["pool"].add(pool)
            moments["spatial"].add(spatial)
            if keep_features:
                side.features[done:done + len(pool)] = pool
            done += len(pool)
            split = torch.cat([split, logits])
            while len(split) >= 5000 or (done == side.count and len(split) > 0):
                scores.append(inception_score(split[:5000]))
                split = split[5000:]
            bar.update(len(pool))
    side.size = size_of(pixels)
    side.inception_score = sum(scores) / len(scores)
    if not math.isfinite(side.inception_score):
        raise UserError(f"{side.path}: Inception's outputs are not finite: are its weights good?")
    side.moments = {kind: of_kind.result() for kind, of_kind in moments.items()} | side.moments

# ---- The command ---------------------------------------------------------------------------------

# Each score, and the statistics that give it without pictures.
METRICS = {"fid": "pool", "sfid": "spatial", "is": "", "precision": "", "recall": ""}

def obstacle(metric, sides):
    """Why a score can't be had, or None if it can."""
    if metric == "is":
        sides = sides[:1]
    elif len(sides) == 1:
        return "there is no reference"
    for side in sides:
        if side.batches is None and METRICS[metric] not in side.moments:
            return f"{side.path} holds no pictures, only statistics ({', '.join(side.moments)})"

def choose_metrics(asked, sides):
    """The scores that can be had, and lines that say why others can't."""
    names = []
    reasons = {}  # and the scores that each rules out
    for name in asked.split(",") if asked else METRICS:
        if name not in METRICS:
            raise UserError(f"--metrics {name}: choose from {','.join(METRICS)}")
        if reason := obstacle(name, sides):
            reasons.setdefault(reason, []).append(name)
        else:
            names.append(name)
    missing = [f"no {', '.join(without)}: {reason}" for reason, without in reasons.items()]
    if missing and (asked or not names):
        raise UserError("; ".join(missing))
    return names, missing

def check_outputs(paths, sides):
    """Raise UserError for a path that can't be written to, or that is an input."""
    for path in filter(None, paths):
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"{path}: {path.parent} is not a folder that can be written to")
        if path.is_dir() or (path.exists() and any(path.samefile(side.path) for side in sides)):
            raise UserError(f"{path} is there already; name another file to write to")

def describe(title, side, usual):
    """Print what a side is, and what is unusual about it."""
    what = "" if side.batches else "statistics of "
    count = "an unknown number of" if side.count is None else f"{side.count:,}"
    print(f"{title:12}{side.path}: {what}{count} pictures")
    if side.count and side.count < usual:
        few = "fewer than the 2,048 features" if side.count < 2048 else "not the usual 50,000"
        print(f"{'':12}{few}: FID and sFID come out higher; compare equal counts only")
    if side.size != "256x256":
        print(f"{'':12}of {side.size} and not the usual 256x256")

def run(argv):
    parser = tok.Parser(prog="fid.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("samples", type=Path, help="folder of pictures, .npz or .npy file")
    add("reference", type=Path, nargs="?", help="the same, or statistics")
    add("--metrics", help=f"of {','.join(METRICS)} [all there are]")
    add("--crop", type=tok.positive, help="cut folders' pictures so")
    add("--weights", help="Inception's, if not to be downloaded")
    add("--json", type=Path, help="file to write the scores to")
    add("--save-stats", type=Path, help=".npz to write the samples' statistics to")
    add("--batch", type=tok.positive, help="at once [16; GPU: 64]")
    add("--device", choices=["cuda", "cpu"], help="[cuda, if there is one]")
    args = parser.parse_args(argv)
    device, _, _ = tok.choose_device(args.device)
    sides = [open_side(path, args.crop) for path in (args.samples, args.reference) if path]
    samples = sides[0]
    if args.crop and not any(side.path.is_dir() for side in sides):
        raise UserError(f"--crop {args.crop} is for folders of pictures")
    check_outputs((args.json, args.save_stats), sides)
    names, missing = choose_metrics(args.metrics, sides)
    if args.save_stats and samples.batches is None:
        raise UserError(f"--save-stats: {samples.path} holds no pictures to measure")

    distances = [name for name in ("fid", "sfid") if name in names]
    manifolds = "precision" in names or "recall" in names
    lacking = [manifolds or any(METRICS[name] not in side.moments for name in distances)
               for side in sides]
    lacking[0] = lacking[0] or args.save_stats or "is" in names
    todo = [side for side, lacks in zip(sides, lacking) if lacks]
    inception = load_inception(args.weights, device) if todo else None
    batch = args.batch or (16 if device.type == "cpu" else 64)
    for side in todo:
        measure(side, inception, batch, manifolds)

    found = {"is": samples.inception_score}
    for name in distances:
        first, second = (side.moments[METRICS[name]] for side in sides)
        found[name] = frechet_distance(*first, *second)
    if manifolds:
        found["precision"], found["recall"] = precision_recall(*(side.features for side in sides))
    scores = dict.fromkeys(METRICS) | {name: found[name] for name in names}
    for title, side, usual in zip(("samples", "reference"), sides, (50_000, 2048)):
        describe(title, side, usual)
    print(*(f"{name:12}{scores[name]:.4f}" for name in names), *missing, sep="\n")
    if args.json:
        counts = {"samples": samples.count, "reference": sides[1].count if sides[1:] else None}
        tok.write_json(args.json, scores | counts)
    if args.save_stats:
        arrays = {"count": samples.count}
        for kind, (mean, covariance, _) in KINDS.items():
            arrays[mean], arrays[covariance] = samples.moments[kind]
        with tok.replacing(args.save_stats) as beside, open(beside, "wb") as file:
            np.savez(file, **arrays)

def main(argv=None):
    """Run the command. Returns its exit code."""
    return tok.exit_code(run, argv, interrupted="interrupted")

if __name__ == "__main__":
    sys.exit(main())
