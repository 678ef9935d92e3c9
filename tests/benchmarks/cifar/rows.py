"""The rows of the table: every method through the public commands, each in a folder of its own.

A row that is there is kept; to make one anew, delete its folder.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from commands import OutOfTime, dmm
from merge_starts import with_mean_variance
from safetensors.numpy import load_file, save_file

from dmm_cli.architectures import build
from dmm_cli.checkpoint import save_arrays
from dmm_cli.devices import cores
from dmm_cli.images import PixelSpace
from dmm_cli.inputs import resolve_source
from dmm_cli.loading import load_model
from dmm_cli.norms import norm_layers
from dmm_cli.runtime import resolve_device, seeded
from dmm_cli.synthesis.pseudodata import load_pseudo_data, save_pseudo_data

from . import ensembles
from .cells import Cell
from .training import SPEC, seconds_file

MODEL, MADE, RECORD, CLIENTS = "model.safetensors", "made.json", "row.json", "clients.json"


class Clock:
    """The time that is left.

    Args:
        seconds: from now on; None for as long as it takes.
    """

    def __init__(self, seconds: float | None) -> None:
        self._until = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Seconds, None where there is no limit.

        Raises:
            OutOfTime: none are left.
        """
        if self._until is None:
            return None
        if self._until <= time.monotonic():
            raise OutOfTime
        return self._until - time.monotonic()


@contextmanager
def timed(output: Path) -> Iterator[None]:
    """Note what an output takes, in addition to what it took before it was interrupted."""
    note, began = seconds_file(output), spent()
    output.parent.mkdir(parents=True, exist_ok=True)
    before = float(note.read_text()) if note.exists() else 0.0
    try:
        yield
    finally:
        note.write_text(f"{before + spent() - began:.1f}")


def spent() -> float:
    """Processor seconds of this process and the commands it has called; on a GPU, where these tell nothing, seconds."""
    return sum(os.times()[:4]) if resolve_device("auto").type == "cpu" else time.monotonic()


@dataclass(frozen=True)
class Place:
    """Where a row of a cell is made.

    Attributes:
        data: the pseudo-data that the run of dmm drew.
    """

    cell: Cell
    folder: Path
    clock: Clock

    model = property(lambda self: self.folder / MODEL)
    made = property(lambda self: self.folder / MADE)
    record = property(lambda self: self.folder / RECORD)
    run = property(lambda self: self.cell.folder / "rows" / "dmm" / "run")
    data = property(lambda self: self.run / "pseudo.safetensors")

    def dmm(self, *words: object) -> str:
        """A command within the time that is left, with the cell's seed; outputs replace what an earlier try left."""
        return dmm(*words, "--seed", self.cell.seed, "--force", "-q", seconds=self.clock.left())


def merged(*flags: object) -> Callable[[Place], None]:
    """``dmm merge`` with these flags; ``base`` and ``data`` among them stand for the cell's files."""

    def make(place: Place) -> None:
        files = {"base": place.cell.base, "data": place.data}
        words = [files.get(flag, flag) for flag in flags]
        place.dmm("merge", *place.cell.clients, *words, "-o", place.model)

    return make


def plain(place: Place) -> None:
    """Running variances averaged like weights, as others do it."""
    merge = place.folder / "analytic.safetensors"
    place.dmm("merge", *place.cell.clients, "--align", "never", "-o", merge)
    with_mean_variance(merge, place.cell.clients, place.model)


def local_statistics(place: Place) -> None:
    """FedBN (Li et al., ICLR 2021): the mean of all weights, but every client keeps its own BatchNorm layers."""
    merge = place.folder / "mean.safetensors"
    place.dmm("merge", *place.cell.clients, "--align", "never", "-o", merge)
    source = resolve_source(str(merge))
    model, _ = load_model(source)
    local = tuple(f"{name}." for name, _ in norm_layers(model))
    metadata = {name: source.metadata[name] for name in ("format", "dmm.arch", "dmm.input")}
    for number, client in enumerate(place.cell.clients):
        own = {name: tensor for name, tensor in load_file(client).items() if name.startswith(local)}
        save_file({**load_file(merge), **own}, place.folder / f"model-{number}.safetensors", metadata)
    merge.unlink()


def pipeline(place: Place) -> None:
    """``dmm run``, with the flags of the profile."""
    place.dmm("run", *place.cell.clients, *place.cell.profile.run, "-o", place.run)
    place.model.unlink(missing_ok=True)
    place.model.hardlink_to(place.run / MODEL)


