"""RegMean: every layer answers what its parents see as they do."""

from __future__ import annotations

import torch

from .least_squares import solve_toward
from .method import Layer, require_positive, require_share


def regmean(layer: Layer, *, off_diagonal: float = 0.9, ridge: float = 0.01) -> torch.Tensor:
    """The W that answers the inputs X_i of every parent as that parent's own W_i does.

    The rows of X_i are inputs, and ``sum_i w_i |X_i (W - W_i)^T|^2`` is minimised: with ``G_i = X_i^T X_i``,
    ``W sum_i w_i G_i = sum_i w_i W_i G_i`` (RegMean, Jin et al., ICLR 2023). The inputs are those of the merged
    network (RegMean++, Nguyen et al., 2025), see ``features``. What lies off the diagonal of G_i is shrunk, as
    published; beyond that W is drawn toward the weighted mean by ``ridge`` times the mean eigenvalue, because
    units that pseudo-data hardly wake would get weights of any size.

    Args:
        off_diagonal: factor of the Gram matrices' elements off the diagonal; 0 weighs every input unit by itself.

    Returns:
        float64 (R, S).

    Raises:
        DmmError: off_diagonal is not between 0 and 1, or ridge is negative.
    """
    require_share("off_diagonal", off_diagonal)
    require_positive("ridge", ridge)
    gram, target = torch.zeros_like(layer.grams[0]), torch.zeros_like(layer.weights[0])  # (S, S), (R, S)
    for weight, inputs, share in zip(layer.weights, layer.grams, layer.shares, strict=True):
        own = share * (off_diagonal * inputs + (1.0 - off_diagonal) * inputs.diagonal().diag())  # (S, S)
        gram += own
        target += weight @ own
    mean = torch.tensordot(layer.shares, layer.weights, 1)  # (R, S)
    return solve_toward(mean, gram, target, ridge)
