"""Times the authors' implementation and ours in one run, on random weights:

    git clone https://github.com/bytedance/1d-tokenizer && git -C 1d-tokenizer checkout 942a96f
    pip install -r 1d-tokenizer/requirements.txt
    python .github/authors.py 1d-tokenizer sample --model RAR-B --batch 128
    python .github/authors.py 1d-tokenizer train --model RAR-B --batch 64 --compile

Theirs samples as released (float32; TF32 where the device has it) with its own generate, and trains
in bfloat16 on CUDA. --precision is that of our sampling, and of both in training.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import rar  # noqa: E402
import tokenizer as tok  # noqa: E402

class Settings(dict):
    __getattr__ = dict.__getitem__

def theirs(config):
    """The authors' model of the same size."""
    from modeling.rar import RAR
    generator = Settings(
        hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.heads,
        intermediate_size=config.mlp_width, image_seq_len=config.grid_size**2,
        condition_num_classes=config.num_classes, dropout=config.dropout, attn_drop=config.dropout)
    return RAR(Settings(model=Settings(
        generator=generator, vq_model=Settings(codebook_size=config.codebook_size))))

def sampling(config, ours, other, device, autocast):
    """Two functions: ours and theirs draw the tokens of a batch, guided."""
    labels = torch.arange(config.batch) % config.num_classes
    ours.to(device).eval()
    if device.type == "cpu":  # as rar.py sample
        rar.pack(ours)
    # One generator for all batches: on CUDA it records the second, and replays it from then on.
    batches = rar.sample_tokens(ours, labels.repeat(9), config, autocast)
    labels = labels.to(device)

    @torch.no_grad()
    def their_batch():
        other.eval().generate(labels, guidance_scale=config.scale, guidance_scale_pow=config.power,
                              randomize_temperature=config.temperature)
    return lambda: next(batches), their_batch

def training(config, ours, other, device, autocast):
    """Two functions: ours and theirs make an update, at r = 1."""
    rng = np.random.default_rng(0)
    rows = rng.integers(config.codebook_size, size=(10_000, 1 + config.grid_size**2))
    rows[:, 0] %= config.num_classes
    rows = rows.astype(np.uint16)
    ours.to(device)
    our_optimizer = rar.make_optimizer(ours, config)
    their_optimizer = torch.optim.AdamW(other.parameters(), lr=config.lr, betas=config.betas,
                                        weight_decay=config.weight_decay, fused=True)
    other.set_random_ratio(1.0)
    if config.compile:  # as rar.train does
        for block in ours.blocks:
            block.before, block.after = torch.compile(block.before), torch.compile(block.after)

    def our_update():
        batch = rar.draw_batch(rows, config, 1)
        rar.train_step(ours.train(), our_optimizer, config, batch, 1, autocast)

    def their_update():
        batch = torch.from_numpy(rows[:config.batch].astype(np.int64)).to(device)
        with autocast:
            condition = other.preprocess_condition(batch[:, 0], config.label_dropout)
            logits, labels = other.train()(batch[:, 1:], condition, return_labels=True)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), config.clip)
        their_optimizer.step()
        their_optimizer.zero_grad()
    return our_update, their_update

def timed(function, device):
    """Seconds of a call, the median of three after one to warm up, and on CUDA one to record."""
    seconds = []
    for _ in tqdm(range(5 if device.type == "cuda" else 4), "timing", leave=False):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds[-3:])[1]

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clone", help="folder of bytedance/1d-tokenizer")
    parser.add_argument("what", choices=["sample", "train"])
    parser.add_argument("--model", choices=rar.PRESETS, default="RAR-B")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--precision", choices=["float32", "tf32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    sys.path.insert(0, args.clone)
    device, precision, autocast = tok.choose_device(None, args.precision, "bfloat16")
    name = f"cpu, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    config = dataclasses.replace(rar.PRESETS[args.model], batch=args.batch, compile=args.compile,
                                 micro_batch=args.batch)
    torch.manual_seed(0)
    ours = rar.RAR(config)
    for parameter in ours.parameters():  # gates of 0 would leave the caches empty of meaning
        torch.nn.init.normal_(parameter, std=0.02)
    other = theirs(config)
    other.load_state_dict(ours.state_dict())
    other.to(device)
    ask = sampling if args.what == "sample" else training
    our, their = ask(config, ours, other, device, autocast)
    if args.what == "sample":  # theirs as released
        tok.choose_device(None, None, "tf32")
    their_seconds = timed(their, device)
    tok.choose_device(None, precision)
    our_seconds = timed(our, device)
    result = {"what": args.what, "model": args.model, "batch": args.batch, "precision": precision,
              "device": name, "torch": torch.__version__,
              "our_images_per_second": args.batch / our_seconds,
              "their_images_per_second": args.batch / their_seconds,
              "ratio": their_seconds / our_seconds}
    print(*(f"{name:26}{value}" for name, value in result.items()), sep="\n")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")

if __name__ == "__main__":
    main()
