"""Run with: python -m pytest -q

The published model, the idea: the figures of the authors' code, on weights of closed form
Sampling, training: parts I and II of rar.py draw the same and learn the same
The command line: a run, stops, checkpoints, two at once, a user's mistakes
Photographs, released files, many samples, any order: the rest of tokenizer.py and rar.py
fid.py: the scores of the reference implementations
Nothing lost: kills, full disks, damaged files

Where the folder ../shared lies beside the checkout, its golden files are matched in full as well.
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
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
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

# ---- The published model -------------------------------------------------------------------------

def test_logits(model):
    for name, labels, orders, expected in (
            ("raster", LABELS, RASTER, [[1.118814, -0.352126, -1.152376, 0.002458],
                                        [0.869593, -0.42206, 0.013033, 0.653023],
                                        [-1.476539, -0.150445, 0.954111, -1.1295]]),
            ("permuted", LABELS, ORDERS, [[0.877996, -0.293868, -1.436493, 1.879414],
                                          [0.075993, -1.175012, -0.827803, -0.177382],
                                          [0.217349, 2.229292, 0.223261, -1.031078]]),
            ("raster_uncond", NO_CLASS, RASTER, [[1.853005, -0.856028, -1.159469, 0.148748],
                                                 [1.104111, 0.33193, -0.542573, 1.484534],
                                                 [0.4913, 0.239152, 0.738969, -0.71225]])):
        logits = model(TOKENS, labels, orders).detach().numpy()
        assert logits.shape == (3, 16, 32)
        assert np.abs(logits[[0, 1, 2], [0, 7, 15], :4] - expected).max() < 6e-6
        if GOLDEN.exists():
            golden = np.load(GOLDEN / "rar.npz")["logits_" + name]
            assert np.abs(logits - golden[:, :-1]).max() < 5e-6  # theirs has an unused last slot

def test_gradients_and_updates(model):
    gradients = {
        "cls_token": 0.063842975, "pos_embed": 0.32647365, "target_aware_pos_embed": 0.31163391,
        "timesteps_embeddings": 0.26376882, "blocks.0.attn.q_norm.weight": 0.029111244,
        "blocks.1.attn.qkv.weight": 0.36872584, "blocks.2.adaLN_modulation.1.weight": 0.37690896,
        "adaln_before_head.adaLN_modulation.1.weight": 0.34275427,
        "embeddings.weight": 0.43062049, "lm_head.weight": 1.23873973}
    if GOLDEN.exists():
        golden = np.load(GOLDEN / "rar.npz")
        gradients |= dict(zip(golden["grad_names"].tolist(), golden["grad_norms"].tolist()))
        assert gradients.keys() == model.state_dict().keys()
    config = dataclasses.replace(TINY, steps=8, warmup=0.25)
    optimizer = rar.make_optimizer(model, config)
    decayed = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    block = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    assert {name for name, parameter in model.named_parameters() if id(parameter) in decayed} == {
        "cls_token", "lm_head.weight",
        *(f"blocks.{i}.{part}.weight" for i in range(3) for part in block)}
    losses, norms = [], []
    for step in range(8):
        loss, _ = rar.training_loss(model, TOKENS, LABELS, ORDERS)
        loss.backward()
        if step == 0:
            found = {name: model.get_parameter(name).grad.norm().item() for name in gradients}
            assert found == pytest.approx(gradients, rel=1e-5, abs=1e-7)
        norms.append(rar.update(model, optimizer, config, step)[0].item())
        losses.append(loss.item())
    assert losses == pytest.approx([3.72877479, 3.72877479, 3.60201716, 3.35365081, 3.12926650,
                                    2.95381641, 2.83804154, 2.77827096], rel=1e-6)
    assert norms == pytest.approx([2.25130510, 2.25130510, 2.22651267, 2.16976595, 2.11143804,
                                   2.06262946, 2.02955413, 2.01252198], rel=1e-5)

def test_adaln_runs_once_for_each_class(model, monkeypatch):
    tokens, labels, orders = TOKENS.repeat(4, 1), torch.arange(12) % 11, ORDERS.repeat(4, 1)
    seen = calls(monkeypatch, model.blocks[0].adaLN_modulation, "forward")
    together = model(tokens, labels, orders)
    alone = torch.cat([model(*parts) for parts in zip(*(
        x.split(4) for x in (tokens, labels, orders)))])
    assert torch.allclose(together, alone, atol=1e-5)
    assert [len(condition) for condition, in seen] == [11, 4, 4, 4]

def slowly(*arguments, uniforms=RASTER, orders=RASTER):
    return rar.generate_slowly(*arguments, uniforms, orders)

@pytest.mark.parametrize("sampler", [slowly, generate])
def test_greedy_generation(model, sampler):
    for scale, power, expected in (
            (0, 0, [[22, 27, 19, 17, 26, 27, 8, 10, 20, 15, 27, 12, 30, 10, 12, 1],
                    [22, 1, 20, 10, 21, 20, 10, 10, 20, 10, 27, 0, 24, 5, 5, 23],
                    [13, 14, 30, 17, 3, 31, 30, 10, 20, 20, 7, 11, 7, 11, 24, 22]]),
            (4, 0, [[29, 26, 28, 16, 23, 7, 22, 27, 28, 10, 27, 29, 28, 17, 5, 27],
                    [4, 7, 7, 11, 4, 31, 24, 18, 20, 10, 7, 31, 4, 11, 29, 5],
                    [16, 17, 7, 28, 7, 7, 10, 30, 16, 2, 17, 7, 29, 7, 5, 27]]),
            # a near tie at step 8 of the first row: it is compared up to there
            (16, 2.75, [[22, 27, 19, 17, 26, 27, 8, 10],
                        [22, 1, 20, 10, 21, 20, 10, 18, 9, 22, 7, 31, 18, 28, 7, 4],
                        [13, 14, 30, 17, 3, 31, 30, 18, 2, 17, 17, 15, 28, 16, 31, 5]])):
        tokens = sampler(model, LABELS, scale, power, 0).tolist()
        assert [row[:len(wanted)] for row, wanted in zip(tokens, expected)] == expected

def test_sizes():
    for name, count in {"RAR-S": 133_344_256, "RAR-B": 260_923_648, "RAR-L": 461_668_352,
                        "RAR-XL": 955_425_024, "RAR-XXL": 1_498_520_704}.items():
        with torch.device("meta"):
            state = RAR(PRESETS[name]).state_dict()
        assert sum(tensor.numel() for tensor in state.values()) == count
        if GOLDEN.exists() and name != "RAR-S":  # which is not released
            keys = json.loads((GOLDEN / "rar_keys.json").read_text())
            shapes = {name: list(tensor.shape) for name, tensor in state.items()}
            assert shapes == keys[name.lower().replace("-", "_")]

def test_first_loss():
    """At width 768 the released head, of std 0.02, sees normalised inputs."""
    torch.manual_seed(0)
    model = RAR(dataclasses.replace(PRESETS["RAR-S"], depth=1))
    tokens, orders = torch.randint(1024, (4, 256)), torch.arange(256).expand(4, 256)
    loss, _ = rar.training_loss(model, tokens, torch.arange(4), orders)
    assert loss.item() == pytest.approx(math.log(1024) + 768 * 0.02**2 / 2, abs=0.02)
    layers = [name for name in model.state_dict() if "adaLN_modulation.1.weight" in name]
    assert layers and not any(model.get_parameter(name).any() for name in layers)  # gates of 0

# ---- The idea ------------------------------------------------------------------------------------

def test_schedules():
    r = [rar.randomness(step, 125_000, 187_500) for step in (0, 125_000, 150_000, 187_500, 200_000)]
    assert r == pytest.approx([1, 1, 0.6, 0, 0])
    assert rar.randomness(0, 0, 0) == 0 and rar.randomness(9, 10, 10) == 1  # raster; random
    rates = [rar.learning_rate(step, 8, 2, 4e-4, 1e-5) for step in range(9)]
    assert rates == pytest.approx([0, 2e-4, 4e-4, 3.73874954e-4, 3.025e-4, 2.05e-4, 1.075e-4,
                                   3.61250463e-5, 1e-5])
    assert rar.learning_rate(0, 8, 0, 4e-4, 1e-5) == 4e-4
    weights = [rar.guidance_weight(t, 256, 16, 2.75) for t in range(256)]
    assert weights[0] == 1 and weights == sorted(weights)
    assert weights[-2:] == pytest.approx([15.98315514, 15.99575865])
    assert {rar.guidance_weight(t, 256, 4, 0) for t in range(256)} == {4}
    assert rar.guidance_weight(128, 256, 9, 1) == pytest.approx(5)

def test_sample_orders():
    orders = sample_orders(4000, 6, 0.6, rng=np.random.default_rng(0))
    assert orders.dtype == torch.long and (orders.sort(dim=1).values == torch.arange(6)).all()
    is_raster = (orders == torch.arange(6)).all(dim=1)
    assert is_raster.float().mean().item() == pytest.approx(0.4 + 0.6 / 720, abs=0.03)
    # every cell comes first equally often: chi-square with 5 degrees of freedom, 0.1 %
    first = sample_orders(4000, 6, 1, rng=np.random.default_rng(1))[:, 0]
    assert ((torch.bincount(first, minlength=6) - 4000 / 6) ** 2 / (4000 / 6)).sum() < 20.5

def test_scan_orders():
    for name, ranks in {
            "raster": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
            "alternate": [[0, 1, 2, 3], [7, 6, 5, 4], [8, 9, 10, 11], [15, 14, 13, 12]],
            "spiral_in": [[0, 11, 10, 9], [1, 12, 15, 8], [2, 13, 14, 7], [3, 4, 5, 6]],
            "spiral_out": [[15, 4, 5, 6], [14, 3, 0, 7], [13, 2, 1, 8], [12, 11, 10, 9]],
            "z_curve": [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]],
            "subsample": [[0, 4, 1, 5], [8, 12, 9, 13], [2, 6, 3, 7], [10, 14, 11, 15]]}.items():
        assert scan_order(name, 4).argsort().view(4, 4).tolist() == ranks
        for n in (1, 2, 3, 5, 8, 32, 48):
            assert sorted(scan_order(name, n).tolist()) == list(range(n * n))
    if GOLDEN.exists():
        for name, ranks in json.loads((GOLDEN / "scan_orders.json").read_text()).items():
            assert scan_order(name, 16).argsort().view(16, 16).tolist() == ranks

def test_target_embedding_tells_orders_apart(model):
    """The paper's Fig. 3: two orders that share their first cells, but not the one to predict."""
    orders = RASTER[:2].clone()
    orders[1, 4:6] = torch.tensor([5, 4])
    for aware, least, most in ((True, 1e-2, math.inf), (False, 0, 1e-6)):
        model.config = dataclasses.replace(TINY, target_aware=aware)
        first, second = model(TOKENS[:1].expand(2, 16), LABELS[:1].expand(2), orders)
        difference = (first - second).abs().amax(-1)
        assert difference[:4].max() < 1e-6 and least <= difference[4] < most

