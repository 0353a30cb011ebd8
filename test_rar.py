"""Run with: python -m pytest -q

Closed forms, figures of the authors' code, and the real commands at tiny size. Part I of rar.py is
the measure for part II. The golden files of ../shared are used where they lie beside the checkout.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
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
CPU = torch.device("cpu")
PLAIN = torch.autocast("cpu", enabled=False)
torch.set_num_threads(1)  # as in torchrun's processes

TINY = Config(width=64, depth=3, heads=4, mlp_width=256, grid_size=4, codebook_size=32,
              num_classes=10, dropout=0.0)

def digits(*rows):
    return torch.tensor([[int(digit, 32) for digit in row] for row in rows])

ORDERS = digits("2e4897b150cf6da3", "7b0a584ec9f1d263", "6b53ad82490e7c1f")
TOKENS = digits("rkg891205qktgjvn", "khht8ql0crh1onr5", "2r0h29fdc0030lgk")
LABELS = torch.tensor([2, 6, 7])
RASTER = torch.arange(16).expand(3, 16)

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

def tiny(**settings):
    return closed_form(RAR(dataclasses.replace(TINY, **settings)))

def calls(monkeypatch, owner, name, before={}):
    """The list of a function's arguments from now on. before[n]() comes before call n."""
    function, made = getattr(owner, name), []

    def noted(*arguments, **options):
        made.append((*arguments, *options.values()))
        before.get(len(made), bool)()
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, noted)
    return made

def raising(error):
    def fail(*_):
        raise error
    return fail

# ---- Part I: the published model

THEIRS = np.load(GOLDEN / "rar.npz") if GOLDEN.exists() else {}

@needs_golden
def test_logits():
    for name, labels, orders in (("raster", LABELS, RASTER), ("permuted", LABELS, ORDERS),
                                 ("raster_uncond", torch.full((3,), 10), RASTER)):
        logits = tiny()(TOKENS, labels, orders).detach().numpy()
        expected = THEIRS[f"logits_{name}"][:, :-1]  # without an unused last slot
        assert np.abs(logits - expected).max() < 5e-6

def test_gradients_and_updates():
    model, figures = tiny(steps=8, warmup=0.25), []
    optimizer = rar.make_optimizer(model, model.config)
    for step in range(8):
        loss, _ = rar.training_loss(model, TOKENS, LABELS, ORDERS)
        loss.backward()
        if THEIRS and step == 0:
            found = {name: p.grad.norm().item() for name, p in model.named_parameters()}
            expected = dict(zip(THEIRS["grad_names"], THEIRS["grad_norms"]))
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)
        figures.append((loss.item(), *map(float, rar.update(model, optimizer, model.config, step))))
        optimizer.zero_grad()
    losses, norms, rates = zip(*figures)
    assert losses[::7] == pytest.approx([3.72877479, 2.77827096], rel=1e-6)
    assert norms[::7] == pytest.approx([2.25130510, 2.01252198], rel=1e-5)
    assert rates[:4] == pytest.approx([0, 2e-4, 4e-4, 3.73874954e-4])
    # cls_token, the head, and the matrices of blocks
    decayed = sum(parameter.numel() for parameter in optimizer.param_groups[0]["params"])
    assert decayed == 64 * (1 + 32 + 3 * (192 + 64 + 256 + 256 + 384))

def slowly(*arguments, uniforms=RASTER, orders=RASTER):
    return rar.generate_slowly(*arguments, uniforms, orders)

@pytest.mark.parametrize("sampler", [slowly, generate])
def test_greedy_generation(sampler):
    """The first picture has a near tie."""
    for scale, power, sums in ((0, 0, [1901, 2236]), (4, 0, [2051, 1987]),
                               (16, 2.75, [2108, 2442])):
        tokens = sampler(tiny(), LABELS, scale, power, 0)
        assert (tokens[1:] @ torch.arange(1, 17)).tolist() == sums

def test_sizes_and_initial_weights():
    for name, count in (("RAR-S", 133_344_256), ("RAR-B", 260_923_648), ("RAR-L", 461_668_352),
                        ("RAR-XL", 955_425_024), ("RAR-XXL", 1_498_520_704)):
        with torch.device("meta"):
            assert sum(p.numel() for p in RAR(PRESETS[name]).parameters()) == count
    for width, std in ((64, 0.0693), (1536, 0.02)):
        model = RAR(dataclasses.replace(TINY, width=width, mlp_width=64, depth=1))
        for name, p in model.named_parameters():
            is_constant = p.ndim == 1 or "adaLN" in name or name == "cls_token"
            assert p.std().item() == pytest.approx(0 if is_constant else std, rel=0.1)

def test_schedules():
    assert [rar.randomness(step, 4, 8) for step in (0, 4, 5, 7, 8)] == [1, 1, 0.75, 0.25, 0]
    rates = [rar.learning_rate(step, 8, 2, 4, 1) for step in (0, 1, 2, 5, 8)]
    assert rates == pytest.approx([0, 2, 4, 2.5, 1])
    slow, at_once = ([rar.guidance_weight(t, 4, 5, power) for t in range(4)] for power in (1, 0))
    assert slow == pytest.approx([1, 3 - 2**0.5, 3, 3 + 2**0.5]) and at_once == [5] * 4
    for name in ("B", "L", "XL", "XXL") if GOLDEN.exists() else ():
        scale, power = PRESETS[f"RAR-{name}"].scale, PRESETS[f"RAR-{name}"].power
        expected = np.load(GOLDEN / "schedules.npz")[f"cfg_rar_{name.lower()}"]
        assert [rar.guidance_weight(t, 256, scale, power) for t in range(256)] == (
            pytest.approx(expected, rel=1e-12))

def test_sample_orders():
    orders = sample_orders(4000, 6, 0.6, rng=np.random.default_rng(0))
    assert (orders.sort(dim=1).values == torch.arange(6)).all()
    is_raster = (orders == torch.arange(6)).all(dim=1)
    in_place = (orders[~is_raster] == torch.arange(6)).float().mean(0).tolist()
    assert [is_raster.float().mean().item(), *in_place] == pytest.approx(
        [0.4] + [1 / 6] * 6, abs=0.03)

