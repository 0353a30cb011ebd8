"""Run with: python -m pytest -q

The expected figures are the authors' implementation's, on weights that anyone can regenerate (see
`closed_form`). Where the folder ../shared lies beside the checkout, its golden files are matched in
full as well.
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
RASTER = torch.arange(16).expand(3, 16)

def closed_form(model):
    """Fill the model with weights that depend on nothing but names, shapes and a sine."""
    state, is_tokenizer = model.state_dict(), isinstance(model, tok.MaskGITVQGAN)
    for k, name in enumerate(sorted(state)):
        shape, count = state[name].shape, state[name].numel()
        v = np.sin(np.arange(count) * 12.9898 + k * 78.233) * 43758.5453
        v = 2 * (v - np.floor(v)) - 1
        if len(shape) >= 2 and is_tokenizer:
            v *= 1 if "embedding" in name else 1.4 * np.sqrt(3 * shape[0] / count)
        elif len(shape) >= 2:
            v *= 0.5 if "embed" in name or "cls_token" in name else np.sqrt(3 * shape[0] / count)
        else:
            v = 1 + 0.1 * v if name.endswith("weight") else 0.1 * v
        state[name] = torch.from_numpy(v.astype(np.float32)).view(shape)
    model.load_state_dict(state)
    return model

@pytest.fixture
def model():
    return closed_form(RAR(TINY)).eval()

# ---- The published model -------------------------------------------------------------------------

@pytest.mark.parametrize("name, label, orders, expected", [
    ("logits_raster", None, RASTER, [(1.118814, -0.352126, -1.152376, 0.002458),
                                     (0.869593, -0.42206, 0.013033, 0.653023),
                                     (-1.476539, -0.150445, 0.954111, -1.1295)]),
    ("logits_permuted", None, ORDERS, [(0.877996, -0.293868, -1.436493, 1.879414),
                                       (0.075993, -1.175012, -0.827803, -0.177382),
                                       (0.217349, 2.229292, 0.223261, -1.031078)]),
    ("logits_raster_uncond", 10, RASTER, [(1.853005, -0.856028, -1.159469, 0.148748),
                                          (1.104111, 0.33193, -0.542573, 1.484534),
                                          (0.4913, 0.239152, 0.738969, -0.71225)]),
])
def test_logits(model, name, label, orders, expected):
    labels = LABELS if label is None else torch.full((3,), label)
    logits = model(TOKENS, labels, orders).detach()
    assert logits.shape == (3, 16, 32)
    for (b, slot), values in zip([(0, 0), (1, 7), (2, 15)], expected):
        assert logits[b, slot, :4].tolist() == pytest.approx(values, abs=6e-6)
    if GOLDEN.exists():
        golden = np.load(GOLDEN / "rar.npz")[name][:, :-1]  # theirs has an unused last slot
        assert np.abs(logits.numpy() - golden).max() < 5e-6

GRADIENT_NORMS = {
    "cls_token": 0.06384297460317612, "pos_embed": 0.3264736533164978,
    "target_aware_pos_embed": 0.3116339147090912, "timesteps_embeddings": 0.2637688219547272,
    "blocks.0.attn.q_norm.weight": 0.029111243784427643,
    "blocks.1.attn.qkv.weight": 0.36872583627700806,
    "blocks.2.adaLN_modulation.1.weight": 0.37690895795822144,
    "adaln_before_head.adaLN_modulation.1.weight": 0.3427542746067047,
    "embeddings.weight": 0.4306204915046692, "lm_head.weight": 1.2387397289276123}

def test_gradients(model):
    loss, _ = rar.training_loss(model, TOKENS, LABELS, ORDERS)
    loss.backward()
    expected = dict(GRADIENT_NORMS)
    if GOLDEN.exists():
        golden = np.load(GOLDEN / "rar.npz")
        expected |= dict(zip(golden["grad_names"].tolist(), golden["grad_norms"].tolist()))
        assert expected.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        if name in expected:
            assert parameter.grad.norm().item() == pytest.approx(expected[name], rel=1e-5, abs=1e-7)

def test_eight_updates(model):
    losses = [3.7287747859954834, 3.7287747859954834, 3.6020171642303467, 3.3536508083343506,
              3.1292665004730225, 2.9538164138793945, 2.8380415439605713, 2.778270959854126]
    norms = [2.251305103302002, 2.251305103302002, 2.2265126705169678, 2.1697659492492676,
             2.111438035964966, 2.062629461288452, 2.0295541286468506, 2.012521982192993]
    optimizer = rar.make_optimizer(model, TINY)
    decayed = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    block = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    assert names == {"cls_token", "lm_head.weight",
                     *(f"blocks.{i}.{part}.weight" for i in range(3) for part in block)}
    for step in range(8):
        for group in optimizer.param_groups:
            group["lr"] = rar.learning_rate(step, 8, 2, 4e-4, 1e-5)
        loss, _ = rar.training_loss(model, TOKENS, LABELS, ORDERS)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() == pytest.approx(losses[step], rel=1e-6)
        assert norm.item() == pytest.approx(norms[step], rel=1e-5)

@pytest.mark.parametrize("scale, power, expected", [
    (0, 0, [[22, 27, 19, 17, 26, 27, 8, 10, 20, 15, 27, 12, 30, 10, 12, 1],
            [22, 1, 20, 10, 21, 20, 10, 10, 20, 10, 27, 0, 24, 5, 5, 23],
            [13, 14, 30, 17, 3, 31, 30, 10, 20, 20, 7, 11, 7, 11, 24, 22]]),
    (4, 0, [[29, 26, 28, 16, 23, 7, 22, 27, 28, 10, 27, 29, 28, 17, 5, 27],
            [4, 7, 7, 11, 4, 31, 24, 18, 20, 10, 7, 31, 4, 11, 29, 5],
            [16, 17, 7, 28, 7, 7, 10, 30, 16, 2, 17, 7, 29, 7, 5, 27]]),
    # a near tie at step 8 of the first row: it is compared up to there
    (16, 2.75, [[22, 27, 19, 17, 26, 27, 8, 10],
                [22, 1, 20, 10, 21, 20, 10, 18, 9, 22, 7, 31, 18, 28, 7, 4],
                [13, 14, 30, 17, 3, 31, 30, 18, 2, 17, 17, 15, 28, 16, 31, 5]]),
])
@pytest.mark.parametrize("predict", [rar.all_slots, rar.newest_slot, rar.tabled_slots])
def test_greedy_generation(model, scale, power, expected, predict):
    tokens = generate(model, LABELS, scale, power, 0, predict=predict).tolist()
    assert [row[:len(wanted)] for row, wanted in zip(tokens, expected)] == expected

@pytest.mark.parametrize("name, count", [
    ("RAR-S", 133_344_256), ("RAR-B", 260_923_648), ("RAR-L", 461_668_352),
    ("RAR-XL", 955_425_024), ("RAR-XXL", 1_498_520_704)])
def test_sizes(name, count):
    with torch.device("meta"):
        model = RAR(PRESETS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    released = GOLDEN / "rar_keys.json"
    key = name.lower().replace("-", "_")
    if released.exists() and key in (keys := json.loads(released.read_text())):
        assert {n: list(p.shape) for n, p in model.state_dict().items()} == keys[key]

def test_first_loss_is_that_of_the_released_initialisation():
    """At width 768 the head of std 0.02 sees normalised inputs: ln V + 768 * 0.02^2 / 2."""
    torch.manual_seed(0)
    model = RAR(dataclasses.replace(PRESETS["RAR-S"], depth=1))
    tokens = torch.randint(1024, (4, 256))
    orders = torch.arange(256).expand(4, 256)
    loss, _ = rar.training_loss(model, tokens, torch.arange(4), orders)
    assert loss.item() == pytest.approx(math.log(1024) + 768 * 0.02**2 / 2, abs=0.02)

# ---- The idea ------------------------------------------------------------------------------------

def test_randomness():
    assert rar.randomness(0, 125_000, 187_500) == rar.randomness(125_000, 125_000, 187_500) == 1
    assert rar.randomness(150_000, 125_000, 187_500) == pytest.approx(0.6)
    assert rar.randomness(187_500, 125_000, 187_500) == rar.randomness(2e5, 125_000, 187_500) == 0
    assert all(rar.randomness(step, 0, 0) == 0 for step in range(10))       # plain raster
    assert all(rar.randomness(step, 10, 10) == 1 for step in range(10))     # always random

def test_learning_rate():
    rates = [rar.learning_rate(step, 8, 2, 4e-4, 1e-5) for step in range(8)]
    assert rates == pytest.approx([0, 2e-4, 4e-4, 3.73874954e-4, 3.025e-4, 2.05e-4, 1.075e-4,
                                   3.61250463e-5])
    assert rar.learning_rate(8, 8, 2, 4e-4, 1e-5) == pytest.approx(1e-5)
    assert rar.learning_rate(0, 8, 0, 4e-4, 1e-5) == 4e-4

def test_guidance_weight():
    weights = [rar.guidance_weight(t, 256, 16, 2.75) for t in range(256)]
    assert weights[0] == 1 and weights == sorted(weights)
    assert weights[-2:] == pytest.approx([15.98315514, 15.99575865])
    assert {rar.guidance_weight(t, 256, 4, 0) for t in range(256)} == {4}
    assert rar.guidance_weight(128, 256, 9, 1) == pytest.approx(5)

def test_sample_orders_draws_for_each_sample():
    orders = sample_orders(4000, 6, 0.6, rng=np.random.default_rng(0))
    assert orders.shape == (4000, 6) and orders.dtype == torch.long
    assert (orders.sort(dim=1).values == torch.arange(6)).all()
    raster = (orders == torch.arange(6)).all(dim=1).float().mean().item()
    assert raster == pytest.approx(0.4 + 0.6 / 720, abs=0.03)
    # every cell comes first equally often: chi-square with 5 degrees of freedom, 0.1 %
    random = sample_orders(4000, 6, 1, rng=np.random.default_rng(1))
    counts = torch.bincount(random[:, 0], minlength=6)
    assert ((counts - 4000 / 6) ** 2 / (4000 / 6)).sum() < 20.5
    spiral = scan_order("spiral_in", 4)
    assert (sample_orders(3, 16, 0, spiral) == spiral).all()

def test_scan_orders():
    def ranks(name):
        return scan_order(name, 4).argsort().view(4, 4).tolist()

    assert ranks("raster") == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert ranks("alternate") == [[0, 1, 2, 3], [7, 6, 5, 4], [8, 9, 10, 11], [15, 14, 13, 12]]
    assert ranks("spiral_in") == [[0, 11, 10, 9], [1, 12, 15, 8], [2, 13, 14, 7], [3, 4, 5, 6]]
    assert ranks("spiral_out") == [[15, 4, 5, 6], [14, 3, 0, 7], [13, 2, 1, 8], [12, 11, 10, 9]]
    assert ranks("z_curve") == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert ranks("subsample") == [[0, 4, 1, 5], [8, 12, 9, 13], [2, 6, 3, 7], [10, 14, 11, 15]]
    for name in ("raster", "alternate", "spiral_in", "spiral_out", "z_curve", "subsample"):
        for n in (1, 2, 3, 5, 8, 32, 48):
            assert sorted(scan_order(name, n).tolist()) == list(range(n * n))

@needs_golden
def test_scan_orders_of_the_paper():
    for name, grid in json.loads((GOLDEN / "scan_orders.json").read_text()).items():
        assert scan_order(name, 16).argsort().view(16, 16).tolist() == grid

def test_target_embedding_tells_permutations_apart(model):
    """The paper's Fig. 3: two orders that share their first tokens but not the cell to predict."""
    first, second = torch.arange(16), torch.arange(16)
    second[4], second[5] = 5, 4
    tokens = TOKENS[:1].repeat(2, 1)
    logits = model(tokens, LABELS[:1].repeat(2), torch.stack([first, second]))
    assert (logits[0, 4] - logits[1, 4]).abs().max() > 1e-2
    assert torch.allclose(logits[0, :4], logits[1, :4], atol=1e-6)
    with torch.no_grad():
        model.target_aware_pos_embed.zero_()
    logits = model(tokens, LABELS[:1].repeat(2), torch.stack([first, second]))
    assert torch.allclose(logits[0, 4], logits[1, 4], atol=1e-6)

def test_model_is_causal(model):
    """Changing the token at slot i leaves the predictions up to slot i alone."""
    before = model(TOKENS, LABELS, ORDERS)
    changed = TOKENS.clone()
    changed[torch.arange(3), ORDERS[:, 5]] += 1
    after = model(changed % 32, LABELS, ORDERS)
    assert torch.allclose(before[:, :6], after[:, :6], atol=1e-6)
    assert ((before[:, 6:] - after[:, 6:]).abs().amax(-1) > 1e-5).all()

