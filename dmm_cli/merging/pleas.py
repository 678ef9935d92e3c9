"""PLeaS: every layer gives what its parents give."""

from __future__ import annotations

import torch

from .least_squares import solve_toward
from .method import Layer, require_positive


def pleas(layer: Layer, *, ridge: float = 0.01) -> torch.Tensor:
    """The W that makes of the merged network's inputs X_i what parent i makes of the same images, Y_i.

    ``sum_i w_i |X_i W^T - Y_i|^2`` is minimised, so ``W sum_i w_i X_i^T X_i = sum_i w_i Y_i^T X_i``, drawn toward the
    weighted mean by ``ridge`` times the mean eigenvalue: the least squares of PLeaS (Nasery et al., CVPR 2025), after
    its permutations (``--align``). There Y is the mean of all parents' outputs on every image; here every parent
    answers its own images alone, since about those of the others it knows less than their owner. Unlike in
    RegMean, Y_i comes from the parent's own inputs, so that what earlier layers got wrong is mended.

    The units that its partial merge keeps side by side are more units here, see ``alignment.widen``.

    Returns:
        float64 (R, S).

    Raises:
        DmmError: ridge is negative.
    """
    require_positive("ridge", ridge)
    gram, target, mean = (torch.tensordot(layer.shares, of, 1) for of in (layer.grams, layer.targets, layer.weights))
    return solve_toward(mean, gram, target, ridge)