def test_target_embedding_tells_orders_apart():
    """The paper's Fig. 3: two orders that share their first cells, but not the one to predict."""
    orders = torch.stack([RASTER[0], RASTER[0][[0, 1, 2, 3, 5, 4, *range(6, 16)]]])
    for aware in (True, False):
        first, second = tiny(target_aware=aware)(TOKENS[[0, 0]], LABELS[[0, 0]], orders)
        differ = (first - second).abs().amax(-1) > 1e-5
        assert differ[:5].tolist() == [False] * 4 + [aware]

def test_draw():
    """Never a token of probability 0, at neither end, and always a token."""
    logits = torch.tensor([[0.0, 0.2, 0.5, 0.3, 0.0]]).log().expand(6, 5)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-24])
    assert rar.draw(logits, 1.0, uniforms).tolist() == [1, 1, 2, 2, 3, 3]
    assert all(rar.draw(torch.zeros(1, V), 1.0, uniforms[5:]) < V for V in range(2, 99))
    logits = torch.cat([1e9 * torch.randn(64, 9), 1e-6 * torch.randn(64, 9)])
    for temperature in (0, 1e-320, 1e-30, 1e-3, 1e308):
        tokens = rar.draw(logits, temperature, torch.rand(128))
        assert tokens.max() < 9 and (temperature > 1e-30 or tokens.equal(logits.argmax(1)))

# ---- Part II: as part I, but fast

def test_scan_orders():
    for name, ranks in {
            "raster": "0123456789abcdef", "alternate": "0123765489abfedc",
            "spiral_in": "0ba91cf82de73456", "spiral_out": "f456e307d218cba9",
            "z_curve": "0145236789cdabef", "subsample": "04158c9d2637aebf"}.items():
        assert torch.equal(scan_order(name, 4).argsort(), digits(ranks)[0])
        for n in (1, 2, 3, 5, 8, 32, 48):
            assert sorted(scan_order(name, n).tolist()) == list(range(n * n))
    if GOLDEN.exists():
        for name, ranks in json.loads((GOLDEN / "scan_orders.json").read_text()).items():
            assert scan_order(name, 16).argsort().view(16, 16).tolist() == ranks

@pytest.mark.parametrize("scale, aware", [(0, False), (1, True), (3, True)])
def test_the_same_tokens(scale, aware):
    """Also where some are known, in whose place others would be drawn."""
    model = tiny(grid_size=7, image_size=28, target_aware=aware)
    labels, uniforms = torch.arange(20) % 11, rar.image_uniforms(0, range(20), 49)
    orders = sample_orders(20, 49, 0.5, rng=np.random.default_rng(0))
    slow = slowly(model, labels, scale, 1.0, 0.9, uniforms=uniforms, orders=orders)
    assert rar.AHEAD < 49  # so tables are made twice
    for place in ([], np.s_[:, :6], np.s_[:], np.s_[:5], np.s_[:7, [0, 5, 9, 48]]):
        is_known = torch.zeros(20, 49, dtype=torch.bool)
        is_known[place] = True
        known = torch.where(is_known.gather(1, orders.argsort(1)), slow, -1)
        others = torch.where(is_known, 1 - uniforms, uniforms)
        tokens = generate(
            model, labels, scale, 1.0, 0.9, uniforms=others, orders=orders, known=known)
        assert (tokens != slow).any(dim=1).sum() <= 1  # by rounding

def test_bfloat16_is_stored():
    """With the logits of autocast."""
    model = closed_form(RAR(TINY)).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(TOKENS, LABELS, ORDERS)
        rar.to_bfloat16(model)
        assert torch.equal(model(TOKENS, LABELS, ORDERS), expected)
    assert {p.dtype for p in model.blocks[0].mlp.parameters()} == {torch.bfloat16}

def test_labels_are_dropped():
    config = dataclasses.replace(TINY, batch=1000, label_dropout=0.3)
    _, labels, *_ = rar.draw_batch(ROWS, config, 0)
    assert (labels == 10).float().mean().item() == pytest.approx(0.3, abs=0.05)

def test_cache():
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    cache = rar.Cache(9)
    parts = [cache.attend(*slot, 0.0) for slot in zip(*(x.split(1, dim=2) for x in (q, k, v)))]
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(torch.cat(parts, dim=2), expected, atol=1e-6)

# a class c, then tokens c + 3, c + 6, ...
ROWS = (np.arange(100)[:, None] % 10 + 3 * np.arange(17)) % 32

def test_nothing_is_read_back(monkeypatch):
    """In this mode tensors have no values. CUDA graphs can't look at one, and updates need not."""
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    config = dataclasses.replace(TINY, depth=1, batch=6, micro_batch=4, dropout=0.1)
    *batch, r = rar.draw_batch(ROWS, config, 0)
    autocast = torch.autocast("cpu", torch.bfloat16)
    with FakeTensorMode() as mode:
        model = RAR(config)
        for known in (None, torch.zeros(16, dtype=torch.long)):
            with autocast:
                generate(model, torch.arange(4), 1.5, 1.0, 1.0, known=known)
        batch = [*map(mode.from_tensor, batch), r]
        rar.train_step(model, rar.make_optimizer(model, config), config, batch, 0, autocast)

def test_a_picture_depends_on_its_number():
    wholes, labels = [], torch.arange(50) % 10
    for seed in (0, 1):
        model = tiny(order="random", scale=2.0, power=0.0, seed=seed)
        (_, whole), = rar.sample_tokens(model, labels, model.config, PLAIN)
        model.config.micro_batch = 3
        batches = rar.sample_tokens(model, labels, model.config, PLAIN, [49, 7, 2, 30])
        assert all(torch.equal(tokens, whole[numbers]) for numbers, tokens in batches)
        orders = rar.image_orders(model.config, range(50))
        draws = rar.image_uniforms(seed, range(50), 16).argsort()
        assert torch.equal(orders.sort().values, torch.arange(16).expand(50, 16))
        assert len(torch.cat([orders, draws]).unique(dim=0)) == 100
        wholes.append(whole)
    assert (wholes[0] == wholes[1]).float().mean() < 0.2

