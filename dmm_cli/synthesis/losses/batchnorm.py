"""How far a batch is from the statistics a teacher stored."""

from __future__ import annotations

import torch

from . import Observation


def batchnorm(seen: Observation) -> torch.Tensor:
    """Gaussian Kullback-Leibler divergence from running to batch statistics, mean over channels, then layers.

    ``KL = (shift^2 + variance) / running - 1 - log(variance / running)`` (twice the divergence of two
    one-dimensional Gaussians). DeepInversion (Yin et al., CVPR 2020) uses the norm of the raw
    differences, in which channels of large variance drown the others; the divergence is scale free.

    Returns:
        A scalar, 0 when every channel matches.
    """
    # all layers in one row of channels: a dozen operations instead of a dozen per layer
    running = torch.cat([layer.running_variance + layer.eps for layer in seen.layers])  # (sum of C,)
    variance = torch.cat([layer.variance + layer.eps for layer in seen.layers])
    shift = torch.cat([layer.shift for layer in seen.layers])
    ratio = variance / running
    divergence = shift.square() / running + ratio - 1.0 - torch.log(ratio)
    widths = [len(layer.shift) for layer in seen.layers]
    return torch.stack([part.mean() for part in divergence.split(widths)]).mean()
