"""Task singular vectors."""

from __future__ import annotations

import torch

from .spectrum import of_each, polar_factor, thin_svd


def tsv(tasks: torch.Tensor, noise: torch.Tensor | None = None, *, scale: float = 1.0) -> torch.Tensor:
    """TSV-M (Gargiulo et al., CVPR 2025): keep r/N components of every task, make them orthogonal, add them.

    The singular vectors of all tasks side by side are replaced by their polar factors, so that no task
    reads or writes another one's directions; singular values stay. Directions that a task lacks, up to rounding, stay
    out: the others would make room for them.

    Args:
        tasks: (N, R, S).
        noise: of rounding, (2, N), see ``rounding_noise``; none if None.
    """
    kept = max(1, min(tasks.shape[1:]) // len(tasks))
    parts = [thin_svd(task, floor) for task, floor in zip(tasks, of_each(noise, len(tasks)), strict=True)]
    left = polar_factor(torch.cat([u[:, :kept] for u, _, _ in parts], 1))  # (R, N kept)
    right = polar_factor(torch.cat([v[:kept] for _, _, v in parts], 0).T)  # (S, N kept)
    values = torch.cat([s[:kept] for _, s, _ in parts])
    return scale * (left * values) @ right.T
