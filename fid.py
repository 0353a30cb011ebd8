"""FID, sFID, Inception Score, precision and recall, as ADM's evaluator computes them.

    python fid.py SAMPLES REFERENCE              all five scores
    python fid.py SAMPLES                        the Inception Score only
    python fid.py PICTURES --save-stats X.npz    statistics, to be a REFERENCE later

Each is an .npz file with arr_0, an .npy file (both uint8, N x H x W x 3), a folder of pictures of
one size, or an .npz file of statistics with ADM's names (mu, sigma, mu_s, sigma_s).

FID and sFID are distances of the two. The Inception Score is high if each sample is clearly of one
class, and all classes occur. Precision is the share of samples that look like the reference, recall
the reverse. ADM's evaluator (openai/guided-diffusion) needs TensorFlow.
MIT licence, the authors of this repository.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# OpenMP's threads spin while they wait, so on a busy CPU an update of a network took 2 s instead of
# 0.06 s, until libgomp got this limit.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

# ---- The scores

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means (D,) and covariances (D, D).

    On pool features it is FID (Heusel 2017), on spatial ones sFID (Nash 2021).
    """
    # With S = R^T R, the trace of (S1 S2)^(1/2) is the sum of the singular values of R1 R2^T. It is
    # real even where S is singular, as with fewer pictures than features.
    singular = np.linalg.svd(root(sigma1) @ root(sigma2).T, compute_uv=False)
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * singular.sum()
    return max(0.0, float(distance))  # rounding can make -1e-12 of equals

def root(sigma):
    """R with R^T R = sigma. ValueError if there is none, so that sigma is no covariance."""
    values, vectors = np.linalg.eigh(sigma)
    if values.clip(max=0).sum() < -1e-6 * abs(values.sum()):  # more than rounding
        raise ValueError("a sigma has negative eigenvalues")
    return np.sqrt(values.clip(min=0))[:, None] * vectors.T