def test_the_same_updates(monkeypatch):
    """Part I learns and draws without the rest. Part II makes the same batches and updates."""
    text, _ = Path(rar.__file__).read_text().split("# ---- Part II:")
    one = types.ModuleType("part_one")
    exec(text, vars(one))
    losses = calls(monkeypatch, one, "training_loss")
    config = dataclasses.replace(TINY, width=32, depth=1, steps=60, batch=24, anneal=(0.3, 0.8),
                                 label_dropout=0.3, lr=1e-2, warmup=0.2, order="spiral_in")
    plain, order = closed_form(one.RAR(config)), scan_order("spiral_in", 4)
    one.train_plainly(plain, ROWS, config, order)
    labels, orders = torch.arange(10), order.expand(10, 16)
    tokens = one.generate_slowly(plain, labels, 0, 0, 0, orders, orders)
    assert (tokens.numpy() == ROWS[:10, 1:]).mean() > 0.9
    batches = [batch for _, *batch in losses]
    dropped = torch.cat([labels for _, labels, _ in batches]) == 10
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.05)

    parts = calls(monkeypatch, rar, "training_loss")
    for micro_batch in (24, 7):
        config, model = dataclasses.replace(config, micro_batch=micro_batch), RAR(config)
        optimizer = rar.make_optimizer(closed_form(model), config)
        for step in range(60):
            *batch, r = rar.draw_batch(ROWS, config, step)
            assert all(map(torch.equal, batch, batches[step]))
            expected = one.training_loss(model, *batch)
            found = rar.train_step(model, optimizer, config, (*batch, r), step, PLAIN)
            assert torch.allclose(torch.stack(found[:2]), torch.stack(expected))
        logits = model(tokens, labels, orders)
        assert torch.allclose(logits, plain(tokens, labels, orders), atol=1e-3)
    assert len(parts) == 60 * (1 + 4)

def test_a_pass_visits_every_row_once():
    rows, config = np.arange(20)[:, None] + np.zeros(17), dataclasses.replace(TINY, batch=8)
    rar.shuffled.cache_clear()
    visits = torch.cat([rar.draw_batch(rows, config, step)[0][:, 0] for step in range(5)])
    first, second = visits.split(20)
    assert len(first.unique()) == len(second.unique()) == 20 and not first.equal(second)
    assert rar.shuffled.cache_info().misses == 2  # the orders of two passes, each made once

def test_evaluate():
    loss, _ = rar.training_loss(tiny(), TOKENS, LABELS, scan_order("alternate", 4).expand(3, 16))
    rows, found = np.column_stack([LABELS, TOKENS]).astype(np.uint16), []
    for micro_batch in (1, 2, 3):
        model = tiny(order="alternate", micro_batch=micro_batch, dropout=0.5)
        bits, of_random_orders = rar.evaluate(model.eval(), rows, model.config, PLAIN).values()
        assert bits == pytest.approx(loss.item() / math.log(2))
        found.append(of_random_orders)
    assert found == pytest.approx(found[:1] * 3) and abs(bits - found[0]) > 1e-3

# ---- Pictures

@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in, and less built-in data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rar, "SHAPES_TRAIN", 100)
    monkeypatch.setattr(rar, "SHAPES_HELD_OUT", 20)
    return tmp_path

def paint(path, size=(70, 80), mode="RGB", seed=0):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(coarse).resize(size, Image.BICUBIC).convert(mode).save(path)

def touch(*paths):
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

def test_patch_tokenizer(tmp_path):
    fitted, images = tok.draw_shapes(400).split([300, 100])
    torch.save(tok.PatchTokenizer.fit(fitted, 8, 64).state_dict(), tmp_path / "t.pt")
    tokenizer = tok.load(tmp_path / "t.pt")
    tokens = tokenizer.encode(images)
    pasted = F.fold(tokenizer.codebook[tokens].mT, 32, 4, stride=4)
    error = F.mse_loss(tokenizer.decode(tokens), images)
    assert error < min(0.006, 0.9 * F.mse_loss(pasted, images))
    # moving the picture by a patch moves the tokens
    moved = tokenizer.encode(images.roll(4, dims=-1)).view(100, 8, 8)
    assert torch.equal(moved, tokens.view(100, 8, 8).roll(1, -1))
    colours = torch.tensor([0, 0.999, 1, 1.7, -0.2, 0.5]).expand(1, 3, 1, 6)
    assert tok.to_uint8(colours)[0, 0, :, 0].tolist() == [0, 254, 255, 255, 0, 127]  # truncated

def test_crops():
    picture = Image.fromarray(np.arange(90 * 120 * 3).reshape(90, 120, 3).astype(np.uint8))
    whole, middle = tok.center_crop(picture, 88), tok.center_crop(picture, 80)
    corners = [(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)]
    ten = [side[y:y + 80, x:x + 80] for side in (whole, whole[:, ::-1]) for y, x in corners]
    for kind, expected in (("ten", ten), ("center", [middle]), ("flip", [middle, middle[:, ::-1]])):
        assert np.array_equal(tok.crop(picture, 80, kind), expected)
    photographs = GOLDEN.parent / "data/imagenet/train"
    golden = json.loads((GOLDEN / "crops.json").read_text()) if photographs.exists() else {}
    for name, expected in golden.items():
        picture = Image.open(photographs / name.split()[0]).convert("RGB")
        times = np.floor_divide(expected["size"], picture.size)
        crops = tok.crop(Image.fromarray(np.tile(picture, (*times[::-1], 1))), 256, "ten")
        digests = [hashlib.sha256(crop.tobytes()).hexdigest() for crop in crops]
        assert digests == expected["tencrop_sha256"]

def test_published_tokenizer(tmp_path):
    with torch.device("meta"):
        tokenizer = tok.MaskGITVQGAN()
    state = closed_form(tokenizer.to_empty(device="cpu")).state_dict()
    shapes = sorted((name, list(tensor.shape)) for name, tensor in state.items())
    assert hashlib.sha256(repr(shapes).encode()).hexdigest().startswith("ba3a3990b697")
    torch.save(state, tmp_path / "t.pt")
    tokenizer = tok.load(tmp_path / "t.pt")
    if GOLDEN.exists():
        golden = np.load(GOLDEN / "tokenizer.npz")
        tokens = tokenizer.encode(tok.to_float(golden["images"][:1]))
        assert np.array_equal(tokens, golden["codes"][:1])
        expected = golden["decoded_unclamped"][:1].clip(0, 1)
        assert np.abs(tokenizer.decode(tokens).numpy() - expected).max() < 5e-4

