"""What every operation does to the labels of its tensors: one rule a kind, one table from operation to rule.

A rule takes the units, the shape of the result and the operation's arguments, with a ``Value`` for every tensor, and
returns the result's ``Value``, or a list of them. An operation without a rule fixes all axes of its tensors, which
is always sound.

Legend: B batch, C channels, G groups, O output channels, I input channels of a group, S space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import contractions as c
from .shapes import reshape
from .units import Axis, Units, Value

Rule = Callable[..., "Value | list[Value]"]


def pointwise(units: Units, shape: Sequence[int], *arguments: Any, **named: Any) -> Value:
    """Tensors that are broadcast against one another; everything else is a number or a flag."""
    tensors = [value for value in (*arguments, *named.values()) if isinstance(value, Value)]
    return c.broadcast(units, shape, tensors)


def alike(units: Units, shape: Sequence[int], x: Value, *_: Any, **__: Any) -> Value:
    """The first tensor as it is, in another precision."""
    return x


def constant(units: Units, shape: Sequence[int], *_: Any, **__: Any) -> Value:
    """A tensor that depends on no element of another."""
    return Value.fixed(shape)


def unknown(units: Units, shape: Sequence[int], *arguments: Any, **named: Any) -> Value:
    """No rule: nothing that goes in may be permuted."""
    for argument in (*arguments, *named.values()):
        for value in argument if isinstance(argument, (list, tuple)) else [argument]:
            if isinstance(value, Value):
                units.rigid(*value.axes)
    return Value.fixed(shape)


def view(units: Units, shape: Sequence[int], value: Value, *_: Any, **__: Any) -> Value:
    return reshape(units, value, shape)


def permute(units: Units, shape: Sequence[int], value: Value, order: Sequence[int]) -> Value:
    return value.permuted([k % len(shape) for k in order])


def transpose(units: Units, shape: Sequence[int], value: Value, a: int = 0, b: int = 1) -> Value:
    order = list(range(len(shape)))
    if len(order) > 1:
        order[a], order[b] = order[b], order[a]
    return value.permuted(order)


def expand(units: Units, shape: Sequence[int], value: Value, *_: Any, **__: Any) -> Value:
    return c.broadcast(units, shape, [value])


def spatial(units: Units, shape: Sequence[int], x: Value, *_: Any, **__: Any) -> Value:
    """Pooling and resizing of (B, C, S...): batch and channels stay, space is fixed."""
    units.rigid(*x.axes[2:])
    return Value(tuple(shape), (*x.axes[:2], *(None for _ in shape[2:])))


def roll(units: Units, shape: Sequence[int], x: Value, shifts: Any, dims: Sequence[int] = ()) -> Value:
    moved = {k % len(shape) for k in dims} or set(range(len(shape)))
    return _fixed(units, x, moved)


def pad(units: Units, shape: Sequence[int], x: Value, amounts: Sequence[int], *_: Any, **__: Any) -> Value:
    padded = {k for k, size in enumerate(shape) if size != x.shape[k] or any(_amounts(amounts, k, len(shape)))}
    return Value(tuple(shape), _fixed(units, x, padded).axes)


def _amounts(amounts: Sequence[int], k: int, rank: int) -> Sequence[int]:
    """How much axis ``k`` is padded by: torch counts axes from the last."""
    return amounts[2 * (rank - 1 - k) : 2 * (rank - k)]


def _fixed(units: Units, x: Value, dims: set[int]) -> Value:
    units.rigid(*(x.axes[k] for k in dims))
    return Value(x.shape, tuple(None if k in dims else axis for k, axis in enumerate(x.axes)))


def mean(units: Units, shape: Sequence[int], x: Value, dims: Any = None, keepdim: bool = False, **_: Any) -> Value:
    """A reduction over axes whose result does not depend on their order."""
    rank = len(x.shape)
    numbers = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims or range(rank)
    for k in sorted((k % rank for k in numbers), reverse=True):
        x = units.without(x, k)
    return reshape(units, x, shape)  # keepdim puts axes of size 1 back


def vector_norm(
    units: Units, shape: Sequence[int], x: Value, order: float = 2, dims: Any = None, *_: Any, **__
) -> Value:
    return mean(units, shape, x, dims)


def cat(units: Units, shape: Sequence[int], tensors: Sequence[Value], dim: int = 0) -> Value:
    """Segments put one behind the other; fixed ones among others keep their places."""
    dim %= len(shape)
    tensors = [value for value in tensors if len(value.shape) == len(shape)]  # torch lets an empty vector through
    axes: list[Axis | None] = []
    for k in range(len(shape)):
        if k != dim:
            axes.append(units.agree(*(units.tied(value.axes[k], dim) for value in tensors)))
    parts = [units.plain(value.axes[dim]) for value in tensors]
    whole = None
    if any(parts):
        for number, value in enumerate(tensors):
            if parts[number] is None:
                parts[number] = Axis(units.fresh(value.shape[dim]))
                units.rigid(parts[number])
        whole = Axis(np.concatenate([part.labels for part in parts]))
    axes.insert(dim, whole)
    return Value(tuple(shape), tuple(axes))


def stack(units: Units, shape: Sequence[int], tensors: Sequence[Value], dim: int = 0) -> Value:
    """Tensors side by side along a new axis."""
    dim %= len(shape)
    alone = (*shape[:dim], 1, *shape[dim + 1 :])
    return cat(units, shape, [reshape(units, value, alone) for value in tensors], dim)


def repeat(units: Units, shape: Sequence[int], x: Value, counts: Sequence[int]) -> Value:
    """Copies of a tensor side by side."""
    x = reshape(units, x, (*(1 for _ in counts[len(x.shape) :]), *x.shape))
    for dim, count in enumerate(counts):
        if count > 1:
            x = cat(units, (*x.shape[:dim], count * x.shape[dim], *x.shape[dim + 1 :]), [x] * count, dim)
    return x


def cut(units: Units, value: Value, dim: int, start: int, stop: int, step: int = 1) -> Value:
    """Positions start, start + step, ... of an axis; one that is left alone is fixed."""
    size = len(range(start, stop, step))
    if size == 1:
        units.rigid(value.axes[dim])
        value = value.with_axis(dim, None)
    axes = []
    for k, axis in enumerate(value.axes):
        if axis and (k == dim or dim in axis.deps):
            place = axis.labels.ndim - 1 if k == dim else axis.deps.index(dim)
            labels = axis.labels[(slice(None),) * place + (slice(start, stop, step),)]
            axis = Axis(labels, axis.deps) if size > 1 else units.tied(Axis(labels, axis.deps), dim)
        axes.append(axis)
    return Value((*value.shape[:dim], size, *value.shape[dim + 1 :]), tuple(axes))


def slice_(
    units: Units,
    shape: Sequence[int],
    x: Value,
    dim: int = 0,
    start: int | None = None,
    stop: int | None = None,
    step: int = 1,
) -> Value:
    dim %= len(shape)
    return cut(units, x, dim, *slice(start, stop, step).indices(x.shape[dim]))


def narrow(units: Units, shape: Sequence[int], x: Value, dim: int, start: int, length: int) -> Value:
    dim %= len(shape)
    return cut(units, x, dim, start % x.shape[dim], start % x.shape[dim] + length)


def split(units: Units, shape: Any, x: Value, size: int | Sequence[int], dim: int = 0) -> list[Value]:
    dim %= len(x.shape)
    total = x.shape[dim]
    sizes = [min(size, total - at) for at in range(0, total, size)] if isinstance(size, int) else list(size)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [cut(units, x, dim, start, start + length) for start, length in zip(starts, sizes, strict=True)]


def chunk(units: Units, shape: Any, x: Value, count: int, dim: int = 0) -> list[Value]:
    return split(units, shape, x, -(-x.shape[dim % len(x.shape)] // count), dim)


def select(units: Units, shape: Sequence[int], x: Value, dim: int, index: int) -> Value:
    """One position of an axis, which is thereby fixed."""
    dim %= len(x.shape)
    index %= x.shape[dim]
    return reshape(units, cut(units, x, dim, index, index + 1), shape)


def unbind(units: Units, shape: Any, x: Value, dim: int = 0) -> list[Value]:
    dim %= len(x.shape)
    rest = x.shape[:dim] + x.shape[dim + 1 :]
    return [select(units, rest, x, dim, index) for index in range(x.shape[dim])]


def rows(units: Units, shape: Sequence[int], table: Value, indices: Any, *_: Any, **__: Any) -> Value:
    """Rows of a table, picked by an integer tensor."""
    if isinstance(indices, Value):
        indices = [indices]
    if len(indices) != 1 or not isinstance(indices[0], Value):
        return unknown(units, shape, table, list(indices))
    units.rigid(table.axes[0], *indices[0].axes)
    extra = len(shape) - len(table.shape)
    places = {k: k + extra for k in range(len(table.shape))}
    rest = (units.tied(axis, 0) for axis in table.axes[1:])
    return Value(tuple(shape), (*(None for _ in range(extra + 1)), *(a and a.renamed(places) for a in rest)))


def glu(units: Units, shape: Sequence[int], x: Value, dim: int = -1) -> Value:
    return pointwise(units, shape, *chunk(units, None, x, 2, dim))


_POINTWISE = (
    "abs", "add", "addcmul", "alias", "alpha_dropout", "bernoulli", "celu", "clamp", "clamp_max", "clamp_min", "clone",
    "contiguous", "copysign", "cos", "detach", "div", "dropout", "elu", "eq", "erf", "exp", "expm1",
    "feature_dropout", "floor", "ge", "gelu", "gt", "hardsigmoid", "hardswish", "hardtanh", "le", "leaky_relu",
    "lift_fresh_copy", "log", "log1p", "log_sigmoid", "log_softmax", "logaddexp", "logical_and", "logical_not",
    "logical_or", "lt", "masked_fill", "maximum", "minimum", "mish", "mul", "ne", "neg", "pow", "reciprocal", "relu",
    "relu6", "round", "rsqrt", "rsub", "selu", "sigmoid", "sign", "silu", "sin", "softmax", "softplus", "sqrt",
    "square", "sub", "tanh", "threshold", "where",
)  # fmt: skip
_VIEWS = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "view_as", "reshape_as")
_CONSTANTS = (
    "zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "empty", "empty_like", "arange",
    "_assert_tensor_metadata",
)  # fmt: skip
_SPATIAL = (
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
)  # fmt: skip

RULES: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE, pointwise),
    **dict.fromkeys(_VIEWS, view),
    **dict.fromkeys(_CONSTANTS, constant),
    **dict.fromkeys(_SPATIAL, spatial),
    **dict.fromkeys(("to", "type_as", "_to_copy"), alike),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), c.convolution),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "logsumexp"), mean),
    **dict.fromkeys(("transpose", "t", "swapaxes", "swapdims"), transpose),
    **dict.fromkeys(("matmul", "mm", "bmm"), c.matmul),
    **dict.fromkeys(("expand", "expand_as"), expand),
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    **dict.fromkeys(("split", "split_with_sizes"), split),
    "addmm": c.addmm,
    "batch_norm": c.channel_norm,
    "cat": cat,
    "chunk": chunk,
    "embedding": rows,
    "glu": glu,
    "group_norm": c.group_norm,
    "index": rows,
    "instance_norm": c.channel_norm,
    "layer_norm": c.layer_norm,
    "linalg_vector_norm": vector_norm,
    "linear": c.linear,
    "narrow": narrow,
    "permute": permute,
    "prelu": c.channel_norm,
    "rms_norm": c.layer_norm,
    "repeat": repeat,
    "roll": roll,
    "scaled_dot_product_attention": c.attention,
    "select": select,
    "slice": slice_,
    "stack": stack,
    "unbind": unbind,
}
