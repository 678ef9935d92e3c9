"""One small network draws the images of every teacher.

Running statistics leave most directions of pixel space free; what fills them decides whether the
images are digits or noise. A convolutional generator fills them with smooth strokes (Ulyanov et al.,
Deep Image Prior, CVPR 2018), and one generator for all teachers makes every teacher's statistics
shape the strokes of the others: a teacher that saw one class alone, and learned almost nothing,
still gets images in the style that the well-trained ones agree on. Generators per teacher are common
in data-free distillation (CMI, Fast-Datafree, NAYER); sharing one across teachers is our addition.

Legend: T teachers, K classes, B images per teacher, Z latent size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from ..images import InputSpec, PixelSpace
from ..runtime import generator as random_stream
from ..runtime import mixed_precision, seeded
from .canvas import Progress, Recorder, Settings
from .objective import Objective
from .prior import draw_targets
from .teacher import Teacher

LATENT = 32
WIDTH, NARROWEST = 64, 16  # channels at the lowest resolution, and the least at the highest
SMALLEST = 4  # side of the lowest resolution, roughly
LEARNING_RATE, BETAS, WARM_UP = 3e-3, (0.5, 0.99), 0.1
ROUNDS = 4  # of drawing, until enough images are recognised
BLOCK = 256  # images drawn at once


class Generator(nn.Module):
    """Latent (B, Z) and condition (B,) to image parameters (B, C, H, W).

    Args:
        size: (C, H, W) of the images.
        conditions: number of embeddings, one for each class of each teacher.
    """

    def __init__(self, size: tuple[int, int, int], conditions: int) -> None:
        super().__init__()
        channels, height, width = size
        doublings = max(0, round(math.log2(min(height, width) / SMALLEST)))
        scales = [2**i for i in reversed(range(doublings + 1))]
        self._sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in scales]
        widths = [max(NARROWEST, WIDTH >> i) for i in range(doublings + 1)]
        self.embedding = nn.Embedding(conditions, LATENT)
        self.project = nn.Linear(2 * LATENT, WIDTH * self._sizes[0][0] * self._sizes[0][1])
        self.norm = nn.BatchNorm2d(WIDTH)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in zip([WIDTH, *widths], widths, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.paint = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, latent: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        features = self.project(torch.cat([latent, self.embedding(condition)], 1))
        features = features.view(len(latent), WIDTH, *self._sizes[0])  # (B, WIDTH, h, w)
        features = F.leaky_relu(self.norm(features), 0.2)
        for size, conv, norm in zip(self._sizes, self.convs, self.norms, strict=True):
            if features.shape[2:] != size:
                features = F.interpolate(features, size=size)
            features = F.leaky_relu(norm(conv(features)), 0.2)
        return self.paint(features)


class GeneratorEngine:
    """Fits a generator to all teachers at once, then draws any number of images.

    Each step draws ``settings.batch`` images of every teacher and sums the teachers' losses.
    """

    def __init__(self, teachers: list[Teacher], spec: InputSpec, settings: Settings, device: torch.device) -> None:
        self._teachers, self._settings, self._device = teachers, settings, device
        self._space = PixelSpace(spec, device)
        self._stream = random_stream(settings.seed, "generator")
        with seeded(settings.seed, "generator weights"):
            network = Generator(spec.size, sum(teacher.num_classes for teacher in teachers))
        self._network = network.to(device, memory_format=torch.channels_last)
        offsets = [0]
        for teacher in teachers[:-1]:
            offsets.append(offsets[-1] + teacher.num_classes)
        self._offsets = offsets

    def fit(self, objective: Objective, recorder: Recorder, on_progress: Progress | None = None) -> None:
        """Train the generator for ``settings.steps`` steps."""
        steps = self._settings.steps
        optimiser = torch.optim.Adam(
            self._network.parameters(), LEARNING_RATE, BETAS, fused=self._device.type == "cuda"
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, LEARNING_RATE, total_steps=steps + 1, pct_start=WARM_UP, cycle_momentum=False
        )
        for step in range(steps):
            targets = [draw_targets(t.prior, self._settings.batch, self._stream) for t in self._teachers]
            images = self._images(targets)
            outcomes = [
                objective(teacher, part, target.to(self._device))
                for teacher, part, target in zip(self._teachers, images, targets, strict=True)
            ]
            optimiser.zero_grad(set_to_none=True)
            torch.stack([total for total, _ in outcomes]).sum().backward()
            optimiser.step()
            schedule.step()
            if recorder.wants(step) or step + 1 == steps:
                shown = recorder.add(step, [terms for _, terms in outcomes])
                if on_progress:
                    on_progress("synthesize", step + 1, steps, **shown)

    @torch.no_grad()
    def candidates(self, teacher: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Fresh images of one teacher, normalised (B, C, H, W), with targets (B,), in up to ``ROUNDS`` rounds."""
        self._network.eval()
        stream = random_stream(self._settings.seed, "draw", teacher)
        prior, count = self._teachers[teacher].prior, self._settings.count
        for _ in range(ROUNDS):
            targets = draw_targets(prior, count, stream)
            latent = torch.randn(count, LATENT, generator=stream)
            blocks = [
                self._draw(z.to(self._device), (t + self._offsets[teacher]).to(self._device))
                for z, t in zip(latent.split(BLOCK), targets.split(BLOCK), strict=True)
            ]
            yield torch.cat(blocks), targets

    def _images(self, targets: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """One batch per teacher, drawn in a single pass so that its normalisation sees all teachers."""
        condition = torch.cat([t + o for t, o in zip(targets, self._offsets, strict=True)]).to(self._device)
        latent = torch.randn(len(condition), LATENT, generator=self._stream).to(self._device)
        return self._draw(latent, condition).split([len(target) for target in targets])

    def _draw(self, latent: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        with mixed_precision(self._device):
            parameters = self._network(latent, condition)
        return self._space.normalise(parameters.float().sigmoid())
