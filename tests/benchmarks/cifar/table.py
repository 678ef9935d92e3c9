"""The table of a setting in Markdown, and what it was measured on."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from dmm_cli import __version__
from dmm_cli.devices import cores
from dmm_cli.runtime import resolve_device

from .cells import Cell, Profile
from .rows import CLIENTS, Clock, chosen
from .training import seconds_file

ENSEMBLES = {"ensemble": "ensemble of probabilities", "ensemble of logits": "ensemble of logits"}


def markdown(cells: Sequence[Cell], slugs: Sequence[str] | None) -> str:
    """One setting: a row per method, see ``rows.chosen``, a column per seed; cells are the same setting, its seeds."""
    seeds = [f"seed {cell.seed}" for cell in cells]
    lines = [
        f"| {cells[0].setting}: accuracy, % | {' | '.join(seeds)} | mean | seconds | images |",
        "|---|" + "---|" * (len(cells) + 3),
    ]
    lines += _clients(cells)
    for name, row in chosen(cells[0], slugs).items():
        records = [json.loads(row.place(cell, Clock(None)).record.read_text()) for cell in cells]
        best = [max(record["accuracy"]) for record in records]
        seconds, images = (statistics.mean(record[key] for record in records) for key in ("seconds", "images"))
        shown = [f"{value:.1f}" for value in best]
        lines.append(_line(name, shown, best, f"{seconds:.0f}", f"{images:,.0f}" if images else ""))
    return "\n".join(lines)


def _clients(cells: Sequence[Cell]) -> list[str]:
    """Each client, and all of them together."""
    found = [json.loads((cell.folder / CLIENTS).read_text())["rows"] for cell in cells]
    alone = [[row["accuracy"] for row in rows if row["label"] not in ENSEMBLES] for rows in found]
    spent = statistics.mean(sum(map(_training, cell.clients)) for cell in cells)
    images = statistics.mean(sum(map(len, cell.shares)) for cell in cells)
    each = [", ".join(f"{value:.1f}" for value in values) for values in alone]
    lines = [_line("each client", each, list(map(statistics.mean, alone)), f"{spent:.0f}", f"{images:,.0f}")]
    for label, name in ENSEMBLES.items():
        values = [row["accuracy"] for rows in found for row in rows if row["label"] == label]
        lines.append(_line(name, [f"{value:.1f}" for value in values], values, "", ""))
    return lines


def _training(path: Path) -> float:
    return float(seconds_file(path).read_text())


def _line(name: str, shown: Sequence[str], values: Sequence[float], seconds: str, images: str) -> str:
    return f"| {name} | {' | '.join([*shown, f'{statistics.mean(values):.1f}', seconds, images])} |"


def conditions(profile: Profile, cells: Sequence[Cell]) -> str:
    """Hardware, versions, seeds, and how the clients came about."""
    device = resolve_device("auto")
    seeds, flags = sorted({cell.seed for cell in cells}), " ".join(profile.run)
    return (
        f"{profile.clients} clients of CIFAR-10, n = {len(seeds)} (seeds {', '.join(map(str, seeds))}, of split, "
        f"training and dmm), 10,000 test images. The images are a JPEG re-encoding of the original, a little lossy, so "
        f"accuracies sit a little below the usual ones. Network: `{profile.own.arch}`; clients of their own start are "
        f"trained for {profile.own.epochs} epochs, of a common one (trained on a twentieth of the images, which no "
        f"client has) for {profile.shared.epochs}, the network of all data for {profile.pooled.epochs}. "
        f"{f'`dmm run` with `{flags}`. ' if flags else ''}"
        f"Seconds are {'seconds' if device.type == 'cuda' else 'processor seconds, of all cores together'}; those of "
        f"clients are of all of them; rows on pseudo-data use dmm's, whose synthesis is in dmm's row alone. "
        f"{_processor()}{', ' + torch.cuda.get_device_name(device) if device.type == 'cuda' else ''}; "
        f"dmm {__version__}, Python {platform.python_version()}, torch {torch.__version__}, timm {version('timm')}."
    )


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{cores()} CPUs of {names[0] if names else platform.machine()}"
