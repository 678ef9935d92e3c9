"""Frozen BatchNorm layers that measure their input as they normalise it, in one pass over it each way, on a GPU.

What limits a step on a GPU are bytes, not products: apart, statistics, normalisation and ReLU read or write every
feature map some twenty times, forward and backward, many of them in float32. Here they do five times. A ReLU that
follows is done in the same pass and, where a residual block ends, the sum with its shortcut before it.

Legend: B images, C channels, H height, W width, R = B * H * W rows, G groups of rows.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn
from torch.utils._pytree import tree_map_only

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
    x, shortcut, y, sums, means, variances, weight, bias, rows, channels, per_group, eps,
    RECTIFY: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows (R, C) to normalised ones, and the sums of a group's centred rows and of their squares, (G, 2, C).

    ADD: rows of the shortcut (R, C) are added to the normalised ones, before they are rectified.
    """
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
        normal = tl.fma(centred, slope[None, :], offset[None, :])
        if ADD:  # rounded first, as a layer apart does: a run that goes on from its savepoint learns this anew
            normal = normal.to(y.dtype.element_ty).to(tl.float32)
            normal += tl.load(shortcut + place, mask=inside, other=0.0).to(tl.float32)
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
    x, y, grad_y, grad_x, grad_shortcut, means, variances, weight, bias, shifts, grad_shifts, grad_spreads,
    rows, channels, eps, RECTIFY: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of rows (R, C), from those of what was made of them; ADD: of the shortcut's rows too."""
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
    if ADD:  # and rectified: what was positive tells the result
        grad = tl.where(tl.load(y + place, mask=inside, other=0.0).to(tl.float32) > 0.0, grad, 0.0)
        tl.store(grad_shortcut + place, grad.to(grad_shortcut.dtype.element_ty), mask=inside)
    elif RECTIFY:
        grad = tl.where(tl.fma(centred, slope[None, :], offset[None, :]) > 0.0, grad, 0.0)
    # fused by hand: the compiler chose another of the products for a layer apart, whose gradients rounded otherwise
    grad = tl.fma(grad, slope[None, :], tl.fma(centred, stretch[None, :], move[None, :]))
    tl.store(grad_x + place, grad.to(grad_x.dtype.element_ty), mask=inside)


class _Measured(torch.autograd.Function):
    """Features (B, C, H, W), normalised, with the mean of their distance to the running mean and their variance.

    A shortcut (B, C, H, W) is added to the normalised ones; rectified with one always, else where that is wanted.
    """

    @staticmethod
    def forward(ctx, features: torch.Tensor, layer: FusedNorm, shortcut: torch.Tensor | None, rectify: bool):
        features, shortcut = _rows(features), None if shortcut is None else _rows(shortcut)
        batch, channels, *sides = features.shape
        rows = batch * sides[0] * sides[1]
        width = min(TILE_CHANNELS, triton.next_power_of_2(channels))
        per_group = TILE_ROWS * triton.cdiv(rows, TILE_ROWS * MOST_GROUPS)
        groups, blocks = triton.cdiv(rows, per_group), triton.cdiv(channels, width)
        result, known, adds = torch.empty_like(features), layer.known(), shortcut is not None
        sums = torch.empty(groups, 2, channels, device=features.device)
        shift, variance = torch.empty(2, channels, device=features.device)
        _normalise[groups, blocks](
            features, shortcut if adds else features, result, sums, *known, rows, channels, per_group, layer.eps,
            adds or rectify, adds, TILE_ROWS, width,
        )  # fmt: skip
        few = (triton.cdiv(channels, SUM_CHANNELS),)
        _add_up[few](sums, shift, variance, groups, rows, channels, SUMS, SUM_CHANNELS)
        ctx.save_for_backward(features, result if adds else features, shift, *known)
        ctx.eps, ctx.rectifies, ctx.adds, ctx.width = layer.eps, adds or rectify, adds, width
        return result, shift, variance

    @staticmethod
    def backward(ctx, grad: torch.Tensor, grad_shift: torch.Tensor, grad_variance: torch.Tensor):
        features, result, shift, *known = ctx.saved_tensors
        channels = features.shape[1]
        rows = features.numel() // channels
        grad_features, grad = torch.empty_like(features), _rows(grad)
        grad_shortcut = torch.empty_like(features) if ctx.adds else None
        _back[triton.cdiv(rows, BACK_ROWS), triton.cdiv(channels, ctx.width)](
            features, result, grad, grad_features, grad_shortcut if ctx.adds else grad_features, *known, shift,
            grad_shift.contiguous(), grad_variance.contiguous(), rows, channels, ctx.eps, ctx.rectifies, ctx.adds,
            BACK_ROWS, ctx.width, num_warps=BACK_WARPS,
        )  # fmt: skip
        return grad_features, None, grad_shortcut, None


