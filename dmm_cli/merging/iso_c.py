"""Isotropic merging in the common subspace."""

from __future__ import annotations

import torch

from .spectrum import of_sum, thin_svd


def iso_c(tasks: torch.Tensor, noise: torch.Tensor | None = None, *, scale: float = 1.0) -> torch.Tensor:
    """Iso-C (Marczak et al., ICML 2025): the sum of the tasks with every singular value set to their mean.

    Directions that the sum lacks, up to rounding, stay out.

    Args:
        tasks: (N, R, S).
        noise: of rounding, (2, N), see ``rounding_noise``; none if None.
    """
    left, values, right = thin_svd(tasks.sum(0, dtype=torch.float64), of_sum(noise))
    return scale * values.mean() * (left @ right)
