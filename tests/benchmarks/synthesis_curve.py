"""Accuracy of the distilled student by number of pseudo-images and of the steps they took.

    python tests/benchmarks/synthesis_curve.py [--cifar10 DIRECTORY] [--work DIRECTORY] [--seeds N]

Digits: five sites as those of the fixtures, trained on parts of the training images and judged on 300 training images
that were kept from them; a student from the merged group, as in ``dmm run``. CIFAR-10 (DIRECTORY holds what
pack_cifar10.py wrote): one network trained on nine tenths of the training images, judged on the others; a student from
its own random start. The test sets of either are not touched: defaults are chosen here. One synthesis for every number
of steps draws the largest number of images, and fewer images are the first so many of every teacher: which of them come
first is by chance. Syntheses and students are kept, so that a second run goes on. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from cifar.whole import savez
from commands import dmm
from merge_quality import ARCH, save, train, unpack

from dmm_cli.architectures import build
from dmm_cli.inputs import resolve_source
from dmm_cli.synthesis.kind import REQUIRED
from dmm_cli.synthesis.pseudodata import load_pseudo_data, save_pseudo_data

sys.path.insert(0, str(Path(__file__).parents[2] / "fixtures"))
import make_digits

COUNT, STEPS = 1024, 300
COUNTS, BUDGETS = (256, 512, 1024, 2048, 4096), (75, 150, 300, 600)
KEPT_BACK = 30  # digits of each class
EPOCHS, RATE = 12, 3e-3
POINTS = [(count, STEPS) for count in COUNTS] + [(COUNT, steps) for steps in BUDGETS if steps != STEPS]


def digits(work: Path, seed: int) -> None:
    """Sites, their merge and validation images in ``work``."""
    torch.set_num_threads(1)
    images, labels = make_digits.digits()
    parts = make_digits.split(labels, make_digits.TEST_PER_CLASS, 0)
    allowed = torch.cat([index for name, index in parts.items() if name != "test"]).sort().values
    images, labels = images[allowed], labels[allowed]
    parts = make_digits.split(labels, KEPT_BACK, 100 + seed)
    for name, model in make_digits.train_all(images, labels, parts, 1000 * (1 + seed)).items():
        if name in make_digits.SITES:
            make_digits.save(work / f"teacher-{name}.safetensors", model)
    dmm("merge", *sorted(work.glob("teacher-*")), "-o", work / "merged", "--force", "-q")
    (work / "merged" / "group-0.safetensors").rename(work / "student.safetensors")
    savez(work / "validation.npz", images=images[parts["test"]], labels=labels[parts["test"]])


def cifar10(folder: Path) -> Callable[[Path, int], None]:
    """Makes a teacher, a fresh student and validation images."""

    def make(work: Path, seed: int) -> None:
        images, labels = map(torch.from_numpy, unpack(folder / "train.npz"))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        kept, seen = order.split([len(order) // 10, len(order) - len(order) // 10])
        for name, start in (("teacher-0", 2 * seed), ("student", 2 * seed + 1)):
            torch.manual_seed(start)
            model = build(ARCH)
            if name != "student":
                model = train(model, images[seen], labels[seen], EPOCHS, RATE, seed)
            save(work / f"{name}.safetensors", model)
        savez(work / "validation.npz", images=images[kept], labels=labels[kept])

    return make


def measure(work: Path, count: int, steps: int, seed: int) -> float:
    """Accuracy of the student of one point, in per cent."""
    result = work / f"{count}-{steps}.json"
    if not result.exists():
        pseudo, out = work / "pseudo.safetensors", work / "out.safetensors"
        teachers = sorted(work.glob("teacher-*"))
        first_of_each(synthesis(work, teachers, steps, seed), count, pseudo)
        dmm("distill", work / "student.safetensors", *teachers, "--data", pseudo, "-o", out, "--seed", seed,
            "--force", "-q")  # fmt: skip
        result.write_text(dmm("evaluate", out, "--data", work / "validation.npz", "-q"))
    return float(result.read_text())


def synthesis(work: Path, teachers: list[Path], steps: int, seed: int) -> Path:
    """Pseudo-data of the largest number of images, made where they are missing."""
    out = work / f"pseudo-{steps}.safetensors"
    if not out.exists():
        dmm("synthesize", *teachers, "-o", out, "--count", max(COUNTS), "--steps", steps, "--seed", seed, "-q")
    return out


def first_of_each(source: Path, count: int, out: Path) -> None:
    """Pseudo-data of the first ``count`` images of every teacher."""
    read = resolve_source(str(source))
    data = load_pseudo_data(read)
    kept = np.sort(np.concatenate([np.flatnonzero(data.teacher_id == t)[:count] for t in range(len(data.teachers))]))
    parts = {name: getattr(data, name)[kept] for name in ("images", *REQUIRED)}
    save_pseudo_data(out, replace(data, **parts), dict(read.metadata), force=True)


def main() -> None:
    """Train what is missing, measure what is missing, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dmm-synthesis-curve")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    sets: dict[str, Callable[[Path, int], None]] = {"digits": digits}
    if options.cifar10:
        sets["CIFAR-10"] = cifar10(options.cifar10)
    columns: dict[str, dict[tuple[int, int], list[float]]] = {}
    for name, make in sets.items():
        for seed in range(options.seeds):
            work = options.work / f"{name}-{seed}"
            if not (work / "validation.npz").exists():
                work.mkdir(parents=True, exist_ok=True)
                make(work, seed)
            for point in POINTS:
                found = measure(work, *point, seed)
                print(f"{name}, seed {seed}, {point}: {found}", file=sys.stderr, flush=True)
                columns.setdefault(name, {}).setdefault(point, []).append(found)
    print(f"| images a teacher | steps | {' | '.join(columns)} |\n|---|---{'|---' * len(columns)}|")
    for count, steps in sorted(POINTS):
        cells = [summary(column[count, steps]) for column in columns.values()]
        print(f"| {count} | {steps} | {' | '.join(cells)} |")


def summary(values: list[float]) -> str:
    """Mean and range."""
    return f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})"


if __name__ == "__main__":
    main()
