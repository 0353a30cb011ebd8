"""Run with: python -m pytest -q

The published model, the idea, sampling, training: closed forms, and figures of the authors' code
The command line, photographs, released files, any order: the real commands at tiny size
fid.py: closed forms, and figures of the reference implementations
Nothing lost: kills, full disks, damaged files

The golden files of ../shared are matched in full, where they lie beside the checkout.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses import FakeTensorMode

import fid
import rar
import tokenizer as tok
from rar import PRESETS, RAR, Config, generate, sample_orders, scan_order

GOLDEN = Path(__file__).parent.parent / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason="no ../shared/golden here")

TINY = Config(width=64, depth=3, heads=4, mlp_width=256, grid_size=4, codebook_size=32,
              num_classes=10, dropout=0.0)
ORDERS = torch.tensor([[2, 14, 4, 8, 9, 7, 11, 1, 5, 0, 12, 15, 6, 13, 10, 3],
                       [7, 11, 0, 10, 5, 8, 4, 14, 12, 9, 15, 1, 13, 2, 6, 3],
                       [6, 11, 5, 3, 10, 13, 8, 2, 4, 9, 0, 14, 7, 12, 1, 15]])
TOKENS = torch.tensor([[27, 20, 16, 8, 9, 1, 2, 0, 5, 26, 20, 29, 16, 19, 31, 23],
                       [20, 17, 17, 29, 8, 26, 21, 0, 12, 27, 17, 1, 24, 23, 27, 5],
                       [2, 27, 0, 17, 2, 9, 15, 13, 12, 0, 0, 3, 0, 21, 16, 20]])
LABELS = torch.tensor([2, 6, 7])
NO_CLASS = torch.full((3,), 10)
RASTER = torch.arange(16).expand(3, 16)
PLAIN = torch.autocast("cpu", enabled=False)
torch.set_num_threads(1)  # as in torchrun's processes

def closed_form(model):
    """Fill the model with weights that depend on nothing but names, shapes and a sine."""
    state, is_tokenizer = model.state_dict(), isinstance(model, tok.MaskGITVQGAN)
    for k, name in enumerate(sorted(state)):
        shape, count = state[name].shape, state[name].numel()
        v = np.sin(np.arange(count) * 12.9898 + k * 78.233) * 43758.5453
        v = 2 * (v - np.floor(v)) - 1
        if len(shape) < 2:
            v = 1 + 0.1 * v if name.endswith("weight") else 0.1 * v
        elif "embed" in name or "cls_token" in name:
            v *= 1 if is_tokenizer else 0.5
        else:
            v *= np.sqrt(3 * shape[0] / count) * (1.4 if is_tokenizer else 1)
        state[name] = torch.from_numpy(v.astype(np.float32)).view(shape)
    model.load_state_dict(state)
    return model

@pytest.fixture
def model():
    torch.manual_seed(0)
    return closed_form(RAR(TINY)).eval()

# ---- The published model

THEIRS = np.load(GOLDEN / "rar.npz") if GOLDEN.exists() else {}

@needs_golden
def test_logits(model):
    for name, labels in (("raster", LABELS), ("raster_uncond", NO_CLASS)):
        logits = model(TOKENS, labels, RASTER).detach().numpy()
        expected = THEIRS[f"logits_{name}"][:, :-1]  # without an unused last slot
        assert np.abs(logits - expected).max() < 5e-6

def test_gradients_and_updates(model):
    config = dataclasses.replace(TINY, steps=8, warmup=0.25)
    optimizer, losses, norms = rar.make_optimizer(model, config), [], []
    for step in range(8):
        loss, _ = rar.training_loss(model, TOKENS, LABELS, ORDERS)
        loss.backward()
        if THEIRS and step == 0:
            found = {name: p.grad.norm().item() for name, p in model.named_parameters()}
            expected = dict(zip(THEIRS["grad_names"], THEIRS["grad_norms"]))
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)
        norms.append(rar.update(model, optimizer, config, step)[0].item())
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[::7] == pytest.approx([3.72877479, 2.77827096], rel=1e-6)
    assert norms[::7] == pytest.approx([2.25130510, 2.01252198], rel=1e-5)
    # cls_token, the head, and the matrices of blocks
    decayed = sum(parameter.numel() for parameter in optimizer.param_groups[0]["params"])
    assert decayed == 64 * (1 + 32 + 3 * (192 + 64 + 256 + 256 + 384))

def slowly(*arguments, uniforms=RASTER, orders=RASTER):
    return rar.generate_slowly(*arguments, uniforms, orders)

@pytest.mark.parametrize("sampler", [slowly, generate])
def test_greedy_generation(model, sampler):
    """The first picture has a near tie."""
    for scale, power, sums in ((0, 0, [1901, 2236]), (4, 0, [2051, 1987]),
                               (16, 2.75, [2108, 2442])):
        tokens = sampler(model, LABELS, scale, power, 0)
        assert (tokens[1:] @ torch.arange(1, 17)).tolist() == sums

def test_sizes():
    for name, count in {"RAR-S": 133_344_256, "RAR-B": 260_923_648, "RAR-L": 461_668_352,
                        "RAR-XL": 955_425_024, "RAR-XXL": 1_498_520_704}.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in RAR(PRESETS[name]).parameters()) == count

def test_initial_weights():
    for width, std in ((64, 0.0693), (1536, 0.02)):
        model = RAR(dataclasses.replace(TINY, width=width, mlp_width=64, depth=1))
        for name, parameter in model.named_parameters():
            is_constant = parameter.ndim == 1 or "adaLN" in name or name == "cls_token"
            assert parameter.std().item() == pytest.approx(0 if is_constant else std, rel=0.1)

# ---- The idea

def test_sample_orders():
    orders = sample_orders(4000, 6, 0.6, rng=np.random.default_rng(0))
    assert (orders.sort(dim=1).values == torch.arange(6)).all()
    is_raster = (orders == torch.arange(6)).all(dim=1)
    assert is_raster.float().mean().item() == pytest.approx(0.4, abs=0.03)
    in_place = (orders[~is_raster] == torch.arange(6)).float().mean(0)
    assert in_place.tolist() == pytest.approx([1 / 6] * 6, abs=0.03)

def test_scan_orders():
    for name, ranks in {
            "raster": "0123456789abcdef", "alternate": "0123765489abfedc",
            "spiral_in": "0ba91cf82de73456", "spiral_out": "f456e307d218cba9",
            "z_curve": "0145236789cdabef", "subsample": "04158c9d2637aebf"}.items():
        assert "".join(f"{rank:x}" for rank in scan_order(name, 4).argsort().tolist()) == ranks
        for n in (1, 2, 3, 5, 8, 32, 48):
            assert sorted(scan_order(name, n).tolist()) == list(range(n * n))
    if GOLDEN.exists():
        for name, ranks in json.loads((GOLDEN / "scan_orders.json").read_text()).items():
            assert scan_order(name, 16).argsort().view(16, 16).tolist() == ranks

def test_target_embedding_tells_orders_apart(model):
    """The paper's Fig. 3: two orders that share their first cells, but not the one to predict."""
    orders = RASTER[:2].clone()
    orders[1, 4:6] = torch.tensor([5, 4])
    for aware in (True, False):
        model.config = dataclasses.replace(TINY, target_aware=aware)
        first, second = model(TOKENS[[0, 0]], LABELS[[0, 0]], orders)
        differ = (first - second).abs().amax(-1) > 1e-5
        assert differ[:5].tolist() == [False] * 4 + [aware]

# ---- Sampling

