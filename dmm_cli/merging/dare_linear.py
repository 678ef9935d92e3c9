"""DARE, then a sum."""

from __future__ import annotations

import numpy as np

from .drop import drop_and_rescale
from .method import Block


def dare_linear(block: Block, *, density: float = 0.1, scale: float = 0.3) -> np.ndarray:
    """``theta_base + scale * sum_i w_i DARE(theta_i - theta_base)`` (Yu et al., ICML 2024).

    The mask of an element depends on the seed, the tensor's name, the element's place, and the checkpoint's place
    among those whose weight is not 0. The scale is that of task arithmetic.
    """
    return scale * (block.weights @ drop_and_rescale(block, density))
