"""How many samples of a run on the built-in shapes are put into their class by a classifier?

    python .github/shapes_score.py [RUN]        about a minute on two cores

Trains a small CNN on drawn shapes, says how well it does on held-out drawings, and then scores 500
samples of the run (of the newest by default), 50 of each class, drawn with the run's own settings.
"""

import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import rar
import tokenizer as tok


def drawings(start, stop):
    images = tok.to_float(np.stack([tok.draw_shape(i) for i in range(start, stop)]))
    return images, torch.arange(start, stop) % len(tok.SHAPES)


def train_classifier(images, labels):
    torch.manual_seed(0)
    widths = (3, 32, 64, 128)
    convolutions = [layer for i in range(3) for layer in
                    (nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1), nn.ReLU())]
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in tqdm(range(8), "classifier", unit=" passes"):
        for part in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model(images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(classifier, images, labels):
    return (classifier(images).argmax(-1) == labels).float().mean().item()


def load(path, **knobs):
    """The model, config and tokenizer of a run or checkpoint, for the CPU."""
    try:
        model, config, folder = rar.load_model(path, knobs, torch.device("cpu"))
        return model, config, tok.tokenizer_of(config, folder)
    except tok.UserError as error:
        sys.exit(f"error: {error}")


def sample(model, config, tokenizer, labels, known=None):
    """Images (N, 3, H, W) of the classes `labels` (N,)."""
    parts = rar.sample_tokens(model, labels, config, contextlib.nullcontext(), known=known)
    return tokenizer.decode(torch.cat([tokens for _, tokens in parts]))


if __name__ == "__main__":
    if sys.argv[1:] and not os.path.exists(sys.argv[1]):
        sys.exit(__doc__)
    torch.set_num_threads(1)  # so that the classifier is the same on every machine
    run = load(sys.argv[1] if len(sys.argv) > 1 else None)
    classifier = train_classifier(*drawings(0, tok.SHAPES_TRAIN))
    held_out = drawings(tok.SHAPES_TRAIN, tok.SHAPES_TRAIN + tok.SHAPES_HELD_OUT)
    print(f"held-out drawings in their class: {accuracy(classifier, *held_out):.1%}")
    labels = torch.arange(500) % len(tok.SHAPES)
    print(f"samples in their class: {accuracy(classifier, sample(*run, labels), labels):.1%}")
