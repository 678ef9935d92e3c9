"""Isotropic merging in common and task-specific subspaces."""

from __future__ import annotations

import torch

from .method import require_share
from .spectrum import CUTOFF, of_sum, polar_factor, thin_svd


def iso_cts(
    tasks: torch.Tensor, noise: torch.Tensor | None = None, *, scale: float = 1.0, common: float = 0.8
) -> torch.Tensor:
    """Iso-CTS (Marczak et al., ICML 2025): Iso-C, its weakest directions replaced by those each task has alone.

    The share ``common`` of the directions is taken from the sum; the rest, in equal parts, from what is left
    of every task outside the column space of those. All are made orthogonal and get the mean singular value.
    Directions that the sum, or a task, lacks, up to rounding, stay out.

    Args:
        tasks: (N, R, S).
        noise: of rounding, (2, N), see ``rounding_noise``; none if None.

    Raises:
        DmmError: common is not a share.
    """
    require_share("common", common)
    rank = min(tasks.shape[1:])
    own = min(round(rank * (1.0 - common) / len(tasks)), rank // len(tasks))
    shared = rank - own * len(tasks)
    of_all = of_sum(noise)
    parts = [_leading(tasks.sum(0, dtype=torch.float64), shared, of_all)]
    column_space = parts[0][0]  # (R, shared)
    for task in tasks if own else ():
        task = task.double()
        # of the task, not of what is left of it; and the column space turns by the noise of the sum
        floor = max(of_all, CUTOFF * float(task.norm()))
        parts.append(_leading(task - column_space @ (column_space.T @ task), own, floor))
    left = polar_factor(torch.cat([u for u, _, _ in parts], 1))  # (R, rank)
    right = polar_factor(torch.cat([v for _, _, v in parts], 0).T)  # (S, rank)
    return scale * torch.cat([s for _, s, _ in parts]).mean() * (left @ right.T)


def _leading(matrix: torch.Tensor, count: int, floor: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    left, values, right = thin_svd(matrix, floor)
    return left[:, :count], values[:count], right[:count]
