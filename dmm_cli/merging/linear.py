"""Weighted mean of weights."""

from __future__ import annotations

import numpy as np

from .method import Block


def linear(block: Block) -> np.ndarray:
    """``theta = sum_i w_i theta_i`` with weights that sum to 1 (FedAvg: McMahan et al., AISTATS 2017).

    Computed as the first checkpoint plus weighted differences, so that equal checkpoints come back
    bit for bit.
    """
    first = block.values[0]
    return first + block.shares[1:] @ (block.values[1:] - first)
