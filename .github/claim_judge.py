"""What claim.py and photos.py judge samples with: a small classifier, trained on photographs.

Accuracy is the share of pictures that it puts into their class. Distance is the Frechet distance
of its features of the pictures to those of photographs. Neither is the paper's FID.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from tokenizer import read_crops


class Judge(nn.Module):
    def __init__(self, classes):
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        self.body = nn.Sequential(*(layer for i in range(4) for layer in (
            nn.Conv2d(widths[i], widths[i + 1], 3, stride=1 + (i > 0), padding=1),
            nn.BatchNorm2d(widths[i + 1]), nn.ReLU())), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(128, classes)

    def forward(self, images):
        return self.head(self.body(images))

    def learn(self, images, softer, labels, passes):
        """Learn from pictures. Half of the time they are as in `softer`, because samples are as
        soft. Half of the time they are mirrored, and all are moved by up to 3 pixels."""
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=0.05)
        steps = passes * -(-len(images) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
        for _ in range(passes):
            for part in torch.randperm(len(images)).split(64):
                dx, dy = torch.randint(-3, 4, (2,)).tolist()
                coins = (torch.rand(2, len(part), 1, 1, 1) < 0.5).to(images.device)
                x = torch.where(coins[0], images[part], softer[part])
                x = torch.where(coins[1], x, x.flip(3))
                loss = F.cross_entropy(self(x.roll((dy, dx), (2, 3))), labels[part],
                                       label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return self.eval()

    @torch.no_grad()
    def score(self, images, labels, reference):
        """Accuracy of images, and their distance to those of a reference."""
        a, b = (torch.cat([self.body(part) for part in x.split(250)]) for x in (images, reference))
        right = (self.head(a).argmax(1) == labels).double().mean().item()
        a, b = a.double().cpu(), b.double().cpu()
        roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt()
        distance = ((a.mean(0) - b.mean(0))**2).sum() + a.T.cov().trace() + b.T.cov().trace()
        return {"accuracy": right, "distance": (distance - 2 * roots.sum()).item()}


def photographs(pictures, device="cpu"):
    """Images (N, 3, 32, 32) and labels (N,) of (class, path) pairs."""
    labels = torch.tensor([number for number, _ in pictures])
    return read_crops([path for _, path in pictures], 32).to(device), labels.to(device)


def again(tokenizer, images):
    """The images as the tokenizer gives them back."""
    return torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in images.split(250)])


def nearest_share(tokens, rows):
    """The mean share of tokens (N, T) that are also in the nearest of rows (M, 1 + T)."""
    parts = np.array_split(np.asarray(tokens, np.uint16), max(1, len(tokens) // 10))
    shares = [(part[:, None] == rows[:, 1:]).mean(2).max(1) for part in parts]
    return float(np.concatenate(shares).mean())
