"""Singular values by way of the smaller Gram matrix: several times cheaper than an SVD, and the same on a GPU.

Legend: R x S a matrix, r = min(R, S).
"""

from __future__ import annotations

import math

import torch

CUTOFF = 1e-7  # of the largest singular value; below, the square root of float64 rounding hides the direction


def thin_svd(matrix: torch.Tensor, floor: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``matrix = U diag(s) V`` in float64: U (R, r), s (r,) falling, V (r, S).

    Directions below the cutoff have s = 0 and zero vectors.

    Args:
        floor: a singular value that has to be exceeded, too.
    """
    matrix = matrix.double()
    if matrix.shape[0] > matrix.shape[1]:
        left, values, right = thin_svd(matrix.T, floor)
        return right.T, values, left.T
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)  # rising
    left, values = vectors.flip(1), squares.flip(0).clamp_min(0.0).sqrt()  # (R, r), (r,)
    kept = values > (CUTOFF * values[0]).clamp_min(floor)
    values = values * kept
    right = (left.T @ matrix) * torch.where(kept, 1.0 / values.clamp_min(1e-300), 0.0)[:, None]  # (r, S)
    return left * kept, values, right


def of_each(noise: torch.Tensor | None, count: int) -> list[float]:
    """The largest singular value that rounding gives each task; for ``noise``, (2, N), see ``rounding_noise``."""
    return [0.0] * count if noise is None else noise.square().sum(0).sqrt().tolist()


def of_sum(noise: torch.Tensor | None) -> float:
    """The largest singular value that rounding gives the sum of tasks, which share that of the base."""
    return 0.0 if noise is None else math.hypot(float(noise[0].norm()), float(noise[1].sum()))


def polar_factor(columns: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal columns, (R, k) to (R, k); directions the columns lack stay out."""
    left, _, right = thin_svd(columns)
    return left @ right
