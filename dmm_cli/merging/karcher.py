"""Karcher mean on the sphere."""

from __future__ import annotations

import numpy as np

from .method import Facts

COLLINEAR = 1.0 - 1e-6  # beyond this cosine the mean on the sphere is the linear one to 3e-7
TOLERANCE, ITERATIONS = 1e-9, 200
CANCELLED = 1e-5  # squared length of a mean of unit vectors: cosines come from float32 products, good to 1e-6


def karcher(facts: Facts) -> np.ndarray:
    """The point of least squared geodesic distance to the directions, at the mean length.

    Karcher, Comm. Pure Appl. Math. 1977. Every iterate ``mean <- exp_mean(sum_i w_i log_mean(u_i))`` lies in
    the span of the directions ``u_i = theta_i / |theta_i|``, so the iteration runs on its coefficients
    and the N x N matrix of cosines, never on the tensors. Nearly collinear or zero tensors, and
    directions that cancel, take the linear mean.
    """
    shares, norms = facts.shares, np.sqrt(np.diag(facts.gram))
    if norms.min() == 0:
        return shares
    cosines = facts.gram / np.outer(norms, norms)
    mean = _unit(shares, cosines)
    if cosines.min() > COLLINEAR or mean is None:
        return shares
    for _ in range(ITERATIONS):
        angle_cosine = np.clip(cosines @ mean, -1.0, 1.0)
        angle = np.arccos(angle_cosine)
        sine = np.sin(angle)
        logs = shares * np.divide(angle, sine, out=np.ones_like(angle), where=sine > 1e-12)
        tangent = logs - (logs @ angle_cosine) * mean
        length = np.sqrt(max(tangent @ cosines @ tangent, 0.0))
        if length < TOLERANCE:
            break
        mean = _unit(np.cos(length) * mean + np.sin(length) / length * tangent, cosines)
    return shares @ norms * mean / norms


def _unit(coefficients: np.ndarray, cosines: np.ndarray) -> np.ndarray | None:
    """Coefficients scaled so that their combination has length 1, None where it vanishes."""
    squared = coefficients @ cosines @ coefficients
    return coefficients / np.sqrt(squared) if squared > CANCELLED else None
