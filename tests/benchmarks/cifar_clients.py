"""Every method on clients of CIFAR-10 that share no image: one table per setting.

    python tests/benchmarks/cifar_clients.py --cifar10 DIRECTORY [--profile small|full] [--work DIRECTORY]
        [--clients N] [--settings NAME ...] [--seeds N ...] [--rows NAME ...] [--minutes M] [--class-counts]

DIRECTORY holds what pack_cifar10.py wrote. A setting is what clients differ in and where they start: ``0.01-own``
(classes by Dirichlet(.01), each client from its own random weights), ``100-shared`` (from one network that was trained
on a twentieth of the images), ``renderings-shared`` (the same classes, each client its own rendering: grey, inverted,
blurred, noisy, rotated colours). ``small`` is for two CPU cores, ``full`` for a GPU, where ``dmm run`` is told to do
more. Methods run through the public commands, otherwise with their defaults; nothing is chosen on the test images.

What exists is kept: a run that was killed, or stopped after ``--minutes`` (it then exits with 75), goes on where it
was when the same line is given again. In the work directory every setting and seed has a folder with its clients, and
in it ``rows``, a folder per row; delete one to make that row anew, and with ``dmm`` those that use its pseudo-data.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from cifar.cells import PROFILES, Cell, Images, Profile
from cifar.rows import SLUGS, Clock, make_missing
from cifar.table import conditions, markdown
from cifar.training import train
from cifar.whole import savez
from commands import OutOfTime
from merge_quality import unpack

from dmm_cli.runtime import Host, resolve_device
from dmm_cli.trust import grant, module_of

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
TOLD_EVERY = 30.0  # seconds


def load_images(data: Path, work: Path) -> Images:
    """CIFAR-10, unpacked once."""
    arrays: list[np.ndarray] = []
    for part in ("train", "test"):
        path = work / f"cifar10-{part}.npz"
        if not path.exists():
            images, labels = unpack(data / f"{part}.npz")
            savez(path, images=images, labels=labels)
        with np.load(path) as file:
            arrays += [file["images"], file["labels"]]
    with np.load(data / "train.npz") as file:
        return Images(*arrays, tuple(map(str, file["classes"])))


def require_same(profile: Profile, work: Path) -> None:
    """End unless what the directory holds was trained as the profile says."""
    found = {name: value for name, value in asdict(profile).items() if name not in ("settings", "seeds", "run")}
    text, note = json.dumps(found, indent=1, sort_keys=True), work / "profile.json"
    if note.exists() and note.read_text() != text:
        raise SystemExit(
            f"{work} holds networks that were trained in another way, see {note.name}; name another --work"
        )
    note.write_text(text)


def host(clock: Clock) -> Host:
    """Where networks are trained; tells of it, and stops when the time is over."""
    told = time.monotonic()

    def progress(stage: str, done: int, total: int, **_: float) -> None:
        nonlocal told
        clock.left()
        if time.monotonic() - told > TOLD_EVERY:
            told = time.monotonic()
            tell(f"{stage}: {100 * done // total} %")

    return Host(resolve_device("auto"), on_progress=progress)


def tell(words: str) -> None:
    """To standard error: standard output is for the tables."""
    print(words, file=sys.stderr, flush=True)


def make(cells: list[Cell], rows: list[str] | None, clock: Clock) -> None:
    """Train and measure what is missing."""
    for seed in sorted({cell.seed for cell in cells}):
        mine = [cell for cell in cells if cell.seed == seed]
        for cell in mine:
            cell.write_images()
        tell(f"seed {seed}: training")
        pooled = rows is None or "pooled" in rows
        starts = {task.output: task for cell in mine for task in cell.starts(pooled)}
        train(list(starts.values()), host(clock))
        for cell in mine:
            train(cell.trainings(), host(clock))
            make_missing(cell, rows, clock, lambda row, cell=cell: tell(f"{cell.setting}, seed {cell.seed}: {row}"))


def main() -> None:
    """Make what is missing, and print a table per setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, required=True)
    parser.add_argument("--profile", choices=PROFILES, default="small")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dmm-cifar-clients")
    parser.add_argument("--clients", type=int, help="default: those of the profile; another number, another --work")
    parser.add_argument("--settings", nargs="+", help="default: those of the profile")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the profile")
    parser.add_argument("--rows", nargs="+", choices=SLUGS, metavar="NAME", help=f"{', '.join(SLUGS)}; default: all")
    parser.add_argument("--minutes", type=float, help="stop after so long, to go on later")
    parser.add_argument("--class-counts", action="store_true", help="clients tell how often they saw each class")
    options = parser.parse_args()
    profile, work = PROFILES[options.profile], options.work / options.profile
    profile = replace(profile, clients=options.clients or profile.clients)
    clock = Clock(options.minutes and 60 * options.minutes)
    grant([module_of(profile.own.arch)])  # the clients' files name it, where it is a factory
    work.mkdir(parents=True, exist_ok=True)
    require_same(profile, work)
    images = load_images(options.cifar10, options.work)
    cells = [
        Cell(work, profile, setting, seed, images, options.class_counts)
        for setting in options.settings or profile.settings
        for seed in options.seeds or range(profile.seeds)
    ]
    try:
        make(cells, options.rows, clock)
    except OutOfTime:
        tell(f"stopped after {options.minutes} minutes; the same line goes on")
        raise SystemExit(STOPPED) from None
    for setting in dict.fromkeys(cell.setting for cell in cells):
        print(markdown([cell for cell in cells if cell.setting == setting], options.rows), end="\n\n")
    print(conditions(profile, cells))


if __name__ == "__main__":
    main()
