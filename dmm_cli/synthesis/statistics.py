"""Batch statistics at the input of every normalisation layer of a frozen teacher.

Legend: B images, C channels of a layer, L normalisation layers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from ..examples import hooked, on_input
from ..norms import across

DEFAULT_EPS = 1e-5  # BatchNorm's, where a layer has none or leaves it to the dtype (RMSNorm)


class ShiftedMoments(torch.autograd.Function):
    """Mean and variance per channel around a given centre (C,), in one fused backward pass.

    ``axis`` is the dimension of the channels, the other dimensions are samples. The gradient of both moments is one
    affine map of the input, which measures cheaper than the chain that autograd builds for ``torch.var_mean``.
    """

    @staticmethod
    def forward(ctx, features: torch.Tensor, centre: torch.Tensor, axis: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        axis %= features.dim()
        measure = _in_one_pass if features.is_cuda else _in_two_passes
        shift, variance = measure(features, centre.float(), axis)
        ctx.save_for_backward(features, shift + centre)
        ctx.axis = axis
        return shift, variance

    @staticmethod
    def backward(ctx, grad_shift: torch.Tensor, grad_variance: torch.Tensor):
        features, mean = ctx.saved_tensors
        count = features.numel() // len(mean)
        slope = 2.0 * grad_variance / count  # (C,)
        offset = grad_shift / count - slope * mean  # (C,)
        shape = across(features, ctx.axis)
        grad = torch.addcmul(offset.view(shape), features, slope.view(shape))  # (B, C, ...) or (B, ..., C)
        return grad.to(features.dtype), None, None


def _in_one_pass(features: torch.Tensor, centre: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift and variance (C,). Centred, so that a mean that is large against the spread does not drown the variance."""
    dims = [dim for dim in range(features.dim()) if dim != axis]
    centred = features.float() - centre.view(across(features, axis))  # (B, C, ...) or (B, ..., C)
    shift = centred.mean(dims)  # (C,)
    square = torch.linalg.vector_norm(centred, dim=dims).square()  # (C,)
    return shift, (square / (features.numel() // len(centre)) - shift.square()).clamp_min(0.0)


def _in_two_passes(features: torch.Tensor, centre: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift and variance (C,), by what BatchNorm measures with on a CPU, which copies nothing."""
    if axis != 1:
        features = features.movedim(axis, -1).flatten(0, -2)  # (R, C)
    mean, variance = torch.batch_norm_update_stats(features.float(), None, None, 0.0)
    return mean - centre, variance


@dataclass(frozen=True)
class NormLayer:
    """A normalisation layer and what is known of its input.

    Attributes:
        mean, variance: of the data, per channel (C,): running statistics, or recorded ones.
        axis: dimension of the channels.
    """

    module: nn.Module
    mean: torch.Tensor
    variance: torch.Tensor
    axis: int = 1


@dataclass(frozen=True)
class LayerStatistics:
    """What is stored of one normalisation layer and what the current batch shows there, each of shape (C,).

    ``shift`` is the batch mean minus the stored mean.
    """

    shift: torch.Tensor
    variance: torch.Tensor
    stored_variance: torch.Tensor
    eps: float


class SelfMeasuring:
    """A normalisation layer that measures its input itself.

    Attributes:
        tell: is given the mean of the input minus the running mean, and the variance, (C,) each, of every pass; None
            where nobody listens.
    """

    tell: Callable[[torch.Tensor, torch.Tensor], None] | None = None


class StatisticsRecorder:
    """Records the input statistics of normalisation layers while it is open; leaves no hook behind.

    Args:
        layers: their modules' *input* is measured, since timm's BatchNormAct2d already includes the
            activation in its output. Of a module that is used several times in a pass the last use counts.
    """

    def __init__(self, layers: list[NormLayer]) -> None:
        self._layers = layers
        self._seen: dict[int, LayerStatistics] = {}
        self._opened = ExitStack()

    def __enter__(self) -> StatisticsRecorder:
        for index, layer in enumerate(self._layers):
            self._listen(index, layer)
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def _listen(self, index: int, layer: NormLayer) -> None:
        module, stored = layer.module, layer.variance.float()
        eps = getattr(module, "eps", None) or DEFAULT_EPS

        def note(shift: torch.Tensor, variance: torch.Tensor) -> None:
            self._seen[index] = LayerStatistics(shift, variance, stored, eps)

        def measure(features: torch.Tensor) -> None:
            note(*ShiftedMoments.apply(features, layer.mean, layer.axis))

        if not isinstance(module, SelfMeasuring):
            self._opened.enter_context(hooked([on_input(module, measure)]))
            return
        moved = None if layer.mean is module.running_mean else module.running_mean - layer.mean
        module.tell = note if moved is None else lambda shift, variance: note(shift + moved, variance)
        self._opened.callback(setattr, module, "tell", None)

    def take(self) -> list[LayerStatistics]:
        """The statistics of the last forward pass, in layer order; empties the recorder."""
        seen, self._seen = self._seen, {}
        return [seen[index] for index in sorted(seen)]