def inception_score(logits):
    """exp of the mean KL(p(y | x) || p(y)) of logits (N, 1008) (Salimans 2016).

    The published number is the mean over splits of 5,000 consecutive samples. Trap: class after
    class, a split has few classes, and the score collapses.
    """
    log_p = logits.double().log_softmax(1)
    log_mean = log_p.logsumexp(0) - np.log(len(log_p))
    return (log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item()

def precision_recall(samples, reference, k=3, block=1024):
    """The share of samples on the reference's manifold, and the reverse (Kynkäänniemi 2019).

    Both are pool features, (N, D) and (M, D). Around each point is a ball that reaches to its k-th
    neighbour. The manifold is the union of these balls, with their borders.
    """
    samples, reference = samples.double(), reference.double()
    shares = []
    for points, centres in ((samples, reference), (reference, samples)):
        radii = torch.cat([  # k + 1, because the nearest is the point itself
            torch.cdist(part, centres).topk(k + 1, largest=False).values[:, k] ** 2
            for part in centres.split(block)])
        inside = 0
        for part in points.split(block):
            squared = torch.cdist(part, centres) ** 2
            # Copies of the k-th neighbour lie on the border, but blocks differ in rounding.
            tolerance = 1e-12 * squared.max()
            inside += (squared <= radii + tolerance).any(1).sum().item()
        shares.append(inside / len(points))
    return shares

class Moments:
    """Mean and covariance of vectors that come in batches (B, D), in float64."""

    def __init__(self):
        self.count = self.sum = self.products = 0

    def add(self, vectors):
        vectors = vectors.double()
        self.count += len(vectors)
        self.sum = self.sum + vectors.sum(0)
        self.products = self.products + vectors.T @ vectors

    def result(self):
        """Mean (D,) and covariance (D, D)."""
        mean = self.sum / self.count
        covariance = self.products - self.count * torch.outer(mean, mean)
        covariance /= self.count - 1  # ddof 1, as in numpy.cov
        return mean.cpu().numpy(), covariance.cpu().numpy()

# ---- Inception

def resize(images, size=299):
    """(B, C, H, W) -> (B, C, size, size), blending two neighbours as TensorFlow 1 does.

    Trap: output i lies at i * H / 299, not half a pixel further on. Shrinking smooths nothing.
    """
    for _ in ("x", "y"):
        length = images.shape[3]
        position = torch.arange(size, device=images.device) * torch.tensor(length / size)
        low = position.floor().long()
        high = (low + 1).clamp(max=length - 1)
        first, second = images[..., low], images[..., high]
        images = first + (second - first) * (position - low)
        images = images.transpose(2, 3)
    return images.contiguous(memory_format=torch.channels_last)  # CPUs are faster so

def conv(x, w, name, stride=1, padded=True):
    """Convolution, batch norm, ReLU. Kernel and width are those of the weights."""
    padding = "same" if padded and stride == 1 else 0
    x = F.conv2d(x, w[f"{name}.conv.weight"], None, stride, padding)
    norm = [w[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return F.relu(F.batch_norm(x, *norm, eps=1e-3), inplace=True)

def chain(x, w, name, length, stride=1):
    """The convolutions name_1, name_2, ... The last one has the stride."""
    for i in range(1, length):
        x = conv(x, w, f"{name}_{i}")
    return conv(x, w, f"{name}_{length}", stride)

def halve(x):
    return F.max_pool2d(x, 3, stride=2)

def average(x):
    # Trap: torchvision's network counts the padding.
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

# Branches side by side, with their kernels.

def mixed_5(x, w, name):
    return torch.cat([
        conv(x, w, f"{name}.branch1x1"),
        chain(x, w, f"{name}.branch5x5", 2),         # 1x1, 5x5
        chain(x, w, f"{name}.branch3x3dbl", 3),      # 1x1, 3x3, 3x3
        conv(average(x), w, f"{name}.branch_pool"),
    ], 1)

def mixed_6(x, w, name):
    return torch.cat([
        conv(x, w, f"{name}.branch1x1"),
        chain(x, w, f"{name}.branch7x7", 3),         # 1x1, 1x7, 7x1
        chain(x, w, f"{name}.branch7x7dbl", 5),      # 1x1, 7x1, 1x7, 7x1, 1x7
        conv(average(x), w, f"{name}.branch_pool"),
    ], 1)

def mixed_7(x, w, name, pooled):
    three = conv(x, w, f"{name}.branch3x3_1")        # 1x1
    double = chain(x, w, f"{name}.branch3x3dbl", 2)  # 1x1, 3x3
    return torch.cat([
        conv(x, w, f"{name}.branch1x1"),
        conv(three, w, f"{name}.branch3x3_2a"),      # 1x3
        conv(three, w, f"{name}.branch3x3_2b"),      # 3x1
        conv(double, w, f"{name}.branch3x3dbl_3a"),  # 1x3
        conv(double, w, f"{name}.branch3x3dbl_3b"),  # 3x1
        conv(pooled, w, f"{name}.branch_pool"),
    ], 1)

@torch.no_grad()
def inception(pixels, w):
    """The Inception v3 of 2015, not torchvision's. w holds weights by their published names.

    uint8 (B, H, W, 3) -> pool (B, 2048), spatial (B, 2023), logits (B, 1008)
    """
    x = pixels.permute(0, 3, 1, 2).float()
    x = (resize(x) - 128) / 128               # (B, 3, 299, 299)
    x = conv(x, w, "Conv2d_1a_3x3", stride=2)
    x = conv(x, w, "Conv2d_2a_3x3", padded=False)
    x = halve(conv(x, w, "Conv2d_2b_3x3"))    # (B, 64, 73, 73)
    x = conv(x, w, "Conv2d_3b_1x1")
    x = conv(x, w, "Conv2d_4a_3x3", padded=False)
    x = mixed_5(halve(x), w, "Mixed_5b")      # (B, 256, 35, 35)
    x = mixed_5(x, w, "Mixed_5c")
    x = mixed_5(x, w, "Mixed_5d")
    x = torch.cat([                           # (B, 768, 17, 17)
        conv(x, w, "Mixed_6a.branch3x3", stride=2),
        chain(x, w, "Mixed_6a.branch3x3dbl", 3, stride=2),  # 1x1, 3x3, 3x3
        halve(x),
    ], 1)
    x = mixed_6(x, w, "Mixed_6b")
    x = mixed_6(x, w, "Mixed_6c")
    x = mixed_6(x, w, "Mixed_6d")
    # Trap: (17, 17, 7), channels last.
    spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
    x = mixed_6(x, w, "Mixed_6e")
    x = torch.cat([                           # (B, 1280, 8, 8)
        chain(x, w, "Mixed_7a.branch3x3", 2, stride=2),  # 1x1, 3x3
        chain(x, w, "Mixed_7a.branch7x7x3", 4, stride=2),  # 1x1, 1x7, 7x1, 3x3
        halve(x),
    ], 1)
    x = mixed_7(x, w, "Mixed_7b", average(x))  # (B, 2048, 8, 8)
    # Trap: a maximum. It is a slip of the original, and now part of it.
    x = mixed_7(x, w, "Mixed_7c", F.max_pool2d(x, 3, stride=1, padding=1))
    pool = x.mean((2, 3))
    return pool, spatial, pool @ w["fc.weight"].T  # Trap: logits without their bias.

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

def load_weights(path, device):
    """Inception's weights by name, from a file or else the published ones."""
    try:
        if path is None:
            path = Path(torch.hub.get_dir(), "checkpoints", URL.split("/")[-1])
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256)
        weights = torch.load(path, device, weights_only=True)
        # Do names and shapes fit?
        black = torch.zeros(1, 9, 9, 3, device=device)
        torch.cat(inception(black, weights), 1).view(2048 + 2023 + 1008)
    except Exception as error:
        sys.exit(f"Inception's weights, {path}: {one_line(error)}")
    return weights

def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split()).split(". ")[0]

# ---- Samples and reference

# By ADM's names, with _s for spatial features.
EXPECTED = {"arr_0": "uint8 (N > 3, H, W, 3)", "mu": (2048,), "sigma": (2048, 2048),
            "mu_s": (2023,), "sigma_s": (2023, 2023)}

def open_side(path):
    """Samples or reference, checked: a dictionary with names of EXPECTED."""
    try:
        if path.is_dir():
            arrays = read_folder(path)
        else:
            arrays = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            arrays = {"arr_0": arrays}
        # A mu without a sigma is a KeyError.
        side = {name: arrays[name] for name in EXPECTED if name.replace("sigma", "mu") in arrays}
        if not side:
            raise ValueError(f"neither arr_0 nor mu, but {list(arrays)}")
        for name, array in side.items():
            if name == "arr_0":
                fits = array.dtype == np.uint8 and array.shape[3:] == (3,) and len(array) > 3
            else:
                fits = array.shape == EXPECTED[name] and np.allclose(array, array.T)
            if not fits:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, expected "
                                 f"{EXPECTED[name]} (statistics symmetric, without NaN)")
            if array.ndim == 2:
                root(array)  # or a ValueError
    except Exception as error:  # bad files raise many kinds
        sys.exit(f"{path}: {one_line(error)}")
    return side

