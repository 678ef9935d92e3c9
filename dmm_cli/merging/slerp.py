"""Spherical linear interpolation."""

from __future__ import annotations

import numpy as np

from .linear import linear
from .method import Block

COLLINEAR = 0.9995  # beyond this cosine the two arcs differ by less than float32 can show


def slerp(block: Block) -> np.ndarray:
    """``sin((1-t) W) / sin W theta_0 + sin(t W) / sin W theta_1``, W the angle of the whole tensors.

    Shoemake, SIGGRAPH 1985; t is the second checkpoint's share of the weights. Tensors that are
    nearly collinear, opposite, or zero are interpolated linearly.
    """
    norms = np.sqrt(np.diag(block.gram))
    if norms.min() == 0:
        return linear(block)
    cosine = float(np.clip(block.gram[0, 1] / norms.prod(), -1.0, 1.0))
    if abs(cosine) > COLLINEAR:
        return linear(block)
    angle = np.arccos(cosine)
    return np.sin(block.shares * angle) / np.sin(angle) @ block.values
