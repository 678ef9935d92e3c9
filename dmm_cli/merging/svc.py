"""Singular value calibration of a merged task matrix."""

from __future__ import annotations

import torch

from .spectrum import CUTOFF, thin_svd


def svc(merged: torch.Tensor, tasks: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    """SVC (Li et al., ICML 2026): undo the inflation of directions that several tasks share.

    Direction u of the merged matrix D answers task i by ``s_i = <u^T D, u^T D_i> / |u^T D_i|^2``, 1 where the merge
    answers as the task does. Its singular value is multiplied by ``N / sum_i max(alpha, s_i)``. A task without
    a component along u, up to rounding, has s_i = 0.

    Args:
        merged: (R, S). tasks: (N, R, S).
    """
    left, values, right = thin_svd(merged)
    answers = values[:, None] * right  # (r, S)
    total = torch.zeros_like(values)
    for task in tasks:
        own = left.T @ task.double()  # (r, S)
        squared = own.square().sum(1)
        heard = squared > CUTOFF**2 * squared.sum()
        total += torch.where(heard, (answers * own).sum(1) / squared, 0.0).clamp_min(alpha)
    factors = torch.where(total > 0, len(tasks) / total, 1.0)
    return (left * (values * factors)) @ right
