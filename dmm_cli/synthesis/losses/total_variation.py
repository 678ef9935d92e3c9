"""How rough an image is."""

from __future__ import annotations

import torch

from . import Observation


def total_variation(seen: Observation) -> torch.Tensor:
    """Mean squared difference of vertical and horizontal neighbours of (B, C, H, W), a scalar."""
    images = seen.images
    rows = (images[..., 1:, :] - images[..., :-1, :]).square().mean()
    columns = (images[..., 1:] - images[..., :-1]).square().mean()
    return rows + columns
