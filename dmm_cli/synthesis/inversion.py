"""From teachers to pseudo-data: class priors, an engine, and the images its teacher recognises.

Legend: T teachers, N images, B images of a batch, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from ..errors import DmmError
from ..images import InputSpec, PixelSpace
from ..manifest import History
from ..runtime import Host, one_thread
from ..savepoint import Savepoint
from . import ENGINES
from .prior import from_predictions
from .pseudodata import PseudoData, TeacherRecord
from .settings import Settings
from .teacher import Teacher


def synthesize(
    teachers: Sequence[Teacher], spec: InputSpec, settings: Settings, host: Host
) -> tuple[PseudoData, History]:
    """Invert the normalisation statistics of all teachers into labelled pseudo-data.

    Args:
        teachers: frozen and on the host's device; where a prior is missing it is estimated.

    Returns:
        The images every teacher recognises as their target (at most ``settings.count`` each, in
        teacher order), and the curves of the loss terms. Every process gets the same.

    Raises:
        DmmError: a teacher recognises none of its images.
    """
    host = replace(host, savepoint=host.savepoint or Savepoint())
    with one_thread(host.device):
        engine = ENGINES.load(settings.engine)(teachers, spec, settings, host)
        ready = list(teachers)
        if any(teacher.prior is None for teacher in teachers):
            ready = [_with_prior(*pair) for pair in zip(teachers, engine.explore(), strict=True)]
        history = engine.fit([teacher.prior for teacher in ready])
        harvest = Harvest(ready, spec, settings.count, host.device)
        for number, teacher in enumerate(ready):
            harvest.add(engine.candidates(number, teacher.prior))
        return harvest.pseudo_data(history), history


def _with_prior(teacher: Teacher, logits: torch.Tensor) -> Teacher:
    """The teacher with the prior it came with, or with the one its logits (B, K) on explored images tell."""
    if teacher.prior is not None:
        return teacher
    return replace(teacher, prior=from_predictions(logits), prior_from="estimated")


class Harvest:
    """The images that teachers recognise, in arrays of their own from the start: they are in memory once."""

    def __init__(self, teachers: Sequence[Teacher], spec: InputSpec, count: int, device: torch.device) -> None:
        self._teachers, self._spec, self._count = teachers, spec, count
        self._space, self._device = PixelSpace(spec, device), device
        rows, classes = count * len(teachers), teachers[0].num_classes
        self._arrays = {
            "images": np.empty((rows, *spec.size), np.uint8),
            "targets": np.empty(rows, np.int64),
            "teacher_id": np.empty(rows, np.int16),
            "logits": np.empty((rows, classes), np.float16),
            "confidence": np.empty(rows, np.float16),
        }
        self._rows = 0
        self._records: list[TeacherRecord] = []

    def add(self, candidates: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Keep the first of the next teacher's candidates that it classifies as their target, up to ``count``.

        Args:
            candidates: images, uint8 (B, C, H, W), and targets (B,).

        Raises:
            DmmError: the teacher recognises none.
        """
        teacher = self._teachers[len(self._records)]
        accepted = rejected = 0
        for pixels, targets in candidates:
            logits = teacher.logits(self._space.from_bytes(pixels.to(self._device))).cpu()
            hits = logits.argmax(1) == targets
            good = torch.nonzero(hits)[: self._count - accepted, 0]
            rejected += int((~hits).sum())
            accepted += len(good)
            self._keep(pixels[good], targets[good], logits[good])
            if accepted >= self._count:
                break
        if not accepted:
            raise DmmError(
                f"{teacher.label} recognises none of its {rejected} pseudo-images",
                hint="give it more --steps, or a higher --loss cross_entropy=...",
            )
        prior = tuple(round(float(value), 6) for value in teacher.prior)
        self._records.append(TeacherRecord(teacher.label, teacher.sha256, prior, accepted, rejected))

    def _keep(self, pixels: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor) -> None:
        rows = slice(self._rows, self._rows + len(targets))
        confidence = logits.softmax(1).gather(1, targets[:, None])[:, 0]
        self._arrays["images"][rows] = pixels.numpy()
        self._arrays["targets"][rows] = targets.numpy()
        self._arrays["teacher_id"][rows] = len(self._records)
        self._arrays["logits"][rows] = logits.numpy()
        self._arrays["confidence"][rows] = confidence.numpy()
        self._rows += len(targets)

    def pseudo_data(self, history: History) -> PseudoData:
        """All that was kept."""
        return PseudoData(
            **{name: array[: self._rows] for name, array in self._arrays.items()},
            bn_loss=np.array(history.curves.get("norm", ()), dtype=np.float32),
            teachers=tuple(self._records),
            mean=self._spec.mean,
            std=self._spec.std,
        )