# ---- Sampling ------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale, power", [(0, 0), (3.0, 1.0)])
@pytest.mark.parametrize("target_aware", [True, False])
def test_fast_paths_give_the_same_tokens(scale, power, target_aware):
    """49 tokens: more than the slots whose adaLN outputs are held at a time."""
    model = closed_form(RAR(dataclasses.replace(TINY, grid_size=7, target_aware=target_aware)))
    model.eval()
    labels, uniforms, orders = torch.arange(100) % 11, torch.rand(100, 49), sample_orders(
        100, 49, 0.5)
    known = torch.full((100, 49), -1)
    known[:50].scatter_(1, orders[:50, :9], torch.randint(32, (50, 9)))
    slow, cached, fast = (
        generate(model, labels, scale, power, 0.9, uniforms=uniforms, orders=orders, known=known,
                 predict=predict) for predict in (rar.all_slots, rar.newest_slot, rar.tabled_slots))
    assert (cached == slow).all(dim=1).float().mean() >= 0.99
    assert (fast == slow).all(dim=1).float().mean() >= 0.99
    assert all((tokens == known)[known >= 0].all() for tokens in (slow, cached, fast))

@pytest.fixture
def without_values(monkeypatch):
    """A mode in which tensors have no values: whoever reads one back from its device fails."""
    for name in ("trunc_normal_", "kaiming_uniform_", "uniform_", "normal_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    return FakeTensorMode()

@pytest.mark.parametrize("predict", [rar.newest_slot, rar.tabled_slots])
def test_nothing_is_read_back_while_tokens_are_drawn(predict, without_values):
    """A CUDA graph can't hold it."""
    with without_values, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model = RAR(TINY).eval()
        cells, row = torch.zeros(4, 16, dtype=torch.long), torch.zeros(8, dtype=torch.long)
        drawn = rar.draw_slots(model, ((1.5,) * 16, 1.0, predict), torch.arange(5), row, cells,
                               torch.zeros(4, 16), cells)
        assert drawn.shape == (4, 16)
        with pytest.raises(RuntimeError):  # this one does look
            generate(model, row, 0, 0, 1.0)

def test_nothing_is_read_back_in_an_update(without_values):
    """A GPU would be idle meanwhile."""
    config = dataclasses.replace(TINY, batch=6, micro_batch=4, dropout=0.1)
    batch = [without_values.from_tensor(x) if torch.is_tensor(x) else x
             for x in rar.draw_batch(np.zeros((100, 17), np.uint16), config, 0)]
    autocast = torch.autocast("cpu", torch.bfloat16)
    with without_values:
        model = RAR(config)
        line = rar.train_step(model, rar.make_optimizer(model, config), config, batch, 0, autocast)
        with pytest.raises(RuntimeError):
            float(line["loss"])

def test_generated_tokens_follow_the_model(model):
    """Teacher-forced on its own sample, the model must cumulate to the uniforms that were used."""
    uniforms = torch.rand(3, 16)
    tokens = generate(model, LABELS, 0, 0, 1.0, uniforms=uniforms, orders=ORDERS)
    cumulative = torch.softmax(model(tokens, LABELS, ORDERS), -1).cumsum(-1)    # (B, T, V)
    drawn = tokens.gather(1, ORDERS)[..., None]
    upper = cumulative.gather(-1, drawn)[..., 0]
    lower = F.pad(cumulative, (1, 0)).gather(-1, drawn)[..., 0]
    assert ((lower <= uniforms + 1e-5) & (uniforms <= upper + 1e-5)).all()

def test_image_does_not_depend_on_its_batch(model):
    uniforms = rar.image_uniforms(7, range(20), 16)
    assert torch.equal(rar.image_uniforms(7, [13], 16)[0], uniforms[13])
    assert not torch.equal(rar.image_uniforms(8, [13], 16)[0], uniforms[13])
    labels = torch.arange(20) % 10
    together = generate(model, labels, 2.0, 1.0, 1.0, uniforms=uniforms)
    apart = torch.cat([generate(model, labels[i:i + 5], 2.0, 1.0, 1.0, uniforms=uniforms[i:i + 5])
                       for i in range(0, 20, 5)])
    assert torch.equal(together, apart)

def test_known_tokens_come_first(model):
    known = torch.full((3, 16), -1).scatter_(1, ORDERS[:, :6], 7)
    with pytest.raises(ValueError, match="first"):
        generate(model, LABELS, 0, 0, 1.0, orders=ORDERS.flip(1), known=known)

def test_draw():
    logits = torch.log(torch.tensor([[0.2, 0.0, 0.5, 0.3, 0.0]]))
    draws = [rar.draw(logits, 1.0, torch.tensor([u])).item()
             for u in (0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-24)]
    assert draws == [0, 0, 2, 2, 3, 3]  # never a token of probability 0, at neither end
    assert rar.draw(logits, 0, None).item() == 2

# ---- Training ------------------------------------------------------------------------------------

def test_draw_batch_is_a_function_of_seed_and_step():
    config = dataclasses.replace(TINY, batch=8, label_dropout=0.5, seed=3, steps=10)
    rows = np.arange(20 * 17).reshape(20, 17).astype(np.uint16)
    batch = rar.draw_batch(rows, config, 6)
    for again, first in zip(rar.draw_batch(rows, config, 6), batch):
        assert np.array_equal(again, first)
    halves = [rar.draw_batch(rows, config, 6, rank, 2) for rank in (0, 1)]
    for first, second, whole in zip(*halves, batch):
        assert np.array_equal(np.concatenate([first, second]) if np.ndim(whole) else first, whole)
    tokens, labels, orders, _, r = batch
    assert r == pytest.approx(0.6)
    assert (tokens[:, 0] == tokens[:, 1] - 1).all() and tokens.shape == orders.shape == (8, 16)
    assert 0 < (labels == 10).sum() < 8
    # every pass visits every row once, in its own order, whatever the batch
    visits = np.concatenate([rar.draw_batch(rows, config, step)[0][:, 0] for step in range(5)])
    assert len(set(visits[:20])) == len(set(visits[20:])) == 20
    assert visits[:20].tolist() != visits[20:].tolist()

def test_micro_batches_add_up_to_the_batch(model):
    rows = np.concatenate([LABELS[:, None], TOKENS], axis=1).astype(np.uint16).repeat(4, axis=0)
    weights = []
    for micro_batch in (8, 3):
        config = dataclasses.replace(TINY, batch=8, steps=10, warmup=0.0, micro_batch=micro_batch)
        model = closed_form(RAR(TINY))
        line = rar.train_step(model, rar.make_optimizer(model, config), config,
                              rar.draw_batch(rows, config, 0), 0,
                              torch.autocast("cpu", enabled=False))
        weights.append(model.lm_head.weight.detach())
        assert line["r"] == 1 and line["lr"] == config.lr
    assert torch.allclose(*weights, atol=2e-6)

# ---- Pictures and their tokens -------------------------------------------------------------------

def shapes(count):
    return tok.to_float(np.stack([tok.draw_shape(i) for i in range(count)]))

def test_shapes():
    images = shapes(40)
    assert images.shape == (40, 3, 32, 32) and torch.equal(images, shapes(40))
    ground = torch.tensor(tok.GROUND).view(3, 1, 1) / 255
    ink = ((images - ground).abs().sum(1) > 0.3).float().mean(dim=(1, 2))
    assert ink.min() > 0.03 and ink.max() < 0.7
    assert (images[:, :, 0, 0] - ground[:, 0, 0]).abs().max() < 0.01    # nothing is cut off there
    assert len(tok.SHAPES) == 10 and len({tok.draw_shape(i).tobytes() for i in range(40)}) == 40

def test_patch_tokenizer(tmp_path):
    images = shapes(400)
    tokenizer = tok.PatchTokenizer.fit(images[:300], grid_size=8, codebook_size=64)
    assert (tokenizer.image_size, tokenizer.grid_size, tokenizer.codebook_size) == (32, 8, 64)
    tokens = tokenizer.encode(images[300:])
    assert tokens.shape == (100, 64) and tokens.dtype == torch.int64
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == images[300:].shape and 0 <= decoded.min() and decoded.max() <= 1
    error = ((decoded - images[300:]) ** 2).mean()
    pasted = F.fold(tokenizer.codebook[tokens].transpose(1, 2), 32, 4, stride=4)
    assert error < 0.9 * ((pasted - images[300:]) ** 2).mean() and error < 0.006
    # a token is its own patch, row by row: moving the picture by a patch moves the tokens
    moved = tokenizer.encode(images[:5].roll(4, dims=-1))
    assert torch.equal(moved.view(5, 8, 8), tokenizer.encode(images[:5]).view(5, 8, 8).roll(1, -1))
    tok.write_tensors(tmp_path / "t.pt", tokenizer.state_dict())
    again = tok.load(tmp_path / "t.pt")
    assert torch.equal(again.encode(images), tokenizer.encode(images))
    assert torch.equal(again.decode(tokens), decoded)

def test_pixels_are_truncated():
    images = torch.tensor([0.0, 0.999, 1.0, 1.7, -0.2, 0.5]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert tok.to_uint8(images)[0, 0, :, 0].tolist() == [0, 254, 255, 255, 0, 127]

def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with tok.replacing(path) as beside:
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
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "waiting")}
            for line in lines]

def at_step(monkeypatch, number, do):
    """Have the next training do something before update `number`."""
    step_of = rar.train_step

    def train_step(network, optimizer, config, batch, step, autocast):
        if step + 1 == number:
            do()
        return step_of(network, optimizer, config, batch, step, autocast)

    monkeypatch.setattr(rar, "train_step", train_step)

def test_train_sample_eval(workplace, capsys):
    assert rar.main(TRAIN) == 0
    run = workplace / "runs" / "shapes-tiny"
    assert "next: python rar.py sample\n" in capsys.readouterr().out
    assert {path.name for path in run.iterdir()} == {
        "config.json", "tokenizer.pt", "weights.pt", "log.jsonl", "checkpoint-0000003.pt",
        "checkpoint-0000004.pt", "checkpoint-0000006.pt", "step-000003.png", "step-000004.png",
        "step-000006.png", ".lock"}
    with Image.open(run / "step-000006.png") as picture:
        assert picture.size == (10 * 68 + 4, 5 * 68 + 4 + 22)
    lines = log_of(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["r"] for line in lines] == pytest.approx([1, 1, 1, 1, 1 / 3, 0])
    assert [line["passes"] for line in lines] == pytest.approx([0.16 * n for n in range(1, 7)])
    assert lines[0].keys() == {"step", "loss", "accuracy", "r", "lr", "gradient_norm", "passes"}
    assert lines[-1].keys() - lines[0].keys() == {
        "final_order_bits", "final_order_accuracy", "random_order_bits", "random_order_accuracy"}
    assert rar.main(TRAIN) == 0
    assert "is finished: 6 updates" in capsys.readouterr().out

    assert rar.main(["sample", "--count", "13", "--out", "a.png"]) == 0
    assert rar.main(["sample", "--count", "13", "--out", "b.png", "--seed", "2"]) == 0
    assert Path("a.png").read_bytes() != Path("b.png").read_bytes()
    assert rar.main(["sample", "--classes", "heart", "3", "--order", "spiral_in"]) == 0
    assert rar.main(["sample", "--weights", "runs/shapes-tiny/weights.pt", "--scale", "0"]) == 0
    assert (run / "samples-1.png").exists() and (run / "samples-2.png").exists()

    capsys.readouterr()
    assert rar.main(["eval", "--weights", str(run / "weights.pt"), "--data", "shapes"]) == 0
    printed = capsys.readouterr().out
    assert f"{lines[-1]['final_order_bits']:.3f} bits/token in raster order" in printed
    assert f"{lines[-1]['random_order_bits']:.3f} bits/token in random order" in printed

