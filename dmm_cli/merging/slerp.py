"""Spherical linear interpolation."""

from __future__ import annotations

import numpy as np

from .method import Facts

COLLINEAR = 0.9995  # beyond this cosine arc and chord differ by less than 2e-4 of the length; the usual cut


def slerp(facts: Facts) -> np.ndarray:
    """``sin((1-t) W) / sin W theta_0 + sin(t W) / sin W theta_1``, W the angle of the whole tensors.

    Shoemake, SIGGRAPH 1985; t is the second checkpoint's share of the weights. Tensors that are
    nearly collinear, opposite, or zero are interpolated linearly.
    """
    norms = np.sqrt(np.diag(facts.gram))
    if norms.min() == 0 or len(norms) == 1:
        return facts.shares
    cosine = float(np.clip(facts.gram[0, 1] / norms.prod(), -1.0, 1.0))
    if abs(cosine) > COLLINEAR:
        return facts.shares
    angle = np.arccos(cosine)
    return np.sin(facts.shares * angle) / np.sin(angle)
