"""Every pixel is a free parameter, as in DeepInversion (Yin et al., CVPR 2020).

Legend: B images.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..images import InputSpec, PixelSpace
from ..runtime import generator as random_stream
from .canvas import Progress, Recorder, Settings
from .objective import Objective
from .prior import draw_targets
from .teacher import Teacher

LEARNING_RATE, BETAS = 0.1, (0.9, 0.99)


class PixelEngine:
    """Optimises ``settings.count`` images of each teacher, ``settings.batch`` at a time; teachers do not interact."""

    def __init__(self, teachers: list[Teacher], spec: InputSpec, settings: Settings, device: torch.device) -> None:
        self._teachers, self._spec, self._settings, self._device = teachers, spec, settings, device
        self._space = PixelSpace(spec, device)
        self._pool: list[tuple[torch.Tensor, torch.Tensor]] = []

    def fit(self, objective: Objective, recorder: Recorder, on_progress: Progress | None = None) -> None:
        """Optimise all images for ``settings.steps`` steps."""
        count, batch = self._settings.count, self._settings.batch
        jobs = [
            (number, start, min(batch, count - start))
            for number in range(len(self._teachers))
            for start in range(0, count, batch)
        ]
        pool: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self._teachers]
        for done, (number, start, size) in enumerate(jobs):
            teacher = self._teachers[number]
            stream = random_stream(self._settings.seed, "pixels", number, start)
            targets = draw_targets(teacher.prior, size, stream).to(self._device)
            first = recorder if done == 0 else None
            images, terms = optimise_pixels(
                teacher, targets, self._spec, self._space, objective, self._settings.steps, stream, first
            )
            pool[number].append((images, targets.cpu()))
            if on_progress:
                shown = {name: float(value) for name, value in terms.items()}
                on_progress("synthesize", done + 1, len(jobs), **shown)
        self._pool = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in pool]

    def candidates(self, teacher: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All images of one teacher, normalised (B, C, H, W), and their targets (B,), once."""
        yield self._pool[teacher]


def optimise_pixels(
    teacher: Teacher,
    targets: torch.Tensor,
    spec: InputSpec,
    space: PixelSpace,
    objective: Objective,
    steps: int,
    stream: torch.Generator,
    recorder: Recorder | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Images (B, C, H, W) for targets (B,), from noise, and the last step's loss terms."""
    start = torch.randn(len(targets), *spec.size, generator=stream).to(targets.device)
    pixels = start.requires_grad_(True)
    optimiser = torch.optim.Adam([pixels], LEARNING_RATE, BETAS, fused=pixels.is_cuda)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    terms: dict[str, torch.Tensor] = {}
    for step in range(steps):
        total, terms = objective(teacher, space.normalise(pixels.sigmoid()), targets)
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        optimiser.step()
        schedule.step()
        if recorder is not None and recorder.wants(step):
            recorder.add(step, [terms])
    return space.normalise(pixels.detach().sigmoid()), terms