@pytest.mark.parametrize("scale, aware", [(0, False), (1, True), (3, True)])
def test_the_cache_gives_the_same_tokens(scale, aware):
    """Also where some are known, in whose place others would be drawn."""
    model = closed_form(RAR(dataclasses.replace(TINY, grid_size=6, target_aware=aware)))
    labels, uniforms = torch.arange(20) % 11, rar.image_uniforms(0, range(20), 36)
    orders = sample_orders(20, 36, 0.5, rng=np.random.default_rng(0))
    slow = slowly(model, labels, scale, 1.0, 0.9, uniforms=uniforms, orders=orders)
    assert rar.AHEAD < 34
    if aware:
        rar.pack(model)
    for place in ([], np.s_[:, :6], np.s_[:], np.s_[:5], np.s_[:7, [0, 5, 9]]):
        is_known = torch.zeros(20, 36, dtype=torch.bool)
        is_known[place] = True
        known = torch.where(is_known.gather(1, orders.argsort(1)), slow, -1)
        others = torch.where(is_known, 1 - uniforms, uniforms)
        tokens = generate(
            model, labels, scale, 1.0, 0.9, uniforms=others, orders=orders, known=known)
        assert (tokens != slow).any(dim=1).sum() <= 1

def test_nothing_is_read_back(monkeypatch):
    """In this mode tensors have no values. CUDA graphs can't look at one, and updates need not."""
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    config = dataclasses.replace(TINY, depth=1, batch=6, micro_batch=4, dropout=0.1)
    *batch, seeds, r = rar.draw_batch(ROWS, config, 0)
    autocast = torch.autocast("cpu", torch.bfloat16)
    with FakeTensorMode() as mode:
        model = RAR(config)
        with autocast:
            generate(model, torch.arange(4), 1.5, 1.0, 1.0)
        batch = [*map(mode.from_tensor, batch), seeds, r]
        rar.train_step(model, rar.make_optimizer(model, config), config, batch, 0, autocast)

def test_draw():
    """Never a token of probability 0, at neither end."""
    logits = torch.tensor([[0.0, 0.2, 0.5, 0.3, 0.0]]).log().expand(6, 5)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-24])
    assert rar.draw(logits, 1.0, uniforms).tolist() == [1, 1, 2, 2, 3, 3]
    assert all(rar.draw(torch.zeros(1, V), 1.0, uniforms[5:]) < V for V in range(2, 99))

# ---- Training

# a class c, then tokens c + 3, c + 6, ...
ROWS = (np.arange(100)[:, None] % 10 + 3 * np.arange(17)) % 32

def test_training(monkeypatch):
    """Part II makes the same updates."""
    text, _ = Path(rar.__file__).read_text().split("# ---- Part II")
    for word in ("tok.", "Path(", "open(", "argparse", ".device", "UserError"):
        assert word not in text
    one = {}
    exec(text, one)
    config = dataclasses.replace(TINY, width=32, depth=1, steps=60, batch=24, anneal=(0.3, 0.8),
                                 label_dropout=0.3, lr=1e-2, warmup=0.2)
    plain, labels, orders = closed_form(one["RAR"](config)), torch.arange(10), RASTER[[0] * 10]
    one["train_plainly"](plain, ROWS, config)
    tokens = one["generate_slowly"](plain, labels, 0, 0, 0, orders, orders)
    assert (tokens.numpy() == ROWS[:10, 1:]).mean() > 0.9
    for micro_batch, rows in ((24, {11}), (7, {7, 3})):
        config, model = dataclasses.replace(config, micro_batch=micro_batch), RAR(config)
        optimizer = rar.make_optimizer(closed_form(model), config)
        seen = calls(monkeypatch, model.blocks[0].adaLN_modulation, "forward")
        for step in range(60):
            batch = rar.draw_batch(ROWS, config, step)
            line = rar.train_step(model, optimizer, config, batch, step, PLAIN)
        assert {len(condition) for condition, in seen} == rows
        assert torch.initial_seed() == batch[3][23 // micro_batch * micro_batch]
        logits = model(tokens, labels, orders)
        assert torch.allclose(logits, plain(tokens, labels, orders), atol=1e-3)
        assert [*map(float, line.values())] == pytest.approx(
            [0.8115, 0.8802, 0, 2.06947e-5, 0.3903], rel=0.01)

def test_attention_dropout():
    block, x, seen = rar.Block(dataclasses.replace(TINY, dropout=0.5)), torch.ones(9, 4, 5, 16), []
    assert rar.causal(x, x, x, 0.5)[:, :, 0].unique().tolist() == [0, 2]  # slot 0 sees itself
    for training in (True, False):
        inputs = torch.ones(9, 5, 64), torch.ones(9, 5, 384)
        block.train(training)(*inputs, lambda q, k, v, dropout: seen.append(dropout) or v)
    assert seen == [0.5, 0]

def test_compiled_halves(model, monkeypatch):
    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    results, graphs, compiled = [], [], closed_form(RAR(TINY))
    rar.compile_halves(compiled)
    for network in (model, compiled):
        for batch in ([0] * 2, [1] * 3, [2] * 4):
            loss, _ = rar.training_loss(network, TOKENS[batch], LABELS[batch], ORDERS[batch])
            loss.backward()
        result = {name: parameter.grad for name, parameter in network.named_parameters()}
        tokens = generate(network.eval(), LABELS, 3, 1.0, 0)
        results.append(result | {"loss": loss, "tokens": tokens})
    one, other = results
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    assert 2 < len(graphs) / 2 <= 4  # of a half

def test_draw_batch_is_a_function_of_seed_and_step():
    class Rows(list):  # no array, so nothing can be done to all of them
        def __getitem__(self, index):
            return 17 * np.array(index)[:, None] + np.arange(17)

    rows, config = Rows(range(20)), dataclasses.replace(
        TINY, batch=8, label_dropout=0.5, seed=3, steps=10)
    tokens, labels, *_, r = whole = rar.draw_batch(rows, config, 6)
    halves = [rar.draw_batch(rows, config, 6, rank, 2) for rank in (0, 1)]
    for part in range(4):
        assert np.array_equal(np.concatenate([half[part] for half in halves]), whole[part])
    assert r == halves[1][-1] == pytest.approx(0.6)
    assert (tokens.diff() == 1).all() and 0 < (labels == 10).sum() < 8
    spiral = dataclasses.replace(config, anneal=(0.0, 0.0), order="spiral_in")
    assert (rar.draw_batch(rows, spiral, 0)[2] == scan_order("spiral_in", 4)).all()
    # a pass visits every row once, in its own order, made once
    rar.shuffled.cache_clear()
    visits = torch.cat([rar.draw_batch(rows, config, step)[0][:, 0] for step in range(5)])
    first, second = visits.split(20)
    assert len(first.unique()) == len(second.unique()) == 20 and not first.equal(second)
    assert rar.shuffled.cache_info().misses == 2

def test_evaluate(model):
    rows = np.column_stack([LABELS, TOKENS])
    config = dataclasses.replace(TINY, order="alternate", micro_batch=2)
    order = scan_order("alternate", 4).expand(3, 16)
    loss, accuracy = rar.training_loss(model, TOKENS, LABELS, order)
    bits, right, random_bits, _ = rar.evaluate(model, rows, config, PLAIN).values()
    assert (bits, right) == pytest.approx((loss.item() / math.log(2), accuracy.item()))
    assert random_bits != bits

# ---- Pictures and their tokens

def shapes(count):
    return tok.to_float(np.stack([tok.draw_shape(i) for i in range(count)]))

def test_shapes():
    ink = (shapes(400) - torch.tensor(tok.GROUND).view(3, 1, 1) / 255).abs().sum(1) > 0.3
    areas = ink.float().mean(dim=(1, 2)).view(40, 10).mean(0)  # circle, square, ...
    assert areas.tolist() == pytest.approx(
        [0.377, 0.363, 0.219, 0.181, 0.271, 0.227, 0.255, 0.157, 0.203, 0.311], 0.03)
    colours = torch.tensor([0, 0.999, 1, 1.7, -0.2, 0.5]).expand(1, 3, 1, 6)
    assert tok.to_uint8(colours)[0, 0, :, 0].tolist() == [0, 254, 255, 255, 0, 127]  # truncated

def test_patch_tokenizer(tmp_path):
    images, tokenizer = shapes(400)[300:], tok.PatchTokenizer.fit(shapes(300), 8, 64)
    tokens = tokenizer.encode(images)
    decoded = tokenizer.decode(tokens)
    pasted = F.fold(tokenizer.codebook[tokens].transpose(1, 2), 32, 4, stride=4)
    assert F.mse_loss(decoded, images) < min(0.006, 0.9 * F.mse_loss(pasted, images))
    assert 0 <= decoded.min() and decoded.max() <= 1
    # moving the picture by a patch moves the tokens
    moved = tokenizer.encode(images.roll(4, dims=-1)).view(100, 8, 8)
    assert torch.equal(moved, tokens.view(100, 8, 8).roll(1, -1))
    tok.write_tensors(tmp_path / "t.pt", tokenizer.state_dict())
    again = tok.load(tmp_path / "t.pt")
    assert torch.equal(again.encode(images), tokens) and torch.equal(again.decode(tokens), decoded)

# ---- The command line

TRAIN = ["train", "--steps", "6", "--save-every", "4", "--log-every", "1", "--batch", "16",
         "--width", "32", "--depth", "1", "--mlp-width", "64", "--codebook-size", "32",
         "--device", "cpu", "--dropout", "0.1"]

@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in, and less built-in data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tok, "SHAPES_TRAIN", 100)
    monkeypatch.setattr(tok, "SHAPES_HELD_OUT", 20)
    return tmp_path

