"""``dmm run`` on sites of real digits that know rare classes, and on sites that know a hundred between them.

    python tests/benchmarks/digit_splits.py [--settings rare hundred] [--seeds N]

The digits are those of fixtures/make_digits.py, with the same 450 held out. **rare**: three sites, each from its own
start, with two or three common digits, 100 images each, and one or two that it has six images of and nobody else has
any. **hundred**: two digits side by side are one of the numbers 00 to 99; three sites, each from its own start, know 00
to 39, 30 to 69 and 70 to 99; 2,000 numbers made of held-out digits are the test. Everything goes through the public
commands with their defaults. Prints Markdown: accuracy, and for rare digits their mean recall, per seed of split,
training and dmm. Needs scikit-learn, for the images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from commands import dmm
from safetensors.numpy import save_file

from dmm_cli.architectures import build
from dmm_cli.checkpoint import save_arrays

sys.path.append(str(Path(__file__).parents[2] / "fixtures"))
import make_digits as digits

COMMON, RARE = 100, 6  # images
NUMBERS, TESTED = 4000, 2000
RATE = 3e-3

Part = tuple[torch.Tensor, torch.Tensor]  # images, uint8 (N, 1, 8, W), and labels (N,)


class Setting(NamedTuple):
    """Networks to train, on what, and what they are judged by; ``rare`` are classes whose recall is told apart."""

    arch: str
    epochs: int
    sites: list[Part]
    test: Part
    rare: Sequence[int]


def rare(seed: int) -> Setting:
    """Ten digits, four of them rare, at three sites."""
    images, labels = digits.digits()
    parts = digits.split(labels, digits.TEST_PER_CLASS, 0)
    stream = np.random.default_rng(seed)
    order = stream.permutation(10)
    pool = torch.cat([part for name, part in parts.items() if name != "test"])
    own = {int(digit): stream.permutation(pool[labels[pool] == digit].numpy()) for digit in order}
    sites = []
    for known, seldom in ((order[:2], order[2:3]), (order[3:5], order[5:6]), (order[6:8], order[8:])):
        index = np.concatenate([*(own[d][:COMMON] for d in known), *(own[d][:RARE] for d in seldom)])
        sites.append((images[index], labels[index]))
    test = images[parts["test"]], labels[parts["test"]]
    return Setting(digits.ARCH, 60, sites, test, [order[2], order[5], *order[8:]])


def hundred(seed: int) -> Setting:
    """The numbers 00 to 99 at three sites."""
    images, labels = digits.digits()
    parts = digits.split(labels, digits.TEST_PER_CLASS, 0)
    stream = np.random.default_rng(seed)
    pool = torch.cat([part for name, part in parts.items() if name != "test"])

    def numbers(index: torch.Tensor, count: int, of: range) -> Part:
        drawn = stream.choice(of, count)
        own = [index[labels[index] == digit].numpy() for digit in range(10)]
        halves = [[stream.choice(own[digit]) for digit in place] for place in (drawn // 10, drawn % 10)]
        return torch.cat([images[half] for half in halves], 3), torch.from_numpy(drawn)

    sites = [numbers(pool, NUMBERS, known) for known in (range(40), range(30, 70), range(70, 100))]
    arch = "resnet18,num_classes=100,in_chans=1,layers=(1,1,1,1),channels=(16,32,64,128)"
    return Setting(arch, 15, sites, numbers(parts["test"], TESTED, range(100)), ())


SETTINGS = {"rare": rare, "hundred": hundred}


def train(setting: Setting, part: Part, seed: int, path: Path) -> Path:
    """A checkpoint that does not say what it was trained on."""
    torch.manual_seed(seed)
    images, labels = part
    larger = (F.interpolate(images.float() / 255, scale_factor=2, mode="bilinear") - digits.MEAN) / digits.STD
    model = digits.train(build(setting.arch), larger, labels, setting.epochs, RATE, seed)
    spec = {"size": list(larger.shape[1:]), "mean": [digits.MEAN], "std": [digits.STD]}
    metadata = {"format": "pt", "dmm.arch": setting.arch, "dmm.input": json.dumps(spec)}
    save_arrays(path, {name: value.numpy() for name, value in model.state_dict().items()}, metadata)
    return path


def measure(setting: Setting, seed: int, work: Path) -> dict[str, list[float]]:
    """Accuracy in per cent, and mean recall of rare classes where there are some, of every row."""
    sites = [
        train(setting, part, 100 * seed + n, work / f"site-{n}.safetensors") for n, part in enumerate(setting.sites)
    ]
    images, labels = setting.test
    save_file({"images": images.numpy(), "labels": labels.numpy()}, work / "test.safetensors")
    dmm("run", *sites, "-o", work / "run", "--data", work / "test.safetensors", "--seed", seed, "-q")
    found = {}
    for row in json.loads((work / "run" / "evaluation.json").read_text())["rows"]:
        recalls = [row["recall"][digit] for digit in setting.rare]
        found[row["label"]] = [row["accuracy"], *([statistics.mean(recalls)] if recalls else [])]
    return found


def main() -> None:
    """Train, run, and print a table per setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.settings:
        found = []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                found.append(measure(SETTINGS[name](seed), seed, Path(folder)))
            print(f"{name}, seed {seed}: {found[-1]}", file=sys.stderr, flush=True)
        print(f"| {name} | {' | '.join(f'seed {seed}' for seed in range(len(found)))} | mean |")
        print("|---|" + "---|" * (len(found) + 1))
        for label in found[0]:
            values = [rows[label] for rows in found]
            columns = [*values, [statistics.mean(column) for column in zip(*values, strict=True)]]
            print(f"| {label} | {' | '.join(', '.join(f'{value:.1f}' for value in cell) for cell in columns)} |")
        print()


if __name__ == "__main__":
    main()
