"""Small networks draw the images of every teacher.

Running statistics leave most directions of pixel space free; what fills them decides whether the
images are digits or noise. A convolutional generator fills them with smooth strokes (Ulyanov et al.,
Deep Image Prior, CVPR 2018), and one generator for all teachers makes every teacher's statistics
shape the strokes of the others: a teacher that saw one class alone, and learned almost nothing,
still gets images in the style that the well-trained ones agree on. Generators per teacher are common
in data-free distillation (CMI, Fast-Datafree, NAYER); sharing one across teachers is our addition.
Several generators from different starts draw differently, which is worth more than training one longer.

Legend: T teachers, K classes, B images per teacher, Z latent size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from ..curves import Recorder
from ..images import InputSpec, PixelSpace
from ..runtime import generator as random_stream
from ..runtime import mixed_precision, parallel, seeded
from .network import LATENT, Generator
from .objective import Objective
from .prior import draw_targets
from .settings import Progress, Settings
from .teacher import Teacher

MEMBERS = 4  # generators
EXPLORE = 0.25  # share of the steps that fit the statistics alone, where a class prior is to be estimated
LEARNING_RATE, BETAS, WARM_UP = 3e-3, (0.5, 0.99), 0.1
ROUNDS = 4  # of drawing, until enough images are recognised
BLOCK = 256  # images drawn at once


class GeneratorEngine:
    """Fits generators to all teachers at once, then draws any number of images.

    Each step draws ``settings.batch`` images of every teacher and sums the teachers' losses.
    """

    def __init__(self, teachers: Sequence[Teacher], spec: InputSpec, settings: Settings, device: torch.device) -> None:
        self._settings, self._device = settings, device
        self._members = [_Member(number, teachers, spec, settings, device) for number in range(MEMBERS)]
        self._lock = threading.Lock()

    def explore(self, on_progress: Progress | None = None) -> list[torch.Tensor]:
        """Fit the statistics alone; returns each teacher's logits (B, K) on images drawn then."""
        steps = max(1, round(self._settings.steps * EXPLORE))
        objective = Objective({**self._settings.weights, "cross_entropy": 0.0})
        self._train(objective, steps, on_progress=on_progress)
        images = self._settings.count // MEMBERS + 1
        parts = [member.explored(images) for member in self._members]
        return [torch.cat(logits) for logits in zip(*parts, strict=True)]

    def fit(self, priors: list[torch.Tensor], recorder: Recorder, on_progress: Progress | None = None) -> None:
        """Train for what is left of ``settings.steps`` on targets drawn from the class priors (K,)."""
        objective = Objective(self._settings.weights)
        left = self._settings.steps - self._members[0].done
        self._train(objective, left, priors, recorder, on_progress)

    def candidates(self, teacher: int, prior: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Fresh images of one teacher, normalised (B, C, H, W), with targets (B,), in up to ``ROUNDS`` rounds.

        Every round shuffles the members' images, so that any part of it holds all members'.
        """
        stream = random_stream(self._settings.seed, "draw", teacher)
        share = -(-self._settings.count // MEMBERS)
        for _ in range(ROUNDS):
            targets = [draw_targets(prior, share, stream) for _ in self._members]
            images = [m.draw(teacher, t, stream) for m, t in zip(self._members, targets, strict=True)]
            order = torch.randperm(share * MEMBERS, generator=stream)
            yield torch.cat(images)[order.to(self._device)], torch.cat(targets)[order]

    def _train(
        self,
        objective: Objective,
        steps: int,
        priors: list[torch.Tensor] | None = None,
        recorder: Recorder | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """Train every member for some steps; the curves are the first one's."""
        shown: dict[str, float] = {}

        def work(member: _Member, stop: Callable[[], bool]) -> None:
            for terms in member.train(objective, steps, priors):
                with self._lock:
                    if recorder is not None and member is self._members[0]:
                        shown.update(_record(recorder, member.done - 1, terms))
                    if on_progress:
                        done = sum(other.done for other in self._members)
                        on_progress("synthesize", done, MEMBERS * self._settings.steps, **shown)
                if stop():
                    return

        parallel([partial(work, member) for member in self._members], self._device)


def _record(recorder: Recorder, step: int, terms: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Add the mean of the teachers' loss terms to the curves, where a point is due; returns that point."""
    if not recorder.wants(step):
        return {}
    return recorder.add(step, {name: torch.stack([term[name] for term in terms]).mean() for name in terms[0]})


class _Member:
    """One generator with its optimiser and its own view of the teachers."""

    def __init__(
        self, number: int, teachers: Sequence[Teacher], spec: InputSpec, settings: Settings, device: torch.device
    ) -> None:
        self._number, self._settings, self._device = number, settings, device
        self._teachers = [teacher.view() for teacher in teachers]
        self._space = PixelSpace(spec, device)
        self._stream = random_stream(settings.seed, "generator", number)
        with seeded(settings.seed, "generator weights", number):
            network = Generator(spec.size, sum(teacher.num_classes for teacher in teachers))
        self._network = network.to(device, memory_format=torch.channels_last)
        widths = torch.tensor([0, *(teacher.num_classes for teacher in teachers)])
        self._offsets = widths.cumsum(0)[:-1].tolist()
        self._optimiser = torch.optim.Adam(network.parameters(), LEARNING_RATE, BETAS, fused=True)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimiser, LEARNING_RATE, total_steps=settings.steps + 1, pct_start=WARM_UP, cycle_momentum=False
        )
        self.done = 0

    def train(
        self, objective: Objective, steps: int, priors: list[torch.Tensor] | None = None
    ) -> Iterator[list[dict[str, torch.Tensor]]]:
        """Train for some steps, giving every teacher's loss terms; without priors all classes are equally likely."""
        self._network.train()
        uniform = [torch.full((teacher.num_classes,), 1 / teacher.num_classes) for teacher in self._teachers]
        for _ in range(steps):
            targets = [draw_targets(p, self._settings.batch, self._stream) for p in priors or uniform]
            terms = self._step(objective, targets)
            self.done += 1
            yield terms

    def _step(self, objective: Objective, targets: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        outcomes = [
            objective(teacher, part, target.to(self._device))
            for teacher, part, target in zip(self._teachers, self._images(targets), targets, strict=True)
        ]
        self._optimiser.zero_grad(set_to_none=True)
        torch.stack([total for total, _ in outcomes]).sum().backward()
        self._optimiser.step()
        self._schedule.step()
        return [terms for _, terms in outcomes]

    @torch.no_grad()
    def explored(self, count: int) -> list[torch.Tensor]:
        """Every teacher's logits (count, K) on images drawn without regard to class."""
        stream = random_stream(self._settings.seed, "explored", self._number)
        logits = []
        for number, teacher in enumerate(self._teachers):
            targets = torch.randint(teacher.num_classes, (count,), generator=stream)
            logits.append(teacher.logits(self.draw(number, targets, stream)).cpu())
        return logits

    @torch.no_grad()
    def draw(self, teacher: int, targets: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
        """Images (B, C, H, W) of one teacher for targets (B,)."""
        self._network.eval()
        latent = torch.randn(len(targets), LATENT, generator=stream)
        condition = targets + self._offsets[teacher]
        blocks = zip(latent.split(BLOCK), condition.split(BLOCK), strict=True)
        return torch.cat([self._paint(z, c) for z, c in blocks])

    def _images(self, targets: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """One batch per teacher, drawn in a single pass so that its normalisation sees all teachers."""
        condition = torch.cat([t + o for t, o in zip(targets, self._offsets, strict=True)])
        latent = torch.randn(len(condition), LATENT, generator=self._stream)
        return self._paint(latent, condition).split([len(target) for target in targets])

    def _paint(self, latent: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        with mixed_precision(self._device):
            parameters = self._network(latent.to(self._device), condition.to(self._device))
        return self._space.normalise(parameters.float().sigmoid())