def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]

def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

def at_step(monkeypatch, number, do):
    """Have the next training do something before update `number`."""
    step_of = rar.train_step

    def train_step(*arguments):  # the fifth is the number of updates before
        if arguments[4] + 1 == number:
            do()
        return step_of(*arguments)

    monkeypatch.setattr(rar, "train_step", train_step)

def refused(arguments, capsys, last_line=False, main=rar.main):
    """Run a command that must fail: exit code 2, one line on stderr (or its last). Returns it."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    line = error.splitlines()[-1]
    assert error.endswith(f"{line}\n") and line.startswith("error: "), error
    assert last_line or error.count("\n") == 1, error
    return line

def test_train(workplace, monkeypatch, capsys):
    """A run that is stopped again and again becomes the same as one that never was."""
    train = [*TRAIN, "--log-every", "5", "--anneal", "0.4", "0.75", "--out"]
    whole, parts, loss_of = Path("whole"), Path("parts"), rar.training_loss

    def start_another():
        before = contents(whole)
        assert "whole is in use" in refused([*train, "whole", "--codebook-size", "30"], capsys)
        assert contents(whole) == before

    with monkeypatch.context() as patch:
        at_step(patch, 2, start_another)
        dropouts = calls(patch, F, "dropout")
        works(*train, "whole")
    assert sum(training and p == 0.1 for _, p, training, _ in dropouts) == 6 * 3
    assert "look at whole/step-000006.png\n" in capsys.readouterr().out
    assert Image.open("whole/step-000006.png").size == (10 * 68 + 4, 5 * 68 + 4 + 22)
    r = {line["step"]: line["r"] for line in log_of(whole)}
    assert r == pytest.approx({1: 1, 3: 1, 4: 5 / 7, 5: 5 / 21, 6: 0})

    def spoilt(*inputs):  # its gradient is infinite
        loss, accuracy = loss_of(*inputs)
        return loss + (loss - loss.detach()).sqrt(), accuracy

    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    for number, signals, saved, code in [
            (2, [signal.SIGINT], 2, 130),      # not at a logged update
            (6, [], 4, 2),                     # by a gradient that is no number
            (5, [signal.SIGTERM], 4, 2),       # by both
            (6, [signal.SIGINT] * 2, 4, 130),  # a second one strikes at once
            (5, [signal.SIGINT], 5, 130),      # at a logged update
            (6, [signal.SIGHUP], 6, 130)]:     # at the last, a milestone
        def strike():
            if code == 2:
                patch.setattr(rar, "training_loss", spoilt)
            for each in signals:
                os.kill(os.getpid(), each)

        with monkeypatch.context() as patch:
            at_step(patch, number, strike)
            assert rar.main([*train, "parts"]) == code
        said = f"error: update {number}" if code == 2 else "the same command goes on"
        assert said in capsys.readouterr().err
        assert rar.checkpoints(parts)[0].name == f"checkpoint-{saved:07}.pt"
        with open("parts/log.jsonl", "a") as file:
            file.write('{"step": 6, "lo')
    works(*train, "parts")
    assert "look at parts/step-000006.png" in capsys.readouterr().out
    whole, parts = contents(whole), contents(parts)
    others = whole.keys() ^ parts.keys()
    assert others == {"checkpoint-0000004.pt", "checkpoint-0000005.pt"}
    assert all(whole[name] == parts[name] for name in whole.keys() - others)

def test_sample_and_eval(trained, capsys, monkeypatch):
    run = Path("runs/shapes-tiny")
    shutil.copytree(run, "runs/older")
    os.utime("runs/older/weights.pt", (0, 0))
    last, early, first = (str(path) for path in rar.checkpoints(run))
    for name, more in (("1", []), ("2", ["--seed", "2"]), ("3", ["--weights", last])):
        works("sample", "--count", "13", "--out", f"{name}.png", *more)
    one, two, three = (Path(f"{name}.png").read_bytes() for name in "123")
    assert one == three != two
    works("sample", "--classes", "heart", "3", "--order", "spiral_in")
    for path, anneal in ((first, (1, 1)), (early, (0.5, 0.75)), (None, (0.5, 0.75))):
        assert rar.load_model(path, {}, torch.device("cpu"))[1].anneal == anneal
    works("eval", "--weights", str(run))
    assert rar.in_words(Config(), log_of(run)[-1]) in capsys.readouterr().out
    compiled = []
    monkeypatch.setattr(rar, "compile_halves", compiled.append)
    works("sample", "--weights", f"{run}/weights.pt", "--scale", "0", "--compile")
    assert {path.name for path in run.glob("sam*")} == {"samples-1.png", "samples-2.png"}
    works(*TRAIN, "--compile")
    assert len(compiled) == 2

def cases(text):
    """Lines of a command and, after a bar, what its error names: by default the flag."""
    parts = [[*line.split("|"), ""] for line in text.strip().splitlines()]
    return [(part[0].split(), part[1].strip() or part[0].split()[1]) for part in parts]

def test_mistakes(workplace, capsys):
    assert "python rar.py train" in refused(["sample"], capsys)
    works(*TRAIN)
    run, before = Path("runs/shapes-tiny"), contents("runs/shapes-tiny")
    Path("file").touch()
    for arguments, named in cases(f"""
