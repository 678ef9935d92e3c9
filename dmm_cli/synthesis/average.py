"""Statistics of the images of many steps: one batch may be diverse, while the pool of all matches what is stored.

Fast-Datafree (Fang et al., AAAI 2022) and NAYER compare stored statistics with an exponential average of the batches'.
They average variances; the variance of the pool also holds how far the batches' means lie apart, which the average of
second moments counts.

Legend: C channels of a layer.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from .statistics import LayerStatistics, NormLayer


class PoolStatistics(nn.Module):
    """Exponential averages of mean and second moment per channel; only the newest batch has a gradient.

    Args:
        layers: that may be seen. momentum: what is left of the older batches at each new one.
    """

    def __init__(self, layers: list[NormLayer], momentum: float) -> None:
        super().__init__()
        self._momentum = momentum
        like = layers[0].mean.float()
        for name in ("shift", "square"):
            self.register_buffer(name, like.new_zeros(sum(len(layer.mean) for layer in layers)))
        self.register_buffer("weight", like.new_zeros(()))  # of all batches so far, towards 1

    def forward(self, seen: list[LayerStatistics]) -> list[LayerStatistics]:
        """The pool's statistics in place of the batch's, which are added to it."""
        widths = [len(layer.shift) for layer in seen]
        shift = torch.cat([layer.shift for layer in seen])  # (sum of C,)
        square = torch.cat([layer.variance for layer in seen]) + shift.square()
        kept = self._momentum
        weight = kept * self.weight + (1.0 - kept)
        places = slice(len(shift))  # layers that no batch goes through are not seen
        pooled = [kept * old[places] + (1.0 - kept) * new for old, new in ((self.shift, shift), (self.square, square))]
        for old, new in ((self.shift[places], pooled[0]), (self.square[places], pooled[1]), (self.weight, weight)):
            old.copy_(new.detach())
        mean = pooled[0] / weight
        variance = (pooled[1] / weight - mean.square()).clamp_min(0.0)
        parts = zip(seen, mean.split(widths), variance.split(widths), strict=True)
        return [replace(layer, shift=own, variance=spread) for layer, own, spread in parts]
