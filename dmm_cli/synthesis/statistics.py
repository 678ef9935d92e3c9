"""Batch statistics at the input of every normalisation layer of a frozen teacher.

Legend: B images, C channels of a layer, L normalisation layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


class ShiftedMoments(torch.autograd.Function):
    """Mean and variance per channel around a given centre, in one fused backward pass.

    Centring on the running mean keeps the single-pass variance accurate when a channel's mean is
    large against its spread, and the gradient of both moments is one affine map of the input,
    which measures cheaper than the chain that autograd builds for ``torch.var_mean``.
    """

    @staticmethod
    def forward(ctx, features: torch.Tensor, centre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (1, -1) + (1,) * (features.dim() - 2)
        dims = [0, *range(2, features.dim())]
        count = features.numel() // features.shape[1]
        centred = features.float() - centre.float().view(shape)  # (B, C, ...)
        shift = centred.mean(dims)  # (C,)
        variance = torch.linalg.vector_norm(centred, dim=dims).square() / count - shift.square()  # (C,)
        ctx.save_for_backward(centred, shift)
        ctx.count, ctx.shape, ctx.dtype = count, shape, features.dtype
        return shift, variance.clamp_min(0.0)

    @staticmethod
    def backward(ctx, grad_shift: torch.Tensor, grad_variance: torch.Tensor):
        centred, shift = ctx.saved_tensors
        slope = 2.0 * grad_variance / ctx.count  # (C,)
        offset = grad_shift / ctx.count - slope * shift  # (C,)
        grad = torch.addcmul(offset.view(ctx.shape), centred, slope.view(ctx.shape))  # (B, C, ...)
        return grad.to(ctx.dtype), None


@dataclass(frozen=True)
class LayerStatistics:
    """What one normalisation layer stored and what the current batch shows there, each of shape (C,).

    ``shift`` is the batch mean minus the running mean.
    """

    shift: torch.Tensor
    variance: torch.Tensor
    running_variance: torch.Tensor
    eps: float


class StatisticsRecorder:
    """Records the input statistics of normalisation layers while it is open; leaves no hook behind.

    Args:
        layers: modules with ``running_mean`` and ``running_var`` of shape (C,). Their *input* is
            measured, since timm's BatchNormAct2d already includes the activation in its output.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        self._layers = layers
        self._seen: dict[int, LayerStatistics] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> StatisticsRecorder:
        self._hooks = [layer.register_forward_pre_hook(self._hook(index)) for index, layer in enumerate(self._layers)]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, index: int):
        def record(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            shift, variance = ShiftedMoments.apply(inputs[0], layer.running_mean)
            running = layer.running_var.float()
            self._seen[index] = LayerStatistics(shift, variance, running, getattr(layer, "eps", 1e-5))

        return record

    def take(self) -> list[LayerStatistics]:
        """The statistics of the last forward pass, in layer order; empties the recorder."""
        seen, self._seen = self._seen, {}
        return [seen[index] for index in sorted(seen)]
