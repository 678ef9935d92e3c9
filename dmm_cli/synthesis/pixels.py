"""Every pixel is a free parameter, as in DeepInversion (Yin et al., CVPR 2020).

Legend: B images, K classes, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from ..images import InputSpec, PixelSpace
from ..manifest import History
from ..runtime import Host
from ..runtime import generator as random_stream
from ..training import work_through
from .batch import Batch, finished
from .objective import Objective
from .prior import draw_targets
from .settings import Settings
from .teacher import Teacher

EXPLORED = 128  # images that a class prior is estimated from


class Unit(NamedTuple):
    """A batch of images of one teacher; all there is to know of it before it is begun."""

    teacher: int
    start: int

    @property
    def name(self) -> str:
        """Of its savepoint."""
        return f"images-{self.teacher}-{self.start}"


class PixelEngine:
    """Optimises ``settings.count`` images of each teacher, ``settings.batch`` at a time, apart from one another.

    Every batch is drawn from a random stream of its own, so that neither their order nor the process that makes
    one matters; processes share the batches.
    """

    TOGETHER = False  # a step shows images to one teacher

    def __init__(self, teachers: Sequence[Teacher], spec: InputSpec, settings: Settings, host: Host) -> None:
        self._teachers, self._spec, self._settings, self._host = teachers, spec, settings, host
        starts = range(0, settings.count, settings.batch)
        self._units = [Unit(number, start) for number in range(len(teachers)) for start in starts]

    def explore(self) -> list[torch.Tensor]:
        """Fit the statistics alone; returns each teacher's logits (B, K) on the images."""
        objective = Objective({**self._settings.weights, "cross_entropy": 0.0})
        names = [f"explore-{number}" for number in range(len(self._teachers))]
        mine = self._host.ranks.deal(range(len(names)))
        targets = torch.zeros(EXPLORED, dtype=torch.int64)
        self._optimise([(names[i], i, lambda _: targets, objective) for i in mine])
        return [
            self._host.ranks.fetch(i, lambda i=i: self._logits(self._teachers[i], names[i])) for i in range(len(names))
        ]

    def fit(self, priors: list[torch.Tensor]) -> History:
        """Optimise all images on targets drawn from the class priors (K,); returns the first batch's curves."""
        objective = Objective(self._settings.weights)
        self._optimise(
            [
                (unit.name, unit.teacher, partial(self._targets, priors[unit.teacher], unit), objective)
                for unit in self._host.ranks.deal(self._units)
            ]
        )
        return self._host.ranks.fetch(0, lambda: finished(self._host, self._units[0].name).history)

    def candidates(self, teacher: int, prior: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All images of one teacher, uint8 (B, C, H, W), and their targets (B,), batch by batch."""
        for number, unit in enumerate(self._units):
            if unit.teacher == teacher:
                made = self._host.ranks.fetch(number, lambda unit=unit: finished(self._host, unit.name))
                yield made.images, made.targets

    def _targets(self, prior: torch.Tensor, unit: Unit, stream: torch.Generator) -> torch.Tensor:
        return draw_targets(prior, min(self._settings.batch, self._settings.count - unit.start), stream)

    def _optimise(self, jobs: Sequence[tuple[str, int, Callable[[torch.Generator], torch.Tensor], Objective]]) -> None:
        """Make the batches that are not there yet: their names, teachers, targets from a stream, and objectives."""

        def begin(name: str, number: int, draw: Callable, objective: Objective) -> Batch:
            stream = random_stream(self._settings.seed, "pixels", name)
            teacher = self._teachers[number].view()
            return Batch(name, teacher, draw(stream), objective, self._spec, self._settings, self._host, stream)

        left = [partial(begin, *job) for job in jobs if finished(self._host, job[0]) is None]
        work_through(left, "synthesize", self._settings.steps, self._host)

    def _logits(self, teacher: Teacher, name: str) -> torch.Tensor:
        space = PixelSpace(self._spec, self._host.device)
        return teacher.logits(space.from_bytes(finished(self._host, name).images.to(self._host.device))).cpu()
