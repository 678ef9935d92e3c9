"""Weighted mean of weights."""

from __future__ import annotations

import numpy as np

from .method import Facts


def linear(facts: Facts) -> np.ndarray:
    """``theta = sum_i w_i theta_i`` with weights that sum to 1 (FedAvg: McMahan et al., AISTATS 2017)."""
    return facts.shares