@pytest.mark.parametrize("stop_after", [1, 4, 5])
def test_resume_is_exact(workplace, monkeypatch, capsys, stop_after):
    assert rar.main([*TRAIN, "--out", "whole"]) == 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    with monkeypatch.context() as patch:
        at_step(patch, stop_after, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert rar.main([*TRAIN, "--out", "parts"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert log_of(Path("parts"))[-1]["step"] == stop_after
    assert rar.main([*TRAIN, "--out", "parts"]) == 0
    whole, parts = (tok.read_tensors(f"{run}/weights.pt") for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert log_of(Path("whole")) == log_of(Path("parts"))
    assert Path("whole/step-000006.png").read_bytes() == Path("parts/step-000006.png").read_bytes()

def test_checkpoints(workplace, capsys):
    """The last two are kept, every Nth, and the one where annealing begins; each can be sampled; an
    unreadable one falls back to the one before."""
    train = [*TRAIN, "--save-every", "1", "--steps", "12", "--anneal", "0.2", "0.75",
             "--keep-every"]
    assert rar.main([*train, "5"]) == 0
    run = Path("runs/shapes-tiny")
    assert sorted(int(p.stem[11:]) for p in run.glob("check*")) == [3, 5, 10, 11, 12]
    weights = (run / "weights.pt").read_bytes()
    assert log_of(run)[2]["r"] == 1 > log_of(run)[3]["r"]
    for name in ("weights.pt", "checkpoint-0000012.pt"):
        assert rar.main(["sample", "--weights", str(run / name), "--out", name[0] + ".png"]) == 0
    assert Path("w.png").read_bytes() == Path("c.png").read_bytes()
    assert rar.main(["sample", "--weights", str(run / "checkpoint-0000003.pt")]) == 0
    for number, any_order in ((3, True), (5, False), (12, False)):  # annealing begins at 2.4
        path = run / f"checkpoint-{number:07}.pt"
        config = rar.load_model(path, {}, torch.device("cpu"))[1]
        assert (config.anneal == (1, 1)) == any_order
    for name in ("checkpoint-0000012.pt", "checkpoint-0000011.pt"):
        (run / name).write_bytes((run / name).read_bytes()[:-500])
    capsys.readouterr()
    assert rar.main([*train, "4"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("going on from the checkpoint before") == 2
    assert [line["step"] for line in log_of(run)] == list(range(1, 13))
    assert (run / "weights.pt").read_bytes() == weights
    for path in run.glob("checkpoint*"):
        path.write_bytes(b"")
    assert "checkpoint-0000003.pt" in refused([*train, "4"], capsys)

@pytest.mark.parametrize("wrong", ["loss", "gradient_norm"])
def test_a_loss_that_is_no_number_stops_the_run(workplace, capsys, monkeypatch, wrong):
    step_of = rar.train_step

    def diverged(network, optimizer, config, batch, step, autocast):
        line = step_of(network, optimizer, config, batch, step, autocast)
        return line | {wrong: line[wrong] * (math.nan if step == 4 else 1)}

    monkeypatch.setattr(rar, "train_step", diverged)
    error = refused([*TRAIN, "--log-every", "6"], capsys, last_line=True)
    assert "update 5" in error and "checkpoint-0000004.pt" in error and "--lr" in error
    assert sorted(p.name for p in Path("runs/shapes-tiny").glob("check*"))[-1].endswith("4.pt")
    state = tok.read_tensors("runs/shapes-tiny/weights.pt")
    assert all(tensor.isfinite().all() for tensor in state.values())

def test_a_compiled_model_learns_the_same(workplace, monkeypatch):
    """Losses and weights up to rounding, and weights of the same names. (The compiler's last stage,
    which takes most of its time, is left out.)"""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for out, more in (("plain", []), ("compiled", ["--compile"])):
        assert rar.main([*TRAIN, "--dropout", "0", "--steps", "2", "--out", out, *more]) == 0
    losses = [[line["loss"] for line in log_of(Path(out))] for out in ("plain", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    plain, compiled = (tok.read_tensors(f"{out}/weights.pt") for out in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    assert all(torch.allclose(plain[name], compiled[name], atol=1e-4) for name in plain
               if "k_norm.bias" not in name)

def test_recompute_gives_the_same_gradients():
    config = dataclasses.replace(TINY, dropout=0.3)
    gradients = []
    for recompute in (False, True):
        model = closed_form(RAR(dataclasses.replace(config, recompute=recompute))).train()
        torch.manual_seed(5)
        rar.training_loss(model, TOKENS, LABELS, ORDERS)[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))

def test_resume_after_a_kill(workplace, monkeypatch):
    """Killed without warning after a checkpoint: what was logged since is made and logged again."""
    assert rar.main([*TRAIN, "--out", "whole"]) == 0

    def kill():
        raise SystemError("as if killed")

    with monkeypatch.context() as patch:
        at_step(patch, 6, kill)
        with pytest.raises(SystemError):
            rar.main([*TRAIN, "--out", "parts"])
    assert log_of(Path("parts"))[-1]["step"] == 5
    with open("parts/log.jsonl", "a") as log:
        log.write('5\n{"step": "x"}\n[]\n{"step": 5, "lo')
    assert rar.main([*TRAIN, "--out", "parts"]) == 0
    assert log_of(Path("whole")) == log_of(Path("parts"))

def test_who_comes_second_starts_again(workplace, monkeypatch, capsys):
    """Between looking for checkpoints and holding the folder another process may train here."""
    open_data = tok.open_data

    def while_another_trains(*arguments, **options):
        monkeypatch.setattr(tok, "open_data", open_data)
        assert rar.main(TRAIN) == 0
        return open_data(*arguments, **options)

    monkeypatch.setattr(tok, "open_data", while_another_trains)
    assert "start again" in refused([*TRAIN, "--codebook-size", "30"], capsys, last_line=True)
    assert tok.load("runs/shapes-tiny/tokenizer.pt").codebook_size == 32  # not overwritten either
    assert len(log_of(Path("runs/shapes-tiny"))) == 6

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

@pytest.mark.parametrize("arguments, named", [
    (["train", "--data", "nowhere"], "--data nowhere"),
    (["train", "--model", "RAR-M"], "--model"),
    (["train", "--order", "zigzag"], "--order zigzag"),
    (["train", "--device", "tpu"], "--device"),
    (["train", "--device", "mps" if torch.cuda.is_available() else "cuda"], "--device"),
    (["train", "--device", "cpu", "--precision", "tf32"], "--precision tf32"),
    (["train", "--steps", "0"], "--steps"),
    (["train", "--steps", "many"], "--steps"),
    (["train", "--batch", "-3"], "--batch"),
    (["train", "--lr", "nan"], "--lr"),
    (["train", "--seed", "-1"], "--seed"),
    (["train", "--heads", "3"], "--heads 3"),
    (["train", "--depth", "0"], "--depth"),
    (["train", "--dropout", "1.0"], "--dropout"),
    (["train", "--anneal", "0.0", "1.5"], "--anneal"),
    (["train", "--anneal", "0.9", "0.1"], "--anneal"),
    (["train", "--widht", "64"], "there is no --widht; see python rar.py train --help"),
    (["train", "--data", "file"], "--data file: is not a folder"),
    (["train", "--out", "file/run"], "file/run"),
    (["train", "--grid-size", "5"], "--grid-size 5"),
    (["train", "--codebook-size", "60000"], "--codebook-size 60000"),
    (["sample"], "python rar.py train"),
    (["sample", "--weights", "missing.pt"], "missing.pt"),
    (["sample", "--weights", "file"], "file is not a PyTorch file of tensors"),
    (["eval", "--weights", "file"], "file"),
    (["eval", "--weights", "missing"], "missing"),
    ([], "train"),
    (["draw"], "draw"),
])
def test_mistakes(workplace, capsys, arguments, named):
    Path("file").write_text("not a checkpoint")
    assert named in refused(arguments, capsys)
    assert os.listdir(workplace) == ["file"]

def test_mistakes_with_a_run(workplace, capsys):
    assert rar.main([*TRAIN, "--out", "runs/a"]) == 0
    run = Path("runs/a")
    before = sorted(os.listdir(run))
    for arguments, named in [
            (["sample", "--count", "0"], "--count"),
            (["sample", "--count", "1.5"], "--count"),
            (["sample", "--temperature", "-1"], "--temperature"),
            (["sample", "--scale", "inf"], "--scale"),
            (["sample", "--classes", "10"], "--classes 10"),
            (["sample", "--classes", "unicorn"], "unicorn"),
            (["sample", "--order", "zigzag"], "error: --order zigzag"),  # and nothing before it
            (["sample", "--keep", "0,0,16,32"], "--keep the picture"),
            (["sample", "--seed", "-1"], "--seed"),
            (["sample", "--out", "runs/a/weights.pt/x.png"], "--out"),
            (["sample", "--out", "nowhere/samples"], "with a / at its end"),
            (["sample", "--out", "x.png", "--count", "20000"], "too many for a grid"),
            (["sample", "--model", "RAR-B"], "--pretrained"),
            (["sample", "--pretrained"], "--model RAR-B | RAR-L"),
            (["sample", "--pretrained", "--model", "RAR-M"], "--model"),
            (["sample", "--out", "picture.gif"], "--out"),
            (["sample", "--weights", "runs/a/tokenizer.pt"], "tokenizer.pt"),
            (["sample", "--coun", "3"], "--coun"),
            (["eval", "--data", "nowhere"], "--data nowhere"),
            ([*TRAIN, "--out", "runs/a", "--lr", "0.001"], "--lr")]:
        assert named in refused(arguments, capsys)
    assert sorted(os.listdir(run)) == before

    weights = (run / "weights.pt").read_bytes()
    (run / "weights.pt").write_bytes(weights[:-100])
    assert "weights.pt" in refused(["sample"], capsys)
    assert rar.main([*TRAIN, "--out", "runs/a"]) == 0  # which makes weights.pt anew
    assert (run / "weights.pt").read_bytes() == weights
    for number in (3, 4):
        (run / f"checkpoint-000000{number}.pt").unlink()
    newest = run / "checkpoint-0000006.pt"
    newest.rename("away")
    assert "no checkpoint" in refused([*TRAIN, "--out", "runs/a"], capsys)
    Path("away").rename(newest)
    tokenizer = (run / "tokenizer.pt").read_bytes()
    tok.write_tensors(run / "tokenizer.pt", tok.PatchTokenizer(4, 8, 16).state_dict())
    assert "grid_size 4" in refused(["sample"], capsys)
    (run / "tokenizer.pt").unlink()
    assert "tokenizer.pt" in refused(["sample"], capsys)
    assert "tokenizer.pt" in refused(["eval"], capsys)
    (run / "tokenizer.pt").write_bytes(tokenizer[:500])
    assert "tokenizer.pt" in refused(["sample"], capsys)
    state = tok.read_tensors(newest)
    state["model"]["lm_head.weight"] = torch.zeros(7, 7)
    tok.write_tensors(newest, state)
    Path("runs/a/config.json").write_text(
        Path("runs/a/config.json").read_text().replace('"steps": 6', '"steps": 7'))
    arguments = [*TRAIN, "--out", "runs/a", "--steps", "7"]
    assert "lm_head.weight is (7, 7)" in refused(arguments, capsys)
    (run / "config.json").write_text("{")
    assert "config.json" in refused(arguments, capsys)

# ---- Photographs ---------------------------------------------------------------------------------

def paint(path, size=(70, 80), mode="RGB", seed=0, **options):
    """A picture file of smooth colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    Image.fromarray(coarse).resize(size, Image.BICUBIC).convert(mode).save(path, **options)

@pytest.fixture
def photographs(workplace):
    """Two classes of 20 pictures, and SMALL: flags to train on them in seconds."""
    for i in range(40):
        paint(workplace / "photos" / ("cats", "dogs")[i % 2] / f"{i:02}.png", seed=i)
    return workplace / "photos"

SMALL = ["train", "--data", "photos", "--grid-size", "8", "--codebook-size", "64", "--width", "32",
         "--depth", "1", "--heads", "2", "--mlp-width", "64", "--steps", "4", "--save-every", "2",
         "--log-every", "1", "--device", "cpu"]

def test_center_crop_and_ten_crop():
    x, y = np.meshgrid(np.arange(120), np.arange(90))
    picture = Image.fromarray(np.stack([x * 2, y * 2, x + y], -1).astype(np.uint8))
    assert np.array_equal(tok.center_crop(picture, 90), np.asarray(picture)[:, 15:105])
    whole, crops = tok.center_crop(picture, 88), tok.crop(picture, 80, "ten")
    assert crops.shape == (10, 80, 80, 3)
    for crop, (top, left) in zip(crops, [(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)]):
        assert np.array_equal(crop, whole[top:top + 80, left:left + 80])
    for crop, (top, left) in zip(crops[5:], [(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)]):
        assert np.array_equal(crop, whole[:, ::-1][top:top + 80, left:left + 80])
    assert tok.center_crop(picture, 20).shape == (20, 20, 3)

@needs_golden
def test_crops_are_the_authors():
    def sha(pixels):
        return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()

    for name, expected in json.loads((GOLDEN / "crops.json").read_text()).items():
        picture = Image.open(GOLDEN.parent / "data/imagenet/train" / name.split()[0])
        if "tiled 3x2" in name:
            tiles = np.tile(np.asarray(picture.convert("RGB")), (expected["size"][1] //
                            picture.height, expected["size"][0] // picture.width, 1))
            picture = Image.fromarray(tiles)
        assert list(picture.size) == expected["size"]
        assert sha(tok.center_crop(picture, 256)) == expected["center256_sha256"]
        assert [sha(crop) for crop in tok.crop(picture, 256, "ten")] == expected["tencrop_sha256"]

def test_shortcut_of_the_published_tokenizer_skips_the_input():
    block = tok.ResidualBlock(32, 64)
    x = torch.randn(1, 32, 4, 4)
    with torch.no_grad():
        block.conv2.weight.zero_()
    assert (block(x) == 0).all()

def test_published_tokenizer():
    with torch.device("meta"):
        tokenizer = tok.MaskGITVQGAN()
    assert sum(p.numel() for p in tokenizer.parameters()) == 54_515_587
    if GOLDEN.exists():
        shapes = {name: list(tensor.shape) for name, tensor in tokenizer.state_dict().items()}
        assert shapes == json.loads((GOLDEN / "tokenizer_keys.json").read_text())

@needs_golden
def test_published_tokenizer_on_photographs(tmp_path):
    tokenizer = closed_form(tok.MaskGITVQGAN())
    tok.write_tensors(tmp_path / "released.bin", tokenizer.state_dict())
    tokenizer = tok.load(tmp_path / "released.bin")
    golden = np.load(GOLDEN / "tokenizer.npz")
    images = tok.to_float(golden["images"])
    with torch.no_grad():
        output = torch.cat([tokenizer.encoder(image[None]) for image in images])
        assert output.std().item() == pytest.approx(float(golden["encoder_output_std"]), rel=1e-5)
        assert np.allclose(output[0, :8], golden["encoder_output_0"], rtol=1e-4, atol=1e-4)
        codes = torch.from_numpy(golden["codes"]).long()
        assert torch.equal(tokenizer.encode(images), codes)
        cells = tokenizer.quantize.embedding(codes[:1]).transpose(1, 2).unflatten(2, (16, 16))
        decoded = tokenizer.decoder(cells).numpy()
    assert np.abs(decoded - golden["decoded_unclamped"][:1]).max() < 2.5e-3

def test_pictures_in_the_wild(tmp_path, monkeypatch):
    folder = tmp_path / "wild"
    for name, mode, options in [("cmyk.jpg", "CMYK", {}), ("grey.png", "L", {}),
                                ("palette.png", "P", {}), ("clear.png", "RGBA", {}),
                                ("tiff.tif", "RGB", {}), ("web.webp", "RGB", {})]:
        paint(folder / name, mode=mode, **options)
    deep = np.linspace(0, 65535, 70 * 80).reshape(80, 70).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    frames = [Image.new("RGB", (70, 80), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, which the authors' code does not do either
    paint(folder / "turned.jpg", exif=exif)
    paint(folder / "pixel.png", size=(1, 1))
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not a picture")
    paint(folder / "thread.png", size=(1, 9000))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    paint(folder / "bomb.png", size=(120, 120))
    os.mkfifo(folder / "pipe.png")
    (folder / "loop").symlink_to(folder)
    (folder / "notes.md").write_text("not read at all")

    files = tok.pictures_in(folder)
    read = dict(zip((file.name for file in files), tok.read_pictures(files, "center", 64)))
    refused = {"zero.jpg", "text.jpg", "bomb.png", "pipe.png", "thread.png"}
    assert {name for name, item in read.items() if isinstance(item, str)} == refused
    assert set(read) - refused == {
        "cmyk.jpg", "grey.png", "palette.png", "clear.png", "tiff.tif", "web.webp", "deep.png",
        "moving.gif", "turned.jpg", "pixel.png"}
    assert all(read[name].shape == (1, 64, 64, 3) for name in set(read) - refused)
    assert read["moving.gif"][0, 0, 0].tolist() == [255, 0, 0]
    assert 100 < read["deep.png"].mean() < 155 and read["deep.png"].max() > 230

def test_train_on_photographs(photographs, capsys):
    assert rar.main(SMALL) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == ("photos (2 classes, not ImageNet's 1000): --model small, 64 pixels, "
                     "--tokenizer patch, --crops flip")
    run = Path("runs/photos-small")
    with Image.open(run / "step-000004.png") as picture:
        assert picture.size[1] == 22 + 4 + 7 * 68  # originals, reconstructions, five samples
    files = {path.name: path.stat().st_mtime_ns for path in Path("runs/tokens").iterdir()}
    assert len(files) == 4
    rows = np.load(next(Path("runs/tokens").glob("photos-train-*.npy")))
    assert rows.shape == (2 * 38, 65) and rows.dtype == np.uint16
    assert rows[:, 0].tolist() == [0] * 38 + [1] * 38  # 20 of 40 are cats; 19 and 39 are held out
    assert rar.main(["eval"]) == 0
    assert rar.main(["sample", "--classes", "dogs", "--count", "2"]) == 0
    assert files == {p.name: p.stat().st_mtime_ns for p in Path("runs/tokens").iterdir()}

    # another picture, another token file; a damaged one is named
    paint(photographs / "cats" / "new.png", seed=99)
    assert rar.main([*SMALL, "--out", "again"]) == 0
    assert len(list(Path("runs/tokens").iterdir())) > 4
    newest = max(Path("runs/tokens").glob("*train*.npy"), key=lambda path: path.stat().st_mtime)
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 1
    newest.write_bytes(damaged)
    assert newest.name in refused([*SMALL, "--out", "third"], capsys)

def test_eval_of_weights_from_elsewhere(photographs, capsys):
    """Weights and a tokenizer, and nothing else of a run: as with the released files."""
    assert rar.main(SMALL) == 0
    own = log_of(Path("runs/photos-small"))[-1]["final_order_bits"]
    Path("other").mkdir()
    Path("runs/photos-small/weights.pt").rename("other/rar.bin")
    arguments = ["eval", "--weights", "other/rar.bin", "--data", "photos"]
    assert "other/tokenizer.pt" in refused(arguments, capsys)
    Path("runs/photos-small/tokenizer.pt").rename("other/tokenizer.pt")
    assert rar.main(arguments) == 0
    assert f"{own:.3f} bits/token in raster order" in capsys.readouterr().out
    assert "10 classes, the model 2" in refused([*arguments[:3], "--data", "shapes"], capsys)

def test_fine_tuning(photographs, capsys):
    assert rar.main([*SMALL, "--out", "first"]) == 0
    for i in range(20):
        paint(photographs / "birds" / f"{i}.png", seed=100 + i)
    assert rar.main([*SMALL, "--out", "second", "--init", "first"]) == 0
    assert "knows 2 classes, not 3" in capsys.readouterr().out
    assert "nowhere" in refused([*SMALL, "--out", "third", "--init", "nowhere"], capsys)
    assert "--init first: its width is 32" in refused(
        [*SMALL, "--out", "third", "--init", "first", "--width", "64"], capsys)
    assert not Path("third").exists()

def test_val_folder_and_layout_mistakes(workplace, capsys):
    assert "DIR/train/CLASS" in refused(["train", "--data", "imagenet"], capsys)
    Path("empty").mkdir()
    assert "no class folders" in refused(["train", "--data", "empty"], capsys)
    Path("empty/cats").mkdir()
    assert "no pictures" in refused(["train", "--data", "empty"], capsys)
    paint(Path("d/train/cats/a.png"))
    paint(Path("d/val/dogs/a.png"))
    assert "named as one of train/" in refused(["train", "--data", "d"], capsys)
    paint(Path("d/val/cats/a.png"))
    train, held_out = tok.labelled_pictures("d")
    assert train == [(0, Path("d/train/cats/a.png"))]
    assert held_out == [(0, Path("d/val/cats/a.png"))]
    assert "--crops zoom" in refused(["train", "--data", "d", "--crops", "zoom"], capsys)

def test_encoding_goes_on_after_a_kill(photographs, monkeypatch):
    rar.main([*SMALL, "--out", "run", "--steps", "1"])
    arguments = ["encode", "photos", "--tokenizer", "run", "--crops", "ten", "--out"]
    assert tok.main([*arguments, "whole.npy"]) == 0
    monkeypatch.setattr(tok, "BLOCK_SECONDS", -1)  # a block for every picture
    blocks = []

    def killed(path, value):
        if len(blocks) == 7:
            raise SystemError("as if killed")
        blocks.append(value)
        write_json(path, value)

    write_json = tok.write_json
    with monkeypatch.context() as patch:
        patch.setattr(tok, "write_json", killed)
        with pytest.raises(SystemError):
            tok.main([*arguments, "parts.npy"])
    assert not Path("parts.npy").exists()
    assert tok.main([*arguments, "parts.npy"]) == 0
    assert Path("parts.npy").read_bytes() == Path("whole.npy").read_bytes()
    assert np.load("parts.npy").shape == (400, 65)

def test_unreadable_pictures_are_skipped_but_not_many(photographs, capsys):
    for i in range(10):
        (photographs / "cats" / f"x{i}.png").write_text("broken")
    rar.main([*SMALL, "--out", "run"])
    printed = capsys.readouterr()
    assert "pictures were skipped" in printed.out and "x3.png" in printed.out + printed.err
    for i in range(10, 14):
        (photographs / "cats" / f"x{i}.png").write_text("broken")
    assert "can't be read" in refused(
        [*SMALL, "--out", "run2"], capsys, last_line=True)

def test_the_authors_token_file(workplace, capsys):
    random = np.random.default_rng(0)
    rows = [(int(c), t.tolist()) for c, t in zip(random.integers(1000, size=60),
                                                random.integers(1024, size=(60, 256)))]
    lines = [json.dumps({"class_id": c, "tokens": t}) for c, t in rows]
    Path("maskgitvq.jsonl").write_text("\n".join(lines) + "\n")
    found = tok.import_jsonl("maskgitvq.jsonl", Path("tokens.npy"), 256)
    assert found.tolist() == [[c, *t] for c, t in rows]
    assert tok.class_names("maskgitvq.jsonl")[999] == "999"
    Path("spaced.jsonl").write_text("\n".join([" " + line for line in lines]))  # any other JSON
    assert np.array_equal(tok.import_jsonl("spaced.jsonl", Path("spaced.npy"), 256), found)
    start = '{"class_id": 1, "tokens": ['
    for wrong in (start + "1," * 254 + ",1]}", start.replace("1", "1000") + "1," * 255 + "1]}",
                  start + "1, 2]}", start + "1024," * 255 + "1]}", '{"class_id": 1}', "{", "[]", "",
                  '{"class_id": 1, "tokens": "x"}'):
        Path("bad.jsonl").write_text("\n".join([*lines[:7], wrong]) + "\n")
        with pytest.raises(tok.UserError, match="bad.jsonl: line 8"):
            tok.import_jsonl("bad.jsonl", Path("bad.npy"), 256)
    assert "--tokenizer" in refused(["train", "--data", "maskgitvq.jsonl", "--tokenizer", "patch",
                                     "--depth", "1"], capsys)

def test_reconstruct(photographs, capsys):
    assert rar.main([*SMALL, "--out", "run", "--steps", "1"]) == 0
    pictures = ["photos/cats/00.png", "photos/dogs/01.png"]
    assert tok.main(["reconstruct", *pictures, "--tokenizer", "run", "--out", "recon.png"]) == 0
    with Image.open("recon.png") as picture:
        assert picture.size == (4 * 68 + 4, 68 + 4 + 22)
    assert tok.main(["reconstruct", "photos", "--tokenizer", "run", "--out", "recon.npz"]) == 0
    assert np.load("recon.npz")["arr_0"].shape == (40, 64, 64, 3)
    for arguments, named in [(["nowhere", "--out", "a.png"], "nowhere"),
                             ([pictures[0], "--out", "a.jpg"], "--out"),
                             ([pictures[0], "--out", "a.png", "--tokenizer", "b.bin"], "b.bin")]:
        assert named in refused(["reconstruct", "--tokenizer", "run", *arguments], capsys,
                                main=tok.main)

# ---- Released files and many samples -------------------------------------------------------------

@pytest.fixture
def hub(workplace, monkeypatch):
    """A model hub on this machine. hub["name"] = bytes is what it has; "cut" says to break off in
    the middle of a file, "lie" to send half of it as if it were all; `asked` lists the requests."""

    class Hub(dict):
        mode, asked = None, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            hub.asked.append(self.path)
            body = hub.get(self.path.split("/")[-1])
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if body is not None:
                self.wfile.write(body if hub.mode is None else body[:len(body) // 2])

        def log_message(self, *args):
            pass

    hub, server = Hub(), ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("TORCH_HOME", str(workplace / "torch"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()

def test_fetch(hub, workplace):
    torch.save({"x": torch.arange(100_000)}, "x.bin")
    good = Path("x.bin").read_bytes()
    right, checkpoints = hashlib.sha256(good).hexdigest(), workplace / "torch/hub/checkpoints"

    def fails(sha256=None):
        with pytest.raises(tok.UserError, match="put it at .*x.bin") as error:
            tok.fetch_released("owner/name", "x.bin", sha256)
        assert os.listdir(checkpoints) == [] and "\n" not in str(error.value)
        return str(error.value)

    assert "404" in fails()
    hub["x.bin"] = b"<html>Please log in</html>"
    assert "not a PyTorch file" in fails()
    assert "invalid hash" in fails(right)
    hub["x.bin"], hub.mode = good, "cut"
    assert f"broke after {len(good) // 2}" in fails()
    assert "cannot download" in fails(right)
    hub.mode = None
    assert "invalid hash" in fails("0" * 64)
    left = checkpoints / "x.bin.123.part.456.partial"  # by a process that was killed long ago
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    hub.asked.clear()
    path = tok.fetch_released("owner/name", "x.bin", right)
    assert path.read_bytes() == good and os.listdir(checkpoints) == ["x.bin"]
    assert set(hub.asked) == {"/owner/name/resolve/main/x.bin"}
    hub.clear()
    assert tok.fetch_released("owner/name", "x.bin", right) == path  # once is enough
    path.unlink()
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
    assert "refused" in fails()

def test_pretrained(hub, capsys, monkeypatch):
    """From two files on a hub to a grid, with the settings of the model's size."""
    config = dataclasses.replace(PRESETS["RAR-XL"], width=32, depth=1, heads=2, mlp_width=32,
                                 num_classes=5)
    monkeypatch.setitem(PRESETS, "RAR-XL", config)
    torch.manual_seed(0)
    torch.save(RAR(config).state_dict(), "model")
    torch.save(closed_form(tok.MaskGITVQGAN()).state_dict(), "tokenizer")
    hub["rar_xl.bin"] = Path("model").read_bytes()
    hub[tok.RELEASED] = Path("tokenizer").read_bytes()
    sample = ["sample", "--model", "RAR-XL", "--pretrained", "--count", "2", "--out", "x.png"]
    assert "invalid hash" in refused(sample, capsys, last_line=True)
    released = hashlib.sha256(hub["rar_xl.bin"]).hexdigest()
    monkeypatch.setitem(tok.RELEASED_MODELS, "RAR-XL", ("rar_xl.bin", released))
    assert rar.main(sample) == 0
    hub.clear()
    assert rar.main([*sample[:-1], "y.npz"]) == 0
    settings = json.loads(tok.zipfile.ZipFile("y.npz").comment)
    assert (settings["scale"], settings["power"], settings["temperature"]) == (6.9, 1.5, 1.02)
    images = np.load("y.npz")["arr_0"]
    assert images.shape == (2, 256, 256, 3)
    with Image.open("x.png") as grid:
        assert np.array_equal(np.asarray(grid)[26:282, 4:260], images[0])
    assert rar.main(["sample", "--weights", "model", "--count", "1", "--out", "z.npz"]) == 0
    assert np.array_equal(np.load("z.npz")["arr_0"][0], images[0])

def test_weights_survive_the_round_trip(trained):
    model, config, folder = rar.load_model(None, {}, torch.device("cpu"))
    written = torch.load("runs/shapes-tiny/weights.pt", weights_only=True)
    assert written.keys() == dict(model.named_parameters()).keys()  # a state dict, nothing else
    tok.write_tensors("again.pt", model.state_dict())
    tokenizer = closed_form(tok.MaskGITVQGAN())
    tok.write_tensors("tokenizer.pt", tokenizer.state_dict())
    for state, again in ((written, tok.read_tensors("again.pt")),
                         (tokenizer.state_dict(), tok.load("tokenizer.pt").state_dict())):
        assert state.keys() == again.keys()
        assert all(torch.equal(state[name], again[name]) for name in state)

def test_weights_that_do_not_fit(workplace, capsys):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (Path("executed"),)

    good = RAR(TINY).state_dict()
    without = {name: tensor for name, tensor in good.items() if name != "cls_token"}
    cases = {"missing": (without, "cls_token is missing"),
             "another": (good | {"extra": torch.zeros(2)}, "extra is (2,), expected none"),
             "shape": (good | {"cls_token": torch.zeros(3)}, "cls_token is (3,), expected (1, 1"),
             "no_tensor": (good | {"cls_token": [1]}, "cls_token is ()"),
             "no_names": ([1, 2], "no dictionary"),
             "other": ({"a": torch.zeros(1)}, "no weights of"),
             "module": (torch.nn.Linear(2, 2), "not a PyTorch file of tensors"),
             "hostile": ({"model": Hostile()}, "not a PyTorch file of tensors")}
    for name, (value, message) in cases.items():
        torch.save(value, f"{name}.bin")
        error = refused(["sample", "--weights", f"{name}.bin"], capsys)
        assert f"{name}.bin" in error and message in error
    assert not Path("executed").exists()

NPZ = ["sample", "--count", "23", "--device", "cpu"]

@pytest.fixture
def trained(workplace):
    assert rar.main(TRAIN) == 0

def test_npz(trained, capsys):
    model, config, folder = rar.load_model(None, {"seed": 1}, torch.device("cpu"))
    tokenizer = tok.tokenizer_of(config, folder)
    for micro_batch in ("8", "5"):
        arguments = ["--micro-batch", micro_batch, "--out", f"{micro_batch}.npz"]
        assert rar.main([*NPZ, *arguments]) == 0
    assert "23 of 23 pictures to make" in capsys.readouterr().out
    with np.load("8.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        images = file["arr_0"]
    assert images.shape == (23, 32, 32, 3) and images.dtype == np.uint8
    assert (np.load("5.npz")["arr_0"] != images).any(axis=(1, 2, 3)).mean() <= 0.01
    # image i is of class i % 10, and truncated
    order = torch.arange(64)
    tokens = generate(model, torch.arange(23) % 10, config.scale, config.power, config.temperature,
                      uniforms=rar.image_uniforms(1, range(23), 64), orders=order)
    assert np.array_equal(tok.to_uint8(tokenizer.decode(tokens)), images)
    assert rar.main([*NPZ, "--out", "new/folder/"]) == 0
    assert len(os.listdir("new/folder")) == 23
    assert np.array_equal(np.asarray(Image.open("new/folder/000022.png")), images[22])
    assert rar.main([*NPZ, "--out", "newer/still/x.npz"]) == 0
    for name in ("8.npz", "new/folder"):
        assert "other settings" in refused([*NPZ, "--seed", "2", "--out", name], capsys)

def test_sampling_goes_on_after_a_kill(trained, capsys, monkeypatch):
    """Ctrl-C after every other batch: no picture is made twice, and the file is the same."""
    assert rar.main([*NPZ, "--micro-batch", "4", "--out", "whole.npz"]) == 0
    put, made = tok.Samples.put, []

    def interrupted(self, numbers, images):
        put(self, numbers, images)
        made.extend(numbers.tolist())
        if len(made) in (8, 16):
            raise KeyboardInterrupt

    monkeypatch.setattr(tok.Samples, "put", interrupted)
    arguments = [*NPZ, "--micro-batch", "4", "--out", "parts.npz"]
    for _ in range(2):
        assert rar.main(arguments) == 130
        assert not Path("parts.npz").exists()
    assert "other settings" in refused([*arguments, "--scale", "2"], capsys)
    Path("parts.npz.parts/000003.png").write_bytes(b"half")
    assert rar.main(arguments) == 0
    assert sorted(made) == sorted([*range(23), 3])
    assert Path("parts.npz").read_bytes() == Path("whole.npz").read_bytes()
    assert not Path("parts.npz.parts").exists()
    assert rar.main(arguments) == 0  # it is there: nothing is made
    assert len(made) == 24

def test_no_room_for_the_samples(trained, capsys, monkeypatch):
    usage = tok.shutil.disk_usage(".")
    monkeypatch.setattr(tok.shutil, "disk_usage", lambda folder: usage._replace(free=100_000))
    assert "GB" in refused([*NPZ, "--out", "x.npz"], capsys)

def launch(*arguments, processes=2, patch=""):
    """Run a command in processes of its own, two of which talk by gloo, after a patch of Python."""
    Path("patched.py").write_text(f"""
import os, signal, sys, threading, time, rar, tokenizer as tok
tok.SHAPES_TRAIN, tok.SHAPES_HELD_OUT = 100, 20
{patch}
sys.exit((tok if "encode" in sys.argv else rar).main())
""")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    places = {"PYTHONPATH": str(Path(rar.__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else ()), "patched.py", *arguments],
        capture_output=True, text=True, timeout=120, env=os.environ | places)

def test_sampling_with_two_processes(trained):
    assert rar.main([*NPZ, "--micro-batch", "4", "--out", "one.npz"]) == 0
    result = launch(*NPZ, "--micro-batch", "4", "--out", "two.npz")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("23 pictures") == 2  # rank 0 alone talks: to make, made
    one, two = (np.load(name)["arr_0"] for name in ("one.npz", "two.npz"))
    assert (one != two).any(axis=(1, 2, 3)).mean() <= 0.01

def test_a_process_that_fails_ends_all(workplace):
    """One of two processes is given another learning rate."""
    result = launch(*TRAIN, patch="sys.argv += ['--lr', '0.1'] * tok.RANK")
    assert result.returncode != 0
    assert "rank 1: error: this process has other flags than rank 0" in result.stderr
    assert not Path("runs/shapes-tiny/log.jsonl").exists()

def test_training_with_two_processes_and_then_one(workplace):
    """Ten updates of batch 16, or of 8 in each of two processes, the second of which is stopped
    after five: the same losses and weights, orders, dropped labels and dropout included."""
    train = [*TRAIN, "--steps", "10", "--micro-batch", "8", "--out"]
    assert rar.main([*train, "one"]) == 0
    result = launch(*train, "two", patch="""
step_of = rar.train_step
def train_step(network, optimizer, config, batch, step, autocast):
    assert len(batch[0]) == 8
    if step == 4 and tok.RANK == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return step_of(network, optimizer, config, batch, step, autocast)
rar.train_step = train_step
""")
    assert "two is saved, the same command goes on" in result.stderr
    assert log_of(Path("two"))[-1]["step"] == 5
    assert rar.main([*train, "two"]) == 0
    for one, two in zip(log_of(Path("one")), log_of(Path("two")), strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    one, two = (tok.read_tensors(f"{run}/weights.pt") for run in ("one", "two"))
    for name in one:
        if "k_norm.bias" not in name:  # has no gradient but noise
            assert torch.allclose(one[name], two[name], rtol=0, atol=1e-5), name

def test_draws_follow_the_softmax(model):
    """20,000 first and second tokens of one class against the model's own probabilities."""
    uniforms = rar.image_uniforms(11, range(20_000), 16)
    labels = torch.full((500,), 4)
    with torch.no_grad():
        tokens = torch.cat([generate(model, labels, 0, 0, 1.3, uniforms=part)[:, :2]
                            for part in uniforms.split(500)])
        logits = model(torch.arange(32)[:, None].expand(32, 16), labels[:32],
                       torch.arange(16).expand(32, 16)) / 1.3
    first, second = logits[0, 0].softmax(-1), logits[:, 1].softmax(-1)  # (V,), (first V, second V)
    for drawn, expected in ((tokens[:, 0], first), (tokens[:, 1], first @ second)):
        expected = expected.double() / expected.double().sum() * 20_000
        counts = torch.bincount(drawn, minlength=32)
        assert expected.min() > 5 and scipy.stats.chisquare(counts, expected).pvalue > 1e-3

def test_bench(workplace, capsys, monkeypatch):
    """Figures that hang together: nothing is faster than its bound by much, or takes no time."""
    step_of = rar.train_step

    def train_step(network, optimizer, config, batch, step, autocast):
        assert len(batch[0]) == config.batch == config.micro_batch == 2
        return step_of(network, optimizer, config, batch, step, autocast)

    monkeypatch.setattr(rar, "train_step", train_step)
    assert rar.main(["bench", "--model", "tiny", "--batch", "2", "--json", "b.json"]) == 0
    result = json.loads(Path("b.json").read_text())
    assert "training_utilisation" in capsys.readouterr().out
    images = result["sampling_images_per_second"]
    assert result["sampling_tokens_per_second"] == pytest.approx(64 * images)
    assert 0 < result["decoded_images_per_second"] < images
    assert 0 < result["share_of_bound"] < 2 and 0 < result["training_utilisation"] < 2

# ---- Any order -----------------------------------------------------------------------------------

def test_random_orders_of_images():
    config = dataclasses.replace(TINY, order="random", seed=3)
    orders = rar.image_orders(config, range(50))
    assert (orders.sort(dim=1).values == torch.arange(16)).all() and len(orders.unique(dim=0)) == 50
    assert torch.equal(rar.image_orders(config, [7])[0], orders[7])
    fixed = rar.image_orders(dataclasses.replace(config, order="spiral_in"), [0, 1])
    assert torch.equal(fixed, scan_order("spiral_in", 4).expand(2, 16))

def test_gif(trained, capsys):
    arguments = [*NPZ, "--order", "random", "--out"]
    assert rar.main([*arguments, "x.png.parts/"]) == 0  # as if stopped when all were drawn
    capsys.readouterr()
    assert rar.main([*arguments, "x.png", "--gif"]) == 0
    assert "to make" not in capsys.readouterr().out
    with Image.open("x.gif") as animation, Image.open("x.png") as grid:
        assert animation.n_frames == 65 and animation.size == grid.size
        arrived = []
        for frame in (0, 10, 64):
            animation.seek(frame)
            pixels = np.asarray(animation.convert("RGB")).astype(int)
            arrived.append((abs(pixels - 127).max(axis=2) > 3).mean())
        assert arrived[0] < arrived[1] < arrived[2]
        assert abs(pixels - np.asarray(grid)).mean() < 6  # but for the palette of a GIF

def test_complete(trained, capsys):
    """Given tokens stay, pixels that are hidden don't leak into them, and only weights for any
    order complete any region."""
    tokenizer = tok.load("runs/shapes-tiny/tokenizer.pt")
    picture = np.array(tok.draw_shape(4))
    Image.fromarray(picture).save("a.png")
    picture[16:] = 255 - picture[16:]
    Image.fromarray(picture).save("b.png")
    known, images = tok.known_tokens("a.png", (3, 0, 32, 17), tokenizer)
    assert torch.equal(known, tok.known_tokens("b.png", (3, 0, 32, 17), tokenizer)[0])
    kept = known.view(8, 8) >= 0
    assert kept[:4, 1:].all() and kept.sum() == 28  # whole cells alone
    assert torch.equal(images[1][:, :16, 4:], images[0][:, :16, 4:])
    assert (images[1][:, 16:] == 0.5).all()

    any_order = ["--weights", "runs/shapes-tiny/checkpoint-0000003.pt"]
    complete = ["sample", "--complete", "a.png", "--classes", "cross", "--count", "3"]
    assert rar.main([*complete, "--keep", "3,16,32,32", *any_order, "--out", "x.png", "--gif"]) == 0
    with Image.open("x.png") as grid:
        assert grid.size == (5 * 68 + 4, 68 + 4 + 22)  # the picture, what is kept, and three
    model, config, _ = rar.load_model(any_order[1], {}, torch.device("cpu"))
    assert config.anneal == (1, 1)
    autocast = tok.choose_precision(torch.device("cpu"), "float32")
    for _, tokens in rar.sample_tokens(model, torch.tensor([4, 4]), config, autocast, known=known):
        assert (tokens[:, known >= 0] == known[known >= 0]).all()
    orders = rar.image_orders(config, [0, 1], known)
    assert (known[orders[:, :28]] >= 0).all() and orders[0, :2].tolist() == [1, 2]

    assert rar.main([*complete, "--keep", "0,0,32,16"]) == 0  # rows from the top: raster will do
    assert "come first" in refused([*complete, "--keep", "0,16,32,32"], capsys)
    assert "come first" in refused([*complete, "--keep", "0,0,32,16", "--order", "random"], capsys)
    for arguments, named in [(["--keep", "1,2,3"], "--keep"), ([], "--keep"),
                             (["--keep", "0,0,3,3"], "0 of 64 cells"),
                             (["--keep", "0,0,32,32"], "64 of 64 cells")]:
        assert named in refused([*complete, *arguments], capsys)
    complete[2] = "nothing.png"
    assert "nothing.png" in refused([*complete, "--keep", "0,0,32,16"], capsys)
    assert "--gif" in refused([*NPZ, "--gif", "--out", "x.npz"], capsys)

# ---- fid.py --------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file of weights for Inception that depend on nothing but names, shapes and a sine."""
    state = fid.Inception().state_dict()
    names = sorted(name for name in state if not name.endswith("num_batches_tracked"))
    for i, name in enumerate(names):
        shape = tuple(state[name].shape)
        m = np.arange(math.prod(shape), dtype=np.int64) + 7919 * (i + 1)
        v = math.sqrt(2) * np.sin(2 * math.pi * ((m * m % 999983) * m % 999983) / 999983)
        v = v.reshape(shape)
        if len(shape) > 1:
            v = v - v.mean(axis=tuple(range(1, len(shape))), keepdims=True) * (shape[1] > 3)
            v *= (12 if name == "fc.weight" else 1.7) / math.sqrt(math.prod(shape[1:]))
        elif name.endswith(("bn.weight", "running_var")):
            v = 1 + 0.2 * v
        elif name.endswith("bn.bias"):
            v = 0.2 * v - 0.2
        else:
            v *= 2 if name == "fc.bias" else 0.2
        state[name] = torch.from_numpy(v.astype(np.float32))
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    tok.write_tensors(path, {name: state[name] for name in names})
    return str(path)

def synthetic(numbers, second=False):
    """Pictures (N, 256, 256, 3) from integers alone."""
    y, x, c = np.meshgrid(np.arange(256), np.arange(256), np.arange(3), indexing="ij")
    pictures = []
    for n in numbers:
        t = x * (1 + n % 5) + y * (1 + n // 5 % 7) + (x * y * (n % 3) >> 6)
        t += ((x - 128) ** 2 + (y - 16 * (n % 16)) ** 2) * (n % 4) // 64
        t = (t + 61 * n + 85 * c * (1 + n % 2)) % 510
        p = np.minimum(t, 510 - t)
        pictures.append(p * 15 // 16 + 4 if second else p)
    return np.stack(pictures).astype(np.uint8)

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
    pictures = {"synth8": synthetic(range(2))}
    if GOLDEN.exists():
        photographs = np.load(GOLDEN / "fid/images8.npz")["arr_0"]
        pictures |= {"real8": photographs[:2], "real0_sub4_64px": photographs[:1, ::4, ::4],
                     "real0_224x256": photographs[:1, 16:240]}
    for name, pixels in pictures.items():
        images = fid.resize(torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float())
        if name == "synth8":
            assert images[0, 0, 0, 13:27:13].tolist() == pytest.approx([11.130435, 22.26087])
            assert images[1, 2].double().sum().item() == pytest.approx(12005707.648, rel=1e-6)
        if GOLDEN.exists():
            golden = np.load(GOLDEN / "fid/resize.npz")[name + "__tf1_sub"]
            assert far(images[:, :, ::13, ::13], golden) < 1e-6

def test_inception(inception):
    network = fid.load_inception(inception, torch.device("cpu"))
    outputs = [x.numpy() for x in network(torch.from_numpy(synthetic(range(8))))]
    assert [x.shape for x in outputs] == [(8, 2048), (8, 2023), (8, 1008)]
    expected = [  # the norms of pictures 0 and 5, and some of their numbers
        ((11.616622924804688, 17.455352783203125), 2047, (0.3331587016582489, 0.14948564767837524)),
        ((22.162837982177734, 28.826803207397460), 500, (0.9000805020332336, 0.0)),
        ((86.64056396484375, 118.87308502197266), 1, (-2.7035014629364014, -0.6439145803451538))]
    for x, (norms, place, values) in zip(outputs, expected):
        assert np.linalg.norm(x[[0, 5]], axis=1) == pytest.approx(norms, rel=2e-5)
        assert x[[0, 5], place] == pytest.approx(values, abs=1e-4)
    if GOLDEN.exists():
        golden = np.load(GOLDEN / "fid/features8.npz")
        photographs = np.load(GOLDEN / "fid/images8.npz")["arr_0"]
        outputs = {"synth8": outputs, "real8": network(torch.from_numpy(photographs))}
        for name, each in outputs.items():
            for x, kind in zip(each, ("pool", "spatial", "logits_unbiased")):
                assert far(x, golden[f"{name}__tf64__{kind}"]) < 1e-4

def test_inceptions_weights(inception, workplace, monkeypatch, capsys):
    state = tok.read_tensors(inception)
    if GOLDEN.exists():
        keys = json.loads((GOLDEN / "fid/keys_shapes.json").read_text())["keys"]
        assert [(key["key"], key["shape"]) for key in keys] == \
            [(name, list(state[name].shape)) for name in sorted(state)]
        for key in keys:
            assert state[key["key"]].double().sum().item() == pytest.approx(key["sum"], abs=1e-4)
    fetched = []
    monkeypatch.setattr(tok, "fetch", lambda *arguments: fetched.append(arguments) or inception)
    fid.load_inception(None, torch.device("cpu"))
    assert fetched == [(fid.URL, fid.SHA256)] and fid.SHA256[:8] in fid.URL

    counters = {name.replace("running_var", "num_batches_tracked"): torch.tensor(7)
                for name in state if name.endswith("running_var")}
    assert len(counters) == 94
    tok.write_tensors("counted.pth", state | counters)
    fid.load_inception("counted.pth", torch.device("cpu"))
    np.save("some.npy", synthetic(range(4)))
    for change, named in [({"fc.weight": torch.zeros(1000, 2048)}, "fc.weight is (1000, 2048)"),
                          ({"AuxLogits.fc.bias": torch.zeros(1)}, "AuxLogits.fc.bias"),
                          ({"Mixed_7c.branch1x1.bn.bias": torch.full((320,), math.nan)}, "finite")]:
        tok.write_tensors("wrong.pth", state | change)
        assert named in refused(["some.npy", "--weights", "wrong.pth"], capsys, main=fid.main)
    del state["Mixed_6b.branch_pool.conv.weight"]
    tok.write_tensors("wrong.pth", state)
    assert "Mixed_6b.branch_pool.conv.weight is missing" in refused(
        ["some.npy", "--weights", "wrong.pth"], capsys, main=fid.main)

def test_frechet_distance():
    def distance(*arrays):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return fid.frechet_distance(*(np.asarray(array, dtype=float) for array in arrays))

    a, b = np.array([4.0, 9, 0, 1]), np.array([1.0, 25, 16, 0])
    assert distance(a, np.diag(a), b, np.diag(b)) == pytest.approx(
        ((a - b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)
    u, v = np.eye(4)[0], np.full(4, 0.5)  # rank 1: the root of u u^T v v^T has the trace |u v|
    assert distance(0 * u, np.outer(u, u), 0 * u, 9 * np.outer(v, v)) == pytest.approx(
        1 + 9 - 2 * 3 * 0.5, rel=1e-12)
    for seed in range(10):  # rank 4 of 30
        x = np.random.default_rng(seed).normal(size=(5, 30))
        assert 0 <= distance(x.mean(0), np.cov(x.T), x.mean(0), np.cov(x.T)) < 1e-6
    if GOLDEN.exists():
        cases = np.load(GOLDEN / "fid/frechet_cases.npz")
        for name in {key.split("__")[0] for key in cases}:
            arrays = [cases[f"{name}__{key}"] for key in ("mu1", "sigma1", "mu2", "sigma2")]
            assert distance(*arrays) == pytest.approx(float(cases[name + "__fd"]), rel=1e-7,
                                                      abs=1e-6 * np.trace(arrays[1]))

def test_moments():
    """Means are a million times larger than deviations; the batches are of several sizes."""
    x = 1e6 + np.random.default_rng(0).normal(size=(50, 70))
    moments = fid.Moments()
    for part in torch.from_numpy(x).split([1, 20, 29]):
        moments.add(part)
    mean, covariance = moments.result()
    assert mean == pytest.approx(x.mean(0), rel=1e-14)
    assert np.abs(covariance - np.cov(x, rowvar=False)).max() < 1e-8

def test_inception_score():
    assert fid.inception_score(torch.zeros(9, 1008)) == pytest.approx(1)
    assert fid.inception_score(1000 * torch.eye(1008)[:12]) == pytest.approx(12)
    # half of the samples surely of class 0, half undecided between 0 and 1: entropies in nats
    logits = torch.full((10, 1008), -1000.0)
    logits[:, 0] = 0
    logits[5:, 1] = 0
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert fid.inception_score(logits) == pytest.approx(math.exp(entropy - math.log(2) / 2))

def test_precision_recall():
    line = torch.tensor([[0.0], [1], [2], [3]])  # on a line: radii 3, 2, 2, 3
    points = torch.tensor([[-3.0], [-3.01], [4], [6], [6.01]])
    precision, recall = fid.precision_recall(points, line)
    assert precision == 3 / 5  # the border belongs to the ball
    assert recall == 1  # the radius of -3 alone is 9
    assert fid.precision_recall(line, points) == [recall, precision]

    def brute_force(samples, reference):
        def inside(points, centres):
            to_centres = ((centres[:, None] - centres[None]) ** 2).sum(-1)
            radii = np.sort(to_centres, axis=1)[:, 3]
            return (((points[:, None] - centres[None]) ** 2).sum(-1) <= radii).any(1).mean()
        return [inside(samples, reference), inside(reference, samples)]

    random = np.random.default_rng(0)
    a = random.normal(size=(150, 40)).astype(np.float32)
    b = (1.1 * random.normal(size=(90, 40)) + 0.1).astype(np.float32)
    a[:20], b[4:9] = b[:20], b[4]  # twins of the other set, and of the own one: radius 0
    expected = brute_force(a.astype(np.float64), b.astype(np.float64))
    assert 0.2 < min(expected) and max(expected) < 0.95
    for block in (1, 7, 90, 1000):
        assert fid.precision_recall(torch.from_numpy(a), torch.from_numpy(b), block=block) == \
            pytest.approx(expected, abs=1e-12)
    points, centres = fid.on_grid(torch.from_numpy(a) * 1e3, torch.from_numpy(b) * 1e3)
    assert far(points / points.norm(), a / np.linalg.norm(a)) < 1e-6
    whole = torch.cat(list(fid.squared_distances(points, centres, 1000)))
    assert torch.equal(whole, whole.round()) and whole.max() < 2**53
    for block in (1, 7, 90):  # exactly, not almost, the same
        assert torch.equal(whole, torch.cat(list(fid.squared_distances(points, centres, block))))

def test_all_five_scores(inception, workplace, capsys):
    """64 pictures against 64: the figures are those of torch-fidelity's layers in float64 and of
    ADM's formulas, without rounding."""
    np.savez("reference.npz", synthetic(range(64)))
    np.savez_compressed("samples.npz", synthetic(range(64, 128), second=True))
    arguments = ["--weights", inception, "--device", "cpu", "--json", "scores.json"]
    assert fid.main(["samples.npz", "reference.npz", *arguments, "--save-stats", "s.npz"]) == 0
    printed = capsys.readouterr().out
    scores = json.loads(Path("scores.json").read_text())
    assert scores == {
        "fid": pytest.approx(9.19818432430159, rel=1e-4),
        "sfid": pytest.approx(363.04030863001503, rel=1e-4),
        "is": pytest.approx(1.3587984779713944, rel=1e-4),
        "precision": 0.84375, "recall": 0.515625, "samples": 64, "reference": 64}
    for line in ("fid         9.198", "sfid        363.04", "is          1.358",
                 "precision   0.8438", "recall      0.5156", "fewer than the 2,048 features"):
        assert line in printed
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
    with np.load("s.npz") as saved:
        assert {name: saved[name].shape for name in saved.files} == {
            "mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023),
            "count": ()}

class Cheap(torch.nn.Module):
    """In place of Inception: a fixed map of a picture that is shrunk to 4x4; fewer features."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = torch.nn.Linear(48, 64 + 32 + 1008)
        self.batches = []

    @torch.no_grad()
    def forward(self, pixels):
        assert pixels.dtype == torch.uint8
        self.batches.append(len(pixels))
        images = pixels.permute(0, 3, 1, 2).float() / 255
        return self.fc(F.adaptive_avg_pool2d(images, 4).flatten(1)).split([64, 32, 1008], 1)

@pytest.fixture
def cheap(workplace, monkeypatch):
    network = Cheap()
    monkeypatch.setattr(fid, "load_inception", lambda path, device: network)
    monkeypatch.setattr(fid, "KINDS", {"pool": ("mu", "sigma", 64),
                                       "spatial": ("mu_s", "sigma_s", 32)})
    return network

def scores_of(*arguments):
    assert fid.main([*arguments, "--json", "scores.json", "--device", "cpu"]) == 0
    return json.loads(Path("scores.json").read_text())

def same(scores, expected):
    return scores.keys() == expected.keys() and all(
        scores[name] == (value and pytest.approx(value, rel=1e-6))
        for name, value in expected.items())

def test_inputs_of_fid(cheap, capsys):
    """The same pictures in every form, on either side, give the same scores."""
    random = np.random.default_rng(0)
    ours, theirs = (random.integers(0, high, (40, 64, 64, 3)).astype(np.uint8)
                    for high in (256, 200))
    for name, pictures in (("a", ours), ("b", theirs)):
        np.savez(name + ".npz", pictures, np.arange(40))  # ADM's files hold labels, too: arr_1
        np.savez_compressed(name + "-small.npz", pictures)
        np.save(name + ".npy", pictures)
        for i, pixels in enumerate(pictures):
            folder = Path(name) / str(i // 10)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i:02}.png")
    expected = scores_of("a.npz", "b.npz")
    assert expected["fid"] > 0.01 and None not in expected.values()
    printed = capsys.readouterr().out
    assert "64x64 and not the usual 256x256" in printed and "no " not in printed
    for a, b, options in [("a-small.npz", "b.npy", []), ("a", "b", []),
                          ("a.npy", "b-small.npz", ["--batch", "7"]), ("a", "b", ["--crop", "64"])]:
        assert same(scores_of(a, b, *options), expected)
    assert cheap.batches.count(7) == 10 and cheap.batches.count(5) == 2

    # statistics, by themselves or beside the pictures, in ADM's names or as saved here
    assert fid.main(["b.npz", "--save-stats", "b-stats.npz"]) == 0
    assert "no fid, sfid, precision, recall: there is no reference" in capsys.readouterr().out
    stored = scores_of("a.npz", "b-stats.npz")
    assert same(stored, expected | {"precision": None, "recall": None})
    assert "no precision, recall: b-stats.npz holds no pictures" in capsys.readouterr().out
    with np.load("b-stats.npz") as archive:
        statistics = {name: archive[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez("adm.npz", arr_0=theirs[:20], **statistics)
    used = scores_of("a.npz", "adm.npz")
    assert used["fid"] == pytest.approx(expected["fid"], rel=1e-6) and used["reference"] == 20
    np.savez("few.npz", theirs[:20])
    assert used["recall"] == scores_of("a.npz", "few.npz")["recall"] is not None
    del statistics["mu_s"], statistics["sigma_s"]
    np.savez("pool.npz", **statistics)
    assert scores_of("a.npz", "pool.npz")["sfid"] is None
    printed = capsys.readouterr().out
    assert "no sfid, precision, recall: pool.npz holds no pictures, only" in printed

    cheap.batches.clear()  # no picture is looked at that is not needed
    assert scores_of("b-stats.npz", "b-stats.npz", "--metrics", "fid,sfid")["fid"] == 0
    assert not cheap.batches
    chosen = scores_of("a.npz", "adm.npz", "--metrics", "is,fid")
    assert {name for name in fid.METRICS if chosen[name] is not None} == {"fid", "is"}
    assert sum(cheap.batches) == 40

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
    tok.write_tensors("tokenizer.pt", tok.PatchTokenizer(8, 8, 16).state_dict())

    class Perfect:  # tokens are pixels
        image_size = 64
        encode = decode = lambda self, images: images

        def to(self, device):
            return self

    monkeypatch.setattr(tok, "find_tokenizer", lambda path: Perfect())
    monkeypatch.setattr(tok, "to_uint8", lambda images: np.rint(
        images.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8))
    assert tok.main(["reconstruct", "photos", "--out", "recon.npz"]) == 0
    assert scores_of("recon.npz", "photos", "--crop", "64") == {
        "fid": pytest.approx(0, abs=1e-6), "sfid": pytest.approx(0, abs=1e-6),
        "is": pytest.approx(scores_of("photos", "--crop", "64")["is"], rel=1e-6),
        "precision": 1, "recall": 1, "samples": 45, "reference": 45}
    error = refused(["recon.npz", "photos"], capsys, main=fid.main)
    assert "00.png is 70x80, but" in error and "cats/more/0.jpg 90x100" in error
    assert "--crop 256" in error

def spoil(path, name="arr_0.npy"):
    """Flip one bit in the middle of a member of an .npz file."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(name)
    content = bytearray(Path(path).read_bytes())
    content[member.header_offset + 60 + member.compress_size // 2] ^= 1
    Path(path).write_bytes(content)

@pytest.mark.parametrize("arguments, named", [
    (["missing.npz"], "missing.npz"),
    (["float.npy"], "float.npy: it holds float32 (5, 8, 8, 3)"),
    (["first.npy"], "first.npy: it holds uint8 (5, 3, 8, 8), channels first"),
    (["fortran.npy"], "Fortran"),
    (["objects.npy"], "objects.npy: it holds object"),
    (["others.npz"], "others.npz: neither pictures (arr_0) nor statistics (mu, sigma), but ['im"),
    (["one.npz"], "one.npz: scores need at least 4 pictures, and there are 1"),
    (["none.npy"], "there are 0"),
    (["empty"], "empty: scores need"),
    (["half.npz"], "half.npz"),
    (["half.npy"], "half.npy: 932 bytes of pixels, not 960"),
    (["header.npy"], "header.npy"),
    (["spoilt.npz"], "spoilt.npz: Bad CRC-32"),
    (["spoilt-small.npz"], "spoilt-small.npz: Bad CRC-32"),
    (["notes.txt"], "notes.txt: neither a whole .npz file"),
    (["pipe.npz"], "pipe.npz"),
    (["unreadable"], "unreadable/3.png"),
    (["good.npy", "missing"], "missing"),
    (["good.npy", "width.npz"], "width.npz: mu is (768,)"),
    (["good.npy", "nan.npz"], "nan.npz: sigma_s holds NaN"),
    (["good.npy", "objects.npz"], "objects.npz: Object arrays"),
    (["good.npy", "half-stats.npz"], "half-stats.npz: "),
    (["good.npy", "spoilt-stats.npz"], "spoilt-stats.npz: "),
    (["stats.npz"], "no is: stats.npz holds no pictures"),
    (["good.npy", "stats.npz", "--metrics", "fid,recall"], "no recall: stats.npz"),
    (["good.npy", "--metrics", "fid"], "no fid: there is no reference"),
    (["good.npy", "--metrics", "fid,speed"], "--metrics speed: choose from fid,sfid,is"),
    (["good.npy", "--crop", "8"], "--crop 8"),
    (["good.npy", "--batch", "0"], "--batch"),
    (["good.npy", "--save-stats", "good.npy"], "good.npy is there already"),
    (["good.npy", "--json", "empty"], "empty is there already"),
    (["good.npy", "--json", "notes.txt/a.json"], "notes.txt/a.json"),
    (["stats.npz", "stats.npz", "--save-stats", "x.npz"], "--save-stats: stats.npz"),
    ([], "samples"),
])
def test_mistakes_with_fid(cheap, capsys, arguments, named):
    pictures = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    np.save("good.npy", pictures)
    np.save("float.npy", pictures.astype(np.float32))
    np.save("first.npy", np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
    np.save("fortran.npy", np.asfortranarray(pictures))
    np.save("objects.npy", np.array([{}, None], dtype=object))
    np.save("none.npy", pictures[:0])
    np.savez("others.npz", images=pictures)
    np.savez("one.npz", pictures[:1])
    np.savez("spoilt.npz", pictures)
    noise = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3)).astype(np.uint8)
    np.savez_compressed("spoilt-small.npz", noise)  # larger than what zipfile reads at once
    Path("half.npz").write_bytes(Path("spoilt.npz").read_bytes()[:700])
    Path("half.npy").write_bytes(Path("good.npy").read_bytes()[:-28])
    Path("header.npy").write_bytes(Path("good.npy").read_bytes()[:40])
    Path("notes.txt").write_text("hello")
    Path("empty").mkdir()
    os.mkfifo("pipe.npz")
    for i in range(5):
        paint(Path(f"unreadable/{i}.png"))
    Path("unreadable/3.png").write_text("broken")
    np.savez("width.npz", mu=np.zeros(768), sigma=np.eye(768))
    np.savez("objects.npz", mu=np.array([None] * 64), sigma=np.zeros(1))
    np.savez("half-stats.npz", mu=np.zeros(64))
    np.savez("stats.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez("nan.npz", mu_s=np.zeros(32), sigma_s=np.full((32, 32), np.nan))
    np.savez_compressed("spoilt-stats.npz", mu=np.arange(64.0), sigma=np.eye(64))
    for name, member in (("spoilt", "arr_0"), ("spoilt-small", "arr_0"), ("spoilt-stats", "mu")):
        spoil(name + ".npz", member + ".npy")
    before = sorted(os.listdir())
    assert named in refused(arguments, capsys, main=fid.main)
    assert sorted(os.listdir()) == before

# ---- Nothing lost --------------------------------------------------------------------------------
# RAR_KILLS=100 and RAR_FUZZ=600 (seconds) make long versions of the first and the last of these.

def same_tree(one, two):
    """Compare what two runs, or two files, hold; log lines but for the times in them."""
    if one.is_file():
        return one.read_bytes() == two.read_bytes()
    files = {path.name for path in one.iterdir()}
    assert files == {path.name for path in two.iterdir()}
    return log_of(one) == log_of(two) and all(
        (one / name).read_bytes() == (two / name).read_bytes()
        for name in files - {"log.jsonl", "config.json"})

def test_kills(photographs):
    """The real commands, killed at random moments and started again, give what an undisturbed run
    gives, to the byte."""
    kills, rng = int(os.environ.get("RAR_KILLS", 3)), random.Random(0)
    train = [*TRAIN, "--save-every", "1", "--keep-every", "1", "--micro-batch", "8", "--out"]
    sample = ["sample", "--weights", "train", "--count", "40", "--micro-batch", "4", "--out"]
    encode = ["encode", "photos", "--tokenizer", "train", "--crops", "flip", "--out"]
    commands = {("train", 1): [train, "train"], ("sample", 1): [sample, "x.npz"],
                ("encode", 1): [encode, "x.npy"], ("train", 2): [train, "train2"],
                ("sample", 2): [sample, "y.npz"]}
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for arguments, out in list(commands.values())[:3]:
        assert (tok if arguments is encode else rar).main([*arguments, out]) == 0
    counts = {}
    for k in range(kills):
        name, processes = list(commands)[k % (3 if kills < 10 else 5)]
        arguments, whole = commands[name, processes]
        whole = {"train2": "train", "y.npz": "x.npz"}.get(whole, whole)
        out = Path(f"{k}" + Path(whole).suffix)
        for again in range(rng.randint(1, 2) if kills >= 10 else 1):
            number = ["SIGKILL", "SIGTERM", "SIGKILL", "SIGINT"][k % 4]
            delay = rng.uniform(0, {"train": 1.2, "sample": 0.6, "encode": 0.8}[name] * processes)
            result = launch(*arguments, out, processes=processes, patch=f"""
tok.BLOCK_SECONDS = 0
def kill():
    time.sleep({delay})
    os.kill(os.getpid(), signal.{number})
if tok.RANK == {rng.randrange(processes)}:
    threading.Thread(target=kill, daemon=True).start()
""")
            counts[name, processes, number] = counts.get((name, processes, number), 0) + 1
            assert "Traceback" not in result.stderr or processes == 2, result.stderr
        assert (tok if name == "encode" else rar).main([*arguments, str(out)]) == 0
        if processes == 1:
            assert same_tree(Path(whole), out), (k, counts)
        elif name == "train":  # sums over processes are rounded otherwise
            one, two = (tok.read_tensors(Path(run, "weights.pt")) for run in (whole, out))
            assert all(torch.allclose(one[n], two[n], atol=1e-5) for n in one)
        else:
            one, two = (np.load(name)["arr_0"] for name in (whole, out))
            assert (one != two).any(axis=(1, 2, 3)).mean() <= 0.05
    torch.set_num_threads(torch_threads)
    print(sum(counts.values()), "kills:", counts)

def test_full_disk(workplace, monkeypatch, capsys):
    """Files may not grow beyond 30 kB from update 4 on: the checkpoint before that stays, and with
    room again the run ends as if nothing had been."""
    train = [*TRAIN, "--save-every", "2", "--out"]
    assert rar.main([*train, "whole"]) == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1])))
        try:
            error = refused([*train, "parts"], capsys, last_line=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot write" in error and "File too large" in error
    assert not list(Path("parts").glob("*.part"))
    assert tok.read_tensors("parts/checkpoint-0000003.pt")["updates"] == 3
    assert rar.main([*train, "parts"]) == 0
    assert same_tree(Path("whole"), Path("parts"))

def test_memory_and_cuda_errors(workplace, monkeypatch, capsys):
    """Out of memory names the flag to lower; what CUDA or NCCL report is shown as it is, also where
    it comes up while a file is written."""
    def fail(error):
        raise error

    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):
        at_step(monkeypatch, 2, lambda: fail(error))
        assert "--micro-batch" in refused(TRAIN, capsys, last_line=True)
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: fail(MemoryError()))
        assert "lower --batch" in refused(["bench", "--model", "tiny"], capsys, last_line=True)
    at_step(monkeypatch, 2, lambda: fail(RuntimeError("CUDA error: an illegal access")))
    with pytest.raises(RuntimeError, match="CUDA error"):
        rar.main([*TRAIN, "--out", "a"])
    at_step(monkeypatch, 2, lambda: monkeypatch.setattr(
        torch, "save", lambda *_: fail(RuntimeError("CUDA error: an illegal access"))))
    with pytest.raises(RuntimeError, match="CUDA error"):
        rar.main([*TRAIN, "--out", "b"])

def test_run_that_is_removed_midway(workplace, monkeypatch, capsys):
    at_step(monkeypatch, 5, lambda: shutil.rmtree("runs/shapes-tiny"))
    assert "has been removed" in refused(TRAIN, capsys, last_line=True)
    assert not Path("runs/shapes-tiny").exists()

def test_missing_permission(workplace, monkeypatch, capsys):
    assert rar.main([*TRAIN, "--steps", "4"]) == 0
    shutil.copytree("runs/shapes-tiny", "whole")
    workplace.chmod(0o755)
    for folder in (*workplace.parents, workplace):
        if folder.stat().st_uid == 0 and len(folder.parts) > 2:
            folder.chmod(0o755)
    Path("runs/shapes-tiny").chmod(0o555)
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)  # root may write everywhere
    try:
        for command in ([*TRAIN, "--steps", "4", "--log-every", "2"], ["sample"]):
            assert "can" in refused(command, capsys, last_line=True)
    finally:
        os.seteuid(user)
        Path("runs/shapes-tiny").chmod(0o755)
    Path("runs/shapes-tiny/.lock").unlink()
    assert all(same_tree(path, Path("runs/shapes-tiny", path.name))
               for path in Path("whole").glob("*.pt"))

def damaged(good, rng):
    """What may become of a file: 20 times cut short, 20 times with a byte changed."""
    for length in [0, 1, len(good) - 1, *(rng.randrange(len(good)) for _ in range(17))]:
        yield good[:length]
    for _ in range(20):
        place = rng.randrange(len(good))
        yield good[:place] + bytes([good[place] ^ rng.randrange(1, 256)]) + good[place + 1:]

def flat(value):
    """A value as bytes, to compare: tensors, arrays, and containers of them."""
    if isinstance(value, dict):
        return b"".join(str(key).encode() + flat(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return b"".join(flat(part) for part in value)
    if isinstance(value, torch.Tensor | np.ndarray):
        return np.ascontiguousarray(value).tobytes()
    return repr(value).encode()

def read_npz(path):
    side = fid.open_side(Path(path), None)
    return list(side.batches(4)) if side.batches else side.moments

READERS = {  # file: how it is read, and whether a change can go unnoticed
    "weights.pt": (lambda path: tok.read_weights(path)[0], False),
    "checkpoint-0000006.pt": (tok.read_tensors, False),
    "tokenizer.pt": (lambda path: tok.load(path).state_dict(), False),
    "config.json": (lambda path: tok.read_config(path.parent, Config()), True),
    "tokens.npy": (lambda path: tok.open_tokens(path, {}), False),
    "tokens.json": (lambda path: tok.open_tokens(path.with_suffix(".npy"), {}), True),
    "tokens.jsonl": (lambda path: tok.import_jsonl(path, path.with_name("imported.npy"), 16), True),
    "samples.npz": (read_npz, False),
    "stats.npz": (read_npz, False),
    "plain.npy": (read_npz, True),
    "a.png": (lambda path: tok.read_picture(path, "center", 32), True),
    "a.jpg": (lambda path: tok.read_picture(path, "center", 32), True),
}

def test_damaged_files(trained, workplace, monkeypatch):
    """Each file that is read, damaged in 40 ways: refused in one line that names it, or without
    effect, or one that carries no checksum: a digit of a text, a raw array, pixels that decode."""
    rng, folder = random.Random(1), workplace / "runs/shapes-tiny"
    paint(folder / "a.png")
    paint(folder / "a.jpg")
    assert rar.main([*NPZ[:1], "--count", "9", "--out", str(folder / "samples.npz")]) == 0
    np.save(folder / "plain.npy", np.load(folder / "samples.npz")["arr_0"])
    sizes = {"mu": 2048, "mu_s": 2023}
    np.savez(folder / "stats.npz", **{n: np.random.rand(w) for n, w in sizes.items()},
             **{n.replace("mu", "sigma"): np.eye(w) for n, w in sizes.items()})
    lines = [json.dumps({"class_id": i, "tokens": [i] * 16}) + "\n" for i in range(30)]
    (folder / "tokens.jsonl").write_text("".join(lines))
    monkeypatch.setattr(tok, "BLOCK_SECONDS", -1)  # a block for every ten rows
    tok.token_file(folder / "tokens.npy", {"width": 17}, lambda state: (
        np.arange(170).reshape(10, 17) + i for i in range(3)))
    unnoticed = {}
    for name, (read, may_pass) in READERS.items():
        path = folder / name
        good = path.read_bytes()
        right = flat(read(path))
        for bad in damaged(good, rng):
            path.write_bytes(bad)
            for made in folder.glob("imported.*"):
                made.unlink()
            try:
                value = read(path)
            except tok.UserError as error:
                assert str(folder) in str(error) and "\n" not in str(error)
                continue
            if not (value is None or name[:2] == "a." and isinstance(value, str)):
                unnoticed[name] = unnoticed.get(name, 0) + (flat(value) != right)
        path.write_bytes(good)
    print("damage without notice, of 40:", unnoticed)
    assert not any(count for name, count in unnoticed.items() if not READERS[name][1]), unnoticed

def test_hostile_files(workplace, capsys):
    with tok.zipfile.ZipFile("outside.pt", "w") as archive:
        archive.writestr("../evil", b"x")
    with tok.zipfile.ZipFile("bomb.pt", "w", tok.zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    Path("deep.json").write_text("[" * 100_000)
    Path("deep.jsonl").write_text('{"tokens": ' + "[" * 100_000 + "\n")
    np.savez("objects.npz", arr_0=np.array([{}, {}], dtype=object))
    for path, read in (("outside.pt", tok.read_tensors), ("bomb.pt", tok.read_tensors),
                       ("deep.json", tok.read_json), ("objects.npz", read_npz),
                       ("deep.jsonl", lambda path: tok.import_jsonl(path, Path("x.npy"), 16))):
        with pytest.raises(tok.UserError, match=path):
            read(path)
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
    assert tokens.shape == (1, T) and tokens.max() < 2
    loss, _ = rar.training_loss(model, tokens, torch.tensor([1]), sample_orders(1, T, 1))
    assert loss.isfinite()

EDGES = ["0", "-1", "1", "2", "0.5", "nan", "inf", "-inf", "1e308", "1e-320", str(2**31),
         str(2**63), "-" * 3, "", " ", "x", "\u00e9\U0001f980", "x" * 300, ".", "runs",
         "runs/shapes-tiny", "rubbish", "photos", "1,2,3,4", "0,0,16,32", "0,0,9" + "9" * 20 + ",1",
         "heart", "raster"]

def test_fuzz(trained, photographs, capsys, monkeypatch):
    """Every flag of every command at edge values, and every reader on random bytes: an exit code of
    0 or 2 with one line, never a traceback."""
    seconds, rng = float(os.environ.get("RAR_FUZZ", 5)), random.Random(0)
    model = Path("runs/shapes-tiny/weights.pt").read_bytes()
    parsers = {}
    for module in (rar, tok):
        with monkeypatch.context() as patch:
            patch.setattr(tok.Parser, "run", lambda parser, argv: parser)
            parsers |= {name: (module, command) for name, command in
                        module.main([]).commands.choices.items()}
    flags = {name: [action for action in parser._actions if action.option_strings and
                    action.dest != "help"] for name, (_, parser) in parsers.items()}
    flags["fid"] = [argparse.Namespace(option_strings=[flag], nargs=None) for flag in
                    ("--metrics", "--crop", "--weights", "--json", "--save-stats", "--batch")]
    begin, runs, codes = time.monotonic(), 0, {}
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", "torch")
    while time.monotonic() - begin < seconds * 0.7:
        name = rng.choice(list(flags))
        arguments = {"train": [*TRAIN, "--steps", "1", "--out", f"fuzz/{runs % 5}"],
                     "sample": ["sample", "--count", "2"], "eval": ["eval"],
                     "bench": ["bench", "--model", "tiny", "--batch", "1"],
                     "encode": ["encode", rng.choice(EDGES)],
                     "reconstruct": ["reconstruct", rng.choice(EDGES)],
                     "fid": [rng.choice(EDGES), rng.choice(EDGES)]}[name]
        for action in rng.sample(flags[name], rng.randint(1, 2)):
            count = action.nargs if isinstance(action.nargs, int) else 1
            arguments = [*arguments, action.option_strings[0],
                         *(rng.choice(EDGES) for _ in range(count))]
        main = {"fid": fid.main}.get(name) or parsers[name][0].main
        capsys.readouterr()
        code = main(arguments)
        error = capsys.readouterr().err
        assert code in (0, 2), arguments
        assert code == 0 or error.endswith("\n") and "error: " in error.splitlines()[-1], arguments
        codes[name, code] = codes.get((name, code), 0) + 1
        runs += 1
        if not Path("runs/shapes-tiny/weights.pt").exists():
            Path("runs/shapes-tiny/weights.pt").write_bytes(model)
    folder, reads = Path("bytes"), 0
    folder.mkdir()
    starts = [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"{", b"\x80\x02", b"\x89PNG\r\n\x1a\n",
              b"\xff\xd8\xff\xe0", b"GIF89a"]
    while time.monotonic() - begin < seconds:
        for name, (read, _) in READERS.items():
            path = folder / name
            path.write_bytes(rng.choice(starts) + rng.randbytes(rng.randrange(300)))
            with contextlib.suppress(tok.UserError):
                read(path)
            path.unlink()
            reads += 1
    print(f"{runs} commands {codes}, {reads} files of random bytes")
