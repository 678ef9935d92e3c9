"""Running statistics re-estimated on pseudo-data.

Legend: N images, B images of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def reset_statistics(model: nn.Module, layers: list[nn.Module], batches: Iterable[torch.Tensor]) -> None:
    """Replace running means and variances by their average over batches (B, C, H, W), in place.

    ``num_batches_tracked`` and everything else stay as they are; the model is left in eval mode.
    """
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    counts = [layer.num_batches_tracked.clone() for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
    model.train()
    for batch in batches:
        model(batch)
    model.eval()
    for layer, momentum, count in zip(layers, momenta, counts, strict=True):
        layer.momentum = momentum
        layer.num_batches_tracked.copy_(count)
