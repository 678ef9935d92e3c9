"""What the options of ``dmm synthesize`` give: accuracy of students on digits kept from training digits.

    python tests/benchmarks/inversion_options.py [--option NAME ...] [--work DIRECTORY]

Sites as those of fixtures/digits are trained on the training digits but for 300, by which students are judged; two sets
by two splits. The test digits of the fixture are not seen. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from commands import dmm

sys.path.append(str(Path(__file__).parents[2] / "fixtures"))
import make_digits as digits

from dmm_cli.checkpoint import save_arrays

KEPT = 30  # digits of each class that students are judged by
SETS = {101: 0, 202: 1}  # seed of a split, and of what is made of its sites
GENERATORS = ["--count", 384, "--steps", 120]
PIXELS = ["--engine", "pixels", "--count", 128, "--batch", 64, "--steps", 120]
OPTIONS = {
    "generators": GENERATORS,
    "generators, --jitter 1": [*GENERATORS, "--jitter", 1],
    "generators, --plateau 2": [*GENERATORS, "--plateau", 2],
    "generators, --norm-average 0.9": [*GENERATORS, "--norm-average", 0.9],
    "pixels": PIXELS,
    "pixels, --jitter 1": [*PIXELS, "--jitter", 1],
    "pixels, --jitter 1 --keep-best": [*PIXELS, "--jitter", 1, "--keep-best"],
    "pixels, --flip": [*PIXELS, "--flip"],
}
SECOND = {
    "a second round": [],
    "--student, 0.01": ["--student", "STUDENT", "--loss", "adversarial=0.01"],
    "--student, 0.1": ["--student", "STUDENT", "--loss", "adversarial=0.1"],
    "--student, 1": ["--student", "STUDENT", "--loss", "adversarial=1"],
}


def sites(folder: Path, seed: int) -> list[Path]:
    """Train the sites of a split that leaves the fixture's test digits out."""
    if not (folder / "test.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        images, labels = digits.digits()
        left = torch.ones(len(labels), dtype=torch.bool)
        left[digits.split(labels, digits.TEST_PER_CLASS, 0)["test"]] = False
        images, labels = images[left], labels[left]
        parts = digits.split(labels, KEPT, seed)
        models = digits.train_all(images, labels, parts, seed)
        for name in digits.SITES:
            digits.save(folder / f"site-{name}.safetensors", models[name])
        kept = {"images": images[parts["test"]].numpy(), "labels": labels[parts["test"]].numpy()}
        save_arrays(folder / "test.safetensors", kept, {}, force=True)
    return sorted(folder.glob("site-?.safetensors"))


def taught(folder: Path, name: str, flags: list[object], seed: int, start: Path) -> tuple[Path, str]:
    """A student of what ``flags`` make, and its accuracy."""
    teachers = sorted(folder.glob("site-?.safetensors"))
    pseudo, student = folder / "pseudo.safetensors", folder / f"{name}.safetensors"
    flags = [start if flag == "STUDENT" else flag for flag in flags]
    dmm("synthesize", *teachers, *flags, "--seed", seed, "-o", pseudo, "--force", "-q")
    lessons = ("--data", pseudo, "--steps", 300, "--seed", seed)
    dmm("distill", start, *teachers, *lessons, "-o", student, "--force", "-q")
    return student, dmm("evaluate", student, "--data", folder / "test.safetensors", "-q").strip()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--option", nargs="*", choices=[*OPTIONS, *SECOND], default=[*OPTIONS, *SECOND])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dmm-inversion-options")
    arguments = parser.parse_args()
    cells: dict[str, list[str]] = {}
    for split, seed in SETS.items():
        folder = arguments.work / str(split)
        merged = folder / "merged"
        dmm("merge", *sites(folder, split), "--group", "auto", "-o", merged, "--force", "-q")
        first = merged / "group-0.safetensors"
        for name in [name for name in OPTIONS if name in arguments.option]:
            cells.setdefault(name, []).append(taught(folder, name, OPTIONS[name], seed, first)[1])
        second = [name for name in SECOND if name in arguments.option]
        student = second and taught(folder, "student", GENERATORS, seed, first)[0]
        for name in second:
            flags = [*GENERATORS, *SECOND[name]]
            cells.setdefault(name, []).append(taught(folder, name, flags, seed + 50, student)[1])
    print("| synthesis | accuracy, set 1 | set 2 |\n|---|---|---|")
    for name, found in cells.items():
        print(f"| {name} | {' | '.join(found)} |")


if __name__ == "__main__":
    main()
