"""WUDI: whoever undergoes data-free interference."""

from __future__ import annotations

import torch

from .least_squares import solve_toward
from .method import require_positive, require_whole


def wudi(
    tasks: torch.Tensor, *, scale: float = 1.0, ridge: float = 0.1, steps: float = 0, rate: float = 1e-5
) -> torch.Tensor:
    """The D of least interference ``sum_i |(D - D_i) D_i^T|^2 / |D_i|^2`` near ``sum_i D_i`` (Cheng et al., ICML 2025).

    The rows of a task matrix stand for the inputs it saw. The loss is quadratic in D: with
    ``G_i = D_i^T D_i / |D_i|^2`` its minimum solves ``D sum_i G_i = sum_i D_i G_i``. With ``steps`` it is approached
    by Adam, as published (300 steps at 1e-5); without, it is solved, drawn toward the sum by ``ridge``
    times the mean eigenvalue of ``sum_i G_i``.

    Args:
        tasks: (N, R, S).

    Raises:
        DmmError: ridge, steps or rate is negative, or steps is not whole.
    """
    for name, value in (("ridge", ridge), ("steps", steps), ("rate", rate)):
        require_positive(name, value)
    require_whole("steps", steps)
    gram = torch.zeros(tasks.shape[2], tasks.shape[2], dtype=torch.float64, device=tasks.device)  # (S, S)
    target = torch.zeros(tasks.shape[1:], dtype=torch.float64, device=tasks.device)  # (R, S)
    total = tasks.sum(0, dtype=torch.float64)
    for task in tasks:
        task = task.double()
        squared = task.square().sum()
        if squared > 0:
            own = task.T @ task / squared
            gram += own
            target += task @ own
    if steps:
        return scale * _descend(total, gram, target, int(steps), rate)
    return scale * solve_toward(total, gram, target, ridge)


def _descend(start: torch.Tensor, gram: torch.Tensor, target: torch.Tensor, steps: int, rate: float) -> torch.Tensor:
    merged = start.float().requires_grad_(True)
    gram, target = gram.float(), target.float()
    optimiser = torch.optim.Adam([merged], rate)
    for _ in range(steps):
        with torch.no_grad():
            merged.grad = 2.0 * (merged @ gram - target)
        optimiser.step()
    return merged.detach().double()
