"""What samples of a model of photographs are worth, as a small classifier of photographs sees it.

    python .github/photos.py judge DATA          trains the classifier on DATA/train
    python .github/photos.py score DATA RUN ...  600 samples of each run

Accuracy: the share of the pictures that the classifier puts into their class. Distance: the Frechet
distance of its features to those of held-out photographs (DATA/val), beside that of one half of the
held-out photographs to the other. Shared: the tokens that a picture has in common with the nearest
training picture. The samples' share over that of held-out photographs tells copies from pictures.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import claim_judge  # noqa: E402
import rar  # noqa: E402
import tokenizer as tok  # noqa: E402

def blurred(images, size):
    small = F.interpolate(images, size, mode="area")
    return F.interpolate(small, images.shape[-1], mode="bilinear")

def half_distances(judge, images, labels, held_out):
    """The mean distance of images to the even and the odd half of the held-out photographs."""
    halves = held_out[::2], held_out[1::2]
    return sum(judge.score(images, labels, half)["distance"] for half in halves) / 2

def nearest_share(tokens, rows):
    """The mean share of equal tokens between tokens (B, T) and the nearest of rows (N, 1 + T)."""
    rows = torch.from_numpy(rows[:, 1:].astype("int64"))
    return sum((rows == own).float().mean(1).max().item() for own in tokens) / len(tokens)

def train(data):
    train_files, _ = tok.labelled_pictures(data)
    images, labels = claim_judge.photographs(train_files)
    judge = claim_judge.Judge(int(labels.max()) + 1)
    judge.learn(images, blurred(images, 16), labels)  # half of the time blurred, as samples are
    tok.write_tensors(Path(data, "judge.pt"), judge.state_dict())

def score(data, runs):
    judge, held_out, labels = claim_judge.load_judge(data, Path(data, "judge.pt"))
    own = judge.score(held_out[::2], labels[::2], held_out[1::2])
    blur = judge.score(blurred(held_out, 8), labels, held_out)
    whole = judge.score(held_out, labels, held_out)
    print(f"held out: accuracy {whole['accuracy']:.3f}, blurred to 8x8 {blur['accuracy']:.3f}; "
          f"distance of halves {own['distance']:.3f}")
    for run in runs:
        device = torch.device("cpu")
        model, config, folder = rar.load_model(run, {"seed": 1}, device)
        tokenizer = tok.tokenizer_of(config, folder)
        wanted = torch.arange(600) % config.num_classes
        batches = rar.sample_tokens(model, wanted, config, contextlib.nullcontext())
        tokens = torch.cat([part for _, part in batches])
        images = F.interpolate(tokenizer.decode(tokens), 32, mode="area")
        again = F.interpolate(tokenizer.decode(tokenizer.encode(
            F.interpolate(held_out, config.image_size, mode="bilinear"))), 32, mode="area")
        result = judge.score(images, wanted, held_out)
        rows = tok.open_data(config, folder, device)
        shared = nearest_share(tokens, rows.train)
        others = nearest_share(torch.from_numpy(rows.held_out[:, 1:].astype("int64")), rows.train)
        distance = half_distances(judge, images, wanted, held_out)
        limit = half_distances(judge, again, labels, held_out)
        print(f"{run}: accuracy {result['accuracy']:.3f}; distance {distance:.3f}, "
              f"{distance / own['distance']:.2f} times that of halves; the tokenizer's alone "
              f"{limit:.3f}; shared {shared:.3f}, {shared / others:.2f} times the held-out ones'",
              flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["judge", "score"])
    parser.add_argument("data")
    parser.add_argument("runs", nargs="*")
    args = parser.parse_args()
    if args.what == "judge":
        train(args.data)
    score(args.data, args.runs)

if __name__ == "__main__":
    main()
