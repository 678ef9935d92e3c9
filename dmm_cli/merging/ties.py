"""TIES-Merging."""

from __future__ import annotations

import numpy as np

from .consensus import disjoint_mean
from .method import Block


def ties(block: Block, *, density: float = 0.2, scale: float = 1.0) -> np.ndarray:
    """Trim, elect sign, disjoint mean: ``theta_base + scale * mean`` (Yadav et al., NeurIPS 2023).

    Of every tensor of a task vector the share ``density`` of largest magnitude is kept, one element at
    least; elements as large as the smallest one kept are kept too.
    """
    for row, threshold in zip(block.values, block.thresholds, strict=True):
        row *= np.abs(row) >= threshold
    return scale * disjoint_mean(block.values, block.weights)