# ---- Sampling ------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale, aware", [(0, False), (3, True)])
def test_the_cache_gives_the_same_tokens(scale, aware):
    """49 cells: more than the slots whose modulations are made together."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, grid_size=7, width=32, mlp_width=64, target_aware=aware)
    model, labels, uniforms = closed_form(RAR(config)), torch.arange(100) % 11, torch.rand(100, 49)
    orders = sample_orders(100, 49, 0.5, rng=np.random.default_rng(0))
    cached, slow = (sampler(model, labels, scale, 1.0, 0.9, uniforms=uniforms, orders=orders)
                    for sampler in (generate, slowly))
    assert (cached == slow).all(dim=1).float().mean() >= 0.99 and 49 > rar.AHEAD
    if torch.backends.mkldnn.is_available():
        rar.pack(model)
        packed = generate(model, labels, scale, 1.0, 0.9, uniforms=uniforms, orders=orders)
        assert (packed == slow).all(dim=1).float().mean() >= 0.99

@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("slots, pictures", [
    ([], []), (range(6), [0, 1, 2]), (range(16), [0, 1, 2]), (range(16), [1]), ([0, 5, 9], [0, 2])])
def test_known_tokens(model, scale, slots, pictures):
    """They stay, and the model continues them."""
    is_known = torch.zeros(3, 16, dtype=torch.bool)
    for b in pictures:
        is_known[b, list(slots)] = True
    known = torch.empty_like(TOKENS).scatter_(1, ORDERS, torch.where(is_known, TOKENS, -1))
    tokens = generate(model, LABELS, scale, 1.0, 0, orders=ORDERS, known=known)
    conditional, unconditional = (model(tokens, x, ORDERS) for x in (LABELS, NO_CLASS))
    g = torch.tensor([rar.guidance_weight(t, 16, scale, 1.0) for t in range(16)])[:, None]
    likeliest = (unconditional + g * (conditional - unconditional)).argmax(-1)
    assert torch.equal(tokens.gather(1, ORDERS), torch.where(is_known, TOKENS, likeliest))

def test_nothing_is_read_back(monkeypatch):
    """In this mode tensors have no values. A CUDA graph can't hold a sampler that looks at one, and
    a GPU would be idle while an update does."""
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    config = dataclasses.replace(TINY, batch=6, micro_batch=4, dropout=0.1)
    *batch, seeds, r = rar.draw_batch(np.zeros((100, 17), np.uint16), config, 0)
    autocast = torch.autocast("cpu", torch.bfloat16)
    with FakeTensorMode() as mode:
        model, labels = RAR(config), torch.arange(4)
        with autocast:
            tokens = generate(model, labels, 1.5, 1.0, 1.0)
        with pytest.raises(RuntimeError):  # this one does look
            generate(model, labels, 1.5, 1.0, 1.0, known=tokens)
        batch = [*map(mode.from_tensor, batch), seeds, r]
        rar.train_step(model, rar.make_optimizer(model, config), config, batch, 0, autocast)

def test_picture_does_not_depend_on_its_batch(model):
    uniforms, labels = rar.image_uniforms(7, range(20), 16), torch.arange(20) % 10
    assert torch.equal(rar.image_uniforms(7, [13], 16), uniforms[13:14])
    assert not torch.equal(rar.image_uniforms(8, [13], 16), uniforms[13:14])
    whole = generate(model, labels, 2.0, 1.0, 1.0, uniforms=uniforms)
    assert torch.equal(
        generate(model, labels[5:9], 2.0, 1.0, 1.0, uniforms=uniforms[5:9]), whole[5:9])

def test_draw():
    logits = torch.tensor([[0.2, 0.0, 0.5, 0.3, 0.0]]).log().expand(6, 5)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-24])
    # never a token of probability 0, at neither end
    assert rar.draw(logits, 1.0, uniforms).tolist() == [0, 0, 2, 2, 3, 3]
    assert all(rar.draw(torch.zeros(1, V), 1.0, uniforms[5:]) < V for V in range(2, 99))
    assert rar.draw(logits, 0, None).tolist() == [2] * 6

# ---- Training ------------------------------------------------------------------------------------

def shapes(count):
    return tok.to_float(np.stack([tok.draw_shape(i) for i in range(count)]))

@pytest.fixture
def rows():
    """100 shapes: a class, and 16 tokens of TINY's codebook."""
    images = shapes(100)
    tokens = tok.PatchTokenizer.fit(images, 4, 32).encode(images).numpy()
    return np.column_stack([np.arange(100) % 10, tokens]).astype(np.uint16)

def test_part_one_stands_on_its_own(rows):
    text, _ = Path(rar.__file__).read_text().split("# ---- Part II")
    for word in ("tok.", "import tokenizer", "Path(", "open(", "argparse", ".device", "UserError"):
        assert word not in text
    one = {}
    exec(text, one)
    config = dataclasses.replace(TINY, width=32, depth=1, steps=60, batch=20, lr=1e-2, warmup=0.1)
    torch.manual_seed(0)
    model, orders = one["RAR"](config), torch.arange(16).expand(100, 16)
    tokens, labels = torch.from_numpy(rows[:, 1:].astype(np.int64)), torch.arange(100) % 10

    def loss(tokens):
        return one["training_loss"](model, tokens, labels, orders)[0].item()

    assert loss(tokens) > 3
    one["train_plainly"](model, rows, config)
    drawn = one["generate_slowly"](model, labels, 0, 0, 1.0, torch.rand(100, 16), orders)
    assert loss(tokens) < 2 and loss(drawn) < 2.3

def test_both_parts_make_the_same_updates(rows):
    """And micro-batches add up to the batch."""
    plain = closed_form(RAR(TINY))
    config = dataclasses.replace(TINY, batch=40, steps=6, anneal=(0.3, 0.8), warmup=0.2, lr=1e-3,
                                 label_dropout=0.3)
    rar.train_plainly(plain, rows, config)
    lines = []
    for micro_batch in (40, 15):
        config = dataclasses.replace(config, micro_batch=micro_batch)
        model = closed_form(RAR(TINY))
        optimizer = rar.make_optimizer(model, config)
        for step in range(6):
            batch = rar.draw_batch(rows, config, step)
            line = rar.train_step(model, optimizer, config, batch, step, PLAIN)
        lines.append({name: float(value) for name, value in line.items()})
        if micro_batch == 40:
            for one, other in zip(plain.parameters(), model.parameters()):
                assert torch.allclose(one, other, atol=1e-6)
    assert lines[0] == pytest.approx(lines[1], rel=1e-4)
    assert (line["r"], line["lr"]) == (0, rar.learning_rate(5, 6, 1.2, 1e-3, 1e-5))

def test_draw_batch_is_a_function_of_seed_and_step():
    config = dataclasses.replace(TINY, batch=8, label_dropout=0.5, seed=3, steps=10)
    rows = np.arange(20 * 17).reshape(20, 17).astype(np.uint16)
    *batch, r = rar.draw_batch(rows, config, 6)
    halves = [rar.draw_batch(rows, config, 6, rank, 2) for rank in (0, 1)]
    for first, second, whole in zip(*halves, batch):
        assert np.array_equal(np.concatenate([first, second]), whole)
    tokens, labels, orders, _ = batch
    assert r == halves[1][-1] == pytest.approx(0.6)
    assert (tokens[:, 0] == tokens[:, 1] - 1).all() and tokens.shape == orders.shape == (8, 16)
    assert 0 < (labels == 10).sum() < 8
    # every pass visits every row once, in its own order, whatever the batch
    visits = np.concatenate([rar.draw_batch(rows, config, step)[0][:, 0] for step in range(5)])
    assert len(set(visits[:20])) == len(set(visits[20:])) == 20
    assert visits[:20].tolist() != visits[20:].tolist()
    spiral = dataclasses.replace(config, anneal=(0.0, 0.0), order="spiral_in")
    assert (rar.draw_batch(rows, spiral, 0)[2] == scan_order("spiral_in", 4)).all()

def test_a_pass_is_shuffled_once():
    class Rows:  # no array, so nothing can be done to all of them
        def __len__(self):
            return 12_800_000

        def __getitem__(self, index):
            return np.zeros((len(index), 17), np.uint16)

    rar.shuffled.cache_clear()
    for step in range(3):
        rar.draw_batch(Rows(), TINY, step)
    assert rar.shuffled.cache_info().misses == 1
    rar.shuffled.cache_clear()

def test_evaluate(model):
    rows = np.column_stack([LABELS, TOKENS]).astype(np.uint16)
    config = dataclasses.replace(TINY, order="alternate", micro_batch=2)
    order = scan_order("alternate", 4).expand(3, 16)
    loss, accuracy = rar.training_loss(model, TOKENS, LABELS, order)
    bits, right, bits_random, _ = rar.evaluate(model, rows, config, PLAIN).values()
    assert (bits, right) == pytest.approx((loss.item() / math.log(2), accuracy.item()))
    assert bits_random != bits

# ---- Pictures and their tokens -------------------------------------------------------------------

def test_shapes():
    images, ground = shapes(40), torch.tensor(tok.GROUND).view(3, 1, 1) / 255
    assert images.shape == (40, 3, 32, 32) and torch.equal(images, shapes(40))
    assert len(tok.SHAPES) == 10 and len({image.numpy().tobytes() for image in images}) == 40
    is_ink = (images - ground).abs().sum(1) > 0.3
    ink = is_ink.float().mean(dim=(1, 2))
    assert ink.min() > 0.03 and ink.max() < 0.7 and not is_ink[:, 0, 0].any()

def test_patch_tokenizer(tmp_path):
    images, tokenizer = shapes(400)[300:], tok.PatchTokenizer.fit(shapes(300), 8, 64)
    assert (tokenizer.image_size, tokenizer.grid_size, tokenizer.codebook_size) == (32, 8, 64)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (100, 64) and tokens.dtype == torch.int64
    decoded = tokenizer.decode(tokens)
    assert 0 <= decoded.min() and decoded.max() <= 1
    pasted = F.fold(tokenizer.codebook[tokens].transpose(1, 2), 32, 4, stride=4)
    assert F.mse_loss(decoded, images) < min(0.006, 0.9 * F.mse_loss(pasted, images))
    # a token is its own patch, row by row: moving the picture by a patch moves the tokens
    moved = tokenizer.encode(images.roll(4, dims=-1)).view(100, 8, 8)
    assert torch.equal(moved, tokens.view(100, 8, 8).roll(1, -1))
    tok.write_tensors(tmp_path / "t.pt", tokenizer.state_dict())
    again = tok.load(tmp_path / "t.pt")
    assert torch.equal(again.encode(images), tokens) and torch.equal(again.decode(tokens), decoded)

def test_pixels_are_truncated():
    pixels = tok.to_uint8(torch.tensor([0, 0.999, 1, 1.7, -0.2, 0.5]).expand(1, 3, 1, 6))
    assert pixels[0, 0, :, 0].tolist() == [0, 254, 255, 255, 0, 127]

def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), tok.replacing(path) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]