def informed(place: Place) -> None:
    """``dmm run``, where every client has told what its images look like in the networks of the others."""
    clients = place.cell.clients

    def record(number: int) -> None:
        owner, data = clients[number], place.folder / f"images-{number}.npz"
        np.savez(data, images=place.cell.seen(number)[0])
        others = [other for other in clients if other != owner]
        words = ["--data", data, "--owner", owner, "-o", place.folder / f"statistics-{number}", "--force", "-q"]
        dmm("record", *others, *words, seconds=place.clock.left())
        data.unlink()

    def told(number: int) -> int:
        return len(list((place.folder / f"statistics-{number}").glob("*.safetensors")))

    missing = [n for n in range(len(clients)) if told(n) < len(clients) - 1]  # others were made before a stop
    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(record, missing))
    files = place.folder / "statistics-*" / "*.safetensors"
    place.dmm("run", *clients, *place.cell.profile.run, "--statistics", files, "-o", place.folder / "run")
    place.model.unlink(missing_ok=True)
    place.model.hardlink_to(place.folder / "run" / MODEL)


def distilled(place: Place) -> dict:
    """What the run of dmm tells of its distillation."""
    return json.loads((place.run / "distill.json").read_text())


def everything(place: Place) -> None:
    """The network that was trained on the images of all clients."""
    place.model.unlink(missing_ok=True)
    place.model.hardlink_to(place.cell.pooled)


def from_scratch(place: Place) -> None:
    """A network with random weights learns what dmm's student does, without a merge, as DENSE does (NeurIPS 2022).

    DENSE draws other images, and teaches the mean of the clients' answers.
    """
    like = resolve_source(str(place.cell.clients[0]))
    with seeded(place.cell.seed, "scratch"):
        model = build(like.metadata["dmm.arch"])
    student = place.folder / "student.safetensors"
    metadata = {name: like.metadata[name] for name in ("dmm.arch", "dmm.input", "dmm.classes")}
    save_arrays(student, {name: tensor.numpy() for name, tensor in model.state_dict().items()}, metadata, force=True)
    steps = distilled(place)["parameters"]["steps"]
    flags = ["--steps", steps] if steps else []  # where dmm only resets statistics, this one has all to learn
    place.dmm("distill", student, *place.cell.clients, "--data", place.data, *flags, "-o", place.model)


def oracle(place: Place) -> None:
    """The distillation of ``dmm run`` on real images: as many of each client, with its answers."""
    record = distilled(place)
    real = place.folder / "real.safetensors"
    real_images(place.cell, place.data, real)
    student, steps = record["student"]["path"], record["parameters"]["steps"]
    flags = ["--data", real, "--steps", steps, "-o", place.model]
    place.dmm("distill", student, *place.cell.clients, *flags)


def real_images(cell: Cell, pseudo: Path, path: Path) -> None:
    """Training images of every client, in place of its pseudo-images and no more than these, with its own logits."""
    drawn = load_pseudo_data(resolve_source(str(pseudo)))
    parts = []
    for number, client in enumerate(cell.clients):
        source = resolve_source(str(client))
        place = drawn.place_of(source)
        images, labels = cell.seen(number)
        known = np.flatnonzero(np.array(drawn.teachers[place].prior)[labels] > 0)
        draw = np.random.default_rng([cell.seed, number])
        own = draw.permutation(known)[: int((drawn.teacher_id == place).sum())]
        model, _ = load_model(source)
        with torch.inference_mode():
            logits = model(PixelSpace(SPEC).from_bytes(torch.from_numpy(images[own]))).numpy()  # (N, K)
        sure = torch.from_numpy(logits).softmax(1).amax(1).numpy()
        owner = np.full(len(own), place)
        parts.append((images[own], labels[own], owner, logits, sure))
    images, targets, owners, logits, confidence = (np.concatenate(part) for part in zip(*parts, strict=True))
    halves = {"logits": logits.astype(np.float16), "confidence": confidence.astype(np.float16)}
    data = replace(drawn, images=images, targets=targets, teacher_id=owners.astype(np.int16), **halves)
    save_pseudo_data(path, data, {}, force=True)


def within_known_classes(place: Place) -> list[float]:
    """All clients answer, each for its own classes; there is no model to judge."""
    return [ensembles.within_known_classes(place.cell.clients, place.data, place.cell.test)]


def committee(place: Place) -> list[float]:
    """All clients answer, as dmm's student is taught by them; there is no model to judge."""
    return [ensembles.committee(place.cell.clients, place.data, place.cell.test, place.cell.seed)]


@dataclass(frozen=True)
class Row:
    """A method.

    Attributes:
        slug: name of its folder.
        make: leaves ``model.safetensors``, or several ``model-N.safetensors``, of which the best counts; or gives
            accuracies in per cent.
        start: of the clients it is for, "own" or "shared", both if empty.
        images: file of the images it learns from, within the folder of the cell's rows.
    """

    slug: str
    make: Callable[[Place], list[float] | None]
    start: str = ""
    images: str = ""

    def fits(self, cell: Cell) -> bool:
        """Whether the row is one of the cell's."""
        return self.start in ("", "shared" if cell.shared else "own")

    def place(self, cell: Cell, clock: Clock) -> Place:
        """Where it is made."""
        return Place(cell, cell.folder / "rows" / self.slug, clock)


