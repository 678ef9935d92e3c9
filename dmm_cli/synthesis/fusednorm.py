"""Frozen BatchNorm layers that measure their input as they normalise it, in one pass over it each way, on a GPU.

What limits a step on a GPU are bytes, not products: apart, statistics, normalisation and ReLU read or write every
feature map some twenty times, forward and backward, many of them in float32. Here they do five times.

Legend: B images, C channels, H height, W width, R = B * H * W rows, G groups of rows.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import triton
import triton.language as tl
from torch import nn

from .statistics import SelfMeasuring

# of a program at once: what measured fastest on an H200, over the layers of ResNet-18 and ResNet-50
TILE_CHANNELS, TILE_ROWS, BACK_ROWS, BACK_WARPS = 64, 64, 16, 2
MOST_GROUPS = 1024  # of rows, each summed by one program; the sums of groups are added in order, always the same
SUMS, SUM_CHANNELS = 256, 4  # of a program that adds up, at once


@triton.jit
def _affine(means, variances, weight, bias, channel, known, eps):
    """Of some channels: what is taken off, then by what is multiplied, and what is added."""
    centre = tl.load(means + channel, mask=known, other=0.0)
    scale = tl.load(weight + channel, mask=known, other=0.0)
    deviation = tl.sqrt(tl.load(variances + channel, mask=known, other=1.0) + eps)
    return centre, scale / deviation, tl.load(bias + channel, mask=known, other=0.0)


@triton.jit
def _normalise(
    x, y, sums, means, variances, weight, bias, rows, channels, per_group, eps,
    RECTIFY: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows (R, C) to normalised ones, and the sums of a group's centred rows and of their squares, (G, 2, C)."""
    group = tl.program_id(0)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    known = channel < channels
    centre, slope, offset = _affine(means, variances, weight, bias, channel, known, eps)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    square = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, per_group, ROWS):
        row = group * per_group + first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & known[None, :]
        place = row.to(tl.int64)[:, None] * channels + channel[None, :]
        centred = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - centre[None, :]
        centred = tl.where(inside, centred, 0.0)
        total += centred
        square += centred * centred
        normal = centred * slope[None, :] + offset[None, :]
        if RECTIFY:
            normal = tl.maximum(normal, 0.0)
        tl.store(y + place, normal.to(y.dtype.element_ty), mask=inside)
    tl.store(sums + 2 * group * channels + channel, tl.sum(total, 0), mask=known)
    tl.store(sums + (2 * group + 1) * channels + channel, tl.sum(square, 0), mask=known)


