"""Small networks draw the images of every teacher.

Running statistics leave most directions of pixel space free; what fills them decides whether the
images are digits or noise. A convolutional generator fills them with smooth strokes (Ulyanov et al.,
Deep Image Prior, CVPR 2018), and one generator for all teachers makes every teacher's statistics
shape the strokes of the others: a teacher that saw one class alone, and learned almost nothing,
still gets images in the style that the well-trained ones agree on. Generators per teacher are common
in data-free distillation (CMI, Fast-Datafree, NAYER); sharing one across teachers is our addition.
Several generators from different starts draw differently, which is worth more than training one longer; for images
each is a mixture of small ones (see ``network``).

Legend: K classes, B images per teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..errors import DmmError
from ..examples import Inputs, cat
from ..manifest import History, Steps
from ..runtime import generator as random_stream
from ..training import work_through
from .member import Member
from .network import LATENT
from .objective import Objective
from .prior import draw_targets
from .task import Task

MEMBERS = 4  # generators
EXPLORE = 0.25  # share of the steps that fit the statistics alone, where a class prior is to be estimated
ROUNDS = 4  # of drawing, until enough images are recognised


class GeneratorEngine:
    """Fits generators to all teachers at once, then draws any number of images.

    Each step draws ``settings.batch`` images of every teacher and sums the teachers' losses.
    Processes share the generators.

    Attributes:
        steps: of all generators, once they are fitted.
    """

    TOGETHER = True  # a step shows images to all teachers

    def __init__(self, task: Task) -> None:
        self._task, self._settings, self._host = task, task.settings, task.host
        self._members = [Member(number, task) for number in self._host.ranks.deal(range(MEMBERS))]
        self.steps = Steps(0, MEMBERS * self._settings.steps)

    def explore(self) -> list[torch.Tensor]:
        """Fit the statistics alone; returns each teacher's logits (B, K) on images drawn then.

        Raises:
            DmmError: no step would be left for the classes.
        """
        if self._settings.steps < 2:
            raise DmmError("one step is too few to estimate the class mix too", hint="--steps 2, or --class-prior")
        self._train(self._task.exploring(), max(1, round(self._settings.steps * EXPLORE)))
        images = self._settings.count // MEMBERS + 1
        parts = self._host.ranks.collect([member.explored(images) for member in self._members])
        return [torch.cat(logits) for logits in zip(*parts, strict=True)]

    def fit(self, priors: list[torch.Tensor]) -> History:
        """Train to the end on targets drawn from the class priors (K,); returns the first generator's curves."""
        self._train(self._task.objective(), self._settings.steps, priors)
        told = self._host.ranks.collect([(member.recorder.history(), member.done) for member in self._members])
        self.steps = replace(self.steps, taken=sum(done for _, done in told))
        return told[0][0]

    def candidates(self, teacher: int, prior: torch.Tensor) -> Iterator[tuple[Inputs, torch.Tensor]]:
        """Fresh images of one teacher, uint8 (B, C, H, W), or all inputs, with targets (B,), in ``ROUNDS`` at most.

        Every round shuffles the members' images, so that any part of it holds all members'.
        """
        stream = random_stream(self._settings.seed, "draw", teacher)
        share = -(-self._settings.count // MEMBERS)
        for _ in range(ROUNDS):  # every process draws for all members, and paints for its own
            targets = [draw_targets(prior, share, stream) for _ in range(MEMBERS)]
            latents = [torch.randn(share, LATENT, generator=stream) for _ in range(MEMBERS)]
            order = torch.randperm(share * MEMBERS, generator=stream)
            mine = self._host.ranks.deal(list(zip(latents, targets, strict=True)))
            painted = [m.candidates(teacher, *draw) for m, draw in zip(self._members, mine, strict=True)]
            yield cat(self._host.ranks.collect(painted))[order], torch.cat(targets)[order]

    def _train(self, objective: Objective, until: int, priors: list[torch.Tensor] | None = None) -> None:
        """Train every member until it has taken so many steps."""
        for member in self._members:
            member.plan(objective, until, priors)
        begun = [member.done for member in self._members]
        jobs = [lambda m=member: m for member in self._members]
        work_through(jobs, "synthesize", self._settings.steps, self._host, begun)