def test_pictures_in_the_wild(workplace, monkeypatch):
    paint("upright.JPG", size=(40, 30))
    upright, exif, black = tok.read_picture("upright.JPG")[0], Image.Exif(), np.zeros((9, 9, 4))
    exif[0x0112] = 6  # to be turned to the right
    black[:5, :, 3] = 255  # the rest is transparent
    Image.fromarray(upright).save("turned.png", exif=exif)
    for name, pixels in (("glass.png", black.astype(np.uint8)), ("float.tif", np.float32(black[0])),
                         ("deep.png", np.full((9, 9), 0x7080, np.uint16))):
        Image.fromarray(pixels).save(name)
    for name, *size in ("a/pixel.png", 1, 1), ("bomb.png", 120, 120), ("thread.png", 1, 2500):
        paint(name, size, mode="P")
    Path("half.jpg").write_bytes(Path("upright.JPG").read_bytes()[:500])
    touch("notes.md", "text.jpg", "._upright.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    files = tok.pictures_in(".")
    errors = {file: future.exception() for file, future in zip(files, tok.read_ahead(files, 64))}
    damaged = [file.stem for file, error in errors.items() if type(error) is tok.DamagedPicture
               and re.fullmatch(f"{file}: [^<]*", str(error))]
    assert damaged == ["bomb", "float", "half", "text", "thread"] and files == sorted(files)
    assert [*errors.values()].count(None) == 5
    assert (tok.read_picture("deep.png") == 0x70).all()
    is_white = tok.read_picture("glass.png")[0] == 255
    assert (is_white == (black[:, :, 3:] == 0)).all()
    assert np.array_equal(tok.read_picture("turned.png")[0], np.rot90(upright, -1))

# ---- Data sets and their tokens

def test_classes(workplace, capsys):
    """Numbers are sorted as numbers. What belongs to others is no class, and no picture."""
    touch(*"a/x/1.png a/10/1.png a/9/1.png b/10/1.png b/9/2.png b/9/._3.png runs/c/1.png "
          "b/__MACOSX/1.png b/.git/1.png c/train/cats/1.png c/train/cats/5.heic c/train/dogs/2.png "
          "c/train/empty/x c/val/cows/4.png c/val/dogs/more/3.JPG".split())
    assert [path.name for path in tok.class_folders("a")] == ["10", "9", "x"]
    assert tok.class_folders(".") == [Path("a"), Path("b"), Path("c")]
    train, held_out = tok.labelled_pictures("b")
    assert sorted(train + held_out) == [(0, Path("b/9/2.png")), (1, Path("b/10/1.png"))]
    assert tok.labelled_pictures("c") == (
        [(0, Path("c/train/cats/1.png")), (1, Path("c/train/dogs/2.png"))],
        [(1, Path("c/val/dogs/more/3.JPG"))])
    said = "".join(capsys.readouterr())
    for path in ("val/cows/4.png", "train/cats/5.heic", "train/empty", "train/cats"):
        assert f" c/{path}\n" in said

def test_links(workplace):
    """Pictures and classes may be links, but no picture counts twice in a class."""
    touch("d/a/1.png", "d/a/more/2.png", "d/b/3.png", "c/4.png", "5.png")
    for link, target in (("d/c", "../c"), ("d/b/5.png", "../../5.png"), ("d/a/loop", "."),
                         ("d/a/up", ".."), ("d/a/again", "more")):
        Path(link).symlink_to(target)
    found = sorted((n, path.name) for pairs in tok.labelled_pictures("d") for n, path in pairs)
    assert found == [(0, "1.png"), (0, "2.png"), (1, "3.png"), (1, "5.png"), (2, "4.png")]

def test_held_out(workplace):
    """A hash of the file's name decides, so neither other pictures nor folders move one."""
    def names(data):
        return [{path.name for _, path in pairs} for pairs in tok.labelled_pictures(data)]

    touch(*[f"d/a/{i}.png" for i in range(400)], *[f"few/a/{i}.png" for i in (1, 3)])
    train, held_out = names("d")
    assert {"124.png", "187.png", "192.png"} < held_out and len(held_out) == 22
    shutil.move("d/a", "d/b")
    touch("d/a/1.jpg")
    assert names("d") == [train | {"1.jpg"}, held_out]
    assert names("few") == [{"3.png"}, {"1.png"}]  # with the smallest hash, if none is small

@pytest.fixture
def photographs(workplace):
    """Two classes of 20 pictures, of which 37 are to train on."""
    for i in range(40):
        paint(f"photos/{('cats', 'dogs')[i % 2]}/{i:02}.png", seed=i)
    return tok.labelled_pictures("photos")[0]

def test_rows(photographs, monkeypatch):
    """Stopped and gone on with, by one process or two: the same bytes."""
    tokenizer = tok.PatchTokenizer.fit(tok.read_crops([p for _, p in photographs], 32), 8, 32)
    expected = [[label, *tokenizer.encode(tok.to_float(pixels[None]))[0].tolist()]
                for label, path in photographs for pixels in tok.read_picture(path, 32, "ten")]
    # a shard has twelve pictures: the first is kept, the second made again
    made = calls(monkeypatch, tokenizer, "encode", {20: raising(KeyboardInterrupt)})
    with pytest.raises(KeyboardInterrupt):
        tok.encode_shards(photographs, tokenizer, "ten", "a")
    for rank, processes, folder, count in ((1, 2, "a", 20 + 12), (0, 2, "a", 20 + 12 + 13),
                                           (0, 1, "a", 20 + 12 + 13), (0, 1, "b", 45 + 37)):
        tok.encode_shards(photographs, tokenizer, "ten", folder, rank, processes)
        assert len(made) == count
    for folder in ("a", "b"):
        tok.join_shards(folder, f"{folder}.npy")
        rows = np.load(f"{folder}.npy")
        assert rows.dtype == np.uint16 and np.array_equal(rows, expected)
        assert not Path(folder).exists()

def test_damaged_pictures(photographs, capsys):
    """Some are left out, and named. More than ten are too many."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # as rar.py does it
    bad = [(1, Path(f"photos/dogs/{name}.png")) for name in (*range(9), "\udcff")]
    touch(*[path for _, path in bad])
    for pictures, is_right in ((bad[:5] + photographs + bad[5:], True),
                               (bad + bad[:1] + photographs, False), (bad[:3], False)):
        tok.encode_shards(pictures, tok.PatchTokenizer(8, 4, 32), "center", str(len(pictures)))
        with contextlib.nullcontext() if is_right else pytest.raises(tok.UserError, match="damag"):
            tok.join_shards(str(len(pictures)), "rows.npy")
        said = "".join(capsys.readouterr())
        assert not is_right or (said.count("out photos/dogs/") == 10 and r"\udcff.png: " in said)
        assert np.load("rows.npy")[:, 0].tolist() == [n for n, _ in photographs]

# ---- The commands: training

TRAIN = ("train --steps 6 --save-every 4 --log-every 1 --batch 16 --width 32 --depth 1 "
         "--mlp-width 64 --codebook-size 32 --dropout 0.1").split()
SMALL = [*TRAIN, "--data", "photos"]

def works(*arguments, main=rar.main, code=0):
    """Run a command. Pictures are compared, so all is done on the CPU."""
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert main([*arguments, *device]) == code

def refused(arguments, capsys, main=rar.main):
    """Run a command that must fail with exit code 2. Returns the line that stderr ends with."""
    capsys.readouterr()
    works(*arguments, main=main, code=2)
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line

def log_of(run):
    return [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]

def contents(folder):
    """What each file of a folder holds. Equal checkpoints may differ in their bytes."""
    return {path.name: path.read_bytes() if path.name[:10] != "checkpoint"
            else str(rar.read_tensors(path)) for path in Path(folder).iterdir() if path.is_file()}

def at_step(monkeypatch, number, do):
    """Have the next training do something before update `number`."""
    def train_step(*arguments, step_of=rar.train_step):
        if arguments[4] + 1 == number:
            do()
        return step_of(*arguments)

    monkeypatch.setattr(rar, "train_step", train_step)

def spoil(monkeypatch):
    """From now on gradients are infinite."""
    def spoilt(*inputs, loss_of=rar.training_loss):
        loss, accuracy = loss_of(*inputs)
        return loss + (loss - loss.detach()).sqrt(), accuracy

    monkeypatch.setattr(rar, "training_loss", spoilt)

@pytest.fixture
def trained(workplace, tmp_path_factory):
    runs = tmp_path_factory.getbasetemp() / "runs"
    if not runs.exists():
        works(*TRAIN, "--out", str(runs / "shapes-tiny"))
    shutil.copytree(runs, "runs")

def test_train(workplace, monkeypatch, capsys):
    """A run that is stopped again and again becomes the same as one that never was."""
    train = [*TRAIN, *"--log-every 5 --anneal 0.4 0.75 --out".split()]

    def start_another():
        before = contents("whole")
        assert "whole is in use" in refused([*train, "whole", "--codebook-size", "30"], capsys)
        assert contents("whole") == before

    with monkeypatch.context() as patch:
        at_step(patch, 2, start_another)
        attention = calls(patch, F, "scaled_dot_product_attention")
        dropouts = calls(patch, F, "dropout")
        works(*train, "whole")
    assert sum(training and p == 0.1 for _, p, training, _ in dropouts) == 6 * 3
    assert sum(p == 0.1 for *_, p in attention) == 6  # and none in previews
    printed = capsys.readouterr().out
    assert "look at whole/step-000006.png\n" in printed and "sample --weights whole\n" in printed
    assert Image.open("whole/step-000006.png").size == (10 * 68 + 4, 5 * 68 + 4 + 22)
    r = {line["step"]: line["r"] for line in log_of("whole")}
    assert r == pytest.approx({1: 1, 3: 1, 4: 5 / 7, 5: 5 / 21, 6: 0})

    for number in (signal.SIGINT, signal.SIGHUP):  # background jobs and nohup ignore them
        signal.signal(number, signal.default_int_handler)
    for number, signals, saved, code in [
            (2, [signal.SIGINT], 2, 130),      # not at a logged update
            (6, [], 4, 2),                     # by a gradient that is no number
            (5, [signal.SIGTERM], 4, 2),       # by both
            (6, [signal.SIGINT] * 2, 4, 130),  # a second one strikes at once
            (5, [signal.SIGTERM], 5, 130),     # at a logged update
            (6, [signal.SIGHUP], 6, 130)]:     # at the last, a milestone
        def strike():
            if code == 2:
                spoil(patch)
            for each in signals:
                os.kill(os.getpid(), each)

        with monkeypatch.context() as patch:
            at_step(patch, number, strike)
            works(*train, "parts", code=code)
        said = f"error: update {number}: " if code == 2 else "run the same command to continue"
        assert said in capsys.readouterr().err
        assert rar.checkpoints(Path("parts"))[0].name == f"checkpoint-{saved:07}.pt"
    works(*train, "parts")
    whole, parts = contents("whole"), contents("parts")
    others = {"checkpoint-0000004.pt", "checkpoint-0000005.pt"}
    assert whole.keys() ^ parts.keys() == others
    assert all(whole[name] == parts[name] for name in whole.keys() - others)

def test_a_run_is_changed(workplace, capsys, monkeypatch):
    """By what is given and may change: after NaN by a lower --lr."""
    train, run = ["train", "--out", "run"], Path("run")
    with monkeypatch.context() as patch:
        at_step(patch, 5, functools.partial(spoil, patch))
        assert "a lower --lr" in refused([*TRAIN, "--out", "run"], capsys)
    works(*train, "--lr", "0.001")
    assert "run: lr was 0.004 and is 0.001" in capsys.readouterr().out
    rates = [line["lr"] for line in log_of(run)]
    assert len(rates) == 6 and rates[3] > 0.001 > rates[4] > 0.0001
    newest = rar.checkpoints(run)[0]
    earlier = {name: rar.read_tensors(newest)[name] for name in ("updates", "model", "optimizer")}
    before = contents(run)
    for more in (["--width", "64"], ["--steps", "7"], ["--seed", "1"], ["--anneal", "0", "1"]):
        assert f"run has {more[0][2:]} = " in refused([*train, *more], capsys)
    assert contents(run) == before
    newest.unlink()  # and write another file, because tensors are read when they are used
    torch.save(earlier, newest)
    assert "of an earlier edition" in refused([*train, "--lr", "1"], capsys)
    assert (run / "config.json").read_bytes() == before["config.json"]

def test_mistakes(workplace, capsys, monkeypatch):
    assert "python rar.py train" in refused(["sample"], capsys)
    works(*TRAIN)
    run, before = Path("runs/shapes-tiny"), contents("runs/shapes-tiny")
    touch("file", "photos/a/1.png", "photos/a/2.png", "foreign/config.json")
    monkeypatch.setattr(rar, "train", lambda *_: pytest.fail("not refused"))
    for line in """train --order zigzag --out a
train --precision tf32 --device cpu
train --min-lr 1
train --anneal 0.9 0.1
train --grid-size 5 --out a
train --out file/run | 'file/run'
train --out photos | photos holds other files
train --out foreign | foreign/config.json
train --data nowhere | 'nowhere'
sample --classes 10 | --classes 10: choose from 10: circle, square
sample --weights nowhere | no weights file nowhere
sample --keep 0 0 9 9
eval --data photos""".splitlines():
        arguments, _, named = line.partition(" | ")
        assert (named or arguments.split()[1]) in refused(arguments.split(), capsys)
    assert contents(run) == before and sorted(os.listdir()) == ["file", "foreign", "photos", "runs"]
    with pytest.raises(SystemExit, match="2"):  # by argparse
        rar.main(["draw"])
    for error, code, line in [
            (OSError("broken"), 2, "error: broken\n"), (KeyboardInterrupt(), 130, "interrupted: "),
            (RuntimeError("CUDA out of memory"), 2, "--micro-batch"), (MemoryError(), 2, "memory"),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "--micro-batch")]:
        monkeypatch.setattr(rar, "load_model", raising(error))
        works("eval", code=code)
        assert line in capsys.readouterr().err
    monkeypatch.setattr(rar, "load_model", raising(RuntimeError("CUDA error: illegal access")))
    with pytest.raises(RuntimeError, match="CUDA error"):  # shown as it is
        works("eval")

def test_train_on_photographs(photographs, capsys):
    def rows():
        return [len(np.load(path)) for path in sorted(Path("runs/tokens").glob("*.npy"))]

    works(*SMALL)
    log = log_of("runs/photos-small")
    assert rows() == [3, 370] and log[-1]["passes"] == pytest.approx(6 * 16 / 37)
    works(*SMALL, "--out", "other", "--codebook-size", "30")
    assert rows() == [3, 3, 370, 370]
    os.utime(photographs[0][1], (0, 0))  # now it may be another picture
    works(*SMALL, "--out", "again")
    assert rows() == [3, 3, 370, 370, 370]
    shutil.rmtree("runs/tokens")
    works(*"eval --weights runs/photos-small --data photos/".split())  # needs no others
    assert f" {log[-1]['final_order_bits']:.3f} bits/token in raster" in capsys.readouterr().out
    assert rows() == [3]
    paint("photos/cows/1.png")
    assert "has num_classes = 2" in refused(SMALL, capsys)
    assert rar.evenly(range(10), 4) == [0, 2, 5, 7] and rar.evenly(range(3), 4) == [0, 1, 2]

def test_classes_are_matched(photographs, capsys):
    """By name, and by value where names are numbers. Another set of them is refused."""
    for old, new in (("photos/cats", "photos/10"), ("photos/dogs", "photos/2")):
        os.rename(old, new)
    paint("photos/x/09.png")
    works(*SMALL)
    bits = log_of("runs/photos-small")[-1]["final_order_bits"]
    os.rename("photos/2", "photos/02")  # which comes before 10
    works("eval")
    assert f"held-out {bits:.3f} bits" in capsys.readouterr().out
    os.rename("photos/x", "photos/y")
    assert refused(["eval"], capsys).endswith("not in both: 02, 2, x, y")

def test_train_on_tokens(trained, capsys):
    """Blocks of ten lines are held out, since crops of a picture follow each other."""
    train = (" ".join(TRAIN) + " --data x.jsonl --model tiny --tokenizer "
             "runs/shapes-tiny/tokenizer.pt").split()

    def write(entries):
        Path("x.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    entries = [dict(class_id=n, tokens=[n % 32] * 64) for n in range(433)]
    write(entries)
    works(*train)
    held_out, rows = map(np.load, sorted(Path("runs/tokens").glob("*.npy")))
    is_held_out = np.arange(433) // 10 % 20 == 19
    for rows, chosen in ((held_out, is_held_out), (rows, ~is_held_out)):
        assert np.array_equal(rows, [[n] + [n % 32] * 64 for n in np.flatnonzero(chosen)])
        assert rows.dtype == np.uint16
    works("eval", "--weights", "runs/x-tiny")
    bits = log_of("runs/x-tiny")[-1]["final_order_bits"]
    assert f"held-out {bits:.3f} bits" in capsys.readouterr().out
    shutil.rmtree("runs/tokens")
    for class_id, *tokens in [(0,), (0, 0), *[(0, x, 0) for x in (32, -1, 0.5, True, "1")],
                              (1000, 0, 0), (-1, 0, 0), (None, 0, 0)]:
        entries[299] = dict(class_id=class_id, tokens=tokens[:1] + 63 * tokens[1:])
        write(entries)
        assert "x.jsonl, line 300: expected" in refused(train, capsys)
    assert not os.listdir("runs/tokens")

def test_fine_tuning(photographs, capsys):
    """In the only update of a second run the learning rate is 0."""
    second = [*SMALL, *"--steps 1 --init first --out".split()]
    works(*SMALL, "--out", "first")
    works(*second, "same")
    for i in range(20):
        paint(f"photos/birds/{i}.png", seed=100 + i)
    os.rename("photos/dogs", "photos/ants")  # another class, in front of cats
    works(*second, "more")
    first, same, more = (rar.read_tensors(f"{run}/weights.pt") for run in ("first", "same", "more"))
    for name in first:
        assert torch.equal(first[name], same[name])
        assert torch.equal(first[name][:33], more[name][:33])
    classes = more["embeddings.weight"][33:]
    assert len(classes) == 4  # ants, birds, cats, and no class
    assert torch.equal(classes[2:], first["embeddings.weight"][[33, 35]])
    assert not torch.isin(classes[:2], first["embeddings.weight"]).any()
    assert "first" in refused([*second, "c", "--width", "64"], capsys)

# ---- The commands: released weights, pictures

class Hub(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

def test_released_weights(workplace, capsys, monkeypatch):
    """From two files on a hub to pictures, with the settings of the model's size."""
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}/hub")
    monkeypatch.setenv("TORCH_HOME", "torch")
    config = dataclasses.replace(PRESETS["RAR-XL"], width=32, depth=1, heads=2, mlp_width=32)
    monkeypatch.setitem(PRESETS, "RAR-XL", config)
    torch.save(RAR(config).state_dict(), "model")
    torch.save(tok.PatchTokenizer(16, 2, 1024).state_dict(), "tokenizer")
    weights, tokenizer = Path("model").read_bytes(), Path("tokenizer").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    monkeypatch.setitem(rar.RELEASED_MODELS, "RAR-XL", ("rar_xl.bin", digest))
    sample = "sample --count 2 --out x/ --weights".split()
    for folder, name, right, wrong in [
            ("yucornetto/RAR", "rar_xl.bin", weights, tokenizer),
            ("fun-research/TiTok", tok.RELEASED, tokenizer, b"<html>Log in")]:
        place, path = Path("hub", folder, "resolve/main"), Path("torch/hub/checkpoints")
        place.mkdir(parents=True)
        for body in (right[:-9], wrong, right):  # at first there is none
            assert f"put it at {path / name}" in refused([*sample, "RAR-XL"], capsys)
            assert not list(path.glob(f"{name}*"))
            (place / name).write_bytes(body)
    works(*sample, "RAR-XL")
    hub.shutdown()
    hub.server_close()
    assert json.loads(Path("x/settings.json").read_text())["scale"] == 6.9
    works(*sample, "model")  # into the same folder, so nothing that matters is different

