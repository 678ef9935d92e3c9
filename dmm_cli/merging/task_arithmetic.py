"""Task arithmetic."""

from __future__ import annotations

import numpy as np

from .method import Block


def task_arithmetic(block: Block, *, scale: float = 0.3) -> np.ndarray:
    """``theta = theta_base + scale * sum_i w_i (theta_i - theta_base)`` (Ilharco et al., ICLR 2023).

    Weights are taken as given; without ``--weights`` each is 1.
    """
    return block.base + scale * (block.weights @ (block.values - block.base))
