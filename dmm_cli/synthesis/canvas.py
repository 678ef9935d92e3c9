"""What every engine shares: its settings and the record of its losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..manifest import History

Progress = Callable[..., None]
RECORDS = 60  # points kept per curve


@dataclass(frozen=True)
class Settings:
    """How to synthesise.

    Attributes:
        count: images wanted per teacher.
        steps: optimiser steps. batch: images per teacher and step.
        weights: of the losses, see ``objective.DEFAULT_WEIGHTS``.
    """

    count: int = 512
    steps: int = 400
    batch: int = 64
    seed: int = 0
    engine: str = "generator"
    weights: dict[str, float] = field(default_factory=dict)


class Recorder:
    """Keeps some tens of points per curve, on the device until they are read."""

    def __init__(self, steps: int) -> None:
        self._every = max(1, steps // RECORDS)
        self._steps: list[int] = []
        self._points: list[dict[str, torch.Tensor]] = []

    def wants(self, step: int) -> bool:
        return step % self._every == 0

    def add(self, step: int, terms: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Store the mean over teachers of every term at one step, and return it."""
        mean = {name: torch.stack([term[name] for term in terms]).mean() for name in terms[0]}
        self._steps.append(step)
        self._points.append(mean)
        return {name: float(value) for name, value in mean.items()}

    def history(self) -> History:
        names = self._points[0] if self._points else {}
        curves = {name: tuple(float(point[name]) for point in self._points) for name in names}
        return History(tuple(self._steps), curves)