PSEUDO, REAL = "dmm/run/pseudo.safetensors", "oracle/real.safetensors"
INFORMED = "informed/run/pseudo.safetensors"
ROWS: dict[str, Row] = {
    "ensemble of the logits of those who know the class": Row("known", within_known_classes, images=PSEUDO),
    "committee of all clients, which dmm's student is taught by": Row("committee", committee, images=PSEUDO),
    "linear, variances averaged like weights (FedAvg)": Row("plain", plain),
    "linear, analytic variances": Row("linear", merged("--align", "never")),
    "linear, statistics reset on pseudo-data": Row(
        "reset", merged("--align", "never", "--recalibrate", "data"), images=PSEUDO
    ),
    "aligned (Git Re-Basin), statistics reset": Row(
        "aligned", merged("--align", "always", "--recalibrate", "data"), "own", PSEUDO
    ),
    **{
        name: Row(method, merged("--method", method, "--base", "base"), "shared")
        for name, method in {"TIES": "ties", "TSV": "tsv", "Iso-C": "iso_c", "WUDI": "wudi"}.items()
    },
    "RegMean on pseudo-data": Row("regmean", merged("--method", "regmean", "--recalibrate", "data"), images=PSEUDO),
    "PLeaS on pseudo-data": Row("pleas", merged("--method", "pleas", "--recalibrate", "data"), images=PSEUDO),
    "FedBN: linear, statistics local, best client": Row("fedbn", local_statistics),
    "distilled from scratch, otherwise like dmm": Row("scratch", from_scratch, images=PSEUDO),
    "**dmm** (`dmm run`)": Row("dmm", pipeline, images=PSEUDO),
    "**dmm**, with statistics of images in the others' networks": Row("informed", informed, images=INFORMED),
    "oracle: dmm's distillation on real images": Row("oracle", oracle, images=REAL),
    "one network trained on all data": Row("pooled", everything),
}

SLUGS = tuple(row.slug for row in ROWS.values())


def chosen(cell: Cell, slugs: Sequence[str] | None) -> dict[str, Row]:
    """The rows of a cell; of these slugs alone, if any are given."""
    return {name: row for name, row in ROWS.items() if row.fits(cell) and (slugs is None or row.slug in slugs)}


def make_missing(cell: Cell, slugs: Sequence[str] | None, clock: Clock, on_progress: Callable[[str], None]) -> None:
    """Make and judge every row of a cell, see ``chosen``, that is not there yet.

    Raises:
        SystemExit: a row learns from dmm's images, and these are not there.
    """
    rows = sorted(chosen(cell, slugs).items(), key=lambda named: named[1].make is not pipeline)  # others use its images
    for name, row in rows:
        place = row.place(cell, clock)
        if place.record.exists():
            continue
        if row.images in (PSEUDO, REAL) and row.make is not pipeline and not place.data.exists():
            raise SystemExit(f"the row {row.slug} learns from images of the row dmm: make that too, --rows dmm ...")
        on_progress(name)
        if not place.made.exists():  # else it was stopped while it was judged
            with timed(place.model):
                accuracy = row.make(place)
            place.made.write_text(json.dumps(accuracy))
        made = {"seconds": _seconds(row, place), "images": _images(row, cell)}
        record = made | {"accuracy": json.loads(place.made.read_text()) or judged(place)}
        place.record.write_text(json.dumps(record, sort_keys=True) + "\n")
    if not (cell.folder / CLIENTS).exists():
        on_progress("clients")
        words = [*cell.clients, "--ensemble", "--data", cell.test, "--json"]
        (cell.folder / CLIENTS).write_text(dmm("evaluate", *words, seconds=clock.left()))


def judged(place: Place) -> list[float]:
    """The accuracy, in per cent, of each model of a row."""
    models = sorted(place.folder.glob("model*.safetensors"))
    told = dmm("evaluate", *models, "--data", place.cell.test, "-q", seconds=place.clock.left())
    return [float(word) for word in told.split()]


def _seconds(row: Row, place: Place) -> float:
    """Of a row; the network of all data was trained before."""
    trained = float(seconds_file(place.cell.pooled).read_text()) if row.make is everything else 0.0
    return trained + float(seconds_file(place.model).read_text())


def _images(row: Row, cell: Cell) -> int:
    """How many images a row learns from."""
    if not row.images:
        return 0
    return resolve_source(str(cell.folder / "rows" / row.images)).tensors["targets"].shape[0]
