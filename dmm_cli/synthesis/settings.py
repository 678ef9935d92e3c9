"""How to synthesise: what every engine is told."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """How to synthesise.

    Attributes:
        count: images wanted per teacher.
        steps: optimiser steps. batch: images per teacher and step; None for as many as there is room for.
        precision: that networks are run in, see ``runtime.mixed_precision``.
        weights: of the losses, see ``objective.DEFAULT_WEIGHTS``.
    """

    count: int = 1024
    steps: int = 300
    batch: int | None = 64
    seed: int = 0
    engine: str = "generator"
    precision: str = "float32"
    weights: dict[str, float] = field(default_factory=dict)
