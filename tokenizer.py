"""Pictures, files and the command line, so that rar.py can be about the method alone.

    UserError, Parser, knob     a user's mistake in one line; flags that are fields of a dataclass
    replacing, read_*, write_*  the one place that writes files; one reader for every format
    Run                         the folder of a training run, its progress bar and Ctrl-C
    draw_shape                  the built-in data: ten kinds of shapes, drawn with Pillow
    center_crop, crop           photographs to squares of pixels, as the authors cut them
    PatchTokenizer              pictures <-> tokens: k-means codes of patches, a linear decoder
    MaskGITVQGAN                the published tokenizer, from the released file
    encode_pictures             folders of photographs to a file of tokens, once
    open_data                   a data set as rows of (class, tokens)
    save_grid                   a labelled picture of pictures
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
import shlex
import shutil
import signal
import socket
import sys
import time
import urllib.request
import warnings
import zipfile
import zlib
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
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError
from scipy.cluster.vq import kmeans2
from torch import nn
from tqdm import tqdm

# ---- Mistakes and flags --------------------------------------------------------------------------

class UserError(Exception):
    """A mistake that the user can mend: one line that names the file or flag; exit code 2."""

def knob(default, why, low=0, high=1e9):
    """A dataclass field that is also a flag: its default, its reason, and a number's limits."""
    first, count = (default[0], len(default)) if isinstance(default, tuple) else (default, None)
    option = {"type": type(first), "nargs": count, "help": why}  # for argparse
    return dataclasses.field(default=default, metadata={"option": option, "limits": (low, high)})

def knobs_of(config):
    return [field for field in dataclasses.fields(config) if "option" in field.metadata]

def flag(field):
    return "--" + field.name.replace("_", "-")

def check_knobs(config):
    """Raise UserError unless every knob has its type and keeps its limits."""
    for field in knobs_of(config):
        kind, (low, high) = field.metadata["option"]["type"], field.metadata["limits"]
        value = getattr(config, field.name)
        for each in value if isinstance(field.default, tuple) else (value,):
            if not isinstance(each, (int, float) if kind is float else kind):
                raise UserError(f"{flag(field)} must be {kind.__name__}, not {each}")
            if kind is not str and not low <= each <= high:  # nor is NaN within any limits
                raise UserError(f"{flag(field)} must be from {low:g} to {high:,.10g}, not {each}")

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with commands that are called with
    (args, the knobs that were given, device, autocast)."""

    commands = None
    interrupted = "interrupted; the same command goes on"

    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")

    def command(self, name, function, about, config=None, knobs=None, precision="tf32"):
        """Add a command with flags for the named knobs of a dataclass, or for all of them, and the
        precision that it has on cuda unless --precision says otherwise."""
        self.commands = self.commands or self.add_subparsers(required=True)
        command = self.commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        fields = knobs_of(config) if config else []
        fields = [field for field in fields if knobs is None or field.name in knobs]
        for field in fields:
            option = dict(field.metadata["option"])
            if knobs is None:  # elsewhere the defaults are those of the weights
                option["help"] += f" [{field.default}]"
            if option["type"] is bool:
                option = {"action": argparse.BooleanOptionalAction, "help": option["help"]}
            command.add_argument(flag(field), **option)
        command.add_argument("--device", choices=["cuda", "mps", "cpu"], help="[the best there is]")
        command.add_argument("--precision", choices=["float32", "tf32", "bfloat16"],
                             help=f"of matrix products [{precision} on cuda, else float32]")
        command.set_defaults(function=function, knobs=[field.name for field in fields],
                             cuda_precision=precision, prog=command.prog)
        return command

    def run(self, argv):
        """Call the command that argv names. Returns the exit code."""
        try:
            args, unknown = self.parse_known_args(argv)
            if unknown:
                prog = getattr(args, "prog", self.prog)
                raise UserError(f"there is no {unknown[0]}; see python {prog} --help")
            knobs = {name: tuple(value) if isinstance(value, list) else value
                     for name in args.knobs if (value := getattr(args, name)) is not None}
            device = choose_device(args.device)
            if args.precision is None:
                args.precision = args.cuda_precision if device.type == "cuda" else "float32"
            autocast = choose_precision(device, args.precision)
            if getattr(args, "json", None):
                check_folder(Path(args.json).parent, f"--json {args.json}")
            with processes(device):
                args.function(args, knobs, device, autocast)
            return 0
        except UserError as error:
            code, message = 2, f"error: {error}"
        except KeyboardInterrupt as error:
            code, message = 130, str(error) or self.interrupted
        except BrokenPipeError:  # whoever read our output has gone, as head does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:
            code, message = 2, f"error: {error.filename}: {error.strerror}"
        except (MemoryError, RuntimeError) as error:
            # torch says it in other words on accelerators and on a CPU
            if not re.search("MemoryError|out of memory|DefaultCPUAllocator", repr(error)):
                if WORLD_SIZE > 1:
                    time.sleep(5)  # if another process has gone, torchrun ends us meanwhile
                raise
            flag = "--micro-batch" if hasattr(args, "micro_batch") else "--batch"
            code, message = 2, f"error: out of memory: lower {flag}, or take a smaller model"
        if RANK == 0:
            print(message, file=sys.stderr)
        elif code == 2:  # rank 0 says for all that they were interrupted
            time.sleep(2)  # if rank 0 says the same, torchrun ends us first
            print(f"rank {RANK}: {message}", file=sys.stderr)
        return code

def whole_number(low, high):
    """A type for argparse: an integer from low to high."""
    def number(text):
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return int(text)
    return number

def rectangle(text):
    """A type for argparse: x0,y0,x1,y1."""
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"must be four numbers, such as 0,0,16,32, not {text}")
    return [int(number) for number in numbers]

def choose_device(name):
    """The torch.device of this name, or the best that there is."""
    mps = torch.backends.mps.is_available() and WORLD_SIZE == 1  # gloo does not know it
    there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    name = name or next(name for name in there if there[name])
    if not there[name]:
        raise UserError(f"--device {name}: this machine has no such device that torch can use")
    return torch.device(name, LOCAL_RANK) if name == "cuda" else torch.device(name)

def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"

def choose_precision(device, precision):
    """The autocast context in which networks run on the device; weights stay float32."""
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"--precision tf32 exists on cuda alone, and this is {device.type}")
    # in bfloat16 the few products that stay float32, such as the logits', may use TF32 too
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    # Some releases would rather take cuDNN's attention than flash attention. It makes a plan for
    # every length, of which sampling has T, and rounds the share that dropout drops.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.autocast(device.type, torch.bfloat16, precision == "bfloat16")

def send(tensor, device):
    """The tensor on the device. From pinned memory the copy keeps nobody waiting."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)

# ---- Processes: torchrun starts them and says in the environment who is who ----------------------

RANK, LOCAL_RANK, WORLD_SIZE = (
    int(os.environ.get(name, default))
    for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))

@contextlib.contextmanager
def processes(device):
    """Join the processes of torchrun, if it started this one. Rank 0 alone talks."""
    if WORLD_SIZE == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The others wait for rank 0 while it makes the tokens of a data set; that takes hours. Whether
    # a process has died is for torchrun to notice, not for a time limit.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            timeout=datetime.timedelta(days=1))
    with (open(os.devnull, "w") as silence,
          contextlib.redirect_stdout(silence if RANK > 0 else sys.stdout),
          contextlib.redirect_stderr(silence if RANK > 0 else sys.stderr)):
        yield
    dist.destroy_process_group()  # not after an error: the others would fail before it is told