@triton.jit
def _add_up(sums, shifts, spreads, groups, rows, channels, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums of groups (G, 2, C) to the mean of centred rows and their variance, (C,) each."""
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    known = channel < channels
    totals = tl.zeros([GROUPS, WIDTH], tl.float32)
    squares = tl.zeros([GROUPS, WIDTH], tl.float32)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        inside = (group < groups)[:, None] & known[None, :]
        place = 2 * group[:, None] * channels + channel[None, :]
        totals += tl.load(sums + place, mask=inside, other=0.0)
        squares += tl.load(sums + place + channels, mask=inside, other=0.0)
    shift = tl.sum(totals, 0) / rows
    tl.store(shifts + channel, shift, mask=known)
    tl.store(spreads + channel, tl.maximum(tl.sum(squares, 0) / rows - shift * shift, 0.0), mask=known)


@triton.jit
def _back(
    x, grad_y, grad_x, means, variances, weight, bias, shifts, grad_shifts, grad_spreads, rows, channels, eps,
    RECTIFY: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of rows (R, C), from those of what was made of them."""
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    known = channel < channels
    centre, slope, offset = _affine(means, variances, weight, bias, channel, known, eps)
    stretch = 2.0 * tl.load(grad_spreads + channel, mask=known, other=0.0) / rows
    move = tl.load(grad_shifts + channel, mask=known, other=0.0) / rows
    move -= stretch * tl.load(shifts + channel, mask=known, other=0.0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & known[None, :]
    place = row.to(tl.int64)[:, None] * channels + channel[None, :]
    centred = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - centre[None, :]
    grad = tl.load(grad_y + place, mask=inside, other=0.0).to(tl.float32)
    if RECTIFY:
        grad = tl.where(centred * slope[None, :] + offset[None, :] > 0.0, grad, 0.0)
    grad = grad * slope[None, :] + centred * stretch[None, :] + move[None, :]
    tl.store(grad_x + place, grad.to(grad_x.dtype.element_ty), mask=inside)


class _Measured(torch.autograd.Function):
    """Features (B, C, H, W), normalised, with the mean of their distance to the running mean and their variance."""

    @staticmethod
    def forward(ctx, features: torch.Tensor, layer: FusedNorm):
        features = _rows(features)
        batch, channels, *sides = features.shape
        rows = batch * sides[0] * sides[1]
        width = min(TILE_CHANNELS, triton.next_power_of_2(channels))
        per_group = TILE_ROWS * triton.cdiv(rows, TILE_ROWS * MOST_GROUPS)
        groups, blocks = triton.cdiv(rows, per_group), triton.cdiv(channels, width)
        result, known = torch.empty_like(features), layer.known()
        sums = torch.empty(groups, 2, channels, device=features.device)
        shift, variance = torch.empty(2, channels, device=features.device)
        _normalise[groups, blocks](
            features, result, sums, *known, rows, channels, per_group, layer.eps, layer.rectifies, TILE_ROWS, width,
        )  # fmt: skip
        few = (triton.cdiv(channels, SUM_CHANNELS),)
        _add_up[few](sums, shift, variance, groups, rows, channels, SUMS, SUM_CHANNELS)
        ctx.save_for_backward(features, shift, *known)
        ctx.eps, ctx.rectifies, ctx.width = layer.eps, layer.rectifies, width
        return result, shift, variance

    @staticmethod
    def backward(ctx, grad: torch.Tensor, grad_shift: torch.Tensor, grad_variance: torch.Tensor):
        features, shift, *known = ctx.saved_tensors
        channels = features.shape[1]
        rows = features.numel() // channels
        result, grad = torch.empty_like(features), _rows(grad)
        _back[triton.cdiv(rows, BACK_ROWS), triton.cdiv(channels, ctx.width)](
            features, grad, result, *known, shift, grad_shift.contiguous(), grad_variance.contiguous(), rows, channels,
            ctx.eps, ctx.rectifies, BACK_ROWS, ctx.width, num_warps=BACK_WARPS,
        )  # fmt: skip
        return result, None


def _rows(features: torch.Tensor) -> torch.Tensor:
    return features.contiguous(memory_format=torch.channels_last)


class FusedNorm(SelfMeasuring, nn.BatchNorm2d):
    """A frozen BatchNorm that measures its input, and rectifies its output where a ReLU in place is all that follows.

    Attributes:
        rectifies: whether a ReLU was found to follow.
    """

    rectifies = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        result, shift, variance = _Measured.apply(input, self)
        if self.tell:
            self.tell(shift, variance)
        result.made_by, result.made_as = self, result._version
        return result

    def known(self) -> tuple[torch.Tensor, ...]:
        """Running mean and variance, weight and bias, (C,) each."""
        weight = torch.ones_like(self.running_var) if self.weight is None else self.weight
        bias = torch.zeros_like(self.running_mean) if self.bias is None else self.bias
        return self.running_mean, self.running_var, weight, bias


class FusedReLU(nn.ReLU):
    """A ReLU that leaves its work to the ``FusedNorm`` whose output it would overwrite."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        norm = getattr(input, "made_by", None)
        # a sum is written over the output of a block's last layer: still the same tensor, of another version
        if norm is None or not self.inplace or input._version != input.made_as:
            return super().forward(input)
        if norm.rectifies:
            return input
        norm.rectifies = True  # from the next pass on
        return super().forward(input)


def fuse_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """Make every plain BatchNorm2d of a frozen model a ``FusedNorm``, in place, if kernels can be built here."""
    if not _builds(device):
        return model
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.track_running_stats:
            module.__class__ = FusedNorm
        elif type(module) is nn.ReLU:
            module.__class__ = FusedReLU
    return model


@cache
def _builds(device: torch.device) -> bool:
    """Whether kernels can be built: Triton wants a C compiler, and a GPU it knows."""
    layer = FusedNorm(1).requires_grad_(False).to(device)
    try:
        layer(torch.ones(1, 1, 1, 1, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # of the compiler, the linker, the driver
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"no fused kernels, so synthesis is slower on {device}: {reason}", stacklevel=2)
        return False
    return True
