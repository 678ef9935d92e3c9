"""The weighted sum of inversion losses."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import LOSSES
from .teacher import Teacher

DEFAULT_WEIGHTS = {"norm": 1.0, "cross_entropy": 0.1, "total_variation": 0.0}


class Objective:
    """Sums the losses that have a weight.

    Args:
        weights: loss name to weight; a weight of 0 switches a loss off. Missing ones take their default.

    Raises:
        DmmError: there is no loss of that name.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = {**DEFAULT_WEIGHTS, **{LOSSES.check(name): value for name, value in weights.items()}}
        self._losses = {name: LOSSES.load(name) for name, weight in self.weights.items() if weight}

    def __call__(
        self, teacher: Teacher, images: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Total loss (scalar) and its unweighted terms, detached."""
        seen = teacher.observe(images, targets)
        terms = {name: loss(seen) for name, loss in self._losses.items()}
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return total, {name: term.detach() for name, term in terms.items()}