def sum_over_processes(tensor):
    """Add up a tensor over the processes, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor

def wait_for_all():
    sum_over_processes(torch.zeros(1))

@contextlib.contextmanager
def rank_zero_first():
    """What rank 0 writes inside, the others find there."""
    if RANK > 0:
        wait_for_all()
    yield
    if RANK == 0:
        wait_for_all()

def check_same_on_all(config, rows):
    """Raise UserError if this process has another config or other data than rank 0."""
    if WORLD_SIZE > 1:
        flags = json.dumps(dataclasses.asdict(config)).encode()
        for own, what in ((flags, "other flags"), (rows, f"other data in {config.data}")):
            own = torch.tensor(zlib.crc32(own))
            if sum_over_processes(own * (RANK == 0)) != own:
                raise UserError(f"this process has {what} than rank 0")

# ---- Files ---------------------------------------------------------------------------------------

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
    """Turn whatever a damaged or foreign file makes the parsers inside raise into a UserError, in
    their words or in those of `wrong`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        why = f": {str(error) or type(error).__name__}" if wrong is None else f" {wrong}"
        raise UserError(f"{path}{why}") from error

@contextlib.contextmanager
def replacing(path, ending=".part"):
    """Yield a path beside `path` to write to, and rename it to `path` once it is whole: a reader
    finds the old file or the new one, never half of one. Every file that we write goes through
    here, except two that grow: the log, by lines, and a token file, by blocks."""
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

def read_tensors(path, sha256=None):
    """The dictionary that torch.save wrote to a file; nothing in the file is ever executed. Its
    checksums are verified, which torch.load does not: a flipped bit would go unnoticed. Files of
    before PyTorch 1.6 have none; of these, only the one whose SHA-256 is given is read."""
    with reading(path, "is not a PyTorch file of tensors, or it is damaged"):
        if sha256 is None or digest(np.memmap(path, mode="r")) != sha256:
            with zipfile.ZipFile(path) as archive:
                if any(m.compress_type != zipfile.ZIP_STORED for m in archive.infolist()):
                    raise ValueError("torch.save compresses nothing, a bomb does")
                if archive.testzip() is not None:
                    raise ValueError("a checksum differs")
        value = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no dictionary of tensors")
    return value

def existing(folder):
    """The folder, or the nearest above it that there is."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())

def check_folder(folder, given):
    """Raise UserError, before the work rather than after it, if no file can be put in `folder`."""
    there = existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{given}: {there} is not a folder that can be written to")

def check_room(folder, size, what):
    free = shutil.disk_usage(existing(folder)).free
    if size > free:
        raise UserError(f"{what} needs {size / 1e9:.2f} GB in {folder}, which has room for "
                        f"{free / 1e9:.2f} GB")

def fetch(url, sha256=None):
    """The path of the file at a URL, which is downloaded once, into torch.hub's folder. It gets its
    name when it is whole: as long as the server said, with this SHA-256; without one, a zip file,
    which torch.save writes, and not the page of a proxy."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.split("/")[-1])
    if path.exists():
        return path
    for left in path.parent.glob(f"{path.name}.*.part*"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > 3600:
            left.unlink(missing_ok=True)
    with replacing(path, f".{os.getpid()}.part") as beside:  # two may download it at once
        silence = socket.getdefaulttimeout()
        try:
            socket.setdefaulttimeout(60)  # torch.hub sets no limit
            with urllib.request.urlopen(url) as response:
                size = response.length
            check_room(path.parent, size or 0, url)
            print(f"downloading {url} to {path}", file=sys.stderr)
            torch.hub.download_url_to_file(url, str(beside), sha256)
            if size is not None and beside.stat().st_size != size:
                raise ValueError(f"the connection broke after {beside.stat().st_size} bytes")
            if sha256 is None and not zipfile.is_zipfile(beside):
                raise ValueError("what came is not a PyTorch file")
        except (OSError, ValueError, RuntimeError, http.client.HTTPException) as error:
            raise UserError(f"cannot download {url}: {error}. Try again, or get the file some "
                            f"other way and put it at {path}") from error
        finally:
            socket.setdefaulttimeout(silence)
    return path

RELEASED = "maskgit-vqgan-imagenet-f16-256.bin"
RELEASED_MODELS = {  # and the SHA-256 of each
    "RAR-B": ("rar_b.bin", "cbbf4b27dc36afae77fdb2fe0d6b9b5b7446eae45f1a9f91d442ab0b315b9ebf"),
    "RAR-L": ("rar_l.bin", "edad8e9905e20a5df14eeee0d5d04c1be48b16a7751b4b3f4954a6dec8ad87d5"),
    "RAR-XL": ("rar_xl.bin", "7b4cec5c76f18dc7a3ea055a6b0cc4c5748c533768eed71564a88d897c762bc8"),
    "RAR-XXL": ("rar_xxl.bin", "85aba44fef7aecfd879829077e541f09da4c29da3b1fd374837601d7322bf6ff"),
}
CHECKPOINT = {"updates", "model", "optimizer"}  # what a checkpoint holds

def fetch_released(repository, file, sha256=None):
    """The path of a file on Hugging Face, or on the mirror that HF_ENDPOINT names."""
    host = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return fetch(f"{host.rstrip('/')}/{repository}/resolve/main/{file}", sha256)

def chosen_weights(args):
    """The path that --weights names, or that of the released --model, which is fetched."""
    if args.pretrained and not args.model:
        raise UserError(f"--pretrained needs --model {' | '.join(RELEASED_MODELS)}")
    if args.model and (args.weights or not args.pretrained):
        raise UserError("--model goes with --pretrained; of --weights the size is read off")
    if not args.model:
        return args.weights
    with rank_zero_first():
        fetch_released("fun-research/TiTok", RELEASED)  # and it lies beside the weights
        return fetch_released("yucornetto/RAR", *RELEASED_MODELS[args.model])

def load_strictly(module, state, path):
    """Copy a state dict into a module; UserError at the first name or shape that differs."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in state.items()}
    for name in wanted | found:
        here, there = found.get(name, "missing"), wanted.get(name, "none of that name")
        if here != there:
            raise UserError(f"{path} does not fit the model: {name} is {here}, expected {there}")
    module.load_state_dict(state)

def newest_weights():
    """The weights.pt of the run in runs/ that was saved last, or None."""
    files = Path("runs").glob("*/weights.pt")
    return max(files, key=lambda file: file.stat().st_mtime, default=None)

def find_weights(path, flag="--weights"):
    """The weights file that is meant by a file, by a run folder, or by None: the newest run's."""
    path = newest_weights() if path is None else Path(path)
    if path is None:
        raise UserError(f"there is no run in {Path('runs').absolute()}: make one with "
                        "python rar.py train, or name one with --weights")
    path = path / "weights.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{flag}: there is no file {path}")
    return path

def read_weights(path):
    """The state dict of a RAR; the sizes in its Config, as they follow from the shapes; and how
    many updates it has had, which a run's checkpoint tells and a weights file does not (None)."""
    state, updates = read_tensors(path), None
    if state.keys() == CHECKPOINT:
        state, updates = state["model"], state["updates"]
    with reading(path, "holds no weights of a RAR"):
        ids, width = state["embeddings.weight"].shape
        codebook_size = len(state["lm_head.bias"])
        sizes = {
            "width": width, "codebook_size": codebook_size, "num_classes": ids - codebook_size - 2,
            "depth": sum(name.endswith(".attn.qkv.bias") for name in state),
            "heads": width // len(state["blocks.0.attn.q_norm.bias"]),
            "mlp_width": len(state["blocks.0.mlp.fc1.bias"]),
            "grid_size": math.isqrt(state["pos_embed"].shape[1] - 1024)}
    return state, sizes, updates

