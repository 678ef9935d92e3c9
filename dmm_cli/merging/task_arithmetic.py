"""Task arithmetic."""

from __future__ import annotations

import numpy as np

from .method import Facts


def task_arithmetic(facts: Facts, *, scale: float = 0.3) -> np.ndarray:
    """``theta = theta_base + scale * sum_i w_i (theta_i - theta_base)`` (Ilharco et al., ICLR 2023).

    Weights are taken as given; without ``--weights`` each is 1.
    """
    return scale * facts.weights