def read_folder(folder):
    files = list(pictures_below(folder, set()))
    if not files:
        raise ValueError("no pictures")
    for i, file in enumerate(tqdm(files, "reading", leave=False)):
        try:
            with Image.open(file) as image:
                pixels = np.array(image.convert("RGB"))
        except Exception as error:
            sys.exit(f"{file}: {one_line(error)}")
        if i == 0:
            pictures = np.empty((len(files), *pixels.shape), np.uint8)
        if pixels.shape != pictures[0].shape:
            sys.exit(f"{file} is {pixels.shape}, but {files[0]} {pictures[0].shape}")
        pictures[i] = pixels
    return pictures

def pictures_below(folder, seen):
    if folder.resolve() not in seen:  # links can lead in circles
        seen.add(folder.resolve())
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                yield from pictures_below(path, seen)
            elif path.suffix.lower() in Image.registered_extensions():
                yield path

def measure(side, name, weights, batch, device):
    """A side with statistics, features and score in place of pictures."""
    pictures = side.pop("arr_0")
    # Not lists: small tensors between large ones would fragment memory, to 50 GB.
    pool = torch.empty(len(pictures), EXPECTED["mu"][0], device=device)
    logits = torch.empty(len(pictures), 1008, device=device)
    moments, spatial_moments = Moments(), Moments()
    for start in tqdm(range(0, len(pictures), batch), name):
        part = slice(start, start + batch)
        pixels = torch.tensor(pictures[part], device=device)
        pool[part], spatial, logits[part] = inception(pixels, weights)
        moments.add(pool[part])
        spatial_moments.add(spatial)
    splits = logits.split(5000)
    found = {"pool": pool, "is": sum(map(inception_score, splits)) / len(splits)}
    found["mu"], found["sigma"] = moments.result()
    found["mu_s"], found["sigma_s"] = spatial_moments.result()
    return found | side  # stored statistics win: ADM's are of more pictures