def init_weights(model, path):
    """Copy weights of the same sizes into the model. Where the classes are others, their rows of
    the embedding table stay as they are."""
    state, sizes, _ = read_weights(find_weights(path, "--init"))
    table, config, given = "embeddings.weight", model.config, sizes.pop("num_classes")
    for name, size in sizes.items():
        if size != getattr(config, name):
            raise UserError(f"--init {path}: its {name} is {size}, but that of this model is "
                            f"{getattr(config, name)}: take the --model that it was trained with")
    if given != config.num_classes:
        print(f"{path} knows {given} classes, not {config.num_classes}: the embeddings of the "
              "classes start anew")
        first = config.codebook_size + 1
        state[table] = torch.cat([state[table][:first], model.state_dict()[table][first:].cpu()])
    load_strictly(model, state, path)

def read_config(folder, default):
    """The dataclass of `default` from the config.json in a folder; the default if there is none."""
    path = Path(folder) / "config.json"
    if not path.exists():
        return default
    values = read_json(path)
    with reading(path):
        return type(default)(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

def held_out_text(config, result):
    return "held-out " + ", ".join(
        f"{result[key + '_bits']:.3f} bits/token in {name} order "
        f"({result[key + '_accuracy']:.0%} of tokens right)"
        for name, key in ((config.order, "final_order"), ("random", "random_order")))

class Run:
    """The folder of a training run: config.json, tokenizer.pt, checkpoint-*.pt (all that is needed
    to go on), weights.pt (names as released), log.jsonl, and the previews step-*.png."""

    # What may change while a run goes on: weights follow from it by rounding alone, and dropout
    # masks from micro_batch and compile.
    free = ("micro_batch", "recompute", "compile", "log_every", "save_every", "keep_every", "scale",
            "power", "temperature")

    def __init__(self, folder, config):
        self.folder, self.config = Path(folder), config
        self.log_path, self.lock = self.folder / "log.jsonl", None
        # after so many updates r leaves 1: the last of a model for any order
        self.annealing_starts = math.ceil(config.anneal[0] * config.steps)
        # asked: a signal came to this process; stopped: one came to any, and all know it
        self.asked = self.stopped = False
        check_folder(self.folder, f"--out {folder}")
        if config.batch % WORLD_SIZE:
            raise UserError(f"--batch {config.batch} is not a multiple of {WORLD_SIZE} processes")

    def checkpoints(self):
        """The checkpoints by their number of updates, the newest first."""
        found = {path.stem[11:]: path for path in self.folder.glob("checkpoint-*.pt")}
        numbered = {int(number): path for number, path in found.items() if number.isdecimal()}
        return dict(sorted(numbered.items(), reverse=True))

    def load(self, model, optimizer):
        """Copy the newest checkpoint that can be read, if there is one, into both. Returns the
        updates that were made. Raises UserError if it is that of another config."""
        elsewhere = "name another folder with --out"
        self.found = self.checkpoints()
        weights, paths = self.folder / "weights.pt", list(self.found.values())
        if not paths:
            if weights.exists():
                raise UserError(f"{weights} has no checkpoint beside it to go on from: {elsewhere}")
            return 0
        saved = read_config(self.folder, self.config)
        for field in dataclasses.fields(saved):
            old, new = getattr(saved, field.name), getattr(self.config, field.name)
            if old != new and field.name not in self.free:
                raise UserError(f"{self.folder} holds a run with {flag(field)} {old!r}, not "
                                f"{new!r}: {elsewhere}")
        for path in paths:
            try:
                state = read_tensors(path)
                if state.keys() != CHECKPOINT:
                    raise UserError(f"{path} is not the checkpoint of a run")
                break
            except UserError as error:
                if path == paths[-1]:
                    raise
                print(f"{error}; going on from the checkpoint before it")
        load_strictly(model, state["model"], path)
        optimizer.load_state_dict(state["optimizer"])
        if RANK == 0:
            write_tensors(weights, state["model"])  # in case a kill came between the two files
        return state["updates"]

    def check_still_there(self):
        """Raise UserError rather than begin another run where somebody removed this one."""
        if not (self.folder / "config.json").exists():
            raise UserError(f"{self.folder} has been removed, or its config.json")

    def save(self, step, model, optimizer):
        if RANK > 0:
            return
        self.check_still_there()
        weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        write_tensors(self.folder / f"checkpoint-{step + 1:07}.pt", {
            "updates": step + 1, "model": weights, "optimizer": optimizer.state_dict()})
        write_tensors(self.folder / "weights.pt", weights)
        every = self.config.keep_every or math.inf
        for number, path in list(self.checkpoints().items())[2:]:
            if number != self.annealing_starts and number % every:
                with contextlib.suppress(OSError):  # not worth ending a run
                    path.unlink()

    def hold(self):
        """Keep other processes out of the folder, until this Run is gone, before anything in it is
        written. Raises UserError if one is there, or has been since `load`."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "ab")
        try:
            if fcntl is not None:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{self.folder} is in use by another process: wait for it") from error
        if self.checkpoints() != self.found:
            raise UserError(f"{self.folder}: another process has trained here: start again")

    def open_folder(self, first):
        """Note the config, and cut the log behind update `first`: what came after it is made again,
        and so is half a line."""
        if self.lock is None:
            self.hold()
        write_json(self.folder / "config.json", dataclasses.asdict(self.config))
        if self.log_path.exists():
            lines = self.log_path.read_text(errors="replace").splitlines()
            found = filter(None, (re.fullmatch(r'\{"step": (\d+), .*\}', line) for line in lines))
            with replacing(self.log_path) as beside:
                beside.write_text("".join(m[0] + "\n" for m in found if int(m[1]) <= first))

    def updates(self, first, images):
        """Yield the updates first .. steps - 1 under a progress bar; a pass is of so many `images`.
        On Ctrl-C, SIGTERM or SIGHUP, the one in hand is the last: `stopped` is set, to be saved
        before the next is asked for."""
        self.images = images
        if RANK == 0:
            self.open_folder(first)

        def note(number, frame):
            self.asked = True
            signal.signal(number, before[number])  # the second one strikes at once
            tqdm.write("stopping after this update", file=sys.stderr)

        before = {}
        with contextlib.ExitStack() as after:
            for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as it is under nohup
                    before[number] = signal.signal(number, note)
                    after.callback(signal.signal, number, before[number])
            self.bar = after.enter_context(tqdm(
                total=self.config.steps, initial=first,
                bar_format="step {n}/{total}{postfix}, {remaining} left |{bar}|"))
            self.start_clock()
            for step in range(first, self.config.steps):
                yield step
                if self.stopped:
                    return

    def start_clock(self):
        """Begin anew what is gathered between two lines of the log."""
        self.clock, self.waited, self.lines = time.perf_counter(), 0.0, []

    def wait_for(self, future):
        """The result of a future; the time that it takes is logged as waiting."""
        self.waited -= time.perf_counter()
        result = future.result()
        self.waited += time.perf_counter()
        return result

    def report(self, step, line, evaluate):
        """Move the bar. On every log_every-th update log what the step said of itself, `line`; at a
        `milestone`, of which there is a preview and a checkpoint, also what evaluate() says."""
        done = step + 1
        self.bar.update()
        self.lines.append(line)
        self.stopped = sum_over_processes(torch.tensor(float(self.asked))) > 0
        self.milestone = (done % self.config.save_every == 0
                          or done in (self.annealing_starts, self.config.steps))
        logged = self.milestone or done == 1 or done % self.config.log_every == 0
        if not logged and not self.stopped:
            return
        # only here is the device waited for: the loss of every update since the last line
        for past, each in enumerate(self.lines, done - len(self.lines) + 1):
            loss, norm = float(each["loss"]), float(each["gradient_norm"])
            if not math.isfinite(loss + norm):
                last = next(iter(self.checkpoints().values()), "no checkpoint yet")
                raise UserError(f"update {past}: the loss is {loss}, the norm of its gradient "
                                f"{norm}. {self.folder} is as it was (last good: {last}). Try a "
                                "lower --lr, a longer --warmup or --precision float32")
        seconds, batch = time.perf_counter() - self.clock, self.config.batch
        line = {key: float(value) for key, value in line.items()}
        line |= {"images_per_second": len(self.lines) * batch / seconds,
                 "waiting": self.waited / seconds, "passes": done * batch / self.images}
        self.bar.set_postfix_str("loss {loss:.3f}, r {r:.2f}, pass {passes:.3g}, "
                                 "{images_per_second:,.3g} images/s".format(**line))
        if logged and RANK == 0:
            if self.milestone:
                line |= (result := evaluate())
                self.bar.write(f"step {done}: {held_out_text(self.config, result)}")
            self.check_still_there()
            with writing(self.log_path), open(self.log_path, "a") as file:
                file.write(json.dumps({"step": done} | line) + "\n")
        self.start_clock()

    def say_what_next(self):
        """Say how it ended and what to type next. Raises KeyboardInterrupt if it was stopped."""
        if self.stopped:
            raise KeyboardInterrupt(f"stopped; {self.folder} is saved, the same command goes on")
        print(f"{self.folder} is finished: {self.config.steps} updates. "
              f"Look at {self.folder / f'step-{self.config.steps:06}.png'}")
        is_newest = newest_weights() == self.folder / "weights.pt"
        where = "" if is_newest else f" --weights {shlex.quote(str(self.folder))}"
        print(f"next: python rar.py sample{where}")

# ---- Built-in data: shapes -----------------------------------------------------------------------

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
    """Picture number `index`, always the same: (32, 32, 3) uint8 of class index % 10."""
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

# ---- Photographs ---------------------------------------------------------------------------------

def center_crop(image, size):
    """The middle of a picture as ADM cuts it, (size, size, 3) uint8: halved with a box filter while
    the short side is at least twice too long, then bicubic to the size; small ones are enlarged."""
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    if max(image.size) * scale * size > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} is too long and narrow to enlarge")
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]

CROPS = {"ten": 10, "flip": 2, "center": 1}  # and how many each makes of a picture

def crop(image, size, kind):
    """The crops (N, size, size, 3) uint8 of a picture: its middle, alone or with its mirror image;
    or four corners and the middle of a tenth more, and the same of the mirror image."""
    whole, corners = size, [(0, 0)]
    if kind == "ten":
        whole = int(1.1 * size)
        far, middle = whole - size, round((whole - size) / 2)
        corners = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    pixels = center_crop(image, whole)
    sides = [pixels] if kind == "center" else [pixels, pixels[:, ::-1]]
    return np.stack([side[y:y + size, x:x + size] for side in sides for y, x in corners])

LAYOUT = "expected DIR/CLASS/PICTURE, or DIR/train/CLASS/PICTURE and DIR/val/CLASS/PICTURE"

def class_folders(folder, flag=""):
    """The folders of the classes in a data folder, sorted: those of its train/, if it has one."""
    folder = Path(folder)
    root = folder / "train" if (folder / "train").is_dir() else folder
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "there is no such folder"
        raise UserError(f"{flag}{folder}: {what}; {LAYOUT}; or the authors' token file, a .jsonl")
    found = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    if not found:
        raise UserError(f"{flag}{root} has no class folders; {LAYOUT}")
    return found

def pictures_in(folder):
    """The files below a folder whose names say that Pillow reads them, sorted. Links are followed,
    but into no folder twice."""
    found, seen = [], set()
    readable = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    for root, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        found += [Path(root, f) for f in files if Path(f).suffix.lower() in readable]
    return sorted(found)

def labelled_pictures(folder):
    """The training and the held-out pictures of a data folder: two lists of (class, path). Without
    a val/, every twentieth picture is held out."""
    folders, val = class_folders(folder), Path(folder) / "val"
    train, held_out = (
        [(c, path) for c, each in enumerate(folders) for path in pictures_in(root / each.name)]
        for root in (folders[0].parent, val))
    if not val.is_dir():
        train, held_out = [x for i, x in enumerate(train) if i % 20 != 19], train[19::20]
    if not train or not held_out:
        raise UserError(f"--data {folder}: {len(train) or 'no'} pictures to learn from and "
                        f"{len(held_out) or 'none'} held out; expected 20, or a val/ with a class "
                        "folder named as one of train/")
    return train, held_out

# A picture may be as large as Pillow takes for sane; beyond that it only warns at first.
warnings.simplefilter("error", Image.DecompressionBombWarning)

def read_picture(file, crops, size):
    """The crops (N, size, size, 3) uint8 of a picture file, or as text why there are none. Without
    crops, the picture as it is: (1, H, W, 3)."""
    try:
        if not os.path.isfile(file) and os.path.exists(file):  # opening a FIFO would never end
            return "not a regular file"
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
    """Yield what read_picture makes of each file, in order. Threads suffice: Pillow decodes and
    resizes without Python's lock."""
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

def folder_batches(files, crop_size, batch):
    """The pictures of the files, as tokenizer.py reconstruct cuts them or as they are (None)."""
    items, size = zip(files, read_pictures(files, crop_size and "center", crop_size)), None
    while chunk := list(itertools.islice(items, batch)):
        for file, item in chunk:
            if isinstance(item, str):  # without it, this would be the score of another set
                raise UserError(f"{file}: {item}")
            size = size or size_of(item)
            if size_of(item) != size:
                raise UserError(f"{files[0]} is {size}, but {file} {size_of(item)}: cut all to one "
                                "size, with --crop 256 for example")
        yield np.concatenate([item for _, item in chunk])

def size_of(pixels):
    return f"{pixels.shape[2]}x{pixels.shape[1]}"

@contextlib.contextmanager
def open_array(path):
    """The shape of the pictures in an array file, and the file, to be read on at the pixels."""
    if path.suffix == ".npy":
        file, size = open(path, "rb"), path.stat().st_size
    else:
        archive = zipfile.ZipFile(path)
        file, size = archive.open("arr_0.npy"), archive.getinfo("arr_0.npy").file_size
    with file:
        np.lib.format.read_magic(file)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or is_fortran:
            first = ", channels first" if len(shape) == 4 and shape[1] == 3 else ""
            raise ValueError(f"it holds {dtype} {shape}{first}{', Fortran order' * is_fortran}; "
                             "expected uint8 from 0 to 255, (N, H, W, 3)")
        if size - file.tell() != math.prod(shape):
            raise ValueError(f"{size - file.tell():,} bytes of pixels, not {math.prod(shape):,}")
        yield shape, file

def array_batches(path, batch):
    """The array in slices: ADM's 50,000 pictures are 9.8 GB."""
    with reading(path), open_array(path) as (shape, file):
        for first in range(0, shape[0], batch):
            part = (min(batch, shape[0] - first), *shape[1:])
            yield np.frombuffer(bytearray(file.read(math.prod(part))), np.uint8).reshape(part)
        file.read(1)  # only at the very end zipfile compares the checksum

# ---- Pictures <-> tokens -------------------------------------------------------------------------

def nearest(vectors, codes):
    """The nearest code of each vector: (..., C), (V, C) -> int64 (...). |v - c|^2 is computed
    without |v|^2, which is the same for every code."""
    return ((codes**2).sum(1) - 2 * vectors @ codes.T).argmin(-1)

class PatchTokenizer(nn.Module):
    """A token is the nearest of `codebook_size` mean patches; no network, fitted in seconds.

    Encoding looks at one patch at a time. Decoding a token looks at the mean patches of its 3x3
    neighbourhood: one linear map, which is a 3x3 convolution over the grid of mean patches.
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
        """float (B, 3, H, W) in [0, 1] -> int64 (B, T), row by row."""
        return nearest(self.patches(images.to(self.codebook)), self.codebook)

    def decode(self, tokens):
        """int (B, T) -> float (B, 3, H, W) in [0, 1]."""
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
        patches = self.patches(images).flatten(0, 1).numpy()  # (N, C)
        patches = patches[random.permutation(len(patches))[:60_000]]
        # Starting from patches that all differ keeps the many empty ones from taking every code.
        distinct = np.unique(patches, axis=0)
        if len(distinct) < codebook_size:
            raise UserError(f"--codebook-size {codebook_size} is more than the {len(distinct)} "
                            "different patches of these pictures")
        codebook = distinct[random.permutation(len(distinct))[:codebook_size]]
        for _ in tqdm(range(20), "fitting the tokenizer", leave=False):
            codebook, _ = kmeans2(patches, codebook, iter=1, minit="matrix")
        self.codebook.copy_(torch.from_numpy(codebook))
        self.decoder[:, :, 1, 1] = torch.eye(self.codebook.shape[1])  # the patch's own mean
        if self.patch_size > 16:
            return self  # what follows would take tens of GB for patches that large

        # Ridge regression from the means of a 3x3 neighbourhood to what the patch in its middle is
        # beside its own mean; the fewer the samples, the nearer to nothing. In float64: float32
        # loses 2 dB here.
        images = images[:5_000_000 // patches.shape[1] // grid_size**2]  # inputs of 0.4 GB
        tokens = torch.cat([self.encode(part) for part in images.split(50)])
        around = F.unfold(self.means(tokens), 3, padding=1)  # (B, 9C, T)
        inputs = F.pad(around.transpose(1, 2).flatten(0, 1).double(), (0, 1), value=1)  # and a bias
        outputs = (self.patches(images) - self.codebook[tokens]).flatten(0, 1).double()  # (N, C)
        square, size = inputs.T @ inputs, inputs.shape[1]
        ridge = square.diagonal().mean() * size / len(inputs)
        solution = torch.linalg.solve(square + ridge * torch.eye(size), inputs.T @ outputs)
        self.decoder += solution[:-1].T.unflatten(1, (-1, 3, 3))
        self.decoder_bias.copy_(solution[-1])
        return self

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
        # Trap: where the width changes, the input is not added at all; the shortcut is one of h.
        return h + (self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x)

def two_blocks(inputs, outputs):
    return nn.Sequential(ResidualBlock(inputs, outputs), ResidualBlock(outputs, outputs))

def named(**modules):
    """A Sequential whose parameters have the names of the release; what has none may be between."""
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
              for name, (inputs, outputs) in widths.items()}  # run from 4, the coarsest, to 0
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
        """float (B, 3, 256, 256) in [0, 1] -> int64 (B, 256): the nearest code of each cell."""
        cells = self.encoder(images).flatten(2).transpose(1, 2)  # (B, 256 cells, 256)
        return nearest(cells, self.quantize.embedding.weight)

    @torch.no_grad()
    def decode(self, tokens):
        """int (B, 256) -> float (B, 3, 256, 256) in [0, 1]."""
        codes = self.quantize.embedding(tokens)  # (B, 256 cells, 256)
        codes = codes.transpose(1, 2).unflatten(2, (16, 16)).contiguous()
        # one by one on a CPU: as fast, and pixels can't depend on the batch by rounding
        parts = codes.split(1 if codes.device.type == "cpu" else len(codes))
        return torch.cat([self.decoder(part) for part in parts]).clamp(0, 1)

def load(path):
    """The tokenizer in a file, ours or the released one. Raises UserError if there is none."""
    state = read_tensors(path)
    try:
        if "quantize.embedding.weight" in state:
            self = MaskGITVQGAN()
        else:
            (codes, channels), grid_size = state["codebook"].shape, int(state["grid"])
            self = PatchTokenizer(grid_size, math.isqrt(channels // 3), codes)
    except Exception as error:  # whatever other files hold under these names
        raise UserError(f"{path} holds no tokenizer") from error
    load_strictly(self, state, path)
    return self.eval()

def released_tokenizer(*folders):
    """The path of the released tokenizer's file if it is at hand, else None."""
    places = (*folders, ".", torch.hub.get_dir(), Path(torch.hub.get_dir()) / "checkpoints")
    return next((p for p in (Path(f) / RELEASED for f in places) if p.is_file()), None)

def check_tokenizer(tokenizer, config, path, names=("grid_size", "codebook_size", "image_size")):
    for name in names:
        has, wanted = getattr(tokenizer, name), getattr(config, name)
        if has != wanted:
            raise UserError(f"{path} has {name} {has}, but --{name.replace('_', '-')} is {wanted}")

def fit_tokenizer(config, images, path, hold):
    """Put the tokenizer that config names at `path`: that of a file, or one fitted to images(). The
    first that is written of a run, so hold() is called before."""
    if config.tokenizer == "patch":
        tokenizer = PatchTokenizer.fit(images(), config.grid_size, config.codebook_size)
    elif config.tokenizer == "released":
        tokenizer = load(released_tokenizer() or fetch_released("fun-research/TiTok", RELEASED))
    else:
        tokenizer = load(config.tokenizer)
    check_tokenizer(tokenizer, config, config.tokenizer)
    hold()
    write_tensors(path, tokenizer.state_dict())

def tokenizer_of(config, folder):
    """The tokenizer of a model's weights: the tokenizer.pt that lies beside them. Weights without
    a run's config.json can be the authors' and take the released file: that at hand, or fetched."""
    path = Path(folder) / "tokenizer.pt"
    if not path.exists():
        of_a_run = (folder / "config.json").exists()
        if of_a_run or (config.grid_size, config.codebook_size) != (16, 1024):
            raise UserError(f"there is no {path}: weights need the tokenizer.pt of their run")
        path = released_tokenizer(folder) or fetch_released("fun-research/TiTok", RELEASED)
    tokenizer = load(path)
    check_tokenizer(tokenizer, config, path, ("grid_size", "codebook_size"))
    return tokenizer

# ---- Token files ---------------------------------------------------------------------------------

BLOCK_SECONDS = 30  # of work that a kill can cost
NPY_HEADER = 128  # bytes, whatever the number of rows

def digest(*parts):
    """SHA-256 of arrays and texts."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part))
    return sha.hexdigest()

def digest_of(module):
    return digest(*(tensor.cpu().numpy() for tensor in module.state_dict().values()))

def open_tokens(path, description):
    """The rows of a finished token file (N, 1 + T), memory-mapped; None if there is none, or one of
    another description. Raises UserError if its bytes are not those that were written."""
    about, part = path.with_suffix(".json"), path.with_suffix(".part")
    if part.exists() or not path.exists() or not about.exists():
        return None
    written, first = read_json(about), 0
    if not description.items() <= written.items():
        return None
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        for count, checksum in tqdm(written["blocks"], f"checking {path}", leave=False):
            if zlib.crc32(rows[first:first + count]) != checksum:
                raise ValueError(f"rows {first} to {first + count - 1} are damaged")
            first += count
        if first != len(rows):
            raise ValueError("it is not as long as it was")
    except Exception as error:  # whatever a damaged header, or damaged blocks, lead to
        raise UserError(f"{path}: {error}; remove it, and it is made again") from error
    return rows

def token_file(path, description, batches):
    """The rows (N, 1 + T) uint16 of a token file, memory-mapped. It is made once: batches(state)
    yields rows, and counts in state["done"] the pictures or lines that are through.

    They go to PATH.part, and every half minute PATH.json says what is there, so that whoever was
    killed goes on behind that. As long as there is a PATH.part, PATH.json describes it.
    """
    if (rows := open_tokens(path, description)) is not None:
        return rows
    about, part, width = path.with_suffix(".json"), path.with_suffix(".part"), description["width"]
    state = read_json(about) if about.exists() and part.exists() else {}
    if not description.items() <= state.items():
        state = description | {"done": 0, "skipped": [], "blocks": []}
    with writing(part):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        write_json(about, state)
        with open(part, "r+b") as file:
            count = sum(count for count, _ in state["blocks"])
            file.truncate(NPY_HEADER + 2 * width * count)
            file.seek(0, os.SEEK_END)
            state["blocks"].append([0, 0])
            clock = time.monotonic()
            for rows in batches(state):
                rows = np.ascontiguousarray(rows, dtype="<u2")
                file.write(rows)
                count += len(rows)
                before, checksum = state["blocks"][-1]
                state["blocks"][-1] = [before + len(rows), zlib.crc32(rows, checksum)]
                if time.monotonic() - clock > BLOCK_SECONDS:
                    file.flush()
                    write_json(about, state)
                    state["blocks"].append([0, 0])
                    clock = time.monotonic()
            if count == 0:
                raise UserError(f"{path}: there is nothing to make it of that can be read")
            file.seek(0)
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<u2", "fortran_order": False, "shape": (count, width)})
        write_json(about, state)
        os.replace(part, path)
    return np.load(path, mmap_mode="r")

def encode_pictures(pictures, tokenizer, crops, names, device, path=None, title="tokens"):
    """The tokens of (class, picture file) pairs, (N, 1 + T): all crops of a picture after those of
    the one before. The token file is `path`, or one in runs/tokens/ that belongs to these very
    pictures, tokenizer and crops."""
    files = [str(file) for _, file in pictures]
    sizes = [os.path.isfile(file) and os.path.getsize(file) for file in files]
    description = {
        "tokenizer": digest_of(tokenizer), "width": 1 + tokenizer.grid_size**2,
        "crops": crops, "image_size": tokenizer.image_size, "class_names": list(names),
        "files": digest(json.dumps([files, sizes, [c for c, _ in pictures]])),
        "count": len(files)}
    path = path or Path("runs/tokens", f"{title}-{digest(json.dumps(description))[:12]}.npy")

    def batches(state):  # picture by picture, so that tokens can't depend on the batch by rounding
        items = read_pictures(files[state["done"]:], crops, tokenizer.image_size)
        bar = tqdm(items, "encoding", len(files), initial=state["done"], unit=" pictures")
        for item, (label, file) in zip(bar, pictures[state["done"]:]):
            state["done"] += 1
            if not isinstance(item, str):
                tokens = tokenizer.encode(to_float(item).to(device)).cpu().numpy()
                yield np.insert(tokens, 0, label, axis=1)
                continue
            tqdm.write(f"skipped {file}: {item}")
            state["skipped"].append([str(file), item])
            if (bad := len(state["skipped"])) > max(10, len(files) // 1000):
                raise UserError(f"{bad} of {len(files)} pictures can't be read, the last of them "
                                f"{file}: mend or remove them")
        if state["skipped"]:
            print(f"{path}: {len(state['skipped'])} of {len(files)} pictures were skipped")

    return token_file(path, description, batches)

TOKEN_LINE = re.compile(rb'\s*\{"class_id": *(\d+), *"tokens": *\[([\d, ]+)\]\}\s*')

def import_jsonl(source, path, T):
    """The authors' token file, a line for each row of T tokens, as our token file."""
    description = {"source": str(source), "bytes": os.stat(source).st_size, "width": 1 + T}

    def row_of(number, line):
        with contextlib.suppress(AttributeError, ValueError):  # three times as fast as json.loads
            row = np.fromstring(b",".join(TOKEN_LINE.fullmatch(line).groups()), np.int64, sep=",")
            if len(row) == 1 + T and row[0] < 1000 and row[1:].max() < 1024:
                return row
        raise UserError(f'{source}: line {number} is not {{"class_id": 0 to 999, "tokens": '
                        f'[{T} numbers from 0 to 1023]}}')

    def batches(state):
        lines = enumerate(tqdm(file, "reading", unit=" rows"), 1)
        lines = itertools.islice(lines, state["done"], None)
        while rows := [row_of(*line) for line in itertools.islice(lines, 5000)]:
            state["done"] += len(rows)
            yield np.stack(rows)

    with open(source, "rb") as file:
        return token_file(path, description, batches)

# ---- Data sets -----------------------------------------------------------------------------------

@dataclasses.dataclass
class Data:
    """Rows are (N, 1 + T) uint16: the class, then the tokens in cell order."""

    train: np.ndarray
    held_out: np.ndarray
    tokenizer: nn.Module
    examples: torch.Tensor = torch.empty(0)  # (N, 3, H, W), of previews: photographs, and decoded

def class_names(data):
    """The names of the classes in a data set, by number. UserError if there is no such data."""
    if data == "shapes":
        return tuple(SHAPES)
    if Path(data).suffix == ".jsonl" and Path(data).is_file():
        return tuple(map(str, range(1000)))  # the authors' token file
    return tuple(folder.name for folder in class_folders(data, "--data "))

def class_numbers(texts, config, source):
    """The numbers of the classes that are named or numbered by `texts`; of all if None."""
    numbers = range(config.num_classes)
    known = dict(zip(config.class_names, numbers)) | {str(number): number for number in numbers}
    for text in texts or ():
        if text not in known:
            there = f": {', '.join(config.class_names)}" if config.class_names else ""
            raise UserError(f"--classes {text}: the model of {source} knows 0 to "
                            f"{config.num_classes - 1}{there}")
    return list(numbers) if texts is None else [known[text] for text in texts]

def title(data):
    return Path(data).resolve().name.removesuffix(".jsonl")

def recipe(data):
    """What follows from a data set unless flags say otherwise: the names of its classes, a preset,
    knobs on top of it, and the reason in words."""
    names = class_names(data)
    if data == "shapes":
        knobs = {"image_size": SHAPES_SIZE, "crops": "center", "grid_size": 8, "codebook_size": 192}
        return names, "tiny", knobs, "built-in"
    if len(names) != 1000:
        why = f"{len(names)} classes, not ImageNet's 1000"
        return names, "small", {"image_size": 64, "crops": "flip"}, why
    released = released_tokenizer(data if Path(data).is_dir() else Path(data).parent)
    why = "1000 classes, hence as in the paper, for GPUs; without one take --model small"
    if released is None:
        why += f"; {RELEASED} is not at hand, --tokenizer released fetches it"
    return names, "RAR-B", {"tokenizer": str(released or "patch")}, why

def open_data(config, folder, device, hold=None):
    """The data set config.data as tokens, by the tokenizer.pt in the folder. With `hold`, which
    keeps others out of the folder, that is made for the data and put there first."""
    data, names = config.data, class_names(config.data)
    if len(names) != config.num_classes:
        raise UserError(f"--data {data} has {len(names)} classes, the model {config.num_classes}")
    if config.crops not in CROPS:
        raise UserError(f"--crops {config.crops}: choose from {', '.join(CROPS)}")

    def tokenizer_fitted_to(images):
        if hold:
            fit_tokenizer(config, images, Path(folder) / "tokenizer.pt", hold)
        return tokenizer_of(config, folder).to(device)

    if data == "shapes":
        indices = tqdm(range(SHAPES_TRAIN + SHAPES_HELD_OUT), "drawing shapes", leave=False)
        images = to_float(np.stack([draw_shape(i) for i in indices]))  # (N, 3, 32, 32)
        tokenizer = tokenizer_fitted_to(lambda: images[:SHAPES_TRAIN])
        tokens = torch.cat([tokenizer.encode(part.to(device)).cpu() for part in images.split(500)])
        labels = np.arange(len(images)) % len(SHAPES)
        rows = np.column_stack([labels, tokens.numpy()]).astype(np.uint16)
        return Data(rows[:SHAPES_TRAIN], rows[SHAPES_TRAIN:], tokenizer)
    if Path(data).suffix == ".jsonl":
        if hold and config.tokenizer == "patch":
            raise UserError(f"--data {data}: these are tokens of {RELEASED}: name that file with "
                            "--tokenizer")
        tokenizer = tokenizer_fitted_to(None)
        rows = import_jsonl(data, Path("runs/tokens", title(data) + ".npy"), tokenizer.grid_size**2)
        last = min(1000, -(-len(rows) // 20))  # the last rows are held out
        return Data(rows[:-last], rows[-last:], tokenizer)
    train, held_out = labelled_pictures(data)
    held_out = held_out[::-(-len(held_out) // 500)]  # enough to tell losses apart
    enough = min(2000, 10**8 // (3 * config.image_size**2) + 1)
    some = [file for _, file in train[::-(-len(train) // enough)]]
    tokenizer = tokenizer_fitted_to(lambda: crop_images(some, config.image_size))
    rows = [encode_pictures(pictures, tokenizer, crops, names, device,
                            title=f"{title(data)}-{part}")
            for pictures, crops, part in ((train, config.crops, "train"),
                                          (held_out, "center", "held-out"))]
    first = dict(reversed(held_out))  # one picture of each class
    originals = crop_images([first[c] for c in sorted(first)][:COLUMNS], tokenizer.image_size)
    again = tokenizer.decode(tokenizer.encode(originals.to(device))).cpu()
    return Data(*rows, tokenizer, torch.cat([originals, again]))

# ---- Pictures ------------------------------------------------------------------------------------

COLUMNS = 20

def to_float(pixels):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [0, 1], and not in [-1, 1]: so the released
    tokenizer wants it."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255

def to_uint8(images):
    """float (B, 3, H, W) -> uint8 (B, H, W, 3). Truncated, not rounded: the authors' choice, and
    with it the published FIDs were computed."""
    return (images.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()

def save_grid(path, images, names):
    """A PNG of images (B, 3, H, W) in [0, 1], row by row, a column for each name, under it."""
    with replacing(path) as beside:
        grid_of(images, names).save(beside, "PNG")

def grid_of(images, names):
    """The picture that save_grid writes. With more than COLUMNS names it is so many columns without
    names."""
    columns, names = (len(names), names) if len(names) <= COLUMNS else (COLUMNS, ())
    gap, header, scale = 4, 22 if names else 0, max(1, 80 // images.shape[2])
    cell = scale * images.shape[2] + gap
    size = (columns * cell + gap, math.ceil(len(images) / columns) * cell + gap + header)
    sheet = Image.new("RGB", size, "white")
    for i, pixels in enumerate(to_uint8(images).repeat(scale, 1).repeat(scale, 2)):
        row, column = divmod(i, columns)
        sheet.paste(Image.fromarray(pixels), (gap + column * cell, gap + header + row * cell))
    longest = max((len(str(name)) for name in names), default=1)
    font = ImageFont.load_default(size=min(15, 1.6 * (cell - gap) / longest))
    for column, name in enumerate(names):
        centre = ((column + 0.5) * cell + gap / 2, gap + header / 2)
        ImageDraw.Draw(sheet).text(centre, str(name), fill="black", font=font, anchor="mm")
    return sheet

def save_gif(path, images, orders, names):
    """An animation of images (B, 3, H, W) whose cells arrive in orders (B, T), in at most 64 steps.
    The rest is grey; what has arrived looks as it does in the end."""
    T = orders.shape[1]
    grid = math.isqrt(T)
    cell = torch.ones(images.shape[2] // grid, images.shape[3] // grid, dtype=torch.long)
    ranks = orders.argsort(dim=1).view(-1, 1, grid, grid).kron(cell)    # (B, 1, H, W)
    frames = [grid_of(torch.where(ranks < t, images, 0.5), names)
              for t in torch.linspace(0, T, min(T, 64) + 1).long()]
    with replacing(path) as beside:
        frames[0].save(beside, "GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=[80] * (len(frames) - 1) + [3000])

def known_tokens(path, keep, tokenizer, device="cpu"):
    """The tokens (T,) of the cells of a picture that lie whole within the pixels `keep`, -1 for the
    others; and two images (2, 3, H, W): the picture, and what is seen of it."""
    if path is None or keep is None:
        raise UserError("--complete PICTURE needs --keep x0,y0,x1,y1, the pixels that stay, and "
                        "--keep the picture")
    size, grid = tokenizer.image_size, tokenizer.grid_size
    cell, (x0, y0, x1, y1) = size // grid, keep
    cells = torch.zeros(grid, grid, dtype=torch.bool)
    cells[-(-y0 // cell):y1 // cell, -(-x0 // cell):x1 // cell] = True
    if cells.all() or not cells.any():
        raise UserError(f"--keep {x0},{y0},{x1},{y1} keeps {cells.sum()} of {grid**2} cells of "
                        f"{cell} pixels: keep some and leave some, of {size} x {size} pixels")
    [pixels] = folder_batches([path], size, 1)
    image = to_float(pixels)                                            # (1, 3, H, W)
    # The rest is greyed before encoding: an encoder looks beyond a cell, and nothing of what is
    # hidden may reach the tokens that are kept.
    seen = torch.where(cells.kron(torch.ones(cell, cell, dtype=torch.bool)), image, 0.5)
    tokens = tokenizer.encode(seen.to(device)).cpu()[0]
    return torch.where(cells.flatten(), tokens, -1), torch.cat([image, seen])

def write_npz(path, shape, batches, comment=b""):
    """An .npz as numpy.savez writes it, arr_0 uint8 of this shape (N, H, W, 3), but never whole in
    memory: it comes in batches (B, H, W, 3)."""
    with replacing(path) as beside, zipfile.ZipFile(beside, "w") as archive:
        archive.comment = comment
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(
                member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for pixels in batches:
                member.write(pixels)

class Samples:
    """Numbered pictures on their way to `path`, from any number of processes. Whoever is killed
    goes on: `missing` are this process's numbers that are not there yet.

    path is a folder that gets a PNG for each picture; or a grid (.png) or an .npz, which is put
    together at the end and until then is the folder PATH.parts. Each file tells the settings that
    it was made with, in the PNG's text or the .npz's zip comment; none is mixed with others.
    """

    def __init__(self, out, folder, count, size, settings, gif=False):
        new = (Path(folder, f"samples-{n}.png") for n in itertools.count(1))
        path = self.path = Path(out) if out else next(p for p in new if not p.exists())
        is_folder = path.is_dir() or str(out).endswith(("/", os.sep))
        self.kind = "folder" if is_folder else path.suffix.lower()
        many = "an .npz, or a folder with a / at its end"
        if self.kind not in ("folder", ".png", ".npz") or gif and self.kind != ".png":
            raise UserError(f"--out {out}: name a .png for a grid (--gif needs one), {many}")
        if self.kind == ".png" and count * max(size, 80)**2 > Image.MAX_IMAGE_PIXELS:
            raise UserError(f"--out {path}: {count} are too many for a grid: name {many}")
        self.store = path if is_folder else path.with_name(path.name + ".parts")
        check_folder(self.store, f"--out {path}")
        self.shape, self.settings = (count, size, size, 3), json.dumps(settings)
        self.comment = json.dumps(settings | {"count": count}).encode()
        finished = self.kind == ".npz" and self.has(path)
        missing = [n for n in range(count) if not finished and not self.has(self.file(n))]
        wait_for_all()  # nobody writes before all have looked
        self.missing = missing[RANK::WORLD_SIZE]
        if missing:
            need = 3 * size**2 * (len(missing) + (0 if is_folder else count))
            check_room(self.store, need, f"{path} meanwhile")
            print(f"{path}: {len(missing):,} of {count:,} pictures to make")

    def file(self, number):
        return self.store / f"{number:06}.png"

    def has(self, file):
        """Whether a file is there and whole. UserError if it was made with other settings."""
        try:
            if file == self.path:
                with zipfile.ZipFile(file) as archive:
                    same = archive.comment == self.comment
            else:
                with Image.open(file) as image:
                    same = image.info.get("settings") == self.settings
                    image.verify()
        except Exception:  # half a picture is none; an .npz is not ours to replace
            if file != self.path or not file.exists():
                return False
            same = False
        if not same and self.kind != ".png":  # the parts of a grid are nobody's
            made = self.path if file == self.path else self.store
            raise UserError(f"{made} was made with other settings: remove it or name another --out")
        return same

    def put(self, numbers, images):
        text = PngImagePlugin.PngInfo()
        text.add_text("settings", self.settings)

        def write(number, pixels):
            with replacing(self.file(number)) as beside:
                Image.fromarray(pixels).save(beside, "PNG", compress_level=1, pnginfo=text)

        with ThreadPoolExecutor() as pool:  # Pillow compresses without Python's lock
            list(pool.map(write, numbers.tolist(), to_uint8(images)))

    def finish(self, names, before=None, orders=None):
        """Put the file together. A grid has a column for each name; or, behind images (N, 3, H, W)
        that come `before`, one for each picture. With orders (B, T) it is animated, too."""
        wait_for_all()
        if RANK > 0 or self.kind == "folder":
            return
        files = [self.file(n) for n in range(self.shape[0])]
        batches = folder_batches(files, None, 16)
        if self.kind == ".png":
            images = torch.cat([to_float(pixels) for pixels in batches])
            if orders is not None:
                save_gif(self.path.with_suffix(".gif"), images, orders, names)
            if before is not None:
                images, names = torch.cat([before, images]), ["picture", "kept", *names]
            save_grid(self.path, images, names)
        elif not self.has(self.path):
            bar = tqdm(batches, "putting together", math.ceil(len(files) / 16), leave=False)
            write_npz(self.path, self.shape, bar, self.comment)
        shutil.rmtree(self.store, ignore_errors=True)

# ---- Command line --------------------------------------------------------------------------------

def find_tokenizer(path):
    """The tokenizer of a file or run folder; if None, the released one, or the newest run's."""
    newest = newest_weights()
    path = path or released_tokenizer() or newest and newest.parent
    if path is None:
        raise UserError(f"name a file with --tokenizer: {RELEASED}, or the folder of a run")
    path = Path(path, "tokenizer.pt") if Path(path).is_dir() else Path(path)
    tokenizer = load(path)
    print(f"tokenizer {path}: {tokenizer.image_size} pixels, {tokenizer.grid_size**2} tokens")
    return tokenizer

def encode_command(args, knobs, device, autocast):
    tokenizer, path = find_tokenizer(args.tokenizer).to(device), Path(args.out)
    if path.suffix != ".npy":
        raise UserError(f"--out {path}: name a file that ends in .npy")
    check_folder(path.parent, f"--out {path}")
    pictures = [(c, file) for c, folder in enumerate(class_folders(args.folder))
                for file in pictures_in(folder)]
    if not pictures:
        raise UserError(f"{args.folder}: the class folders hold no pictures")
    rows = encode_pictures(pictures, tokenizer, args.crops, class_names(args.folder), device, path)
    print(f"{path}: {len(rows):,} rows of a class and {rows.shape[1] - 1} tokens")

def reconstruct_command(args, knobs, device, autocast):
    tokenizer, path = find_tokenizer(args.tokenizer).to(device), Path(args.out)
    if path.suffix not in (".png", ".npz"):
        raise UserError(f"--out {path}: name a .png file to look at, or an .npz file to score")
    check_folder(path.parent, f"--out {path}")
    files = [file for name in args.pictures for file in pictures_in(name) or [Path(name)]]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: there is no such picture, or there are none in this folder")
    size = tokenizer.image_size
    batches = tqdm(folder_batches(files, size, 16), "reconstructing", math.ceil(len(files) / 16))
    pairs = ((images, tokenizer.decode(tokenizer.encode(images.to(device))).cpu())
             for images in map(to_float, batches))
    if path.suffix == ".npz":
        write_npz(path, (len(files), size, size, 3), (to_uint8(again) for _, again in pairs))
    else:
        images = torch.cat([torch.stack(pair, 1).flatten(0, 1) for pair in pairs])
        save_grid(path, images, ["picture", "again"] * min(4, len(files)))
    print(f"{path}: {len(files)} pictures")

def main(argv=None):
    """Run a command. Returns its exit code."""
    parser = Parser(prog="tokenizer.py", description=__doc__.split("\n")[0])
    encode = parser.command("encode", encode_command, "a folder of photographs to a token file")
    encode.add_argument("folder", help=LAYOUT)
    encode.add_argument("--crops", choices=CROPS, default="ten", help="crops of a picture [ten]")
    reconstruct = parser.command("reconstruct", reconstruct_command,
                                 "pictures through the tokenizer and back")
    reconstruct.add_argument("pictures", nargs="+", help="files and folders")
    for command, what in ((encode, "the .npy file"), (reconstruct, "a .png or .npz file")):
        command.add_argument("--out", required=True, help=what + " to write")
        command.add_argument("--tokenizer", help="file or run folder [the released one, if it is "
                             "at hand, or that of the newest run]")
    return parser.run(argv)

if __name__ == "__main__":
    sys.exit(main())