class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)

def test_damaged_weights(workplace, capsys):
    """And no pickles."""
    good = RAR(TINY).state_dict()
    for value, named in [(good | {"x": torch.zeros(2)}, '"x"'), (good | {"lm_head.bias": 5}, ""),
                         (dict([*good.items()][1:]), '"cls_token"'), ([1, 2], ""),
                         ({"codebook": Evil()}, ""), (good, "")]:
        torch.save(value, "x.bin")
        if value is good:
            Path("x.bin").write_bytes(Path("x.bin").read_bytes()[:-9])
        error = refused("sample --weights x.bin".split(), capsys)
        assert "x.bin" in error and named in error
        with pytest.raises(tok.UserError, match="x.bin"):
            tok.load("x.bin")
    Path("shards").mkdir()
    np.savez("shards/0.npz", rows=np.array([Evil()]), left_out=[], of=1)
    with pytest.raises(ValueError):
        tok.join_shards("shards", "rows.npy")
    assert not Path("executed").exists() and not Path("rows.npy").exists()

NPZ = "sample --count 23 --micro-batch 4 --out".split()

def pixels_of(path):
    if Path(path).is_file():
        return np.load(path)["arr_0"]
    return np.stack([np.asarray(Image.open(file)) for file in sorted(Path(path).glob("*.png"))])

