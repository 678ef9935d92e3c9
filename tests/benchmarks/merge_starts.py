"""What alignment and the reset of statistics are worth: CIFAR-10 networks of two starts, and clients of one.

    python tests/benchmarks/merge_starts.py --cifar10 DIRECTORY [--work DIRECTORY] [--seeds N]

DIRECTORY holds what pack_cifar10.py wrote. "Two starts": a network each on either half of the training images, from its
own random weights. "One start": a base is trained on a twentieth of the images, two clients go on from it, each with 80
per cent of one half of the classes and 20 of the other. Statistics are reset on images drawn from the parents by ``dmm
synthesize`` ("data-free"), or on as many of their real training images (the oracle). Everything goes through the public
commands; nothing is chosen on the test images. Prints Markdown; trained checkpoints are kept.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from cifar.whole import savez
from commands import dmm
from merge_quality import ARCH, BASE_EPOCHS, BASE_RATE, CLIENT_RATE, MEAN, STD, save, train, unpack
from safetensors.numpy import load_file, save_file

from dmm_cli.architectures import build
from dmm_cli.images import InputSpec
from dmm_cli.inputs import resolve_source
from dmm_cli.synthesis.pseudodata import PseudoData, TeacherRecord, save_pseudo_data

EPOCHS, CLIENT_EPOCHS, RATE, REAL = 10, 4, 3e-3, 2048
Parts = list[np.ndarray]


def halves(labels: np.ndarray, draw: np.random.Generator) -> Parts:
    """Two disjoint halves of the images."""
    return np.split(draw.permutation(len(labels)), 2)


def skewed(labels: np.ndarray, draw: np.random.Generator) -> Parts:
    """A twentieth for the base, then 80 and 20 per cent of every class, the first five classes the other way round."""
    parts: list[Parts] = [[], [], []]
    for label in range(10):
        base, rest = np.split(draw.permutation(np.flatnonzero(labels == label)), [250])
        most, few = np.split(rest, [int(0.8 * len(rest))])
        for part, index in zip(parts, (base, most, few) if label < 5 else (base, few, most), strict=True):
            part.append(index)
    return [draw.permutation(np.concatenate(part)) for part in parts]


def two_starts(images: torch.Tensor, labels: torch.Tensor, work: Path, seed: int) -> tuple[list[Path], Parts]:
    """A network from its own random weights on either half."""
    parts = halves(labels.numpy(), np.random.default_rng(seed))
    paths = [work / f"start-{seed}-{number}.safetensors" for number in range(2)]
    for number, (path, own) in enumerate(zip(paths, parts, strict=True)):
        if not path.exists():
            torch.manual_seed(100 * seed + number)
            save(path, train(build(ARCH), images[own], labels[own], EPOCHS, RATE, 100 * seed + number))
    return paths, parts


def one_start(images: torch.Tensor, labels: torch.Tensor, work: Path, seed: int) -> tuple[list[Path], Parts]:
    """Two clients of one base under label skew."""
    base, *parts = skewed(labels.numpy(), np.random.default_rng(seed))
    paths = [work / f"client-{seed}-{number}.safetensors" for number in range(2)]
    if not paths[1].exists():
        torch.manual_seed(100 * seed + 50)
        start = train(build(ARCH), images[base], labels[base], BASE_EPOCHS, BASE_RATE, 100 * seed + 50)
        for number, (path, own) in enumerate(zip(paths, parts, strict=True)):
            model = build(ARCH)
            model.load_state_dict(start.state_dict())
            save(path, train(model, images[own], labels[own], CLIENT_EPOCHS, CLIENT_RATE, 100 * seed + 51 + number))
    return paths, parts


def real_images(path: Path, parents: list[Path], parts: Parts, images: torch.Tensor, labels: torch.Tensor) -> Path:
    """The parents' own training images in the form of pseudo-data."""
    index = np.concatenate([own[:REAL] for own in parts])
    teachers = tuple(TeacherRecord(p.stem, resolve_source(str(p)).sha256, (0.1,) * 10) for p in parents)
    data = PseudoData(
        images=images[index].numpy(),
        targets=labels[index].numpy(),
        teacher_id=np.repeat(np.arange(len(parents)), REAL).astype(np.int16),
        logits=np.zeros((len(index), 10), np.float16),
        confidence=np.ones(len(index), np.float16),
        bn_loss=np.zeros(1, np.float32),
        teachers=teachers,
        spec=InputSpec(tuple(images.shape[1:]), MEAN, STD),
    )
    save_pseudo_data(path, data, {}, force=True)
    return path


