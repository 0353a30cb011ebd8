"""What claim.py judges samples with: a small classifier of photographs, trained on real ones.

Its features are those of the Frechet distance. The photographs that the models of many passes learn
from are not among its own, so copies of them gain nothing here.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import tokenizer as tok


class Judge(nn.Module):
    """A small classifier of photographs. Its features (N, 128) are also what distances are of."""

    def __init__(self, classes):
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        self.body = nn.Sequential(*(layer for i in range(4) for layer in (
            nn.Conv2d(widths[i], widths[i + 1], 3, stride=1 + (i > 0), padding=1),
            nn.BatchNorm2d(widths[i + 1]), nn.ReLU())), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(128, classes)

    def forward(self, images):
        return self.head(self.body(images))

    def learn(self, images, again, labels, passes=15):
        """From pictures, half of the time as the tokenizer gives them back, mirrored half of the
        time, moved by up to 3 pixels."""
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=0.05)
        steps = passes * -(-len(images) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
        for _ in range(passes):
            for part in torch.randperm(len(images)).split(64):
                dx, dy = torch.randint(-3, 4, (2,)).tolist()
                coins = torch.rand(2, len(part), 1, 1, 1) < 0.5
                x = torch.where(coins[0], images[part], again[part])
                x = torch.where(coins[1], x, x.flip(3))
                loss = F.cross_entropy(self(x.roll((dy, dx), (2, 3))), labels[part],
                                       label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

    @torch.no_grad()
    def score(self, images, labels, reference):
        """The share of pictures that is put into its class, and the Frechet distance of their
        features to those of a reference."""
        a, b = (torch.cat([self.body(part) for part in x.split(250)]).double()
                for x in (images, reference))
        right = (self.head(a.float()).argmax(1) == labels).double().mean().item()
        roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt()
        distance = ((a.mean(0) - b.mean(0))**2).sum() + a.T.cov().trace() + b.T.cov().trace()
        return {"accuracy": right, "distance": (distance - 2 * roots.sum()).item()}


def photographs(pictures):
    return (tok.crop_images([file for _, file in pictures], 32),
            torch.tensor([c for c, _ in pictures]))


def train_judge(source, few, tokenizer, path):
    """A classifier that learned from the training photographs but the first `few` of each class."""
    pictures = [(c, file) for c, each in enumerate(tok.class_folders(source))
                for file in tok.pictures_in(each)[few:]]
    images, labels = photographs(pictures)
    judge = Judge(int(labels.max()) + 1)
    judge.learn(images, again(tokenizer, images), labels)
    tok.write_tensors(path, judge.state_dict())


def again(tokenizer, images):
    """The images as the tokenizer gives them back."""
    return torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in images.split(250)])


def load_judge(source, path):
    """The classifier, and the held-out photographs and their labels."""
    judge = Judge(len(tok.class_names(source)))
    judge.load_state_dict(tok.read_tensors(path))
    return judge.eval(), *photographs(tok.labelled_pictures(source)[1])