def differing(one, two):
    return (pixels_of(one) != pixels_of(two)).any(axis=(1, 2, 3)).sum()

def test_samples(trained, capsys, monkeypatch):
    works(*NPZ, "a/b/x.npz")
    works(*NPZ, "folder/", "--micro-batch", "64")
    assert os.listdir("a/b") == ["x.npz"]
    # picture i is of class i % 10
    model, config, run = rar.load_model(None, {}, CPU)
    tokens = generate(model, torch.arange(23) % 10, config.scale, config.power, config.temperature,
                      uniforms=rar.image_uniforms(1, range(23), 64))
    np.savez("plain.npz", arr_0=tok.to_uint8(rar.open_tokenizer(config, run).decode(tokens)))
    assert differing("plain.npz", "folder") <= 1 and differing("a/b/x.npz", "folder") <= 1
    # more into the same folder, but not by other settings; what is there stays
    works(*NPZ, "folder", "--count", "25")
    paint("mine/photo.png")
    before = contents("folder") | contents("mine")
    assert len(before) == 25 + 1 + 1
    for out in ("folder --seed 2", "folder --scale 2", "folder --classes 3", "mine"):
        assert "other settings" in refused([*NPZ, *out.split()], capsys)
    for out in ("a/b/x.npz", "mine/photo.png"):
        assert f"{out} is there already" in refused([*NPZ, out], capsys)
    assert contents("folder") | contents("mine") == before

    # stopped twice, and with a damaged picture
    stop, broken = raising(KeyboardInterrupt), Path("x.npz.parts/000003.png")
    made = calls(monkeypatch, tok.PatchTokenizer, "decode", {3: stop, 6: stop})
    for count in (8, 16):
        works(*NPZ, "x.npz", code=130)
        assert not Path("x.npz").exists() and len(pixels_of("x.npz.parts")) == count
    broken.write_bytes(b"")
    assert str(broken) in refused([*NPZ, "x.npz"], capsys)
    broken.unlink()
    works(*NPZ, "x.npz")
    assert Path("x.npz").read_bytes() == Path("a/b/x.npz").read_bytes()
    assert len(made) == 6 + 2 + 1 and not broken.parent.exists()

