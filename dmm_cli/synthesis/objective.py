"""The weighted sum of inversion losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..errors import DmmError
from ..examples import Inputs
from ..spaces import Spec, pixels_of
from . import LOSSES
from .teacher import Teacher

DEFAULT_WEIGHTS = {"norm": 1.0, "cross_entropy": 0.1, "total_variation": 0.0}
RECORDED_ELSEWHERE = {"cross_norm": 1.0}  # where statistics of a teacher's data in other networks are known
AGAINST_STUDENT = {"adversarial": 0.001}  # where there is a student; more makes images that merely fool it
UNSOUND = "are weights and normalisation statistics those of a network that works? dmm evaluate tells"  # a hint


class Objective:
    """Sums the losses that have a weight.

    Args:
        weights: loss name to weight; a weight of 0 switches a loss off. Missing ones take their default.
        teachers: whether any of them has witnesses decides a default.
        student: frozen, for the losses that compare it with the teacher.
        spec: of the inputs, by which losses of images know them.

    Raises:
        DmmError: there is no loss of that name, or none has a weight.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        teachers: Sequence[Teacher] = (),
        student: nn.Module | None = None,
        spec: Spec | None = None,
    ) -> None:
        defaults = DEFAULT_WEIGHTS | (RECORDED_ELSEWHERE if any(teacher.witnesses for teacher in teachers) else {})
        defaults |= {} if student is None else AGAINST_STUDENT
        self.weights = {**defaults, **{LOSSES.check(name): value for name, value in weights.items()}}
        self._losses = {name: LOSSES.load(name) for name, weight in self.weights.items() if weight}
        if not self._losses:
            raise DmmError(
                "no loss is left to minimise",
                hint="give --loss norm a weight; cross_entropy alone does where --class-prior tells the class mix",
            )
        self._student, self._spec = student, spec

    def __call__(
        self, teacher: Teacher, images: Inputs, targets: torch.Tensor, turn: int = 0
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Total loss (scalar) and its unweighted terms, detached; ``turn`` chooses the witness."""
        seen = teacher.observe(images, targets, self._student, turn)
        if self._spec is not None:
            seen = replace(seen, images=pixels_of(images, self._spec))
        terms = {name: loss(seen) for name, loss in self._losses.items()}
        return torch.stack(list(self._weighted(terms))).sum(), {name: term.detach() for name, term in terms.items()}

    def require_gradient(self, total: torch.Tensor) -> None:
        """Raise DmmError for a total loss that no input changes, as roughness of images is where there are none."""
        if not total.requires_grad:
            raise DmmError(
                "no loss that has a weight depends on what teachers are shown",
                evidence=[f"--loss {name}={self.weights[name]:g}" for name in self._losses],
                hint="give --loss norm or cross_entropy a weight",
            )

    def total(self, terms: Mapping[str, float]) -> float:
        """Total loss by its terms, as curves hold them."""
        return sum(self._weighted(terms))

    def _weighted(self, terms):
        return (self.weights[name] * term for name, term in terms.items())
