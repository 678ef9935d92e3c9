"""How rough an image is."""

from __future__ import annotations

import torch

from ...examples import named
from . import Observation


def total_variation(seen: Observation) -> torch.Tensor:
    """Mean squared difference of vertical and horizontal neighbours of (B, C, H, W), a scalar; the sum over images."""
    total = seen.logits.new_zeros(())
    for images in named(seen.images).values():
        rows = images[..., 1:, :] - images[..., :-1, :]
        columns = images[..., 1:] - images[..., :-1]
        # an image one pixel high or wide has no neighbours that way, and no mean of them
        total = total + sum(part.square().mean() for part in (rows, columns) if part.numel())
    return total
