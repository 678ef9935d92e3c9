"""From teachers to pseudo-data: class priors, an engine, and the images its teacher recognises.

Legend: T teachers, N images, B images of a batch, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..errors import DmmError
from ..examples import Inputs, answer, joined, named, require_finite
from ..manifest import History, Steps
from ..runtime import Host, deterministic
from ..savepoint import Savepoint
from ..spaces import Spec, space_of
from . import ENGINES
from .prior import from_predictions
from .pseudodata import PseudoData, TeacherRecord
from .settings import Settings
from .task import Task
from .teacher import Teacher, random_example

JUDGED = 512  # candidates that are held as float numbers at once
LOWEST = torch.finfo(torch.float16).min  # logit in a file


class Outcome(NamedTuple):
    """What a synthesis made, curves of the loss terms, and the steps taken of those that were planned."""

    data: PseudoData
    history: History
    steps: Steps


def synthesize(
    teachers: Sequence[Teacher], spec: Spec, settings: Settings, host: Host, student: nn.Module | None = None
) -> Outcome:
    """Invert the normalisation statistics of all teachers into labelled pseudo-data.

    Args:
        teachers: frozen and on the host's device; where a prior is missing it is estimated.
        student: see ``Task``.

    Returns:
        The images every teacher recognises as their target (at most ``settings.count`` each, in
        teacher order), the curves of the loss terms, and how many steps it took. Every process gets the same.

    Raises:
        DmmError: a network answers with NaN or infinity, or a teacher recognises none of its images.
    """
    host = replace(host, savepoint=host.savepoint or Savepoint())
    with deterministic(host.device):
        _require_answers([*(teacher.model for teacher in teachers), *([student] if student else [])], spec, host)
        engine = ENGINES.load(settings.engine)(Task(teachers, spec, settings, host, student))
        ready = list(teachers)
        if any(teacher.prior is None for teacher in teachers):
            ready = [_with_prior(*pair) for pair in zip(teachers, engine.explore(), strict=True)]
        history = engine.fit([teacher.prior for teacher in ready])
        harvest = Harvest(ready, spec, settings.count, host.device)
        for number, teacher in enumerate(ready):
            harvest.add(engine.candidates(number, teacher.prior))
        return Outcome(harvest.pseudo_data(history), history, engine.steps)


@torch.no_grad()
def _require_answers(models: Sequence[nn.Module], spec: Spec, host: Host) -> None:
    """Raise DmmError for a network that answers noise with NaN or infinity, which would spoil what all are shown."""
    seen = random_example(spec, host.device)
    for model in models:
        require_finite(model, answer(model, seen))


def _with_prior(teacher: Teacher, logits: torch.Tensor) -> Teacher:
    """The teacher with the prior it came with, or with the one its logits (B, K) on explored images tell."""
    if teacher.prior is not None:
        return teacher
    return replace(teacher, prior=from_predictions(logits), prior_from="estimated")


class Harvest:
    """The images that teachers recognise, in arrays of their own from the start: they are in memory once."""

    def __init__(self, teachers: Sequence[Teacher], spec: Spec, count: int, device: torch.device) -> None:
        self._teachers, self._spec, self._count = teachers, spec, count
        self._space, self._device = space_of(spec, device), device
        rows, classes = count * len(teachers), teachers[0].num_classes
        self._images = {name: np.empty((rows, *part.size), part.stored) for name, part in named(spec).items()}
        self._arrays = {
            "targets": np.empty(rows, np.int64),
            "teacher_id": np.empty(rows, np.int16),
            "logits": np.empty((rows, classes), np.float16),
            "confidence": np.empty(rows, np.float16),
        }
        self._rows = 0
        self._records: list[TeacherRecord] = []

    def add(self, candidates: Iterator[tuple[Inputs, torch.Tensor]]) -> None:
        """Keep the first of the next teacher's candidates that it classifies as their target, up to ``count``.

        Args:
            candidates: images, uint8 (B, C, H, W), or all inputs, and targets (B,).

        Raises:
            DmmError: the teacher recognises none, or answers with NaN or infinity.
        """
        teacher = self._teachers[len(self._records)]
        accepted = rejected = 0
        for pixels, targets in candidates:
            parts = pixels.split(JUDGED)
            logits = torch.cat([teacher.logits(self._space.from_bytes(p.to(self._device))).cpu() for p in parts])
            require_finite(teacher.model, logits)
            hits = logits.argmax(1) == targets
            good = torch.nonzero(hits)[: self._count - accepted, 0]
            rejected += int((~hits).sum())
            accepted += len(good)
            self._keep(pixels[good], targets[good], logits[good])
            if accepted >= self._count:
                break
        if not accepted:
            hint = "give it more --steps, or a higher --loss cross_entropy=..."
            if teacher.prior_from not in ("", "estimated"):
                hint += f"; or is its class mix, by {teacher.prior_from}, another than it was trained on?"
            raise DmmError(f"{teacher.label} recognises none of its {rejected} pseudo-images", hint=hint)
        prior = tuple(round(float(value), 6) for value in teacher.prior)
        self._records.append(TeacherRecord(teacher.label, teacher.sha256, prior, accepted, rejected))

    def _keep(self, pixels: Inputs, targets: torch.Tensor, logits: torch.Tensor) -> None:
        rows = slice(self._rows, self._rows + len(targets))
        confidence = logits.softmax(1).gather(1, targets[:, None])[:, 0]
        for name, part in named(pixels).items():
            self._images[name][rows] = part.numpy()
        self._arrays["targets"][rows] = targets.numpy()
        self._arrays["teacher_id"][rows] = len(self._records)
        self._arrays["logits"][rows] = storable(logits).numpy()
        self._arrays["confidence"][rows] = confidence.numpy()
        self._rows += len(targets)

    def pseudo_data(self, history: History) -> PseudoData:
        """All that was kept."""
        return PseudoData(
            images=joined({name: array[: self._rows] for name, array in self._images.items()}),
            **{name: array[: self._rows] for name, array in self._arrays.items()},
            bn_loss=np.array(history.curves.get("norm", ()), dtype=np.float32),
            teachers=tuple(self._records),
            spec=self._spec,
            classes=next((teacher.classes for teacher in self._teachers if teacher.classes), ()),
        )


def storable(logits: torch.Tensor) -> torch.Tensor:
    """Logits (B, K) for float16: rows that it cannot hold are moved to a largest of 0, which leaves their softmax."""
    beyond = (logits.half().isinf() & logits.isfinite()).any(1, keepdim=True)
    moved = (logits - logits.amax(1, keepdim=True)).clamp_min(LOWEST)
    return torch.where(beyond, moved, logits)
