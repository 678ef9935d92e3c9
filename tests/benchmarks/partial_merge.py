"""What units side by side are worth: pairs of digit networks of two starts, merged with ``dmm merge --overlap``.

    python tests/benchmarks/partial_merge.py [--work DIRECTORY]

The digits are those of fixtures/make_digits.py, and its 450 test images. 300 training images are kept from all
networks; what ``--overlap`` does was chosen on them. Two pairs learn all classes, on a half each of the others; of two
more pairs one learns the digits 0 to 5 and 4 to 9, one the even and the odd. Pseudo-data are drawn by
``dmm synthesize`` with its defaults. Prints Markdown; trained networks, pseudo-data and merges are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from commands import HERE, dmm

sys.path.insert(0, str(HERE.parents[1] / "fixtures"))

from make_digits import EPOCHS, LEARNING_RATE, TEST_PER_CLASS, digits, fresh, prepare, save, split, train

KEPT, ORDER = 300, 5  # images kept apart, and the seed of the order
OVERLAPS = ("1", "0.75", "0.5", "0.25", "0")
KINDS = {"the same digits": ("half0", "half1"), "other digits": ("class0", "class1")}
WAYS = ("linear", "recalibrated", "pleas")  # the first without pseudo-data
TEST = HERE.parents[1] / "fixtures" / "digits" / "test.safetensors"


def parts(labels: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The images that the two networks of every pair learn from."""
    seen = torch.cat([index for name, index in split(labels, TEST_PER_CLASS, 0).items() if name != "test"])
    seen = seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(ORDER))][KEPT:]
    own = labels[seen]
    return {
        "half0": (seen[0::2], seen[1::2]),
        "half1": (seen[1::2], seen[0::2]),
        "class0": (seen[own < 6], seen[own >= 4]),
        "class1": (seen[own % 2 == 0], seen[own % 2 == 1]),
    }


def pairs(work: Path) -> dict[str, tuple[list[Path], Path]]:
    """Two networks, and their pseudo-data, by the name of the pair."""
    images, labels = digits()
    made = {}
    for number, (name, indices) in enumerate(parts(labels).items()):
        paths = [work / f"{name}-{side}.safetensors" for side in "ab"]
        for seed, (path, index) in enumerate(zip(paths, indices, strict=True), 1000 + 2 * number):
            if not path.exists():
                save(path, train(fresh(seed), prepare(images[index]), labels[index], EPOCHS, LEARNING_RATE, seed))
        pseudo = work / f"{name}-pseudo.safetensors"
        if not pseudo.exists():
            dmm("synthesize", *paths, "-o", pseudo, "-q", "--seed", number)
        made[name] = paths, pseudo
    return made


def merged(paths: list[Path], pseudo: Path, overlap: str, way: str, path: Path) -> None:
    """Merge a pair to a file."""
    flags = ["--overlap", overlap, "--method", "pleas" if way == "pleas" else "linear"]
    flags += [] if way == "linear" else ["--recalibrate", pseudo]
    dmm("merge", *paths, *flags, "-o", path, "--force", "-q")


def accuracies(paths: list[Path]) -> list[float]:
    """Accuracy on the test images, in per cent."""
    return [float(score) for score in dmm("evaluate", *paths, "--data", TEST, "-q").split()]


def main() -> None:
    """Train what is missing, merge, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dmm-partial-merge")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    made = pairs(work)
    parents = {name: accuracies(paths) for name, (paths, _) in made.items()}
    print("parents:", parents, file=sys.stderr)
    columns = [(kind, way) for kind in KINDS for way in WAYS]
    print(f"| overlap | parameters | {' | '.join(f'{way}, {kind}' for kind, way in columns)} |")
    print(f"|---|---|{'---|' * len(columns)}")
    for overlap in OVERLAPS:
        cells = []
        for kind, way in columns:
            outs = [work / f"{name}-{way}-{overlap}.safetensors" for name in KINDS[kind]]
            for name, out in zip(KINDS[kind], outs, strict=True):
                merged(*made[name], overlap, way, out)
            scores = accuracies(outs)
            print(overlap, kind, way, scores, file=sys.stderr)
            cells.append(f"{statistics.mean(scores):.1f}")
        size = json.loads(dmm("inspect", outs[0], "--json"))["parameters"]
        print(f"| {overlap} | {size} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