# ---- The command line ----------------------------------------------------------------------------

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
    """Run a command that must fail: exit code 2, one line on stderr (or as its end). Returns it."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.endswith("\n"), error
    error = error.splitlines(keepends=True)[-1] if last_line else error
    assert error.count("\n") == 1, error
    line = error.split("\r")[-1]  # after a progress bar that wiped itself away
    assert line.startswith("error: "), error
    return line

def test_train_sample_eval(workplace, capsys):
    run = Path("runs/shapes-tiny")
    assert rar.main(TRAIN) == 0
    printed = capsys.readouterr().out
    assert "runs/shapes-tiny/step-000006.png\n" in printed and "python rar.py sample" in printed
    before, lines = contents(run), log_of(run)
    assert before.keys() == {"config.json", "tokenizer.pt", "weights.pt", "log.jsonl", ".lock"} | {
        name % number for number in (3, 4, 6) for name in ("checkpoint-%07d.pt", "step-%06d.png")}
    assert Image.open(run / "step-000006.png").size == (10 * 68 + 4, 5 * 68 + 4 + 22)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["r"] for line in lines] == pytest.approx([1, 1, 1, 1, 1 / 3, 0])
    assert [line["passes"] for line in lines] == pytest.approx([0.16 * n for n in range(1, 7)])
    assert lines[0].keys() == {"step", "loss", "accuracy", "r", "lr", "gradient_norm", "passes"}
    assert rar.main(TRAIN) == 0
    assert "finished: look at runs/shapes-tiny" in capsys.readouterr().out and contents(run) == before

    shutil.copytree(run, "runs/older")
    os.utime("runs/older/weights.pt", (0, 0))
    for seed in "12":
        assert rar.main(["sample", "--count", "13", "--seed", seed, "--out", f"{seed}.png"]) == 0
    assert Path("1.png").read_bytes() != Path("2.png").read_bytes()
    assert "annealed to another order" not in capsys.readouterr().out
    assert rar.main(["sample", "--classes", "heart", "3", "--order", "spiral_in"]) == 0
    assert "annealed to another order" in capsys.readouterr().out
    weights = ["--weights", "runs/shapes-tiny/weights.pt"]
    assert rar.main(["sample", *weights, "--scale", "0"]) == 0
    assert contents(run).keys() - before.keys() == {"samples-1.png", "samples-2.png"}
    assert rar.main(["eval", *weights, "--data", "shapes"]) == 0
    assert rar.in_words(Config(), lines[-1]) in capsys.readouterr().out

QUICK = [*TRAIN, "--grid-size", "4", "--log-every", "5", "--betas", "0.9", "0.95"]

@pytest.mark.parametrize("number, signals, saved", [
    (5, [signal.SIGINT], 5),       # at a logged update
    (4, [signal.SIGTERM], 4),      # at a milestone
    (2, [signal.SIGINT], 2),       # at neither
    (6, [signal.SIGHUP], 6),       # at the last
    (6, [signal.SIGINT] * 2, 4),   # a second one strikes at once
    (6, [], 4)])                   # as if killed
def test_resume_is_exact(workplace, monkeypatch, capsys, number, signals, saved):
    def strike():
        for each in signals:
            os.kill(os.getpid(), each)
        if not signals:
            raise SystemError("as if killed")

    assert rar.main([*QUICK, "--out", "whole"]) == 0
    assert [line["step"] for line in log_of(Path("whole"))] == [1, 3, 4, 5, 6]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    before = [signal.getsignal(each) for each in signal.valid_signals()]
    with monkeypatch.context() as patch:
        at_step(patch, number, strike)
        with contextlib.nullcontext() if signals else pytest.raises(SystemError):
            assert rar.main([*QUICK, "--out", "parts"]) == 130
            assert "the same command goes on" in capsys.readouterr().err
    assert [signal.getsignal(each) for each in signal.valid_signals()] == before
    assert rar.checkpoints(Path("parts"))[0].name == f"checkpoint-{saved:07}.pt"
    with open("parts/log.jsonl", "a") as log:
        log.write('{"step": 6, "lo')
    assert rar.main([*QUICK, "--out", "parts"]) == 0
    whole, parts = contents("whole"), contents("parts")
    for name in ("weights.pt", "log.jsonl", "step-000006.png", "config.json"):
        assert whole[name] == parts[name]

def test_two_trainings_at_once(workplace, monkeypatch, capsys):
    def second():
        before = contents("runs/shapes-tiny")
        for more in ([], ["--codebook-size", "30"]):
            assert "runs/shapes-tiny is in use" in refused([*TRAIN, *more], capsys)
        assert contents("runs/shapes-tiny") == before

    at_step(monkeypatch, 2, second)
    assert rar.main(TRAIN) == 0 and len(log_of(Path("runs/shapes-tiny"))) == 6

def test_checkpoints(workplace, capsys):
    """The last two are kept, and the one where annealing starts; each can be sampled."""
    train = [*QUICK, "--save-every", "1", "--steps", "12", "--anneal", "0.2", "0.75"]
    assert rar.main(train) == 0
    run, whole = Path("runs/shapes-tiny"), contents("runs/shapes-tiny")
    newest, _, first = rar.checkpoints(run)
    assert (newest.name, first.name) == ("checkpoint-0000012.pt", "checkpoint-0000003.pt")
    assert log_of(run)[2]["r"] == 1 > log_of(run)[3]["r"]  # annealing starts at 2.4
    for path in (run / "weights.pt", newest, first):
        assert rar.main(["sample", "--weights", str(path), "--out", f"{path.stem}.png"]) == 0
    assert Path("weights.png").read_bytes() == Path(f"{newest.stem}.png").read_bytes()
    shutil.copy(run / "config.json", ".")
    for updates, anneal in ((1, (1, 1)), (3, (1, 1)), (4, (0.2, 0.75)), (12, (0.2, 0.75))):
        tok.write_tensors("c.pt", tok.read_tensors(first) | {"updates": updates})
        assert rar.load_model("c.pt", {}, torch.device("cpu"))[1].anneal == anneal
    # a damaged one is named; without it the run goes on from the one before
    for damaged in (newest.read_bytes()[:-500], b""):
        newest.write_bytes(damaged)
        assert str(newest) in refused(train, capsys)
    newest.unlink()
    assert rar.main(train) == 0 and contents(run) == whole

@pytest.mark.parametrize("stopped, number", [(False, 6), (True, 5)])
def test_a_loss_that_is_no_number(workplace, capsys, monkeypatch, stopped, number):
    """It ends the run when it is looked at. What is on disk stays good."""
    loss_of = rar.training_loss

    def spoilt(*inputs):
        loss, accuracy = loss_of(*inputs)
        loss.register_hook(lambda gradient: gradient * math.nan)
        return loss, accuracy

    def spoil():
        monkeypatch.setattr(rar, "training_loss", spoilt)
        if stopped:
            os.kill(os.getpid(), signal.SIGTERM)

    at_step(monkeypatch, 5, spoil)
    error = refused([*QUICK, "--log-every", "6"], capsys, last_line=True)
    assert f"update {number}" in error and "--lr" in error
    run = Path("runs/shapes-tiny")
    assert rar.checkpoints(run)[0].name == "checkpoint-0000004.pt"
    assert all(tensor.isfinite().all() for tensor in tok.read_tensors(run / "weights.pt").values())
    assert [line["step"] for line in log_of(run)] == [1, 3, 4]

def test_a_compiled_model_learns_the_same(workplace, monkeypatch):
    """Up to rounding. (The compiler's last stage, which takes most of its time, is left out.)"""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for flag in ("--no-compile", "--compile"):
        arguments = [*QUICK, "--dropout", "0", "--steps", "2", "--out", flag[2:], flag]
        assert rar.main(arguments) == 0
    one, two = Path("no-compile"), Path("compile")
    assert log_of(one)[1]["loss"] == pytest.approx(log_of(two)[1]["loss"], rel=1e-5)
    plain, compiled = (tok.read_tensors(run / "weights.pt") for run in (one, two))
    assert plain.keys() == compiled.keys()
    assert all(torch.allclose(plain[name], compiled[name], atol=1e-4) for name in plain
               if "k_norm.bias" not in name)

def cases(text):
    """Lines of a command and, after a bar, what its error names: by default the flag."""
    parts = [[*line.split("|"), ""] for line in text.strip().splitlines()]
    return [(part[0].split(), part[1].strip() or part[0].split()[1]) for part in parts]

@pytest.mark.parametrize("arguments, named", cases(f"""
train --data nowhere | --data nowhere
train --model RAR-M
train --order zigzag | --order zigzag
train --device tpu
train --device {"mps" if torch.cuda.is_available() else "cuda"}
train --device cpu --precision tf32 | --precision tf32
train --steps 0
train --steps many
train --batch -3
train --lr nan
train --seed -1
train --heads 3 | --heads 3
train --depth 0
train --dropout 1.0
train --anneal 0.0 1.5
train --anneal 0.9 0.1
train --widht 64
train --data file | --data file: 
train --out file/run | file/run
train --grid-size 5 | --grid-size 5
train --codebook-size 60000 | --codebook-size 60000
sample | python rar.py train
sample --weights missing.pt | missing.pt
sample --weights file | file is not a dictionary of tensors
eval --weights file | file
eval --weights missing | missing
| train
draw | draw"""))
def test_mistakes(workplace, capsys, arguments, named):
    Path("file").write_text("not a checkpoint")
    assert named in refused(arguments, capsys)
    left = sorted(str(path.relative_to(workplace)) for path in workplace.rglob("*"))
    begun = ["runs", *(f"runs/shapes-tiny{name}" for name in ("", "/.lock", "/config.json"))]
    assert left == ["file", *(begun if "size" in named else [])]  # the pictures tell

def test_mistakes_with_a_run(workplace, capsys):
    run, train = Path("runs/a"), [*TRAIN, "--out", "runs/a"]
    assert rar.main(train) == 0
    before = contents(run)
    for arguments, named in cases(f"""
sample --count 0
sample --count 1.5
sample --temperature -1
sample --scale inf
sample --classes 10 | --classes 10
sample --classes unicorn | unicorn
sample --order zigzag | error: --order zigzag
sample --keep 0,0,16,32 | --complete
sample --seed -1
sample --out runs/a/weights.pt/x.png | runs/a/weights.pt/x.png
sample --out nowhere/samples | --out nowhere/samples
sample --out x.png --count 20000 | too many for a grid
sample --weights runs/a/tokenizer.pt | tokenizer.pt
sample --coun 3
eval --data nowhere | --data nowhere
{" ".join(train)} --lr 0.001 | --lr"""):
        assert named in refused(arguments, capsys)
    assert contents(run) == before and os.listdir(workplace) == ["runs"]

    (run / "weights.pt").write_bytes(before["weights.pt"][:-100])
    assert "weights.pt" in refused(["sample"], capsys)
    assert rar.main(train) == 0 and contents(run) == before  # which makes weights.pt anew
    (run / "tokenizer.pt").write_bytes(before["tokenizer.pt"][:500])
    assert "tokenizer.pt" in refused(["sample"], capsys)
    tok.write_tensors(run / "tokenizer.pt", tok.PatchTokenizer(4, 8, 16).state_dict())
    assert "grid_size 4" in refused(["sample"], capsys)
    (run / "tokenizer.pt").unlink()
    for command in ("sample", "eval"):
        assert "tokenizer.pt" in refused([command], capsys)
    newest = rar.checkpoints(run)[0]
    state = tok.read_tensors(newest)
    state["model"]["lm_head.weight"] = torch.zeros(7, 7)
    tok.write_tensors(newest, state)
    assert "lm_head.weight is (7, 7)" in refused(train, capsys)
    (run / "config.json").write_text("{")
    assert "config.json" in refused(train, capsys)
    for path in rar.checkpoints(run):
        path.unlink()
    assert "no checkpoint" in refused(train, capsys)
# ---- Photographs ---------------------------------------------------------------------------------

torch.set_num_threads(1)  # as in processes of torchrun, whose results can then be the same

def paint(path, size=(70, 80), mode="RGB", seed=0, **options):
    """A picture file of smooth colours."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    Image.fromarray(coarse).resize(size, Image.BICUBIC).convert(mode).save(path, **options)

@pytest.fixture
def photographs(workplace):
    """Two classes of 20 pictures, and SMALL: flags to train on them in seconds."""
    for i in range(40):
        paint(f"photos/{('cats', 'dogs')[i % 2]}/{i:02}.png", seed=i)
    return workplace / "photos"

SMALL = ["train", "--data", "photos", "--grid-size", "8", "--codebook-size", "64", "--width", "32",
         "--depth", "1", "--heads", "2", "--mlp-width", "64", "--steps", "4", "--save-every", "4",
         "--log-every", "1", "--device", "cpu"]

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
    x, y = np.meshgrid(np.arange(120), np.arange(90))
    picture = Image.fromarray(np.stack([x * 2, y * 2, x + y], -1).astype(np.uint8))
    middle = np.asarray(picture)[:, 15:105]
    assert np.array_equal(tok.crop(picture, 90, "flip"), [middle, middle[:, ::-1]])
    whole, places = tok.center_crop(picture, 88), [(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)]
    expected = [side[y:y + 80, x:x + 80] for side in (whole, whole[:, ::-1]) for y, x in places]
    assert np.array_equal(tok.crop(picture, 80, "ten"), expected)

@needs_golden
def test_crops_are_the_authors():
    for name, expected in json.loads((GOLDEN / "crops.json").read_text()).items():
        picture = Image.open(GOLDEN.parent / "data/imagenet/train" / name.split()[0])
        (width, height), pixels = expected["size"], np.asarray(picture.convert("RGB"))
        tiles = np.tile(pixels, (height // picture.height, width // picture.width, 1))
        picture = Image.fromarray(tiles)
        assert tok.digest(tok.center_crop(picture, 256)) == expected["center256_sha256"]
        crops = tok.crop(picture, 256, "ten")
        assert [tok.digest(crop) for crop in crops] == expected["tencrop_sha256"]

def test_published_tokenizer():
    with torch.device("meta"):
        tokenizer = tok.MaskGITVQGAN()
    assert sum(p.numel() for p in tokenizer.parameters()) == 54_515_587
    if GOLDEN.exists():
        shapes = {name: list(tensor.shape) for name, tensor in tokenizer.state_dict().items()}
        assert shapes == json.loads((GOLDEN / "tokenizer_keys.json").read_text())

@needs_golden
def test_published_tokenizer_on_photographs(tmp_path):
    tok.write_tensors(tmp_path / "file", closed_form(tok.MaskGITVQGAN()).state_dict())
    tokenizer, golden, outputs = tok.load(tmp_path / "file"), np.load(GOLDEN / "tokenizer.npz"), []
    for part in (tokenizer.encoder, tokenizer.decoder):
        part.register_forward_hook(lambda part, inputs, output: outputs.append(output.numpy()))
    codes = tokenizer.encode(tok.to_float(golden["images"]))
    decoded = tokenizer.decode(codes[:1])
    assert np.array_equal(codes, golden["codes"])
    assert outputs[0].std(ddof=1) == pytest.approx(float(golden["encoder_output_std"]), rel=1e-5)
    assert np.allclose(outputs[0][0, :8], golden["encoder_output_0"], rtol=1e-4, atol=1e-4)
    assert np.abs(outputs[1] - golden["decoded_unclamped"][:1]).max() < 2.5e-3
    assert np.array_equal(decoded, outputs[1].clip(0, 1))

def test_pictures_in_the_wild(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, mode in [("cmyk.jpg", "CMYK"), ("grey.png", "L"), ("palette.PNG", "P"),
                       ("clear.png", "RGBA"), ("a/tiff.tif", "RGB"), ("web.webp", "RGB"),
                       ("upright.jpg", "RGB")]:
        paint(name, mode=mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, which the authors' code does not do either
    paint("turned.jpg", exif=exif)
    paint("pixel.png", size=(1, 1))
    deep = np.linspace(0, 65535, 70 * 80).reshape(80, 70).astype(np.uint16)
    Image.fromarray(deep).save("deep.png")
    frames = [Image.new("RGB", (70, 80), colour) for colour in ("red", "blue")]
    frames[0].save("moving.gif", save_all=True, append_images=frames[1:])
    good = {path.name for path in Path().rglob("*.*")}
    for name, data in [("zero.jpg", b""), ("text.jpg", b"no picture"), ("notes.md", b"not read"),
                       ("half.png", Path("grey.png").read_bytes()[:500])]:
        Path(name).write_bytes(data)
    paint("thread.png", size=(1, 2500))
    paint("bomb.png", size=(120, 120))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)

    files = tok.pictures_in(".")
    read = {file.name: item for file, item in zip(files, tok.read_pictures(files, "center", 64))}
    bad = {name for name, item in read.items() if isinstance(item, str)}
    assert bad == {"zero.jpg", "text.jpg", "half.png", "bomb.png", "thread.png"}
    assert all(read[name] and "\n" not in read[name] for name in bad)
    assert read.keys() - bad == good and all(read[name].shape == (1, 64, 64, 3) for name in good)
    assert read["moving.gif"][0, 0, 0].tolist() == [255, 0, 0]
    assert np.array_equal(read["turned.jpg"], read["upright.jpg"])
    eight_bits = Image.fromarray((deep >> 8).astype(np.uint8))
    assert np.array_equal(read["deep.png"], tok.crop(eight_bits, 64, "center"))

def test_train_on_photographs(photographs, monkeypatch, capsys):
    """While tokens are made it is stopped, then killed. They are those that are made in one go."""
    made = calls(monkeypatch, tok, "write_at", {13: raising(KeyboardInterrupt),
                                                43: raising(SystemError("as if killed"))})
    assert rar.main(SMALL) == 130
    with pytest.raises(SystemError):
        rar.main(SMALL)
    works(*SMALL)
    assert len(made) == 2 * 40 + 1 + 2  # rows and marks; the rows of one picture were not marked
    assert "--model small for photographs without a GPU" in capsys.readouterr().out
    files, run = token_files(), Path("runs/photos-small")
    held_out, train = sorted(files)
    rows = np.load(f"runs/tokens/{train}")
    assert rows.shape == (2 * 38, 65) and rows.dtype == np.uint16 and held_out.endswith(".npy")
    assert rows[:, 0].tolist() == [0] * 38 + [1] * 38  # 20 of 40 are cats; 19 and 39 are held out
    log = log_of(run)
    assert log[-1]["passes"] == pytest.approx(4 * 64 / 38)
    works("sample", "--classes", "dogs", "--count", "2")
    works("eval")
    assert len(made) == 83
    shutil.rmtree("runs/tokens")
    works("eval")
    assert token_files() == files
    paint("photos/cats/00.png", seed=99, size=(60, 60))  # a file of another size
    works("eval")
    other, = token_files().keys() - files.keys()
    again = np.load(f"runs/tokens/{other}")
    assert np.array_equal(again[2:], rows[2:]) and (again[:2] != rows[:2]).any()

    # weights and a tokenizer, and nothing else of a run: as with the released files
    Path("other").mkdir()
    (run / "weights.pt").rename("other/rar.bin")
    arguments = ["eval", "--weights", "other/rar.bin", "--data"]
    assert "other/tokenizer.pt" in refused([*arguments, "photos"], capsys)
    (run / "tokenizer.pt").rename("other/tokenizer.pt")
    works(*arguments, "photos")
    assert f"{log[-1]['final_order_bits']:.3f} bits/token in raster" in capsys.readouterr().out
    assert "10 classes" in refused([*arguments, "shapes"], capsys)

def test_two_trainings_on_the_same_photographs(photographs, monkeypatch):
    """While the first makes the tokens to train on, the second waits for them, and makes none."""
    def start_another():
        others.append(pool.submit(launch, *SMALL, "--out", "b", processes=1, patch="""
write_at = tok.write_at
tok.write_at = lambda path, *rest: write_at(path, *rest) if "held-out" in path.name else exit(1)
"""))
        while not Path("b/tokenizer.pt").exists() and not others[0].done():
            time.sleep(0.1)

    others = []
    calls(monkeypatch, tok, "write_at", {9: start_another})
    with ThreadPoolExecutor() as pool:
        works(*SMALL, "--out", "a")
    assert others[0].result().returncode == 0, others[0].result().stderr
    assert len(token_files()) == 2 and log_of(Path("a")) == log_of(Path("b"))

def test_damaged_pictures_are_left_out_unless_they_are_many(photographs, capsys):
    bad = [f"photos/cats/x{i}.png" for i in range(11)]
    for path in bad[:10]:
        Path(path).write_text("broken")
    works(*SMALL)
    printed = capsys.readouterr().out
    assert all(f"left out {path}" in printed for path in bad[:10])
    assert sorted(len(np.load(path)) for path in Path("runs/tokens").glob("*.npy")) == [2, 76]
    Path(bad[10]).write_text("broken")
    for _ in range(2):
        error = refused([*SMALL, "--out", "b"], capsys, last_line=True)
        assert any(path in error for path in bad)

def test_fine_tuning(photographs, capsys):
    """In the only update of a second run the learning rate is 0."""
    second = [*SMALL, "--steps", "1", "--out"]
    works(*SMALL, "--out", "first")
    works(*second, "same", "--init", "first/checkpoint-0000004.pt")
    for i in range(20):
        paint(f"photos/birds/{i}.png", seed=100 + i)
    works(*second, "more", "--init", "first")
    assert "first has other classes" in capsys.readouterr().out
    first, same, more = (tok.read_tensors(f"{run}/weights.pt") for run in ("first", "same", "more"))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert all(torch.equal(first[name][:65], more[name][:65]) for name in first)
    classes = more["embeddings.weight"][65:]
    assert len(classes) == 4 and (classes[:2] != first["embeddings.weight"][65:67]).all()
    for wrong in (["nowhere"], ["first", "--width", "64"]):
        assert wrong[0] in refused([*SMALL, "--out", "c", "--init", *wrong], capsys, True)

def test_layouts(workplace, capsys):
    Path("empty/.hidden").mkdir(parents=True)
    paint("val/train/cats/a.png")
    paint("val/val/dogs/a.png")
    for i in range(19):
        paint(f"few/cats/{i}.png")
    for data, named in [("imagenet", ""), ("few/cats/1.png", ""), ("few/cats", ""), ("empty", ""),
                        ("few", "19 pictures"), ("val", "1 pictures to train on and 0 held out")]:
        error = refused(["train", "--data", data], capsys)
        assert named in error and f"--data {data}" in error
    paint("val/val/cats/more/b.JPG")
    assert tok.labelled_pictures("val") == ([(0, Path("val/train/cats/a.png"))],
                                            [(0, Path("val/val/cats/more/b.JPG"))])
    assert "--crops zoom" in refused(["train", "--data", "val", "--crops", "zoom"], capsys)

def test_reconstruct(photographs, capsys, monkeypatch):
    """Pictures are read as they are needed, and written as they are made."""
    def check():
        sizes.append((len(reads), os.path.getsize("a.npz.part")))

    works(*SMALL, "--out", "run", "--steps", "1", "--image-size", "64", "--grid-size", "16")
    paint("photos/big.jpg", size=(300, 200))
    again, tokenizer = ["reconstruct", "--tokenizer", "run", "--out"], tok.load("run/tokenizer.pt")
    cut = tok.read_picture("photos/big.jpg", "center", 64)
    decoded = tok.to_uint8(tokenizer.decode(tokenizer.encode(tok.to_float(cut))))
    works(*again, "a.png", "photos/big.jpg", main=tok.main)
    with Image.open("a.png") as sheet:
        sides = [np.asarray(sheet)[26:90, left:left + 64] for left in (4, 72)]
    assert np.array_equal(sides, [cut[0], decoded[0]])
    reads, sizes = calls(monkeypatch, tok, "read_picture"), []
    calls(monkeypatch, tok.PatchTokenizer, "decode", {1: check, 141: check})
    works(*again, "a.npz", "photos", *["photos/big.jpg"] * 100, main=tok.main)
    images = np.load("a.npz")["arr_0"]
    assert (images[[0, 140]] == decoded).all() and (images[1] != decoded).any()
    assert len(images) == 141 and sizes[0][0] <= 64 and sizes[1][1] > 130 * decoded.size
    Path("photos/text.png").write_text("no picture")
    for out, picture, named in [("b.png", "nowhere", "nowhere"), ("b.jpg", "photos", "--out b.jpg"),
                                ("b.npz", "photos", "photos/text.png")]:
        assert named in refused([*again, out, picture], capsys, True, tok.main)
    assert not list(Path().glob("b.*"))

# ---- Released files and many samples -------------------------------------------------------------

@pytest.fixture
def hub(workplace, monkeypatch):
    """A model hub on this machine: hub[path] = bytes is what it has, and `cut` says to break off in
    the middle of a file."""

    class Hub(dict):
        cut = False

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = hub.get(self.path, b"")
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:len(body) // (1 + hub.cut)])

        def log_message(self, *args):
            pass

    hub, server = Hub(), ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("TORCH_HOME", str(workplace / "torch"))
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()

def test_fetch(hub, workplace, monkeypatch):
    torch.save({"x": torch.arange(100_000)}, "x.bin")
    good, page = Path("x.bin").read_bytes(), b"<html>Please log in</html>"
    right, checkpoints = hashlib.sha256(good).hexdigest(), workplace / "torch/hub/checkpoints"
    for body, sha256, cut in [(b"", None, False), (page, None, False), (page, right, False),
                              (good, "0" * 64, False), (good, None, True), (good, right, True)]:
        hub["/owner/name/resolve/main/x.bin"], hub.cut = body, cut
        with pytest.raises(tok.UserError, match=f"put it at {checkpoints}/x.bin$") as error:
            tok.fetch_hub("owner/name", "x.bin", sha256)
        assert os.listdir(checkpoints) == [] and ("404" in str(error)) == (body == b"")
    hub.cut = False
    path = tok.fetch_hub("owner/name", "x.bin", right)
    assert path.read_bytes() == good and os.listdir(checkpoints) == ["x.bin"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert tok.fetch_hub("owner/name", "x.bin") == path  # once is enough
    path.unlink()
    with pytest.raises(tok.UserError, match="refused"):
        tok.fetch_hub("owner/name", "x.bin")

def test_released_weights(hub, capsys, monkeypatch):
    """From two files on a hub to pictures, with the settings of the model's size."""
    config = dataclasses.replace(PRESETS["RAR-XL"], width=32, depth=1, heads=2, mlp_width=32)
    monkeypatch.setitem(PRESETS, "RAR-XL", config)
    torch.save(RAR(config).state_dict(), "model")
    tokenizer = tok.PatchTokenizer(16, 2, 1024).state_dict()  # of the same grid and codebook
    torch.save(tokenizer | {"codebook": torch.rand(1024, 12),
                            "decoder": torch.rand(12, 12, 3, 3) / 60}, "tokenizer")
    weights = Path("model").read_bytes()
    hub["/yucornetto/RAR/resolve/main/rar_xl.bin"] = weights
    hub[f"/fun-research/TiTok/resolve/main/{tok.RELEASED}"] = Path("tokenizer").read_bytes()
    sample = ["sample", "--count", "2", "--weights"]
    assert "rar_xl.bin" in refused([*sample, "RAR-XL", "--out", "x/"], capsys, last_line=True)
    digest = hashlib.sha256(weights).hexdigest()
    monkeypatch.setitem(tok.RELEASED_MODELS, "RAR-XL", ("rar_xl.bin", digest))
    works(*sample, "RAR-XL", "--out", "x/")
    hub.clear()
    settings = json.loads(Path("x/settings.json").read_text())
    assert (settings["scale"], settings["power"], settings["temperature"]) == (6.9, 1.5, 1.02)
    works(*sample, "model", "--out", "y.npz")
    assert differing("x", "y.npz") == 0 and pixels_of("x").std() > 2

def test_a_thousand_classes_and_a_gpu_ask_for_the_released_tokenizer(hub, capsys, monkeypatch):
    for i in range(1000):
        paint(f"imagenet/{i:04}/a.png", size=(8, 8))
    flags = ["train", "--data", "imagenet", "--width", "8", "--depth", "1", "--heads", "1",
             "--mlp-width", "8", "--device", "cpu"]
    monkeypatch.setattr(tok, "gpu_gigabytes", lambda device: 80)
    error = refused(flags, capsys)
    assert "404" in error and tok.RELEASED in error  # never another in its place
    assert "put it at" in error and "--tokenizer patch" in error
    assert not list(Path("runs").rglob("*.pt"))
    monkeypatch.setattr(tok, "gpu_gigabytes", lambda device: 0)
    works(*flags, "--steps", "2", "--photographs", "100", "--codebook-size", "16")
    printed = capsys.readouterr().out
    assert "--model small" in printed and "100 of 950 photographs, evenly" in printed

def test_weights_that_do_not_fit(workplace, capsys):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (Path("executed"),)

    good = RAR(TINY).state_dict()
    for value, named in [
            ({name: good[name] for name in good if name != "cls_token"}, "cls_token"),
            (good | {"extra": torch.zeros(2)}, "extra"), ([1, 2], ""), ({}, ""),
            (good | {"cls_token": torch.zeros(3)}, "cls_token"), (good | {"cls_token": [1]}, ""),
            (good | {"lm_head.bias": 5}, ""), (torch.nn.Linear(2, 2), ""), ({"x": Hostile()}, "")]:
        torch.save(value, "other.bin")
        error = refused(["sample", "--weights", "other.bin"], capsys)
        assert "other.bin" in error and named in error
    assert not Path("executed").exists()

@pytest.fixture
def trained(workplace):
    works(*TRAIN)

NPZ = ["sample", "--count", "23", "--device", "cpu"]

def pixels_of(path):
    if Path(path).is_dir():
        return np.stack([np.asarray(Image.open(file)) for file in sorted(Path(path).glob("*.png"))])
    with np.load(path, allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        return file["arr_0"]

def differing(one, two):
    """How many pictures differ."""
    return (pixels_of(one) != pixels_of(two)).any(axis=(1, 2, 3)).sum()

def test_samples(trained, capsys):
    for size, out in (("8", "x.npz"), ("5", "new/folder/"), ("23", "newer/still/x.npz")):
        works(*NPZ, "--micro-batch", size, "--out", out)
    assert "newer/still/x.npz: 23 pictures" in capsys.readouterr().out
    assert os.listdir("newer/still") == ["x.npz"] and differing("x.npz", "new/folder") <= 1
    # more into the same folder, but not by other settings; a finished file stays
    works("sample", "--count", "25", "--out", "new/folder")
    names = {f"{i:06}.png" for i in range(25)} | {"settings.json"}
    assert set(os.listdir("new/folder")) == names
    for more in (["--seed", "2"], ["--scale", "2"], ["--order", "z_curve"], ["--classes", "3"]):
        assert "other settings" in refused([*NPZ, *more, "--out", "new/folder"], capsys)
    assert "x.npz is there already" in refused([*NPZ, "--out", "x.npz"], capsys)
    # image i is of class i % 10, and truncated; a weights file is a state dict, nothing else
    model, config, folder = rar.load_model(None, {}, torch.device("cpu"))
    tokens = generate(model, torch.arange(23) % 10, config.scale, config.power, config.temperature,
                      uniforms=rar.image_uniforms(1, range(23), 64))
    pixels = tok.to_uint8(tok.tokenizer_of(config, folder).decode(tokens))
    assert np.array_equal(pixels, pixels_of("x.npz"))
    written = torch.load("runs/shapes-tiny/weights.pt", weights_only=True)
    assert written.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in model.named_parameters())

@pytest.mark.parametrize("out", ["x.npz", "x.png"])
def test_sampling_goes_on(trained, capsys, monkeypatch, out):
    """Ctrl-C after two batches and after four, then a damaged picture, then as if it was killed
    while the parts were removed: no picture is made twice, and the file is the same."""
    arguments, parts = [*NPZ, "--micro-batch", "4", "--out"], Path(f"{out}.parts")
    works(*arguments, f"whole{out}")
    whole, stop = Path(f"whole{out}").read_bytes(), raising(KeyboardInterrupt)
    saved = calls(monkeypatch, tok.PatchTokenizer, "decode", {3: stop, 6: stop})
    for count in (8, 16):
        assert rar.main([*arguments, out]) == 130
        assert not Path(out).exists() and len(pixels_of(parts)) == count
    assert "other settings" in refused([*arguments, out, "--scale", "2"], capsys)
    for number in (3, 0):
        picture = parts / f"{number:06}.png"
        good = picture.read_bytes()
        picture.write_bytes(good[:50])
        assert str(picture) in refused([*arguments, out], capsys, last_line=True)
        picture.write_bytes(good)
    works(*arguments, out)
    assert Path(out).read_bytes() == whole and not parts.exists() and len(saved) == 6 + 2
    works(*arguments, f"{parts}/")
    for number in range(9):
        (parts / f"{number:06}.png").unlink()
    removed = calls(monkeypatch, Path, "unlink")
    works(*arguments, out)
    assert Path(out).read_bytes() == whole and not parts.exists()
    assert removed[-1][0].name == "settings.json"  # without it the others would be strangers

def launch(*arguments, processes=2, patch=""):
    """Run a command in processes of its own, two of which talk by gloo, after a patch of Python."""
    Path("patched.py").write_text(f"""
import os, signal, sys, threading, time, rar, tokenizer as tok
tok.SHAPES_TRAIN, tok.SHAPES_HELD_OUT = 100, 20
{patch}
sys.exit(rar.main())
""")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    places = {"PYTHONPATH": str(Path(rar.__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else ()), "patched.py", *arguments],
        capture_output=True, text=True, timeout=120, env=os.environ | places)

def test_two_processes_and_then_one(photographs):
    """Both make tokens. First rank 1 fails, which ends both. The second start goes on; rank 1 is
    stopped after five updates, which stops both. One process makes the rest. Losses and weights are
    those of one process, orders, dropped labels and dropout included; so are samples of two."""
    train = [*SMALL, "--steps", "8", "--batch", "16", "--micro-batch", "8", "--dropout", "0.1",
             "--out"]
    works(*train, "one")
    files = token_files()
    shutil.rmtree("runs/tokens")
    patch = """
step_of, save, write_at = rar.train_step, tok.save_samples, tok.write_at
def note(what):
    with open(f"{what}-{tok.RANK}", "a") as file:
        file.write("x")
        return file.tell()
def write_or_fail(path, *rest):
    if path.suffix == ".part" and note("rows") == 5 and tok.RANK == 1:
        raise tok.UserError("this one fails")
    write_at(path, *rest)
def train_step(network, optimizer, config, batch, step, autocast):
    assert len(batch[0]) == 8
    if step == 4 and tok.RANK == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return step_of(network, optimizer, config, batch, step, autocast)
tok.write_at, rar.train_step = write_or_fail, train_step
tok.save_samples = lambda store, parts: save(store, (note("saved") and x for x in parts))
"""
    result = launch(*train, "two", patch=patch)
    assert result.returncode != 0 and "rank 1: error: this one fails" in result.stderr
    result = launch(*train, "two", patch=patch)
    assert "stopped and saved" in result.stderr
    rows = [os.path.getsize(f"rows-{rank}") for rank in (0, 1)]
    assert min(rows) >= 12 and 41 <= sum(rows) <= 42  # the failed one, and one more if it was cut
    assert token_files() == files and log_of(Path("two"))[-1]["step"] == 5
    works(*train, "two")
    for one, two in zip(log_of(Path("one")), log_of(Path("two")), strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    one, two = (tok.read_tensors(f"{run}/weights.pt") for run in ("one", "two"))
    for name in one:
        if "k_norm.bias" not in name:  # has no gradient but noise
            assert torch.allclose(one[name], two[name], rtol=0, atol=1e-5), name

    sample = [*NPZ, "--weights", "two", "--micro-batch", "4", "--out"]
    works(*sample, "x/")
    result = launch(*sample, "x.npz", patch=patch)
    assert result.stdout.count("x.npz: 23 pictures") == 1, result.stderr  # rank 0 alone talks
    assert os.path.getsize("saved-0") == os.path.getsize("saved-1") == 3
    assert differing("x", "x.npz") <= 1

# ---- Any order -----------------------------------------------------------------------------------

def test_draws_and_orders_of_images(trained):
    uniforms = rar.image_uniforms(11, range(2000), 16)
    for part in (uniforms, uniforms[:, 0], uniforms[0], uniforms.diff() % 1):
        assert scipy.stats.kstest(part.flatten(), "uniform").pvalue > 1e-3
    config = dataclasses.replace(TINY, order="random", seed=3)
    orders = rar.image_orders(config, range(50))
    assert (orders.sort(dim=1).values == torch.arange(16)).all() and len(orders.unique(dim=0)) == 50
    assert torch.equal(rar.image_orders(config, [7])[0], orders[7])
    fixed = rar.image_orders(dataclasses.replace(config, order="spiral_in"), [0, 1])
    assert torch.equal(fixed, scan_order("spiral_in", 4).expand(2, 16))
    works(*NPZ, "--order", "random")

def test_complete(trained, capsys):
    """Given tokens stay, and pixels that are hidden don't leak into them."""
    tokenizer, picture = tok.load("runs/shapes-tiny/tokenizer.pt"), np.array(tok.draw_shape(4))
    Image.fromarray(picture).save("a.png")
    picture[16:] = 255 - picture[16:]
    Image.fromarray(picture).save("b.png")
    known, images = tok.known_tokens("a.png", (3, 2, 32, 17), tokenizer)
    assert torch.equal(known, tok.known_tokens("b.png", (3, 2, 32, 17), tokenizer)[0])
    kept = known.view(8, 8) >= 0
    assert kept[1:4, 1:].all() and kept.sum() == 21  # whole cells alone
    assert torch.equal(images[1][:, 4:16, 4:], images[0][:, 4:16, 4:])
    assert (images[1][:, 16:] == 0.5).all() and (images[1][:, :4] == 0.5).all()

    any_order = "runs/shapes-tiny/checkpoint-0000003.pt"
    complete = ["sample", "--complete", "a.png", "--classes", "cross", "--count", "3", "--keep"]
    works(*complete, "3,16,32,32", "--weights", any_order, "--out", "x.png")
    works(*complete, "0,0,32,16")  # rows from the top: raster will do
    assert "annealed to another order" not in capsys.readouterr().out
    works(*complete, "0,16,32,32")
    assert "annealed to another order" in capsys.readouterr().out
    with Image.open("x.png") as grid:
        assert grid.size == (5 * 68 + 4, 68 + 4 + 22)  # the picture, what is kept, and three
    model, config, _ = rar.load_model(any_order, {}, torch.device("cpu"))
    autocast = torch.autocast("cpu", enabled=False)
    (_, tokens), = rar.sample_tokens(model, torch.tensor([4, 4]), config, autocast, known=known)
    assert (tokens[:, known >= 0] == known[known >= 0]).all() and (tokens >= 0).all()
    orders = rar.image_orders(config, [0, 1], known)
    assert (known[orders[:, :21]] >= 0).all() and orders[0, :2].tolist() == [9, 10]
    for keep, named in [(["1,2,3"], "--keep"), (["0,0,3,3"], "0 of 64 cells"), ([], "--keep"),
                        (["0,0,32,32"], "64 of 64 cells"),
                        (["0,0,32,16", "--complete", "no.png"], "no.png")]:
        assert named in refused([*complete, *keep], capsys)

# ---- fid.py --------------------------------------------------------------------------------------

fid_refused = functools.partial(refused, main=fid.main)

@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file of weights for Inception that depend on nothing but names, shapes and a sine."""
    state = {name: tensor for name, tensor in sorted(fid.Inception().state_dict().items())
             if not name.endswith("num_batches_tracked")}
    for i, (name, tensor) in enumerate(state.items()):
        shape = tuple(tensor.shape)
        m = np.arange(math.prod(shape), dtype=np.int64) + 7919 * (i + 1)
        v = math.sqrt(2) * np.sin(2 * math.pi * ((m * m % 999983) * m % 999983) / 999983)
        v = v.reshape(shape)
        if len(shape) > 1:
            v -= v.mean(axis=tuple(range(1, len(shape))), keepdims=True) * (shape[1] > 3)
            v *= (12 if name == "fc.weight" else 1.7) / math.sqrt(math.prod(shape[1:]))
        elif name.endswith(("bn.weight", "running_var")):
            v = 1 + 0.2 * v
        elif name.endswith("bn.bias"):
            v = 0.2 * v - 0.2
        else:
            v *= 2 if name == "fc.bias" else 0.2
        state[name] = torch.from_numpy(v.astype(np.float32))
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    tok.write_tensors(path, state)
    return str(path)

def synthetic(first, second=False):
    """64 pictures (64, 256, 256, 3) from integers alone."""
    n = np.arange(first, first + 64).reshape(64, 1, 1, 1)
    y, x, c = np.ogrid[:256, :256, :3]
    t = x * (1 + n % 5) + y * (1 + n // 5 % 7) + (x * y * (n % 3) >> 6)
    t = t + ((x - 128) ** 2 + (y - 16 * (n % 16)) ** 2) * (n % 4) // 64
    t = (t + 61 * n + 85 * c * (1 + n % 2)) % 510
    p = np.minimum(t, 510 - t)
    return (p * 15 // 16 + 4 if second else p).astype(np.uint8)

def noise(*shape, high=256):
    return np.random.default_rng(0).integers(0, high, shape).astype(np.uint8)

def far(values, expected):
    """The largest difference, relative to the largest value."""
    values, expected = np.asarray(values), np.asarray(expected)
    return np.abs(values - expected).max() / np.abs(expected).max()

def test_resize_is_tensorflows():
    # 299 outputs of 2 inputs lie at 0, 2/299, ..., and from input 1 on there is nothing to blend in
    ramp = fid.resize(torch.tensor([10.0, 40.0]).expand(1, 1, 3, 2))[0, 0]
    expected = 10 + 30 * np.minimum(np.arange(299) * 2 / 299, 1)
    assert far(ramp, np.broadcast_to(expected, (299, 299))) < 1e-6
    assert torch.equal(fid.resize(ramp.T[None, None])[0, 0], ramp.T)  # 299 is left alone
    assert fid.resize(torch.arange(598.0).expand(1, 1, 5, 598))[0, 0, 2, 7] == 14  # not smoothed

def test_inception(inception):
    network = fid.load_inception(inception, torch.device("cpu"))
    outputs = network(torch.from_numpy(synthetic(0)[:8]))
    for x, width, place, values in zip(outputs, (2048, 2023, 1008), (2047, 500, 1), [
            (0.3331587016582489, 0.14948564767837524), (0.9000805020332336, 0.0),
            (-2.7035014629364014, -0.6439145803451538)]):
        assert x.shape == (8, width)
        assert x[[0, 5], place].tolist() == pytest.approx(values, abs=1e-4)
    if GOLDEN.exists():
        golden = np.load(GOLDEN / "fid/features8.npz")
        real = network(torch.from_numpy(np.load(GOLDEN / "fid/images8.npz")["arr_0"]))
        for name, each in {"synth8": outputs, "real8": real}.items():
            for x, kind in zip(each, ("pool", "spatial", "logits_unbiased")):
                assert far(x, golden[f"{name}__tf64__{kind}"]) < 1e-4

def test_inceptions_weights(inception, workplace, monkeypatch, capsys):
    state, fetched = tok.read_tensors(inception), []
    if GOLDEN.exists():
        keys = json.loads((GOLDEN / "fid/keys_shapes.json").read_text())["keys"]
        assert {key["key"]: key["shape"] for key in keys} == \
            {name: list(tensor.shape) for name, tensor in state.items()}
    # the published file is in torch's old format; of other such files nothing is unpickled
    counters = {name.replace("running_var", "num_batches_tracked"): torch.tensor(7)
                for name in state if name.endswith("running_var")}
    torch.save(state | counters, "old", _use_new_zipfile_serialization=False)
    Path("empty").touch()
    np.save("some.npy", noise(4, 8, 8, 3))
    score = ["some.npy", "--device", "cpu", "--weights"]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
        for file in ("old", "empty", "some.npy"):
            assert f"{file} is not a PyTorch file of ten" in fid_refused([*score, file], capsys)
        assert "cannot read missing: No such" in fid_refused([*score, "missing"], capsys)
    assert fid.SHA256[:8] in fid.URL
    with monkeypatch.context() as patch:
        patch.setattr(fid, "SHA256", hashlib.sha256(Path("old").read_bytes()).hexdigest())
        patch.setattr(tok, "fetch", lambda *arguments: fetched.append(arguments) or "old")
        old = fid.load_inception(None, torch.device("cpu")).state_dict()
        assert all(torch.equal(old[name], state[name]) for name in state)
        assert fetched == [(fid.URL, fid.SHA256)]

    lost = "Mixed_6b.branch_pool.conv.weight"
    for wrong, named in [
            (state | {"fc.weight": torch.zeros(1000, 2048)}, "fc.weight"),
            (state | {"AuxLogits.fc.bias": torch.zeros(1)}, "AuxLogits.fc.bias"),
            (state | {"Mixed_7c.branch1x1.bn.bias": torch.full((320,), math.nan)}, "not finite"),
            ({name: x for name, x in state.items() if name != lost}, lost)]:
        tok.write_tensors("wrong", wrong)
        assert named in fid_refused([*score, "wrong"], capsys)

@pytest.mark.filterwarnings("error")
def test_frechet_distance():
    a, b = np.array([4.0, 9, 0, 1]), np.array([1.0, 25, 16, 0])
    u, v = np.eye(4)[0], np.full(4, 0.5)  # rank 1: the root of u u^T v v^T has the trace |u v|
    cases = [(a, np.diag(a), b, np.diag(b), ((a - b)**2).sum() + ((a**0.5 - b**0.5)**2).sum(), 0),
             (0 * u, np.outer(u, u), 0 * u, 9 * np.outer(v, v), 1 + 9 - 2 * 3 * 0.5, 0)]
    for seed in range(10):  # rank 4 of 30
        x = np.random.default_rng(seed).normal(size=(5, 30))
        cases.append((x.mean(0), np.cov(x.T), x.mean(0), np.cov(x.T), 0, 1e-6))
    if GOLDEN.exists():
        golden = np.load(GOLDEN / "fid/frechet_cases.npz")
        for name in {key.split("__")[0] for key in golden}:
            case = [golden[f"{name}__{key}"] for key in ("mu1", "sigma1", "mu2", "sigma2", "fd")]
            cases.append((*case, 1e-6 * np.trace(case[1])))
    for *arrays, expected, error in cases:
        distance = fid.frechet_distance(*arrays)
        assert distance == pytest.approx(float(expected), rel=1e-7, abs=error) and distance >= 0

def test_moments():
    x = 1e6 + np.random.default_rng(0).normal(size=(50, 70))
    moments = fid.Moments()
    for part in torch.from_numpy(x).split([1, 20, 29]):
        moments.add(part)
    mean, covariance = moments.result()
    assert mean == pytest.approx(x.mean(0), rel=1e-14)
    assert np.abs(covariance - np.cov(x, rowvar=False)).max() < 1e-8

def test_inception_score():
    # in the third case half of the samples are surely of class 0, half undecided between 0 and 1
    half = torch.full((10, 1008), -1000.0)
    half[:, 0] = half[5:, 1] = 0
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25) - math.log(2) / 2
    for logits, expected in ((torch.zeros(9, 1008), 1), (1000 * torch.eye(1008)[:12], 12),
                             (half, math.exp(entropy))):
        assert fid.inception_score(logits) == pytest.approx(expected)

def test_precision_recall():
    line = torch.tensor([[0.0], [1], [2], [3]])  # on a line: radii 3, 2, 2, 3
    points = torch.tensor([[-3.0], [-3.01], [4], [6], [6.01]])
    # 3 of 5, for the border belongs to the ball; the radius of -3 alone is 9
    assert fid.precision_recall(points, line) == [3 / 5, 1]
    assert fid.precision_recall(line, points) == [1, 3 / 5]

    def inside(points, centres):
        to_centres = ((centres[:, None] - centres[None]) ** 2).sum(-1)
        radii = to_centres.sort(1).values[:, 3]
        to_points = ((points[:, None] - centres[None]) ** 2).sum(-1)
        return (to_points <= radii).any(1).double().mean().item()

    torch.manual_seed(0)
    a, b = torch.randn(150, 40), 1.1 * torch.randn(90, 40) + 0.1
    a[:20], b[4:9] = b[:20], b[4]  # twins of the other set, and of the own one: radius 0
    expected = inside(a.double(), b.double()), inside(b.double(), a.double())
    assert 0.2 < min(expected) and max(expected) < 0.95
    points, centres = fid.on_grid(a * 1e3, b * 1e3)
    assert far(points / points.norm(), a / a.norm()) < 1e-6
    whole = torch.cat(list(fid.squared_distances(points, centres, 1000)))
    assert torch.equal(whole, whole.round()) and whole.max() < 2**53
    for block in (1, 7, 90, 1000):
        assert fid.precision_recall(a, b, block=block) == pytest.approx(expected, abs=1e-12)
        parts = fid.squared_distances(points, centres, block)
        assert torch.equal(whole, torch.cat(list(parts)))  # exactly, not almost, the same

def scores_of(*arguments):
    assert fid.main([*arguments, "--json", "scores.json", "--device", "cpu"]) == 0
    return json.loads(Path("scores.json").read_text())

def test_all_five_scores(inception, workplace, capsys):
    """64 pictures against 64: the figures are those of torch-fidelity's layers in float64 and of
    ADM's formulas, without rounding."""
    np.savez("reference.npz", synthetic(0))
    np.savez_compressed("samples.npz", synthetic(64, second=True))
    arguments = ["--weights", inception, "--save-stats", "s.npz"]
    assert scores_of("samples.npz", "reference.npz", *arguments) == pytest.approx({
        "fid": 9.19818432430159, "sfid": 363.04030863001503, "is": 1.3587984779713944,
        "precision": 0.84375, "recall": 0.515625, "samples": 64, "reference": 64}, rel=1e-4)
    printed = capsys.readouterr().out
    assert "recall      0.5156" in printed and "fewer than the 2,048 features" in printed
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
    assert {name: array.shape for name, array in np.load("s.npz").items()} == {
        "mu": (2048,), "sigma": (2048,) * 2, "mu_s": (2023,), "sigma_s": (2023,) * 2, "count": ()}

@pytest.fixture
def cheap(workplace, monkeypatch):
    """In place of Inception: a fixed map of a picture that is shrunk to 4x4; fewer features."""

    class Cheap(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.batches = torch.nn.Linear(48, 64 + 32 + 1008), []

        @torch.no_grad()
        def forward(self, pixels):
            assert pixels.dtype == torch.uint8
            self.batches.append(len(pixels))
            images = F.adaptive_avg_pool2d(pixels.permute(0, 3, 1, 2) / 255, 4)
            return self.fc(images.flatten(1)).split([64, 32, 1008], 1)

    network = Cheap()
    monkeypatch.setattr(fid, "load_inception", lambda path, device: network)
    monkeypatch.setattr(fid, "KINDS", {"pool": ("mu", "sigma", 64),
                                       "spatial": ("mu_s", "sigma_s", 32)})
    return network

def test_inputs_of_fid(cheap, capsys):
    """The same pictures in every form, on either side, give the same scores."""
    theirs = noise(40, 64, 64, 3, high=200)
    for name, pictures in (("a", noise(40, 64, 64, 3)), ("b", theirs)):
        np.savez(name, pictures, np.arange(40))  # ADM's files hold labels, too: arr_1
        np.savez_compressed(name + "-small", pictures)
        np.save(name, pictures)
        for i, pixels in enumerate(pictures):
            Path(f"{name}/{i // 10}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(f"{name}/{i // 10}/{i:02}.png")
    assert fid.main(["b.npz", "--save-stats", "stats.npz"]) == 0
    assert "no fid, sfid, precision, recall: there is no reference" in capsys.readouterr().out
    statistics = dict(np.load("stats.npz"))
    assert statistics.pop("count") == 40
    np.savez("adm.npz", arr_0=theirs[:20], **statistics)
    np.savez("few.npz", theirs[:20])
    np.savez("pool.npz", mu=statistics["mu"], sigma=statistics["sigma"])

    expected, few = scores_of("a.npz", "b.npz"), scores_of("a.npz", "few.npz")
    assert expected["fid"] > 0.01 and None not in expected.values()
    printed = capsys.readouterr().out
    assert "64x64 and not the usual 256x256" in printed and "no " not in printed
    without = {"precision": None, "recall": None}
    for arguments, looked_at, changes, line in [
            ("a-small.npz b.npy", 80, {}, ""), ("a b", 80, {}, ""), ("a b --crop 64", 80, {}, ""),
            ("a.npy b-small.npz --batch 7", 80, {}, ""),
            ("a.npz adm.npz", 60, {**few, "fid": expected["fid"], "sfid": expected["sfid"]}, ""),
            ("a.npz adm.npz --metrics is,fid", 40, without | {"sfid": None, "reference": 20}, ""),
            ("a.npz stats.npz", 40, without, "no precision, recall: stats.npz holds no pictures"),
            ("a.npz pool.npz", 40, without | {"sfid": None, "reference": None},
             "no sfid, precision, recall: pool.npz holds no pictures, only"),
            ("stats.npz stats.npz --metrics fid,sfid", 0,
             without | {"fid": 0, "sfid": 0, "is": None}, "")]:
        cheap.batches.clear()  # no picture is looked at that is not needed
        assert scores_of(*arguments.split()) == pytest.approx(expected | changes, abs=1e-9)
        assert sum(cheap.batches) == looked_at and line in capsys.readouterr().out
        assert "7" not in arguments or cheap.batches == 2 * [7, 7, 7, 7, 7, 5]

def test_inception_score_is_the_mean_of_consecutive_splits(cheap, capsys):
    pictures = np.zeros((5010, 4, 4, 3), np.uint8)
    pictures[::2], pictures[5000:] = 255, 90
    np.save("a.npy", pictures)
    logits = cheap(torch.from_numpy(pictures))[2]
    expected = (fid.inception_score(logits[:5000]) + fid.inception_score(logits[5000:])) / 2
    assert expected != pytest.approx(fid.inception_score(logits), rel=1e-3)
    for batch in ("64", "5005"):
        assert scores_of("a.npy", "--batch", batch)["is"] == pytest.approx(expected, rel=1e-6)
    assert "not the usual 50,000" in capsys.readouterr().out

def test_rfid(photographs, cheap, capsys, monkeypatch):
    """A reconstruction is compared with the crop that it was made of."""
    for i in range(5):
        paint(photographs / "cats" / "more" / f"{i}.jpg", size=(90 + 20 * i, 100), seed=50 + i)

    class Perfect(torch.nn.Module):  # tokens are pixels
        image_size = 64
        encode = decode = lambda self, images: images

    monkeypatch.setattr(tok, "load", lambda path: Perfect())
    monkeypatch.setattr(tok, "to_uint8", lambda images: np.rint(
        images.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8))
    assert tok.main(["reconstruct", "photos", "--tokenizer", "x", "--out", "recon.npz"]) == 0
    expected = scores_of("photos", "--crop", "64") | {
        "fid": 0, "sfid": 0, "precision": 1, "recall": 1, "reference": 45}
    assert scores_of("recon.npz", "photos", "--crop", "64") == pytest.approx(expected, abs=1e-6)
    error = fid_refused(["recon.npz", "photos"], capsys)
    for part in ("00.png is 70x80, but", "cats/more/0.jpg 90x100", "--crop 256"):
        assert part in error

@pytest.mark.parametrize("line", """missing.npz
float.npy | float.npy: it holds float32 (5, 8, 8, 3)
first.npy | it holds uint8 (5, 3, 8, 8), channels first
fortran.npy | Fortran
objects.npy | it holds object
others.npz | neither pictures (arr_0) nor statistics (mu, sigma), but ['im
three.npz | scores need at least 4 pictures, and there are 3
none.npy | there are 0
empty | scores need
half.npz
half.npy | 932 bytes of pixels, not 960
header.npy
spoilt.npz | Bad CRC-32
spoilt-small.npz | Bad CRC-32
notes.txt | neither a whole .npz file
pipe.npz
unreadable | unreadable/3.png
good.npy missing
good.npy width.npz | mu is (768,)
good.npy nan.npz | sigma_s holds NaN
good.npy objects.npz | Object arrays
good.npy half-stats.npz
good.npy spoilt-stats.npz
stats.npz | no is: stats.npz holds no pictures
good.npy stats.npz --metrics fid,recall | no recall: stats.npz
good.npy --metrics fid | no fid: there is no reference
good.npy --metrics fid,speed | --metrics speed: choose from fid,sfid,is
good.npy --crop 8 | --crop 8
good.npy --batch 0 | --batch
good.npy --device mps | --device
good.npy --met is | --met
good.npy --save-stats good.npy | good.npy is there already
good.npy --json empty | empty is there already
good.npy --json notes.txt/a | notes.txt is not a folder
good.npy --save-stats no/a.npz | no/a.npz: no is not a folder
stats.npz stats.npz --save-stats x.npz | --save-stats: stats.npz
--crop 8 | samples""".splitlines())
def test_mistakes_with_fid(cheap, capsys, line):
    pictures, zeros, none = noise(5, 8, 8, 3), np.zeros(64), np.array([None] * 64)
    for file, arrays in {
            "good.npy": pictures, "float.npy": pictures.astype(np.float32),
            "first.npy": np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)),
            "fortran.npy": np.asfortranarray(pictures), "objects.npy": none,
            "none.npy": pictures[:0], "three.npz": {"arr_0": pictures[:3]},
            "others.npz": {"images": pictures}, "spoilt.npz": {"arr_0": pictures},
            "spoilt-small.npz": {"arr_0": noise(5, 40, 40, 3)},  # more than zipfile reads at once
            "spoilt-stats.npz": {"mu": np.arange(64.0), "sigma": np.eye(64)},
            "half-stats.npz": {"mu": zeros}, "stats.npz": {"mu": zeros, "sigma": np.eye(64)},
            "width.npz": {"mu": np.zeros(768), "sigma": np.eye(768)},
            "objects.npz": {"mu": none, "sigma": zeros},
            "nan.npz": {"mu_s": zeros[:32], "sigma_s": np.full((32, 32), np.nan)}}.items():
        if file.endswith(".npy"):
            np.save(file, arrays)
        else:
            (np.savez_compressed if "-s" in file else np.savez)(file, **arrays)
        if "spoilt" in file:  # a bit flips amid the first array
            with zipfile.ZipFile(file) as archive:
                middle = 60 + archive.infolist()[0].compress_size // 2
            content = bytearray(Path(file).read_bytes())
            content[middle] ^= 1
            Path(file).write_bytes(content)
    for file, whole, size in (("half.npz", "three.npz", 300), ("half.npy", "good.npy", -28),
                              ("header.npy", "good.npy", 40)):
        Path(file).write_bytes(Path(whole).read_bytes()[:size])
    for i in range(5):
        paint(Path(f"unreadable/{i}.png"))
    for file in ("unreadable/3.png", "notes.txt"):
        Path(file).write_text("broken")
    Path("empty").mkdir()
    os.mkfifo("pipe.npz")
    before = sorted(os.listdir())
    arguments, _, named = line.partition(" | ")
    error = fid_refused(arguments.split(), capsys)
    assert named in error and ("--" in arguments or arguments.split()[-1] in error)
    assert sorted(os.listdir()) == before
# ---- Nothing lost --------------------------------------------------------------------------------

def test_kills(photographs):
    """Commands that are killed at random moments and started again give what undisturbed ones give,
    to the byte, or with two processes but for rounding. RAR_KILLS=100 makes a long version."""
    rng = random.Random(0)
    commands = [([*TRAIN, "--save-every", "2"], "a", 0.9), (SMALL, "b", 0.8),
                (["sample", "--weights", "a", "--count", "40", "--micro-batch", "4"], "c.npz", 0.6)]
    for command, whole, _ in commands:
        works(*command, "--out", whole)
    tokens = token_files()
    for k in range(int(os.environ.get("RAR_KILLS", 3))):
        command, whole, longest = commands[k % 3]
        processes, out = 1 + (k % 6 > 2), f"{k}{whole[1:]}"
        shutil.rmtree("runs", ignore_errors=True)
        for _ in range(rng.randint(1, 1 + (k > 2))):
            result = launch(*command, "--out", out, processes=processes, patch=f"""
def kill():
    time.sleep({rng.uniform(0, longest * processes)})
    os.kill(os.getpid(), signal.{rng.choice(["SIGKILL", "SIGTERM"])})
if tok.RANK == {rng.randrange(processes)}:
    threading.Thread(target=kill, daemon=True).start()
""")
            assert processes == 2 or "Traceback" not in result.stderr, result.stderr
        done = Path(out).is_file() and not Path(f"{out}.parts").exists()
        assert done or rar.main([*command, "--out", out]) == 0
        assert command is not SMALL or token_files() == tokens
        if out.endswith(".npz"):
            assert differing(whole, out) <= 2 * (processes - 1)
        elif processes == 1:
            assert contents(Path(whole)) == contents(Path(out))
        else:
            one, two = (tok.read_tensors(f"{run}/weights.pt") for run in (whole, out))
            assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)

@pytest.mark.parametrize("train, number, do_at, room, saved", [
    ([*TRAIN, "--save-every", "2"], 4, at_step, 30_000, [3, 2]),
    (SMALL, 9, lambda patch, number, do: calls(patch, tok, "write_at", {number: do}), 1000, [])])
def test_full_disk(photographs, monkeypatch, capsys, train, number, do_at, room, saved):
    """Files may not grow any more: what is on disk stays, and with room again the run ends as if
    nothing had been."""
    works(*train, "--out", "whole")
    shutil.rmtree("runs", ignore_errors=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        do_at(patch, number, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1])))
        try:
            error = refused([*train, "--out", "parts"], capsys, last_line=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot write" in error and "File too large" in error
    assert not list(Path("parts").glob("*.part"))
    assert [tok.read_tensors(path)["updates"] for path in rar.checkpoints(Path("parts"))] == saved
    works(*train, "--out", "parts")
    assert contents(Path("whole")) == contents(Path("parts"))

def test_memory_and_cuda_errors(workplace, monkeypatch, capsys):
    """Out of memory names the flag to lower; what CUDA or NCCL report is shown as it is, also where
    it comes up while a file is written."""
    cuda = RuntimeError("CUDA error: an illegal access")
    for do, named in [
            (raising(torch.OutOfMemoryError("CUDA out of memory")), "--micro-batch"),
            (raising(MemoryError()), "--micro-batch"),
            (raising(RuntimeError("DefaultCPUAllocator: can't allocate memory")), "--micro-batch"),
            (raising(cuda), None), (lambda: patch.setattr(torch, "save", raising(cuda)), None)]:
        with monkeypatch.context() as patch:
            at_step(patch, 2, do)
            if named:
                assert named in refused(TRAIN, capsys, last_line=True)
            else:
                with pytest.raises(RuntimeError, match="CUDA error"):
                    rar.main(TRAIN)

def test_run_that_is_removed_midway(workplace, monkeypatch, capsys):
    at_step(monkeypatch, 5, lambda: shutil.rmtree("runs/shapes-tiny"))
    assert "runs/shapes-tiny/log.jsonl" in refused(TRAIN, capsys, last_line=True)

def test_missing_permission(trained, workplace, capsys):
    run, before = Path("runs/shapes-tiny"), contents(Path("runs/shapes-tiny"))
    for folder in (*workplace.parents, workplace):
        if folder.stat().st_uid == os.geteuid() == 0 and len(folder.parts) > 2:
            folder.chmod(0o755)
    run.chmod(0o555)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may write everywhere
    try:
        for command in ([*TRAIN, "--log-every", "2"], ["sample"], ["sample", "--out", "/x.png"]):
            assert "cannot write" in refused(command, capsys, last_line=True)
    finally:
        os.seteuid(user)
        run.chmod(0o755)
    assert contents(run) == before

def flat(value):
    """A value as bytes, to compare: tensors, arrays, and containers of them."""
    if isinstance(value, dict):
        return b"".join(str(key).encode() + flat(part) for key, part in value.items())
    if isinstance(value, torch.Tensor | np.ndarray):
        return np.ascontiguousarray(value).tobytes()
    return b"".join(map(flat, value)) if isinstance(value, list) else repr(value).encode()

def test_damaged_files(trained):
    """Cut short, or with a byte changed: refused in one line that names the file, or without
    effect, or in one that carries no checksum: a digit of a text, tokens, pixels that decode."""
    run, rng = Path("runs/shapes-tiny"), random.Random(1)
    tokenizer = tok.load(run / "tokenizer.pt")
    paint(Path("a.png"))

    def read_tokens(_):
        return tok.encode_pictures([(0, "a.png")], tokenizer, "flip", torch.device("cpu"), "x")

    read_tokens(None)
    for path, read, is_checked in [
            (run / "weights.pt", tok.read_tensors, True),
            (run / "checkpoint-0000006.pt", tok.read_tensors, True),
            (run / "tokenizer.pt", lambda path: tok.load(path).state_dict(), True),
            (run / "config.json", lambda path: rar.read_config(run, None), False),
            (next(Path("runs/tokens").glob("*.npy")), read_tokens, False),
            (Path("a.png"), lambda path: tok.read_picture(path, "center", 32), False)]:
        good, right = path.read_bytes(), flat(read(path))
        for k in range(40):
            place = [0, 1, len(good) - 1][k] if k < 3 else rng.randrange(len(good))
            changed = bytes([good[place] ^ rng.randrange(1, 256)]) + good[place + 1:]
            path.write_bytes(good[:place] + (b"" if k < 20 else changed))
            try:
                value = flat(read(path))
            except tok.UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            else:
                assert value == right or not is_checked
        path.write_bytes(good)

def test_hostile_files(trained, capsys):
    with zipfile.ZipFile("outside.pt", "w") as archive:
        archive.writestr("../evil", b"x")
    with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    np.savez("objects.npz", arr_0=np.array([{}, {}], dtype=object))
    for path in ("outside.pt", "bomb.pt"):
        assert path in refused(["sample", "--weights", path], capsys)
    assert "objects.npz" in refused(["objects.npz"] * 2, capsys, main=fid.main)
    Path("runs/shapes-tiny/config.json").write_text("[" * 100_000)
    assert "config.json" in refused(["sample"], capsys)
    assert not Path("../evil").exists()

def test_extreme_numbers(model):
    """Guidance of a million, temperatures near 0, logits that are far apart: always a token that
    can be drawn, and the likeliest one as the temperature falls."""
    uniforms = torch.rand(64)
    for logits in (torch.randn(64, 9) * 1e6, torch.randn(64, 9) * 1e-6, torch.zeros(64, 9)):
        for temperature in (0, 1e-320, 1e-30, 1e-3, 1, 1e30, 1e308):
            token = rar.draw(logits, temperature, uniforms)
            assert ((token >= 0) & (token < 9)).all()
            if temperature <= 1e-30:
                assert (logits.gather(1, token[:, None])[:, 0] == logits.amax(1)).all()
    impossible = torch.tensor([[-math.inf, 0.0, -1e30]])
    assert rar.draw(impossible, 1, torch.tensor([0.999])).item() == 1
    for scale in (1e6, 1e-6):
        tokens = generate(model, LABELS, scale, 1.0, 1.0)
        assert ((tokens >= 0) & (tokens < 32)).all()

@pytest.mark.parametrize("grid_size", [1, 2, 32, 48])
def test_grids(grid_size):
    config = dataclasses.replace(TINY, grid_size=grid_size, width=8, depth=1, heads=1, mlp_width=8,
                                 num_classes=1, codebook_size=2)
    model, T = RAR(config).eval(), grid_size**2
    tokens = generate(model, torch.tensor([0]), 2.0, 1.0, 1.0)
    assert tokens.shape == (1, T) and tokens.min() >= 0 and tokens.max() < 2
    loss, _ = rar.training_loss(model, tokens, torch.tensor([1]), sample_orders(1, T, 1))
    assert loss.isfinite()