def with_mean_variance(merged: Path, parents: list[Path], path: Path) -> Path:
    """The merge as others do it: running variances are averaged like weights."""
    tensors, held = load_file(merged), [load_file(parent) for parent in parents]
    for name in tensors:
        if name.endswith("running_var"):
            tensors[name] = np.mean([one[name] for one in held], 0)
    metadata = resolve_source(str(merged)).metadata
    save_file(tensors, path, {name: metadata[name] for name in ("format", "dmm.arch", "dmm.input")})
    return path


def merges(parents: list[Path], pseudo: Path, real: Path, work: Path, align: str) -> dict[str, Path]:
    """The average of two networks by the name of what was done about its statistics."""
    ways = {
        "variances averaged like weights": [],
        "analytic variances": [],
        "statistics reset on pseudo-data": ["--recalibrate", pseudo],
        "statistics reset on real images": ["--recalibrate", real],
    }
    paths = {}
    for number, (name, flags) in enumerate(ways.items()):
        paths[name] = work / f"merged-{number}.safetensors"
        dmm("merge", *parents, "--align", align, "-o", paths[name], "--force", "-q", *flags)
    if align == "always":  # whose variances are those of the units that were averaged
        moved = work / "aligned.safetensors"
        dmm("align", *parents, "-o", moved, "--force", "-q")
        parents = [parents[0], moved]
    first = next(iter(paths))
    paths[first] = with_mean_variance(paths[first], parents, work / "plain.safetensors")
    return paths


def accuracies(parents: list[Path], merged: dict[str, Path], test: Path) -> dict[str, list[float]]:
    """Accuracy in per cent of the parents, and of their merges."""
    scores = [float(score) for score in dmm("evaluate", *parents, *merged.values(), "--data", test, "-q").split()]
    return {"the two networks": scores[:2], **{name: [score] for name, score in zip(merged, scores[2:], strict=True)}}


def main() -> None:
    """Train what is missing, merge, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dmm-merge-starts")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    images, labels = map(torch.from_numpy, unpack(options.cifar10 / "train.npz"))
    test = options.work / "test.npz"
    if not test.exists():
        held_out, answers = unpack(options.cifar10 / "test.npz")
        savez(test, images=held_out, labels=answers)
    columns: dict[str, list[dict[str, list[float]]]] = {}
    kinds: dict[str, tuple[Callable, list[str]]] = {
        "two starts": (two_starts, ["never", "always"]),
        "one start, skewed": (one_start, ["never"]),
    }
    for kind, (make, policies) in kinds.items():
        for seed in range(options.seeds):
            parents, parts = make(images, labels, options.work, seed)
            pseudo = options.work / f"pseudo-{make.__name__}-{seed}.safetensors"
            if not pseudo.exists():
                dmm("synthesize", *parents, "-o", pseudo, "-q", "--seed", seed)
            real = real_images(options.work / "real.safetensors", parents, parts, images, labels)
            for align in policies:
                merged = merges(parents, pseudo, real, options.work, align)
                found = accuracies(parents, merged, test)
                print(f"{kind}, --align {align}, seed {seed}: {found}", file=sys.stderr)
                columns.setdefault(f"{kind}, --align {align}", []).append(found)
    print(f"| accuracy, %, n = {options.seeds} | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    for row in next(iter(columns.values()))[0]:
        print(f"| {row} | {' | '.join(summary([found[row] for found in column]) for column in columns.values())} |")


def summary(seeds: list[list[float]]) -> str:
    """Means over seeds, and of one number the lowest and the highest."""
    means = ", ".join(f"{statistics.mean(values):.1f}" for values in zip(*seeds, strict=True))
    one = [values[0] for values in seeds]
    return means if len(seeds[0]) > 1 or len(one) < 2 else f"{means} ({min(one):.1f} to {max(one):.1f})"


if __name__ == "__main__":
    main()