# ---- The command

def write(path, save):
    """Write beside and rename, so a file is whole or absent."""
    with open(f"{path}.part", "wb") as file:
        save(file)
    os.replace(f"{path}.part", path)

def main(argv=None):
    devices = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("samples", type=Path)
    add("reference", type=Path, nargs="?")
    add("--save-stats", type=Path)
    add("--json", type=Path)
    add("--weights", type=Path)
    add("--batch", type=int, default=32)
    add("--device", choices=devices, default=devices[0])
    args = parser.parse_args(argv)
    torch.backends.cudnn.allow_tf32 = False  # it would change the scores

    paths = [path for path in (args.samples, args.reference) if path]
    for path in filter(None, (args.save_stats, args.json)):
        is_input = path.resolve() in [each.resolve() for each in paths]
        if is_input or os.path.isdir(path) or not os.access(path.parent, os.W_OK):
            sys.exit(f"{path} is an input, or can't be written")

    sides = [open_side(path) for path in paths]
    shapes = [side["arr_0"].shape for side in sides if "arr_0" in side]
    if any(shape[0] < 2048 for shape in shapes):
        print("FID and sFID of fewer than 2,048 pictures are too high.")
    if len({shape[1:] for shape in shapes}) > 1:
        print("Samples and reference differ in size, so in sharpness.")
    if args.samples.is_dir() and any(path.is_dir() for path in args.samples.iterdir()):
        print("Class after class, as here, the Inception Score of over 5,000 pictures collapses.")

    weights = load_weights(args.weights, args.device) if shapes else None
    for i, path in enumerate(paths):
        if "arr_0" in sides[i]:
            sides[i] = measure(sides[i], str(path), weights, args.batch, args.device)
    samples, reference = [*sides, {}][:2]
    scores = dict.fromkeys(["fid", "sfid", "is", "precision", "recall"])
    for score, m, s in (("fid", "mu", "sigma"), ("sfid", "mu_s", "sigma_s")):
        if {m, s} <= samples.keys() & reference.keys():
            scores[score] = frechet_distance(samples[m], samples[s], reference[m], reference[s])
    scores["is"] = samples.get("is")
    if "pool" in samples and "pool" in reference:
        scores["precision"], scores["recall"] = precision_recall(samples["pool"], reference["pool"])

    for score, value in scores.items():
        missing = "pictures" if reference or score == "is" else "a reference"
        print(f"{score:12}" + (f"needs {missing}" if value is None else f"{value:.4f}"))
    if args.json:
        write(args.json, lambda file: file.write(json.dumps(scores).encode()))
    if args.save_stats:
        statistics = {name: samples[name] for name in EXPECTED if name in samples}
        write(args.save_stats, lambda file: np.savez(file, **statistics))

if __name__ == "__main__":
    main()
