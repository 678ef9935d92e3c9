"""The solve that methods share which want a layer to answer as its parents do.

Legend: R x S a matrix.
"""

from __future__ import annotations

import torch

SMALLEST = 1e-12  # ridge, so that a singular system has a solution


def solve_toward(start: torch.Tensor, gram: torch.Tensor, target: torch.Tensor, ridge: float) -> torch.Tensor:
    """The W (R, S) that minimises ``tr(W gram W^T) - 2 tr(W target^T) + r |W - start|^2``.

    Where ``gram`` says nothing, W is as ``start`` is.

    Args:
        start, target: float64 (R, S).
        gram: float64 (S, S), symmetric, with no negative eigenvalue; overwritten.
        ridge: r, in units of the mean eigenvalue of ``gram``.
    """
    weight = max(ridge, SMALLEST) * float(gram.diagonal().mean()) or 1.0
    gram.diagonal().add_(weight)
    return torch.linalg.solve(gram, (target + weight * start).T).T
