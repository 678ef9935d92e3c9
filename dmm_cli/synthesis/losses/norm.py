"""How far a batch is from the statistics that are stored of a teacher."""

from __future__ import annotations

import torch

from ..statistics import LayerStatistics
from . import Observation


def norm(seen: Observation) -> torch.Tensor:
    """The divergence of the batch from what is stored of the teacher, see ``divergence``."""
    return divergence(seen.layers)


def divergence(layers: list[LayerStatistics]) -> torch.Tensor:
    """Gaussian Kullback-Leibler divergence from stored to batch statistics, mean over channels, then layers.

    ``KL = (shift^2 + variance) / stored - 1 - log(variance / stored)`` (twice the divergence of two
    one-dimensional Gaussians). DeepInversion (Yin et al., CVPR 2020) uses the norm of the raw
    differences, in which channels of large variance drown the others; the divergence is scale free.

    Returns:
        A scalar, 0 when every channel matches.
    """
    # all layers in one row of channels: a dozen operations instead of a dozen per layer
    stored = torch.cat([layer.stored_variance + layer.eps for layer in layers])  # (sum of C,)
    variance = torch.cat([layer.variance + layer.eps for layer in layers])
    shift = torch.cat([layer.shift for layer in layers])
    ratio = variance / stored
    divergences = shift.square() / stored + ratio - 1.0 - torch.log(ratio)
    widths = [len(layer.shift) for layer in layers]
    return torch.stack([part.mean() for part in divergences.split(widths)]).mean()