def _rows(features: torch.Tensor) -> torch.Tensor:
    return features.contiguous(memory_format=torch.channels_last)


class FusedNorm(SelfMeasuring, nn.BatchNorm2d):
    """A frozen BatchNorm that measures its input, and does what alone follows it in the same pass.

    Attributes:
        waits: whether a ReLU in place was found to follow, at once or when a shortcut was added in place.
    """

    waits = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if isinstance(input, Waiting):
            input = input.settled()
        return Waiting.of(input, self) if self.waits else self.normalised(input)

    def normalised(
        self, features: torch.Tensor, shortcut: torch.Tensor | None = None, rectify: bool = False
    ) -> torch.Tensor:
        """Of features (B, C, H, W), or rectified; with a shortcut (B, C, H, W) their rectified sum."""
        result, shift, variance = _Measured.apply(features, self, shortcut, rectify)
        if self.tell:
            self.tell(shift, variance)
        if not self.waits:  # a ReLU is to see what follows
            result.made_by, result.made_as, result.made_in = self, result._version, result.grad_fn
        return result

    def known(self) -> tuple[torch.Tensor, ...]:
        """Running mean and variance, weight and bias, (C,) each."""
        weight = torch.ones_like(self.running_var) if self.weight is None else self.weight
        bias = torch.zeros_like(self.running_mean) if self.bias is None else self.bias
        return self.running_mean, self.running_var, weight, bias


class FusedReLU(nn.ReLU):
    """A ReLU that leaves its work to the ``FusedNorm`` whose output, or whose sum with a shortcut, it would overwrite.

    What follows what is seen in one pass, and done at once from the next pass on.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if isinstance(input, Waiting):
            return input.rectified() if self.inplace else super().forward(input)
        norm = getattr(input, "made_by", None)
        if norm is not None and self.inplace:
            norm.waits = norm.waits or input._version == input.made_as or _is_sum(input)
        return super().forward(input)


def _is_sum(features: torch.Tensor) -> bool:
    """Whether all that befell the output of a ``FusedNorm`` is that as many features were added to it in place."""
    node = features.grad_fn
    if features._version != features.made_as + 1 or type(node).__name__ != "AddBackward0":
        return False
    return node.next_functions[0][0] is features.made_in and node._saved_alpha == 1


class _Unread(torch.autograd.Function):
    """Features as they are; no gradient goes this way, past the layer that waits with them."""

    @staticmethod
    def forward(ctx, features: torch.Tensor) -> torch.Tensor:
        return features.view_as(features)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        raise RuntimeError("a gradient went past a normalisation that waited for its ReLU: what follows it changed")


class Waiting(torch.Tensor):
    """Features (B, C, H, W) whose ``FusedNorm`` waits for the ReLU, and before it for a shortcut.

    For whatever else is done with it, it is the normalised features, or their sum.
    """

    @classmethod
    def of(cls, features: torch.Tensor, norm: FusedNorm) -> Waiting:
        """Features that are not normalised yet."""
        waiting = _Unread.apply(features).as_subclass(cls)
        waiting.features, waiting.norm, waiting.shortcut, waiting.done = features, norm, None, None
        waiting.versions, waiting.learns = [features._version], torch.is_grad_enabled()
        return waiting

    def rectified(self) -> torch.Tensor:
        """The ReLU of what this is by now, and it stays that."""
        if self.done is not None:
            return F.relu_(self.done)
        self._require_unchanged()
        self.done = self.norm.normalised(self.features, self.shortcut, rectify=True)
        return self.done

    def settled(self) -> torch.Tensor:
        """What this is by now, made once, with gradients if they were wanted where it came from."""
        if self.done is None:
            self._require_unchanged()
            with torch.set_grad_enabled(self.learns):
                self.done = self.norm.normalised(self.features)
                self.done = self.done if self.shortcut is None else self.done.add_(self.shortcut)
        return self.done

    def _require_unchanged(self) -> None:
        """Raise RuntimeError where what is read only now was written to since it was given."""
        given = [self.features] if self.shortcut is None else [self.features, self.shortcut]
        if [part._version for part in given] != self.versions:
            raise RuntimeError("features were changed in place between their normalisation and its ReLU")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            adds = func in (torch.Tensor.__iadd__, torch.Tensor.add_) and len(args) == 2 and not kwargs
            if adds and isinstance(args[0], cls) and args[0]._takes(args[1]):
                args[0].shortcut = args[1]
                args[0].versions.append(args[1]._version)
                return args[0]
            return func(*tree_map_only(cls, cls.settled, args), **tree_map_only(cls, cls.settled, kwargs))

    def _takes(self, other: object) -> bool:
        """Whether that can be the shortcut."""
        open_yet = self.shortcut is None and self.done is None and type(other) is torch.Tensor
        return open_yet and other.shape == self.features.shape and other.dtype == self.features.dtype


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
