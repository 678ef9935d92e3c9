"""How to refine: what the loop is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How to refine.

    Attributes:
        temperature: that labels and answers are softened by.
        pose, noise: strength of the random changes of images, see ``augment``.
        precision: that networks are run in, see ``runtime.mixed_precision``.
    """

    steps: int = 1800
    batch: int = 128
    learning_rate: float = 3e-3
    temperature: float = 4.0
    pose: float = 0.5
    noise: float = 0.25
    seed: int = 0
    precision: str = "float32"
