"""Every pixel is a free parameter, as in DeepInversion (Yin et al., CVPR 2020).

Legend: B images, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..curves import Recorder
from ..images import InputSpec, PixelSpace
from ..runtime import generator as random_stream
from .objective import Objective
from .prior import draw_targets
from .settings import Progress, Settings
from .teacher import Teacher

LEARNING_RATE, BETAS = 0.1, (0.9, 0.99)
EXPLORED = 128  # images that a class prior is estimated from


class PixelEngine:
    """Optimises ``settings.count`` images of each teacher, ``settings.batch`` at a time, apart from one another."""

    def __init__(self, teachers: Sequence[Teacher], spec: InputSpec, settings: Settings, device: torch.device) -> None:
        self._teachers, self._spec, self._settings, self._device = teachers, spec, settings, device
        self._space = PixelSpace(spec, device)
        self._pool: list[tuple[torch.Tensor, ...]] = []

    def explore(self, on_progress: Progress | None = None) -> list[torch.Tensor]:
        """Fit the statistics alone; returns each teacher's logits (B, K) on the images."""
        objective = Objective({**self._settings.weights, "cross_entropy": 0.0})
        logits = []
        for number, teacher in enumerate(self._teachers):
            stream = random_stream(self._settings.seed, "explore", number)
            images, _ = self._optimise(teacher, torch.zeros(EXPLORED, dtype=torch.int64), objective, stream, None)
            logits.append(teacher.logits(images).cpu())
            if on_progress:
                on_progress("estimate class priors", number + 1, len(self._teachers))
        return logits

    def fit(self, priors: list[torch.Tensor], recorder: Recorder, on_progress: Progress | None = None) -> None:
        """Optimise all images for ``settings.steps`` steps on targets drawn from the class priors (K,)."""
        count, batch = self._settings.count, self._settings.batch
        jobs = [(number, start) for number in range(len(self._teachers)) for start in range(0, count, batch)]
        pool: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self._teachers]
        objective = Objective(self._settings.weights)
        for done, (number, start) in enumerate(jobs):
            stream = random_stream(self._settings.seed, "pixels", number, start)
            targets = draw_targets(priors[number], min(batch, count - start), stream)
            first = recorder if done == 0 else None
            images, terms = self._optimise(self._teachers[number], targets, objective, stream, first)
            pool[number].append((images, targets))
            if on_progress:
                shown = {name: float(value) for name, value in terms.items()}
                on_progress("synthesize", done + 1, len(jobs), **shown)
        self._pool = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in pool]

    def candidates(self, teacher: int, prior: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """All images of one teacher, normalised (B, C, H, W), and their targets (B,), once."""
        yield self._pool[teacher]

    def _optimise(
        self,
        teacher: Teacher,
        targets: torch.Tensor,
        objective: Objective,
        stream: torch.Generator,
        recorder: Recorder | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Images (B, C, H, W) for targets (B,), from noise, and the last step's loss terms."""
        start = torch.randn(len(targets), *self._spec.size, generator=stream)
        pixels, targets = start.to(self._device).requires_grad_(True), targets.to(self._device)
        optimiser = torch.optim.Adam([pixels], LEARNING_RATE, BETAS, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self._settings.steps)
        terms: dict[str, torch.Tensor] = {}
        for step in range(self._settings.steps):
            total, terms = objective(teacher, self._space.normalise(pixels.sigmoid()), targets)
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            optimiser.step()
            schedule.step()
            if recorder is not None and recorder.wants(step):
                recorder.add(step, terms)
        return self._space.normalise(pixels.detach().sigmoid()), terms
