"""What a student is taught.

Legend: N images, B images of a batch, C channels, H height, W width, T teachers, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..examples import Inputs
from ..recalibration import balanced_weights, drawn_rows
from ..spaces import Space


@dataclass(frozen=True)
class Lessons:
    """Pseudo-data as the loop needs it, on its device.

    Attributes:
        images: uint8 (N, C, H, W), or all inputs. space: from them to what the student sees.
        targets, teacher_id: int64 (N,).
        logits: of each image's owner, (N, K). priors: (T, K). labels: names of the T teachers.
        classes: names of the K classes.
        inside: (T,), whether a teacher's weights are part of the student.
    """

    images: Inputs
    space: Space
    targets: torch.Tensor
    teacher_id: torch.Tensor
    logits: torch.Tensor
    priors: torch.Tensor
    labels: tuple[str, ...]
    classes: tuple[str, ...]
    inside: torch.Tensor

    def weights(self) -> torch.Tensor:
        """Sampling weights (N,), on the CPU, under which every class is equally likely."""
        return balanced_weights(self.targets.cpu(), self.logits.shape[1])

    def show(self, rows: torch.Tensor) -> Inputs:
        """Images of some rows (B,), normalised, float32 (B, C, H, W)."""
        return self.space.from_bytes(self.images[rows])

    def balanced(self, stream: torch.Generator) -> Iterator[Inputs]:
        """Batches (B, C, H, W) in which every class is equally likely."""
        return (self.show(rows.to(self.images.device)) for rows in drawn_rows(self.weights(), stream))

    def in_order(self, batch: int) -> Iterator[Inputs]:
        """All images, in batches (B, C, H, W)."""
        return (self.space.from_bytes(part) for part in self.images.split(batch))
