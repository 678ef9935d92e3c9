"""How to synthesise: what every engine is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

PARTS = 8  # generators in a mixture; in every step each draws an image of every teacher, or more
OPTIONS = ("jitter", "flip", "keep_best", "plateau", "norm_average", "coarse")  # off at 0


@dataclass(frozen=True)
class Settings:
    """How to synthesise.

    Attributes:
        count: images wanted per teacher.
        steps: optimiser steps. batch: images per teacher and step; None for as many as there is room for.
        precision: that networks are run in, see ``runtime.mixed_precision``.
        weights: of the losses, see ``objective.DEFAULT_WEIGHTS``.
        jitter, flip: how images are moved before a teacher sees them, see ``jitter``.
        keep_best: of a batch of pixels keep the images of the lowest loss, not the last.
        plateau: stop when the loss falls by less than this share, see ``plateau``.
        norm_average: momentum of the batch statistics of a generator's images, see ``average``.
        coarse: share of the steps that pixels take at half the resolution, see ``resolution``.
    """

    count: int = 1024
    steps: int = 300
    batch: int | None = 64
    seed: int = 0
    engine: str = "generator"
    precision: str = "float32"
    weights: dict[str, float] = field(default_factory=dict)
    jitter: int = 0
    flip: bool = False
    keep_best: bool = False
    plateau: float = 0.0
    norm_average: float = 0.0
    coarse: float = 0.0

    def record(self) -> dict[str, Any]:
        """All of it, as files keep it; what is off goes without saying."""
        return {name: value for name, value in asdict(self).items() if value or name not in OPTIONS}

    @property
    def coarse_steps(self) -> int:
        """Steps at half the resolution; the last one is never among them."""
        return min(round(self.coarse * self.steps), self.steps - 1)
