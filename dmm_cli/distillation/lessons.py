"""What a student is taught.

Legend: N images, B images of a batch, C channels, H height, W width, T teachers, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from ..examples import Inputs
from ..recalibration import balanced_weights, drawn_rows, owner_weights
from ..runtime import generator as random_stream
from ..spaces import Space
from .augment import add_noise, draw_poses, posed
from .committee import Committee
from .settings import Settings

BLOCK = 512  # images at once


@dataclass(frozen=True)
class Lessons:
    """Pseudo-data as the loop needs it, on its device.

    Attributes:
        images: uint8 (N, C, H, W), or all inputs. space: from them to what the student sees.
        targets, teacher_id: int64 (N,).
        labels: names of the T teachers. classes: names of the K classes.
    """

    images: Inputs
    space: Space
    targets: torch.Tensor
    teacher_id: torch.Tensor
    labels: tuple[str, ...]
    classes: tuple[str, ...]

    def weights(self) -> torch.Tensor:
        """Sampling weights (N,), on the CPU, under which every class is equally likely."""
        return balanced_weights(self.targets.cpu(), len(self.classes))

    def show(self, rows: torch.Tensor) -> Inputs:
        """Images of some rows (B,), normalised, float32 (B, C, H, W)."""
        return self.space.from_bytes(self.images[rows])

    def balanced(self, stream: torch.Generator) -> Iterator[Inputs]:
        """Batches (B, C, H, W) in which every class is equally likely."""
        return (self.show(rows.to(self.images.device)) for rows in drawn_rows(self.weights(), stream))

    def mixed(self, stream: torch.Generator) -> Iterator[Inputs]:
        """Batches (B, C, H, W) in which every teacher is equally likely, with its images in the mix it has of them."""
        teachers = len(self.labels)
        rows = drawn_rows(owner_weights(self.teacher_id.cpu(), [1 / teachers] * teachers), stream)
        return (self.show(part.to(self.images.device)) for part in rows)

    def in_order(self, batch: int) -> Iterator[Inputs]:
        """All images, in batches (B, C, H, W)."""
        return (self.space.from_bytes(part) for part in self.images.split(batch))

    def disturbed(self, batch: int, pose: float, noise: float, stream: torch.Generator) -> Iterator[Inputs]:
        """All images, in batches (B, C, H, W), each in a pose and under noise of these strengths."""
        for part in self.in_order(batch):
            poses = draw_poses(len(part), pose, stream).to(part.device)
            yield add_noise(posed(part, poses), noise, stream)

    def committee(self, teachers: Sequence[nn.Module], settings: Settings) -> Committee:
        """The teachers as one, who have seen all images as they are, and once more disturbed as the student's are."""
        stream = random_stream(settings.seed, "committee")
        images = chain(self.in_order(BLOCK), self.disturbed(BLOCK, settings.pose, settings.noise, stream))
        return Committee(teachers, images, self.targets.repeat(2), self.weights().repeat(2), len(self.classes))
