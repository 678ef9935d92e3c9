"""Minima of convex functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

ITERATIONS = 80
HISTORY = 10  # steps that are remembered, at two copies of the unknowns each; all 80 get 1e-5 lower


def minimise(loss: Callable[[], torch.Tensor], unknowns: Sequence[torch.Tensor]) -> None:
    """Bring unknowns, in place, to where a convex loss (scalar) of them is lowest, by L-BFGS.

    Args:
        unknowns: they take gradients, also where the caller has switched these off.
    """
    optimiser = torch.optim.LBFGS(unknowns, max_iter=ITERATIONS, history_size=HISTORY, line_search_fn="strong_wolfe")

    def evaluate() -> torch.Tensor:
        optimiser.zero_grad()
        total = loss()
        total.backward()
        return total

    with torch.enable_grad():
        optimiser.step(evaluate)
