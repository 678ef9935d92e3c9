"""What an engine is to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..runtime import Host
from ..spaces import Space, Spec, space_of
from .objective import Objective
from .settings import Settings
from .teacher import Teacher


@dataclass(frozen=True)
class Task:
    """Teachers to invert, and how.

    Attributes:
        teachers: frozen and on the host's device. spec: of the input they share.
        student: frozen too; images are sought on which it and the teacher disagree. None seeks none.
    """

    teachers: Sequence[Teacher]
    spec: Spec
    settings: Settings
    host: Host
    student: nn.Module | None = None

    def objective(self) -> Objective:
        """What images are made for."""
        return Objective(self.settings.weights, self.teachers, self.student, self.spec)

    def exploring(self) -> Objective:
        """The statistics alone, whatever the class: by these images a class prior is estimated."""
        weights = {**self.settings.weights, "cross_entropy": 0.0, "adversarial": 0.0}
        return Objective(weights, self.teachers, spec=self.spec)

    def space(self) -> Space:
        """Of the input, on the host's device."""
        return space_of(self.spec, self.host.device)
