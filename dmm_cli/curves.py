"""The record of a training loop: some tens of points per curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from .errors import DmmError
from .manifest import History

POINTS = 60


class Recorder:
    """Keeps about ``POINTS`` of ``steps`` points of every curve, the last one among them."""

    def __init__(self, steps: int) -> None:
        self._last, self._every = steps - 1, max(1, steps // POINTS)
        self._steps: list[int] = []
        self._points: list[dict[str, float]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def totals(self, total: Callable[[dict[str, float]], float], start: int = 0) -> list[float]:
        """A number for each point from a step on, of its scalars by name."""
        return [total(point) for step, point in zip(self._steps, self._points, strict=True) if step >= start]

    def wants(self, step: int) -> bool:
        """Whether the point at a step is kept: reading a value waits for the device, so ask first."""
        return step % self._every == 0 or step == self._last

    def add(self, step: int, values: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Store the scalars of one step, and return them as numbers."""
        point = {name: float(value.detach()) for name, value in values.items()}
        self._steps.append(step)
        self._points.append(point)
        return point

    def state(self) -> dict[str, list]:
        """What there is so far, as JSON."""
        return {"steps": self._steps, "points": self._points}

    def restore(self, state: Mapping[str, list]) -> None:
        """Go on from an earlier ``state``."""
        self._steps, self._points = list(state["steps"]), list(state["points"])

    def history(self) -> History:
        """All curves."""
        names = self._points[0] if self._points else {}
        return History(tuple(self._steps), {name: tuple(point[name] for point in self._points) for name in names})


def require_finite_terms(terms: Mapping[str, float], step: int, hint: str) -> None:
    """Raise DmmError for a term that is NaN or infinite: what was computed from it will not recover."""
    lost = next((name for name, value in terms.items() if not math.isfinite(value)), None)
    if lost:
        raise DmmError(f"{lost.replace('_', ' ')} is {terms[lost]} in step {step}", hint=hint)
