"""Singular value calibration of a merged task matrix."""

from __future__ import annotations

import torch

from .method import require_positive
from .spectrum import CUTOFF, thin_svd

EQUAL = 1e-6  # of a singular value; the next one counts as the same if it is no further below


def svc(merged: torch.Tensor, tasks: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    """SVC (Li et al., ICML 2026): undo the inflation of directions that several tasks share.

    Direction u of the merged matrix D answers task i by ``s_i = <u^T D, u^T D_i> / |u^T D_i|^2``, 1 where the merge
    answers as the task does. Its singular value is multiplied by ``N / sum_i max(alpha, s_i)``. A task without
    a component along u, up to rounding, has s_i = 0. Where singular values are equal, as after Iso-C, any directions
    would do, and rounding would choose: then they are those of the sum of the tasks.

    Args:
        merged: (R, S). tasks: (N, R, S). alpha: the least answer that counts, 0 or more.

    Raises:
        DmmError: alpha is negative.
    """
    require_positive("alpha", alpha)
    left, values, right = _determined(*thin_svd(merged), tasks.sum(0, dtype=torch.float64))
    answers = values[:, None] * right  # (r, S)
    total = torch.zeros_like(values)
    for task in tasks:
        own = left.T @ task.double()  # (r, S)
        squared = own.square().sum(1)
        heard = squared > CUTOFF**2 * squared.sum()
        total += torch.where(heard, (answers * own).sum(1) / squared, 0.0).clamp_min(alpha)
    factors = torch.where(total > 0, len(tasks) / total, 1.0)
    return (left * (values * factors)) @ right


def _determined(
    left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, tasks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same matrix by other directions wherever singular values are equal: those of the tasks' sum (R, S) there."""
    apart = values[:-1] - values[1:] > EQUAL * values[:-1]
    ends = [0, *(apart.nonzero().flatten() + 1).tolist(), len(values)]
    for run in map(slice, ends, ends[1:]):
        mean = values[run].mean()
        if len(values[run]) > 1 and mean > 0:
            along = left[:, run].T @ tasks  # (k, S)
            turn = torch.linalg.eigh(along @ along.T)[1]  # (k, k)
            left[:, run] = left[:, run] @ turn
            right[run] = turn.T @ (values[run, None] * right[run]) / mean
            values[run] = mean
    return left, values, right
