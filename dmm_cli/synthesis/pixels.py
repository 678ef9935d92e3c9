"""Every pixel is a free parameter, as in DeepInversion (Yin et al., CVPR 2020).

Legend: B images, K classes, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch

from ..examples import Inputs
from ..manifest import History, Steps
from ..training import work_through
from .batch import Batch, Job, finished
from .prior import draw_targets
from .task import Task

EXPLORED = 128  # images that a class prior is estimated from


class Unit(NamedTuple):
    """A batch of images of one teacher; all there is to know of it before it is begun."""

    teacher: int
    start: int
    size: int

    @property
    def name(self) -> str:
        """Of its savepoint."""
        return f"images-{self.teacher}-{self.start}"


class PixelEngine:
    """Optimises ``settings.count`` images of each teacher, ``settings.batch`` at a time, apart from one another.

    Where these are no multiple, batches are smaller and nearly equal: a few left over would have no statistics.
    Every batch is drawn from a random stream of its own, so that neither their order nor the process that makes
    one matters; processes share the batches.

    Attributes:
        steps: of the batches whose images have been given.
    """

    TOGETHER = False  # a step shows images to one teacher

    def __init__(self, task: Task) -> None:
        self._task, self._settings, self._host = task, task.settings, task.host
        count, batches = self._settings.count, -(-self._settings.count // self._settings.batch)
        parts = list(pairwise(count * place // batches for place in range(batches + 1)))
        teachers = range(len(task.teachers))
        self._units = [Unit(number, start, end - start) for number in teachers for start, end in parts]
        self.steps = Steps(0, 0)

    def explore(self) -> list[torch.Tensor]:
        """Fit the statistics alone; returns each teacher's logits (B, K) on the images."""
        objective = self._task.exploring()
        names = [f"explore-{number}" for number in range(len(self._task.teachers))]
        mine = self._host.ranks.deal(range(len(names)))
        targets = torch.zeros(EXPLORED, dtype=torch.int64)
        self._optimise([Job(names[i], i, lambda _: targets, objective) for i in mine], "estimate")
        return [self._host.ranks.fetch(i, lambda i=i: self._logits(i, names[i])) for i in range(len(names))]

    def fit(self, priors: list[torch.Tensor]) -> History:
        """Optimise all images on targets drawn from the class priors (K,); returns the first batch's curves."""
        objective = self._task.objective()
        self._optimise(
            [
                Job(unit.name, unit.teacher, partial(self._targets, priors[unit.teacher], unit), objective)
                for unit in self._host.ranks.deal(self._units)
            ],
            "synthesize",
        )
        return self._host.ranks.fetch(0, lambda: finished(self._host, self._units[0].name).history)

    def candidates(self, teacher: int, prior: torch.Tensor) -> Iterator[tuple[Inputs, torch.Tensor]]:
        """All images of one teacher, uint8 (B, C, H, W), or all inputs, and their targets (B,), batch by batch."""
        for number, unit in enumerate(self._units):
            if unit.teacher == teacher:
                made = self._host.ranks.fetch(number, lambda unit=unit: finished(self._host, unit.name))
                self.steps = Steps(self.steps.taken + made.steps, self.steps.planned + self._settings.steps)
                yield made.images, made.targets

    def _targets(self, prior: torch.Tensor, unit: Unit, stream: torch.Generator) -> torch.Tensor:
        return draw_targets(prior, unit.size, stream)

    def _optimise(self, jobs: Sequence[Job], stage: str) -> None:
        """Make the batches that are not there yet, telling progress as that of ``stage``."""
        left = [partial(Batch, self._task, job) for job in jobs if finished(self._host, job.name) is None]
        work_through(left, stage, self._settings.steps, self._host)

    def _logits(self, teacher: int, name: str) -> torch.Tensor:
        images = finished(self._host, name).images.to(self._host.device)
        return self._task.teachers[teacher].logits(self._task.space().from_bytes(images)).cpu()