def test_grids(trained, capsys, monkeypatch):
    run = Path("runs/shapes-tiny")
    shutil.copytree(run, "runs/older")
    os.utime("runs/older/weights.pt", (0, 0))
    last, _, first = rar.checkpoints(run)
    with monkeypatch.context() as patch:
        calls(patch, tok.PatchTokenizer, "decode", {1: raising(KeyboardInterrupt)})
        works("sample", code=130)  # is not in the way of others
    for n, (more, warned) in enumerate([
            ("--classes heart 3 --order spiral_in", True), ("", False),
            (f"--weights {last}", False),
            ("--seed 2", False), (f"--order random --weights {first}", False),
            ("--precision bfloat16", False)]):
        works("sample", "--out", f"{n}.png", *more.split())
        assert ("annealed to another order" in capsys.readouterr().out) == warned
    assert [Image.open(f"{n}.png").width for n in (0, 1)] == [2 * 68 + 4, 10 * 68 + 4]
    works("sample")
    (path,) = run.glob("sam*")
    assert [path.read_bytes() == Path(f"{n}.png").read_bytes() for n in (1, 2, 3)] == [1, 1, 0]
    works("eval", "--weights", str(run))
    assert rar.in_words(Config(), log_of(run)[-1]) in capsys.readouterr().out

