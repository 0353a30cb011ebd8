"""How many samples of a run on the built-in shapes does a classifier put into their class?

    python .github/shapes_score.py [RUN]        about a minute on two cores

Trains a small CNN on drawn shapes, tells how well it does on held-out drawings, and then scores
500 samples of the run (by default the newest), 50 of each class, drawn with the run's settings.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import rar
from rar import SHAPES_HELD_OUT, SHAPES_TRAIN
from tokenizer import SHAPES, draw_shape, to_float



def drawings(start, stop):
    images = to_float(np.stack([draw_shape(i) for i in range(start, stop)]))
    return images, torch.arange(start, stop) % len(SHAPES)


def train_classifier(count):
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so that the classifier is the same on every machine
    widths = (3, 32, 64, 128)
    convolutions = [layer for i in range(3) for layer in
                    (nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1), nn.ReLU())]
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    images, labels = drawings(0, count)
    for _ in tqdm(range(8), "classifier", unit=" passes"):
        for part in torch.randperm(count).split(64):
            loss = F.cross_entropy(model(images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(classifier, images, labels):
    return (classifier(images).argmax(-1) == labels).float().mean().item()


def load(path, **settings):
    """The model, config and tokenizer of a run or checkpoint."""
    rar.DEVICE = torch.device("cpu")  # so that it is the same on every machine
    model, config, folder = rar.load_model(path, {"precision": "float32"} | settings)
    return model, config, rar.open_tokenizer(config, folder)


def sample(model, config, tokenizer, labels, known=None):
    """Images (N, 3, H, W) of the classes `labels` (N,)."""
    batches = rar.sample_tokens(model, labels, config, known=known)
    return tokenizer.decode(torch.cat([tokens for _, tokens in batches]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", help="a run's folder or a checkpoint [the newest run]")
    parser.add_argument("--tiny", action="store_true", help="see that it works, in seconds")
    args = parser.parse_args()
    run = load(args.run)
    classifier = train_classifier(200 if args.tiny else SHAPES_TRAIN)
    held_out = drawings(SHAPES_TRAIN, SHAPES_TRAIN + SHAPES_HELD_OUT)
    print(f"held-out drawings in their class: {accuracy(classifier, *held_out):.1%}")
    labels = torch.arange(20 if args.tiny else 500) % len(SHAPES)
    print(f"samples in their class: {accuracy(classifier, sample(*run, labels), labels):.1%}")


if __name__ == "__main__":
    main()
