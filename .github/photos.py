"""What samples of a model of photographs are worth, as a small classifier of photographs sees it.

    python .github/photos.py DATA RUN ...        600 samples of each run

The classifier learns from DATA/train, the first time. Told is its accuracy on the samples, and
their distance (claim_judge.py) to held-out photographs, beside that of one half of the held-out
photographs to the other. "Shared" are the tokens that a picture has in common with the nearest
training picture. Samples that share much more than held-out photographs do are copies.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from claim_judge import Judge, again, nearest_share, photographs

import rar
from tokenizer import labelled_pictures

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resized(images, size):
    if size < images.shape[-1]:
        return F.interpolate(images, size, mode="area")
    return F.interpolate(images, size, mode="bilinear")


def blurred(images, size):
    return resized(resized(images, size), images.shape[-1])


def open_judge(train, classes, path, passes):
    """The classifier at a path. If it is not there, it is trained."""
    judge = Judge(classes).to(DEVICE)
    if path.exists():
        judge.load_state_dict(rar.read_tensors(path))
        return judge.eval()
    images, labels = photographs(train, DEVICE)
    judge.learn(images, blurred(images, 16), labels, passes)
    rar.write_tensors(path, judge.state_dict())
    return judge


def distance_to_halves(judge, images, labels, held_out):
    """The mean distance of images to the even and to the odd held-out photographs."""
    halves = held_out[::2], held_out[1::2]
    return sum(judge.score(images, labels, half)["distance"] for half in halves) / 2


def score(judge, run, held_out, labels, count):
    """Accuracy, distances and shared tokens of samples of a run, by name."""
    model, config, folder = rar.load_model(run, {"seed": 1, "precision": "float32"})
    tokenizer = rar.open_tokenizer(config, folder).to(DEVICE)
    wanted = torch.arange(count) % config.num_classes
    batches = rar.sample_tokens(model, wanted, config)
    tokens = torch.cat([part for _, part in batches])
    images = torch.cat([resized(tokenizer.decode(part), 32) for part in tokens.split(100)])
    wanted = wanted.to(DEVICE)
    reconstructed = resized(again(tokenizer, resized(held_out, config.image_size)), 32)

    _, *pairs = rar.find_data(config.data)
    rows, held_out_rows = rar.open_rows(config, *pairs, tokenizer)
    return {"accuracy": judge.score(images, wanted, held_out)["accuracy"],
            "distance": distance_to_halves(judge, images, wanted, held_out),
            "the tokenizer's distance": distance_to_halves(judge, reconstructed, labels, held_out),
            "shared": nearest_share(tokens.cpu(), rows),
            "shared by held-out ones": nearest_share(held_out_rows[:, 1:], rows)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="DATA/train/CLASS/PICTURE and DATA/val/CLASS/PICTURE")
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--tiny", action="store_true", help="see that it works, in seconds")
    args = parser.parse_args()
    path = Path(f"runs/judge-{Path(args.data).resolve().name}.pt")

    train, pairs = labelled_pictures(args.data)
    held_out, labels = photographs(pairs, DEVICE)
    judge = open_judge(train, int(labels.max()) + 1, path, passes=1 if args.tiny else 15)
    whole = judge.score(held_out, labels, held_out)
    blur = judge.score(blurred(held_out, 8), labels, held_out)
    own = judge.score(held_out[::2], labels[::2], held_out[1::2])
    print(f"held out: accuracy {whole['accuracy']:.3f}, blurred to 8x8 {blur['accuracy']:.3f}; "
          f"distance of halves {own['distance']:.3f}")
    for run in args.runs:
        result = score(judge, run, held_out, labels, 20 if args.tiny else 600)
        print(f"{run}:", ", ".join(f"{name} {x:.3f}" for name, x in result.items()), flush=True)


if __name__ == "__main__":
    main()
