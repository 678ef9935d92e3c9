"""DARE, then sign election."""

from __future__ import annotations

import numpy as np

from .consensus import disjoint_mean
from .drop import drop_and_rescale
from .method import Block


def dare_ties(block: Block, *, density: float = 0.1, scale: float = 0.3) -> np.ndarray:
    """``theta_base + scale * disjoint_mean(DARE(theta_i - theta_base))`` (Yu et al., ICML 2024; TIES: 2023).

    The scale is small because rescaled elements are 1 / density times too large where only one is left.
    """
    return scale * disjoint_mean(drop_and_rescale(block, density), block.weights)