def test_complete(trained, capsys, monkeypatch):
    """Given tokens come first, and nobody sees the hidden pixels."""
    Image.fromarray(tok.draw_shape(4)).save("a.png")
    before, tokenizer = Path("a.png").read_bytes(), tok.load("runs/shapes-tiny/tokenizer.pt")
    encoded = calls(monkeypatch, tokenizer, "encode")
    known, images = tok.known_tokens("a.png", (3, 2, 32, 17), tokenizer)
    kept = torch.zeros(32, 32, dtype=torch.bool)
    kept[4:16, 4:] = True  # whole cells only
    assert torch.equal(known.view(8, 8) >= 0, kept[::4, ::4])
    assert torch.equal(encoded[0][0][0], torch.where(kept, images[0], 0.5))
    orders = rar.image_orders(PRESETS["tiny"], [0, 1], known)
    assert (known[orders[:, :21]] >= 0).all() and orders[0, :2].tolist() == [9, 10]
    complete = "sample --complete a.png --classes cross --count 3 --keep".split()
    for keep, warned in (("0 0 32 16", False), ("0 16 32 32", True)):  # raster begins at the top
        works(*complete, *keep.split())
        assert ("annealed to another order" in capsys.readouterr().out) == warned
    for keep, named in (("0 0 3 3", "0 of 64 cells"), ("0 0 32 32", "64 of 64"),
                        ("0 0 32 16 --out a.png", "a.png is there already")):
        assert named in refused([*complete, *keep.split()], capsys)
    assert Path("a.png").read_bytes() == before

def test_reconstruct(trained, capsys):
    paint("photos/big.jpg", size=(300, 200))
    paint("photos/other.png")
    again = "reconstruct --tokenizer runs/shapes-tiny photos --out".split()
    for out in ("a.png", "a.npz"):
        works(*again, out, main=tok.main)
    assert Image.open("a.png").width == 4 * 68 + 4
    tokenizer, pictures = tok.load("runs/shapes-tiny/tokenizer.pt"), pixels_of("a-originals.npz")
    assert np.array_equal(tok.read_picture("photos/big.jpg", 32)[0], pictures[0])
    decoded = tokenizer.decode(tokenizer.encode(tok.to_float(pictures)))
    assert np.array_equal(pixels_of("a.npz"), tok.to_uint8(decoded)) and len(pictures) == 2
    for out in ("b.jpg", "photos/other.png"):
        assert f"--out {out}" in refused([*again, out], capsys, tok.main)

# ---- Two processes

PATCHED = """
import os, signal, sys, torch, rar
def noting(function, note):
    def noted(*x, **options):
        print(note(*x), file=open(f"did-{rar.RANK}", "a"))
        return function(*x, **options)
    return noted
def stop(*x):
    if x[4] == 4 and rar.RANK == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return torch.initial_seed()
rar.PatchTokenizer.encode = noting(rar.PatchTokenizer.encode, lambda *x: "encode")
rar.train_step = noting(rar.train_step, stop)
rar.generate = noting(rar.generate, lambda *x: "generate")
sys.exit(rar.main())
"""

def test_two_processes_and_then_one(photographs):
    """After five updates the second is stopped."""
    train = [*SMALL, *"--steps 8 --save-every 8 --anneal 0 1 --dropout 0 --micro-batch 4 "
             "--device cpu --out".split()]
    works(*train, "one")
    rows = contents("runs/tokens")
    shutil.rmtree("runs/tokens")
    Path("patched.py").write_text(PATCHED)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 patched.py".split()
    places = {"PYTHONPATH": str(Path(rar.__file__).parent), "OMP_NUM_THREADS": "1"}
    for command, code, said in (([*train, "two"], 1, "run the same command to continue"),
                                ([*NPZ, *"x.npz --weights two --device cpu".split()], 0, "")):
        result = subprocess.run([sys.executable, *torchrun, *command], capture_output=True,
                                text=True, env=os.environ | places)
        assert result.returncode == code and said in result.stderr, result.stderr
        assert len({*result.stdout.splitlines()}) == len(result.stdout.splitlines())  # rank 0's
    assert contents("runs/tokens") == rows and log_of("two")[-1]["step"] == 5
    did = [Path(f"did-{rank}").read_text().split() for rank in (0, 1)]
    assert len({word for word in did[0] + did[1] if word.isdecimal()}) == 2 * 5  # seeds
    assert did[1].count("encode") == 12 and did[1].count("generate") == 3  # of its share only
    works(*NPZ, "x/", "--weights", "two")
    assert differing("x", "x.npz") <= 1
    works(*train, "two")
    for one, two in zip(log_of("one"), log_of("two"), strict=True):
        assert one == pytest.approx(two, rel=1e-5)

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

def test_permission(photographs, workplace, capsys):
    """Without it nothing counts as damaged. Root has it, so be somebody else."""
    user = os.geteuid()
    for path in (*workplace.parents, workplace):
        if path.stat().st_uid == user == 0 and len(path.parts) > 2:
            path.chmod(0o777)
    for place in (Path("photos/cats"), photographs[-1][1]):
        place.chmod(0)
        os.seteuid(user or 65534)
        try:
            assert f"Permission denied: '{place}" in refused([*SMALL, "--out", "a"], capsys)
        finally:
            os.seteuid(user)
            place.chmod(0o777)
    assert not [*Path("runs").glob("tokens/*.npy")]

def test_kills(photographs):
    """RAR_KILLS=100 makes many more."""
    def strike(event, details):
        nonlocal left
        is_new = event == "open" and "w" in str(details[1])
        left -= is_new or event in ("os.rename", "os.remove")
        if left == 0:
            left -= 1  # because a kill is an event, too
            if is_new:
                Path(details[0]).write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    if torch.cuda.is_initialized():
        pytest.skip("a process that used CUDA can't be forked")
    rng = random.Random(0)
    for k in range(int(os.environ.get("RAR_KILLS", 3))):
        shutil.rmtree("runs", ignore_errors=True)
        for command in ([*SMALL, *f"--save-every 1 --device cpu --out {k}".split()],
                        [*NPZ, *f"{k}/x.npz --device cpu --weights {k}".split()]):
            for _ in range(5 * (k > 0)):
                left = rng.randint(1, 50)
                if os.fork() == 0:
                    try:
                        rar.tqdm.set_lock(threading.RLock())  # or a kill keeps it locked
                        sys.addaudithook(strike)
                        os._exit(rar.main(command))
                    finally:
                        os._exit(1)
                assert os.waitstatus_to_exitcode(os.wait()[1]) != 1
            rar.main(command)
        assert contents("0").items() <= contents(f"{k}").items()