train --order zigzag | --order zigzag
train --device {"mps" if torch.cuda.is_available() else "cuda"}
train --device cpu --precision tf32 | --precision tf32
train --steps 0
train --seed -1
train --lr nan
train --lr 1e-6 | --min-lr
train --heads 3 | --heads 3
train --anneal 0.0 1.5
train --anneal 0.9 0.1
train --out file/run | file/run
train --out a --grid-size 5 | --grid-size 5
train --out a --codebook-size 60000 | --codebook-size 60000
{" ".join(TRAIN)} --lr 0.001 | --lr
sample --count 0
sample --coun 3
sample --classes 10 | --classes 10
sample --order zigzag | error: --order zigzag
sample --out nowhere/samples | --out nowhere/samples
sample --out x.png --count 20000 | too many for a grid
| train"""):
        assert named in refused(arguments, capsys)
    assert contents(run) == before and sorted(os.listdir()) == ["a", "file", "runs"]

    (run / "weights.pt").unlink()
    works(*TRAIN)  # which makes it anew
    assert contents(run) == before
    tok.write_tensors(run / "tokenizer.pt", tok.PatchTokenizer(4, 8, 16).state_dict())
    assert "grid_size 4" in refused(["sample"], capsys)
    for path in rar.checkpoints(run):
        path.unlink()
    assert "no checkpoint" in refused(TRAIN, capsys)

# ---- Photographs

def paint(path, size=(70, 80), mode="RGB", seed=0):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(coarse).resize(size, Image.BICUBIC).convert(mode).save(path)

@pytest.fixture
def photographs(workplace):
    """Two classes of 20 pictures, and SMALL: flags to train on them in seconds."""
    for i in range(40):
        paint(f"photos/{('cats', 'dogs')[i % 2]}/{i:02}.png", seed=i)
    return workplace / "photos"

SMALL = [*TRAIN, "--data", "photos"]

def works(*arguments, main=rar.main):
    assert main([*arguments]) == 0

def raising(error):
    def fail(*_):
        raise error
    return fail

def calls(monkeypatch, owner, name, before={}):
    """The list of calls of a function from now on. before[n]() comes before call n."""
    function, made = getattr(owner, name), []

    def noted(*arguments, **options):
        made.append(arguments)
        before.get(len(made), bool)()
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, noted)
    return made

def token_files():
    return {path.name: path.read_bytes() for path in Path("runs/tokens").iterdir()
            if path.suffix != ".lock"}

def test_crops():
    picture = Image.fromarray(np.arange(90 * 120 * 3).reshape(90, 120, 3).astype(np.uint8))
    whole, places = tok.center_crop(picture, 88), [(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)]
    expected = [side[y:y + 80, x:x + 80] for side in (whole, whole[:, ::-1]) for y, x in places]
    assert np.array_equal(tok.crop(picture, 80, "ten"), expected)
    golden = json.loads((GOLDEN / "crops.json").read_text()) if GOLDEN.exists() else {}
    for name, expected in golden.items():
        picture = Image.open(GOLDEN.parent / "data/imagenet/train" / name.split()[0]).convert("RGB")
        times = np.floor_divide(expected["size"], picture.size)
        crops = tok.crop(Image.fromarray(np.tile(picture, (*times[::-1], 1))), 256, "ten")
        assert [tok.digest(crop) for crop in crops] == expected["tencrop_sha256"]

def test_published_tokenizer(workplace, monkeypatch):
    with torch.device("meta"):
        tokenizer = tok.MaskGITVQGAN()
    state = closed_form(tokenizer.to_empty(device="cpu")).state_dict()
    shapes = sorted((name, list(tensor.shape)) for name, tensor in state.items())
    assert tok.digest(repr(shapes)).startswith("ba3a3990b697")
    tok.write_tensors("file", state)
    tokenizer = tok.load("file")
    if GOLDEN.exists():
        golden = np.load(GOLDEN / "tokenizer.npz")
        codes = tokenizer.encode(tok.to_float(golden["images"][:1]))
        assert np.array_equal(codes, golden["codes"][:1])
        expected = golden["decoded_unclamped"][:1].clip(0, 1)
        assert np.abs(tokenizer.decode(codes).numpy() - expected).max() < 2.5e-3
    for part in (tokenizer.encoder, tokenizer.decoder):
        monkeypatch.setattr(part, "forward", lambda x: x)
    decoder = calls(monkeypatch, tokenizer.decoder, "forward")
    tokens = torch.randperm(1024)[:512].view(2, 256)
    cells = state["quantize.embedding.weight"][tokens].mT.unflatten(2, (16, 16))
    assert torch.equal(tokenizer.encode(cells), tokens)
    assert torch.equal(tokenizer.decode(tokens), cells.clamp(0, 1))
    assert len(decoder) == 2  # on a CPU one by one, or the batch would change pixels

def test_pictures_in_the_wild(workplace, monkeypatch):
    paint("a/upright.JPG")
    paint("pixel.png", size=(1, 1), mode="P")
    Image.fromarray(np.full((80, 70), 0x7080, np.uint16)).save("deep.png")
    Path("half.jpg").write_bytes(Path("a/upright.JPG").read_bytes()[:500])
    for name in ("notes.md", "text.jpg"):
        Path(name).touch()
    paint("thread.png", size=(1, 2500))
    paint("bomb.png", size=(120, 120))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    files = tok.pictures_in(".")
    read = {file.stem: item for file, item in zip(files, tok.read_pictures(files, "center", 64))}
    bad = [name for name, item in read.items() if isinstance(item, str) and "\n" not in item]
    assert (files, bad) == (sorted(files), ["bomb", "half", "text", "thread"])
    assert read.keys() - bad == {"upright", "pixel", "deep"}
    assert (read["deep"] == 0x70).all()

def test_train_on_photographs(photographs, monkeypatch, capsys):
    """While tokens are made it is stopped, then killed; and while it waits, another makes them."""
    def make_them():
        others.append(tok.encode_pictures(*encoded[-1]))

    for i in range(10):
        Path(f"photos/cats/x{i}.png").touch()
    others, encoded = [], calls(monkeypatch, tok, "encode_pictures")
    made = calls(monkeypatch, tok, "write_at", {13: raising(KeyboardInterrupt),
                                                43: raising(SystemError("as if killed"))})
    locks = calls(monkeypatch, tok.fcntl, "flock", {6: make_them})
    assert rar.main(SMALL) == 130
    with pytest.raises(SystemError):
        rar.main(SMALL)
    works(*SMALL)
    works("eval")  # needs no others
    assert len(encoded) == 6
    assert len(made) == 2 * 40 + 1 + 2  # rows and marks; the rows of one picture were not marked
    assert capsys.readouterr().out.count("left out photos/cats/x") == 10
    assert locks[5][1] == tok.fcntl.LOCK_EX and len(token_files()) == 2
    [rows], run = others, Path("runs/photos-small")
    assert rows.shape == (10 * 38, 65) and rows.dtype == np.uint16
    assert rows[:, 0].tolist() == [0] * 190 + [1] * 190  # 20 of 40 are cats; 19 and 39 are held out
    log = log_of(run)
    assert log[-1]["passes"] == pytest.approx(6 * 16 / 38)
    paint("photos/cats/00.png", seed=99, size=(60, 60))  # a file of another size
    works("eval")
    again = tok.encode_pictures(*encoded[2])
    assert np.array_equal(again[10:], rows[10:]) and (again[:10] != rows[:10]).any()

    (run / "config.json").unlink()  # as with the released files
    evaluate = ["eval", "--weights", str(run), "--data"]
    works(*evaluate, "photos")
    assert f"{log[-1]['final_order_bits']:.3f} bits/token in raster" in capsys.readouterr().out
    assert "10 classes" in refused([*evaluate, "shapes"], capsys)
    (run / "tokenizer.pt").unlink()
    assert f"{run}/tokenizer.pt" in refused([*evaluate, "photos"], capsys)
    Path("photos/cats/x.png").touch()  # one damaged picture too many
    assert "photos/cats/x" in refused([*SMALL, "--out", "b"], capsys, last_line=True)

def test_fine_tuning(photographs, capsys):
    """In the only update of a second run the learning rate is 0."""
    second = [*SMALL, "--steps", "1", "--init", "first", "--out"]
    works(*SMALL, "--out", "first")
    works(*second, "same")
    for i in range(20):
        paint(f"photos/birds/{i}.png", seed=100 + i)
    works(*second, "more")
    first, same, more = (tok.read_tensors(f"{run}/weights.pt") for run in ("first", "same", "more"))
    for name in first:
        assert torch.equal(first[name], same[name])
        assert torch.equal(first[name][:33], more[name][:33])
    classes = more["embeddings.weight"][33:]
    assert len(classes) == 4 and (classes[:2] != first["embeddings.weight"][33:35]).all()
    for wrong in (["--width", "64"], ["--init", "nowhere"]):
        assert wrong[1] in refused([*second, "c", *wrong], capsys, last_line=True)

def test_layouts(workplace, capsys):
    Path("empty/.hidden").mkdir(parents=True)
    paint("val/train/cats/a.png")
    paint("val/val/dogs/a.png")
    for i in range(19):
        paint(f"few/cats/{i}.png")
    for data, named in [("empty", "expected"), ("few", "19 pictures"),
                        ("val", "1 pictures to train on and 0 held out")]:
        assert f"--data {data}: {named}" in refused(["train", "--data", data], capsys)
    paint("val/val/cats/more/b.JPG")
    assert tok.labelled_pictures("val") == ([(0, Path("val/train/cats/a.png"))],
                                            [(0, Path("val/val/cats/more/b.JPG"))])
    assert "--crops zoom" in refused(["train", "--data", "val", "--crops", "zoom"], capsys)

def test_reconstruct(trained, capsys):
    paint("photos/big.jpg", size=(300, 200))
    paint("photos/other.png")
    again = ["reconstruct", "--tokenizer", "runs/shapes-tiny", "--out"]
    tokenizer = tok.load("runs/shapes-tiny/tokenizer.pt")
    picture = tok.read_picture("photos/big.jpg", "center", 32)
    decoded = tok.to_uint8(tokenizer.decode(tokenizer.encode(tok.to_float(picture))))
    works(*again, "a.png", "photos/big.jpg", main=tok.main)
    sheet = np.asarray(Image.open("a.png"))[26:90:2, ::2]  # twice as large
    assert np.array_equal([sheet[:, 2:34], sheet[:, 36:68]], [picture[0], decoded[0]])
    works(*again, "a.npz", "photos", "photos/big.jpg", main=tok.main)
    images = pixels_of("a.npz")
    assert len(images) == 3 and (images[1] != decoded).any()
    assert (images[::2] == decoded).all()
    assert "nowhere" in refused([*again, "b.png", "nowhere"], capsys, True, tok.main)
    assert "--out b.jpg" in refused([*again, "b.jpg", "photos"], capsys, True, tok.main)

# ---- Released files and many samples

@pytest.fixture
def hub(workplace, monkeypatch):
    """A model hub on this machine: hub[path] = bytes is what it has."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = hub.get(self.path, b"")
            self.send_response(200 if body else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    hub, server = {}, ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("TORCH_HOME", "torch")
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()

def test_released_weights(hub, capsys, monkeypatch):
    """From two files on a hub to pictures, with the settings of the model's size."""
    config = dataclasses.replace(PRESETS["RAR-XL"], width=32, depth=1, heads=2, mlp_width=32)
    monkeypatch.setitem(PRESETS, "RAR-XL", config)
    torch.save(RAR(config).state_dict(), "model")
    torch.save(tok.PatchTokenizer(16, 2, 1024).state_dict(), "tokenizer")
    weights, tokenizer = Path("model").read_bytes(), Path("tokenizer").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    monkeypatch.setitem(tok.RELEASED_MODELS, "RAR-XL", ("rar_xl.bin", digest))
    sample = ["sample", "--count", "2", "--out", "x/", "--weights"]
    # missing, not that file, cut off, and another one
    for place, bodies in [
            (f"fun-research/TiTok/resolve/main/{tok.RELEASED}",
             [b"", b"<html>Please log in</html>", tokenizer[:-9], tokenizer]),
            ("yucornetto/RAR/resolve/main/rar_xl.bin", [b"", weights[:-9], tokenizer, weights])]:
        for body in bodies[:-1]:
            hub[f"/{place}"] = body
            error = refused([*sample, "RAR-XL"], capsys, last_line=True)
            path = Path("torch/hub/checkpoints", Path(place).name)
            assert f"put it at {path}" in error and ("404" in error) == (body == b"")
            assert not list(path.parent.glob(f"{path.name}*"))
        hub[f"/{place}"] = bodies[-1]
    works(*sample, "RAR-XL")
    hub.clear()
    assert tok.read_json("x/settings.json")["scale"] == 6.9
    works(*sample, "model")  # into the same folder, so nothing that matters is different

def test_a_thousand_classes_and_a_gpu(hub, photographs, capsys, monkeypatch):
    monkeypatch.setattr(tok, "class_names", lambda data: (*map(str, range(1000)),))
    monkeypatch.setattr(tok, "gpu_gigabytes", lambda device: 80)
    error = refused(SMALL, capsys)
    assert all(x in error for x in ("404", tok.RELEASED, "put it at", "--tokenizer patch"))
    monkeypatch.setattr(tok, "gpu_gigabytes", lambda device: 0)
    works(*SMALL, "--photographs", "10")
    printed = capsys.readouterr().out
    assert "--model small" in printed and "10 of 38 photographs, evenly" in printed
    rows = np.load(next(Path("runs/tokens").glob("photos-train*.npy")))
    assert rows[:, 0].tolist() == [0] * 50 + [1] * 50

def test_weights_that_do_not_fit(workplace, capsys):
    good = RAR(TINY).state_dict()
    for value, named in [
            ({**good, "x": torch.zeros(2)}, ": x is (2,)"), ([1, 2], " is not a dictionary"),
            (dict([*good.items()][1:]), ": cls_token is missing"), ({}, " holds no"),
            (good | {"lm_head.bias": 5}, " holds no"),
            ({"x": Path()}, " is not a dictionary")]:  # it might run any code
        torch.save(value, "other.bin")
        error = refused(["sample", "--weights", "other.bin"], capsys)
        assert "other.bin" in error and named in error

@pytest.fixture
def trained(workplace, tmp_path_factory):
    runs = tmp_path_factory.getbasetemp() / "runs"
    if not runs.exists():
        works(*TRAIN, "--out", str(runs / "shapes-tiny"))
    shutil.copytree(runs, "runs")

NPZ = ["sample", "--count", "23", "--device", "cpu"]

def pixels_of(path):
    if Path(path).is_file():
        return np.load(path)["arr_0"]
    return np.stack([np.asarray(Image.open(file)) for file in sorted(Path(path).glob("*.png"))])

def differing(one, two):
    return (pixels_of(one) != pixels_of(two)).any(axis=(1, 2, 3)).sum()

def test_samples(trained, capsys, monkeypatch):
    arguments, parts = [*NPZ, "--micro-batch", "4", "--out", "x.npz"], Path("x.npz.parts")
    works(*arguments[:-1], "a/b/x.npz")
    works(*NPZ, "--out", "folder/")
    assert differing("a/b/x.npz", "folder") <= 1 and os.listdir("a/b") == ["x.npz"]
    # more into the same folder, but not by other settings; a finished file stays
    works("sample", "--count", "25", "--out", "folder")
    assert len(os.listdir("folder")) == 25 + 1
    for more in (["--seed", "2"], ["--scale", "2"], ["--order", "z_curve"], ["--classes", "3"]):
        assert "other settings" in refused([*NPZ, *more, "--out", "folder"], capsys)
    assert "x.npz is there already" in refused([*NPZ, "--out", "a/b/x.npz"], capsys)
    # image i is of class i % 10
    model, config, folder = rar.load_model(None, {}, torch.device("cpu"))
    tokens = generate(model, torch.arange(23) % 10, config.scale, config.power, config.temperature,
                      uniforms=rar.image_uniforms(1, range(23), 64))
    pixels = tok.to_uint8(tok.tokenizer_of(config, folder).decode(tokens))
    assert np.array_equal(pixels, pixels_of("a/b/x.npz"))

    # stopped twice, with a damaged picture, and as if it was killed while the parts were removed
    stop, broken = raising(KeyboardInterrupt), parts / "000003.png"
    made = calls(monkeypatch, tok.PatchTokenizer, "decode", {3: stop, 6: stop})
    for count in (8, 16):
        assert rar.main(arguments) == 130
        assert not Path("x.npz").exists() and len(pixels_of(parts)) == count
    broken.write_bytes(b"")
    assert str(broken) in refused(arguments, capsys, last_line=True)
    broken.unlink()
    Path("x.npz").touch()
    removed = calls(monkeypatch, Path, "unlink")
    works(*arguments)
    assert Path("x.npz").read_bytes() == Path("a/b/x.npz").read_bytes()
    assert len(made) == 6 + 2 + 1 and not parts.exists()
    assert removed[-1][0].name == "settings.json"  # without it the others would be strangers

def launch(*arguments, patch):
    """Run a command in two processes, after a patch of Python."""
    Path("patched.py").write_text(f"""
import os, signal, sys, rar, tokenizer as tok
tok.SHAPES_TRAIN, tok.SHAPES_HELD_OUT = 100, 20
{patch}
sys.exit(rar.main())
""")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    places = {"PYTHONPATH": str(Path(rar.__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *torchrun, "patched.py", *arguments],
                          capture_output=True, text=True, env=os.environ | places)

def test_two_processes_and_then_one(photographs):
    """Rank 1 fails, and then it is stopped after five updates."""
    train = [*SMALL, "--steps", "8", "--save-every", "8", "--anneal", "0", "1"]
    train += ["--micro-batch", "4", "--out"]
    sample = [*NPZ, "--weights", "two", "--micro-batch", "4", "--out"]
    works(*train, "one")
    files = token_files()
    shutil.rmtree("runs/tokens")
    patch = f"""
import contextlib, functools, torch
def note():
    with open(f"did-{{tok.RANK}}", "a") as file:
        file.write("x")
        return file.tell()
def write_at(*x, write=tok.write_at):
    if note() == 10 and tok.RANK == 1:
        raise tok.UserError("this one fails")
    write(*x)
def train_step(*x, step=rar.train_step):
    if x[4] == 4 and tok.RANK == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return step(*x)
def save_samples(store, parts, save=tok.save_samples):
    save(store, (note() and part for part in parts))
tok.write_at, rar.train_step, tok.save_samples = write_at, train_step, save_samples
torch.compile = functools.partial(torch.compile, backend="aot_eager")
if rar.main() == 130:
    tok.processes, sys.argv[1:] = contextlib.nullcontext, {[*sample, "x.npz"]}
"""
    result = launch(*train, "two", patch=patch)
    assert result.returncode != 0 and "rank 1: error: this one fails" in result.stderr
    result = launch(*train, "two", "--compile", patch=patch)
    assert result.returncode == 0 and "stopped and saved" in result.stderr, result.stderr
    assert result.stdout.count("two: ") == 1  # rank 0 alone talks
    did = [os.path.getsize(f"did-{rank}") for rank in (0, 1)]
    assert min(did) > 24 and sum(did) - 2 * 40 - 2 * 3 in (2, 3, 4)  # cut off
    assert token_files() == files and log_of(Path("two"))[-1]["step"] == 5
    works(*sample, "x/")
    assert differing("x", "x.npz") <= 1
    works(*train, "two")
    for one, two in zip(log_of(Path("one")), log_of(Path("two")), strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    one, two = (tok.read_tensors(f"{run}/weights.pt") for run in ("one", "two"))
    for name in one:
        if "k_norm.bias" not in name:  # has no gradient but noise
            assert torch.allclose(one[name], two[name], rtol=0, atol=1e-5), name

# ---- Any order

def test_orders_of_images():
    config = dataclasses.replace(TINY, order="random")
    orders = rar.image_orders(config, range(50))
    assert torch.equal(orders.sort().values, torch.arange(16).expand(50, 16))
    assert torch.equal(orders[7:8], rar.image_orders(config, [7]))
    assert len(orders.unique(dim=0)) == 50
    draws = rar.image_uniforms(0, range(50), 16)
    assert (orders != draws.argsort()).any()  # orders have numbers of their own
    config.order = "spiral_in"
    assert torch.equal(rar.image_orders(config, [7])[0], scan_order("spiral_in", 4))

def test_complete(trained, capsys, monkeypatch):
    """Given tokens stay, and nobody sees the hidden pixels."""
    Image.fromarray(tok.draw_shape(4)).save("a.png")
    tokenizer = tok.load("runs/shapes-tiny/tokenizer.pt")
    encoded = calls(monkeypatch, tokenizer, "encode")
    known, images = tok.known_tokens("a.png", (3, 2, 32, 17), tokenizer)
    assert torch.equal(encoded[0][0], images[1:])
    kept = torch.zeros(32, 32, dtype=torch.bool)
    kept[4:16, 4:] = True  # whole cells alone
    assert torch.equal(known.view(8, 8) >= 0, kept[::4, ::4])
    assert torch.equal(images[1], torch.where(kept, images[0], 0.5))

    complete = ["sample", "--complete", "a.png", "--classes", "cross", "--count", "3", "--keep"]
    works(*complete, "0,0,32,16", "--out", "x.png")  # rows from the top: raster will do
    assert Image.open("x.png").width == 5 * 68 + 4  # the picture, what is kept, and three
    assert "annealed to another order" not in capsys.readouterr().out
    works(*complete, "0,16,32,32")
    assert "annealed to another order" in capsys.readouterr().out
    model, config, _ = rar.load_model(None, {}, torch.device("cpu"))
    (_, tokens), = rar.sample_tokens(model, torch.tensor([4, 4]), config, PLAIN, known=known)
    assert (tokens[:, known >= 0] == known[known >= 0]).all() and (tokens >= 0).all()
    orders = rar.image_orders(config, [0, 1], known)
    assert (known[orders[:, :21]] >= 0).all() and orders[0, :2].tolist() == [9, 10]
    for keep, named in [("1,2,3", "--keep"), ("0,0,3,3", "0 of 64 cells"), ("0,0,32,32", "64 of")]:
        assert named in refused([*complete, keep], capsys)

# ---- fid.py

def scores_of(*arguments):
    fid.main([*arguments, "--json", "scores.json", "--device", "cpu"])
    return json.loads(Path("scores.json").read_text())

def refused_by_fid(*arguments):
    """Run fid.py on a mistake. Returns the one line that it ends with."""
    with pytest.raises(SystemExit) as refusal:
        fid.main([*arguments, "--device", "cpu"])
    assert len(str(refusal.value).splitlines()) == 1
    return str(refusal.value)

@pytest.mark.filterwarnings("error")
def test_frechet_distance():
    # of 2x2 the root has the trace sqrt(tr S1 S2 + 2 sqrt(det S1 S2)) = sqrt(8 + 6)
    a, b, u = np.array([[2.0, 1], [1, 2]]), np.diag([1.0, 3]), np.eye(4)[0]
    low_rank = np.random.default_rng(0).normal(size=(10, 5, 30))
    cases = [([0, 4], a, [3, 0], b, 3**2 + 4**2 + 4 + 4 - 2 * 14**0.5),
             (u, np.outer(u, u), u, np.full((4, 4), 9 / 4), 1 + 9 - 2 * 3 * 0.5),  # rank 1
             *[(x[0], np.cov(x.T), x[0], np.cov(x.T), 0) for x in low_rank]]
    for *arrays, expected in cases:
        distance = fid.frechet_distance(*map(np.array, arrays))
        assert distance == pytest.approx(float(expected), rel=1e-7, abs=1e-6) and distance >= 0
    with pytest.raises(ValueError, match="negative eigenvalues"):
        fid.frechet_distance(u[:2], a - 2, u[:2], b)

def test_moments():
    x, moments = 100 + torch.randn(50, 70), fid.Moments()
    for part in x.split([1, 20, 29]):
        moments.add(part)
    mean, covariance = moments.result()
    assert np.abs(mean - x.double().mean(0).numpy()).max() < 1e-12
    assert np.abs(covariance - np.cov(x.double().T)).max() < 1e-10

def test_precision_recall():
    torch.manual_seed(0)
    a, b = torch.randn(150, 40), 1.1 * torch.randn(90, 40) + 0.1
    expected = []
    for points, centres in ((a.double(), b.double()), (b.double(), a.double())):
        distances, others = (((x[:, None] - centres)**2).sum(-1) for x in (points, centres))
        radii = others.sort(1).values[:, 3]
        expected.append((distances <= radii).any(1).double().mean().item())
    for block in (7, 1024):
        assert fid.precision_recall(a, b, block=block) == pytest.approx(expected, abs=1e-12)

    # Six equal points have balls of radius 0. Their borders take in copies, however they round.
    points = 10 * torch.randn(40, 64).repeat(6, 1)
    for block in (7, 37):
        samples, reference = points[torch.randperm(240)], points[torch.randperm(240)]
        assert fid.precision_recall(samples, reference, block=block) == [1, 1]
        assert fid.precision_recall(samples + 0.001, reference, block=block) == [0, 0]

def test_resize_is_tensorflows():
    # outputs lie at 0, 2/299, ...; from input 1 on there is nothing to blend in
    ramp = fid.resize(torch.tensor([10.0, 40.0]).expand(1, 1, 3, 2))[0, 0]
    expected = 10 + 30 * (torch.arange(299) * 2 / 299).clamp(max=1)
    assert torch.allclose(ramp, expected.expand(299, 299), rtol=1e-6)
    assert fid.resize(torch.arange(598.0).expand(1, 1, 5, 598))[0, 0, 2, 7] == 14  # not smoothed
    assert fid.resize(torch.ones(2, 3, 9, 8)).stride(1) == 1  # channels last: fast

@pytest.fixture
def cheap(tmp_path, monkeypatch):
    """In place of Inception a fixed map, and pictures a and b."""
    def inception(pixels, weights):
        images = F.adaptive_avg_pool2d(pixels.permute(0, 3, 1, 2) / 255, 4)
        return (images.flatten(1) @ weights).split([64, 32, 1008], 1)

    torch.manual_seed(0)
    weights = torch.randn(48, 64 + 32 + 1008) / 7
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "inception", inception)
    monkeypatch.setattr(fid, "load_weights", lambda *_: weights)
    shapes = {"mu": (64,), "sigma": (64, 64), "mu_s": (32,), "sigma_s": (32, 32)}
    monkeypatch.setattr(fid, "EXPECTED", {"arr_0": "uint8"} | shapes)
    for name, end, version in (("a", 256, (3, 0)), ("b", 254, (2, 0))):
        cells = np.random.default_rng(end).integers(0, end, (40, 4, 4, 3)).astype(np.uint8)
        pictures = cells.repeat(16, axis=1).repeat(16, axis=2)
        save = np.savez_compressed if name == "a" else np.savez
        save(name, pictures, np.arange(40))  # ADM's files hold labels, too: arr_1
        with open(f"{name}.npy", "wb") as file:
            np.lib.format.write_array(file, pictures, version)
        Path(name, "deep").mkdir(parents=True)
        for i, pixels in enumerate(pictures):
            file = f"{name}/deep/{i}.png" if i > 20 else f"{name}/{i:02}.png"
            Image.fromarray(pixels).resize((128, 128), 0).save(file)
    os.symlink("..", "a/deep/up")  # leads around in circles
    return lambda path: inception(torch.from_numpy(np.load(path)), weights)

def test_inputs_of_fid(cheap, capsys):
    fid.main(["b.npz", "--save-stats", "stats.npz", "--device", "cpu"])
    stats = dict(np.load("stats.npz"))
    np.savez("adm.npz", np.load("b.npy")[:20], **stats)
    np.savez("pool.npz", mu=stats["mu"], sigma=stats["sigma"])

    a, b = cheap("a.npy"), cheap("b.npy")
    assert np.array_equal(fid.read_folder(Path("a"))[:, ::2, ::2], np.load("a.npy"))  # sorted
    expected = {"is": fid.inception_score(a[2])}
    for i, name in enumerate(("fid", "sfid")):
        one, two = ((x.numpy().mean(0), np.cov(x.T)) for x in (a[i], b[i]))
        expected[name] = fid.frechet_distance(*one, *two)
    expected["precision"], expected["recall"] = fid.precision_recall(a[0], b[0])
    for line in """a.npz b.npz --batch 7 | | fewer than 2,048
a b | | Class after class
a.npy b | | differ in size
a.npz adm.npz | -precision -recall |
a.npz stats.npz | precision recall | precision   needs pictures
a.npz pool.npz | sfid precision recall | sfid        needs pictures
stats.npz stats.npz | is precision recall -fid -sfid | is          needs pictures
a.npy | fid sfid precision recall | recall      needs a reference""".splitlines():
        arguments, others, said = line.split("|")  # a minus means another score, and not none
        scores, printed = scores_of(*arguments.split()), capsys.readouterr()
        assert said.strip() in printed.out and (line[0] == "s" or line.split()[0] in printed.err)
        for hint in ("Class", "differ"):
            assert (hint in printed.out) == (hint in said)
        for name, value in expected.items():
            if name in others.split():
                assert scores[name] is None
            else:
                is_same = scores[name] == pytest.approx(value, rel=1e-4)
                assert is_same == (f"-{name}" not in others.split())
    assert not list(Path().glob("*.part"))

def test_inception_score(cheap):
    pictures = np.zeros((5010, 4, 4, 3), np.uint8)
    pictures[::2], pictures[5000:] = 255, 90
    np.save("some.npy", pictures)
    p = cheap("some.npy")[2].double().softmax(1)
    parts = [(x * (x / x.mean(0)).log()).sum(1).mean().exp().item() for x in p.split(5000)]
    for batch in ("64", "5005"):
        scores = scores_of("some.npy", "--batch", batch)
        assert scores["is"] == pytest.approx(sum(parts) / 2, rel=1e-6)

def test_mistakes_with_fid(cheap):
    pictures, mu, sigma = np.load("a.npy"), np.zeros(64), np.eye(64)
    np.save("float", pictures / 255)
    np.save("first", pictures.reshape(40, 3, 64, 64))
    np.save("fields", np.zeros(9, [("red", "u1")]))
    np.savez("three", pictures[:3])
    np.savez("others", images=pictures)
    for name, arrays in {"width": (mu[:9], sigma), "nan": (mu * math.nan, sigma), "alone": (mu,),
                         "skewed": (mu, np.tri(64)), "negative": (mu, 2 - sigma)}.items():
        np.savez(name, **dict(zip(("mu", "sigma"), arrays)))
    Path("half.npz").write_bytes(Path("a.npz").read_bytes()[:300])
    Path("half.npy").write_bytes(Path("a.npy").read_bytes()[:-20])
    Path("empty").mkdir()
    for folder in ("odd", "broken"):
        shutil.copytree("b", folder)
    Image.new("RGB", (70, 80)).save("odd/deep/39.png")
    Path("broken/07.png").write_bytes(Path("b/07.png").read_bytes()[:90])
    before = set(os.listdir())
    for line in """float.npy | float64
first.npy | (40, 3, 64, 64)
fields.npy | red
three.npz | (3, 64, 64, 3)
others.npz | neither arr_0 nor mu, but ['images']
missing | No such file
half.npz | not a zip file
half.npy | greater than file size
empty | no pictures
odd | odd/deep/39.png is (80, 70, 3), but odd/00.png
broken | broken/07.png
a width.npz | mu is float64 (9,)
a nan.npz | without NaN
a skewed.npz | symmetric
a negative.npz | negative eigenvalues
a alone.npz | sigma
a --save-stats ./a | is an input
a.npz a.npy --json ./a.npy | is an input
a --save-stats no/a.npz | can't be written""".splitlines():
        arguments, named = line.split(" | ")
        error = refused_by_fid(*arguments.split())
        assert named in error and Path(arguments.split()[-1]).name in error
    assert set(os.listdir()) == before

    Path.cwd().chmod(0o755)
    Path("b/deep").chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may read everything
    try:
        assert "Permission denied: 'b/deep'" in refused_by_fid("a.npy", "b")
    finally:
        os.seteuid(user)
        Path("b/deep").chmod(0o755)

def closed_form_inception(monkeypatch):
    """Inception's weights. Its convolutions have these widths and kernels, in turn."""
    fives, sixes, seven = "64:11 48:11 64:55 64:11 96:33 96:33 {0}:11 ", (
        "192:11 {0}:11 {0}:17 192:71 {0}:11 {0}:71 {0}:17 {0}:71 192:17 192:11 "), (
        "384:11 448:11 384:33 320:11 384:13 384:31 384:13 384:31 192:11 ")
    convs = iter(("32:33 32:33 64:33 80:11 192:33 " + "".join(map(fives.format, (32, 64, 64)))
                  + "384:33 64:11 96:33 96:33 " + "".join(map(sixes.format, (128, 160, 160, 192)))
                  + "192:11 320:33 192:11 192:17 192:71 192:33 " + 2 * seven).split())
    weights = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}

    def noting(x, w, name, *how, conv=fid.conv, **more):
        width, kernel = next(convs).split(":")
        w[f"{name}.conv.weight"] = torch.zeros(int(width), x.shape[1], *map(int, kernel))
        for part in ("weight", "bias", "running_mean", "running_var"):
            w[f"{name}.bn.{part}"] = torch.zeros(int(width))
        return conv(x, w, name, *how, **more)

    with monkeypatch.context() as patch:
        patch.setattr(fid, "conv", noting)
        fid.inception(torch.zeros(1, 9, 9, 3), weights)
    assert hashlib.sha256("".join(sorted(weights)).encode()).hexdigest()[:12] == "47109c56070a"
    for i, name in enumerate(sorted(weights)):
        shape = weights[name].shape
        m = np.arange(shape.numel()) + 7919 * (i + 1)
        v = np.sqrt(2) * np.sin(2 * np.pi * (m * m % 999983 * m % 999983) / 999983).reshape(shape)
        if len(shape) > 1:
            v -= v.mean(axis=tuple(range(1, len(shape))), keepdims=True) * (shape[1] > 3)
            v *= (12 if name == "fc.weight" else 1.7) / np.sqrt(shape[1:].numel())
        else:
            v *= 2 if name == "fc.bias" else 0.2
            v += name.endswith(("bn.weight", "var")) - 0.2 * name.endswith("bn.bias")
        weights[name] = torch.from_numpy(v.astype(np.float32))
    return weights

def test_inception(tmp_path, monkeypatch):
    """Of weights and pictures in closed form, in a file of torch's old format, as published."""
    monkeypatch.chdir(tmp_path)
    state = closed_form_inception(monkeypatch)
    torch.save(state, "weights", _use_new_zipfile_serialization=False)
    n = np.arange(8).reshape(8, 1, 1, 1)
    y, x, c = np.ogrid[:256, :256, :3]
    t = x * (1 + n % 5) + y * (1 + n // 5) + (x * y * (n % 3) >> 6)
    t = t + ((x - 128)**2 + (y - 16 * n)**2) * (n % 4) // 64
    t = (t + 61 * n + 85 * c * (1 + n % 2)) % 510
    pictures = np.minimum(t, 510 - t).astype(np.uint8)
    weights = fid.load_weights(Path("weights"), "cpu")
    outputs = fid.inception(torch.from_numpy(pictures), weights)
    assert [x.shape[1] for x in outputs] == [2048, 2023, 1008]
    rising = [(x * torch.arange(x.shape[1])).mean().item() for x in outputs]
    assert rising == pytest.approx([209.31677, 323.50235, -29.386982], rel=1e-5)
    if GOLDEN.exists():
        features = np.load(GOLDEN / "fid/features8.npz")
        theirs = [features[f"synth8__tf64__{x}"] for x in ("pool", "spatial", "logits_unbiased")]
        assert all(np.allclose(x, y, rtol=0, atol=2e-5 * y.max()) for x, y in zip(outputs, theirs))
    np.save("some.npy", pictures)
    assert scores_of("some.npy", "--weights", "weights")["is"] == pytest.approx(1.428117, abs=1e-5)
    assert not torch.backends.cudnn.allow_tf32

    for content in (state | {"Mixed_6b.branch1x1.bn.bias": torch.zeros(9)}, [1],
                    state | {"fc.weight": torch.zeros(1000, 2048)}):  # as torchvision's
        torch.save(content, "wrong")
        assert "weights, wrong" in refused_by_fid("some.npy", "--weights", "wrong")

    def fetch(*source, hash_prefix):
        assert source[0] == fid.URL and fid.SHA256 == hash_prefix
        shutil.move("weights", source[1])  # so it can be fetched once only

    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        assert fid.load_weights(None, "cpu").keys() == state.keys()

# ---- Nothing lost

def test_exit_codes(workplace, capsys, monkeypatch):
    cuda = raising(RuntimeError("CUDA error: an illegal access"))
    monkeypatch.setattr(torch, "save", cuda)
    for fail in (cuda, lambda _: tok.write_tensors("x", {})):  # shown as it is
        with pytest.raises(RuntimeError, match="CUDA error"):
            tok.exit_code(fail, [])
    for error, code, line in [
            (OSError("broken"), 2, "error: broken\n"), (MemoryError(), 2, "--micro-batch"),
            (RuntimeError("CUDA out of memory"), 2, "--micro-batch"),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "--micro-batch"),
            (KeyboardInterrupt(), 130, "interrupted; the same command goes on\n")]:
        assert tok.exit_code(raising(error), []) == code
        assert line in capsys.readouterr().err

def test_extreme_numbers():
    logits = torch.randn(64, 9) * torch.tensor([1e9, 1e-6])[:, None, None]
    for temperature in (0, 1e-320, 1e-30, 1e-3, 1, 1e30, 1e308):
        token = rar.draw(logits.flatten(0, 1), temperature, torch.rand(128))
        assert token.min() >= 0 and token.max() < 9
        assert temperature > 1e-30 or token.equal(logits.argmax(2).flatten())

def test_full_disk(photographs, monkeypatch, capsys):
    """It is full as tokens are made, then as a run is saved. In the end nothing is lost."""
    train, limit = [*SMALL, "--save-every", "1", "--out"], resource.RLIMIT_FSIZE
    before = resource.getrlimit(limit)
    works(*train, "whole")
    shutil.rmtree("runs")
    for room, write, saved in ((1000, 9, ""), (30_000, None, "32")):
        with monkeypatch.context() as patch:
            fill = functools.partial(resource.setrlimit, limit, (room, before[1]))
            calls(patch, tok, "write_at", {write: fill})
            at_step(patch, 4, fill)
            try:
                error = refused([*train, "parts"], capsys, True)
            finally:
                resource.setrlimit(limit, before)
        assert "cannot write" in error and "File too large" in error
        assert "".join(path.stem[-1] for path in rar.checkpoints(Path("parts"))) == saved
    works(*train, "parts")
    assert contents("whole") == contents("parts")
    at_step(monkeypatch, 5, lambda: shutil.rmtree("other"))
    assert "cannot write other/log.jsonl" in refused([*SMALL, "--out", "other"], capsys, True)
    next(Path("runs/tokens").glob("*train*.npy")).write_bytes(b"")
    assert ".npy is damaged: remove it" in refused([*train, "parts"], capsys, True)

def test_permission_and_damage(trained, workplace, capsys, monkeypatch):
    run, before, user = Path("runs/shapes-tiny"), contents("runs/shapes-tiny"), os.geteuid()
    for folder in (*workplace.parents, workplace):
        if folder.stat().st_uid == user == 0 and len(folder.parts) > 2:
            folder.chmod(0o755)
    run.chmod(0o555)
    os.seteuid(user or 65534)  # root may write everywhere
    try:
        for command in ([*TRAIN, "--log-every", "2"], ["sample"]):
            assert "cannot write" in refused(command, capsys, True)
    finally:
        os.seteuid(user)
        run.chmod(0o755)
    assert contents(run) == before

    path, good, rng = run / "weights.pt", before["weights.pt"], random.Random(1)
    right = tok.digest_of(rar.load_model(path, {}, CPU)[0])
    for place in [0, len(good) - 1, *rng.sample(range(len(good)), 27)]:
        bit = bytes([good[place] ^ 1 << rng.randrange(8)])
        for damaged in (good[:place], good[:place] + bit + good[place + 1:]):
            path.write_bytes(damaged)
            try:
                assert tok.digest_of(rar.load_model(path, {}, CPU)[0]) == right
            except tok.UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
    path.write_bytes(good)
    (run / "config.json").write_text("[" * 100_000)
    assert "config.json" in refused(["sample"], capsys)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(1000))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("unpacked"))
    assert "weights.pt" in refused(["sample"], capsys)

def test_kills(photographs):
    """RAR_KILLS=100 makes many more."""
    def strike(event, details):
        nonlocal left
        is_new = event == "open" and "w" in str(details[1])
        left -= is_new or event in ("os.rename", "os.remove")
        if left == 0:
            left -= 1
            if is_new:
                Path(details[0]).write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    rng = random.Random(0)
    for k in range(int(os.environ.get("RAR_KILLS", 3))):
        shutil.rmtree("runs", ignore_errors=True)
        for command in ([*SMALL, "--save-every", "1", "--out", f"{k}"],
                        ["sample", "--weights", f"{k}", "--count", "30", "--out", f"{k}/x.npz"]):
            for _ in range(5 * (k > 0)):
                left = rng.randint(1, 50)
                if os.fork() == 0:
                    try:
                        tok.tqdm.set_lock(threading.RLock())  # or a kill keeps it locked
                        sys.addaudithook(strike)
                        os._exit(rar.main(command))
                    finally:
                        os._exit(1)
                assert os.waitstatus_to_exitcode(os.wait()[1]) != 1
            rar.main(command)
        assert contents("0").items() <= contents(f"{k}").items()
