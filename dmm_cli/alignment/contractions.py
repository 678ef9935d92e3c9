"""Rules of the operations with parameters: convolutions, products, attention, normalisation.

Legend: B batch, C channels, G groups, O output channels, I input channels of a group, S space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .shapes import reshape
from .units import Axis, Units, Value


def broadcast(units: Units, shape: Sequence[int], tensors: Sequence[Value]) -> Value:
    """Tensors that meet position by position, aligned at their last axes."""
    axes = []
    for k, size in enumerate(shape):
        meeting = [_at(value, k, len(shape)) for value in tensors if size > 1 and _size(value, k, len(shape)) == size]
        axes.append(units.agree(*meeting))
    return Value(tuple(shape), tuple(axes))


def _size(value: Value, k: int, rank: int) -> int:
    """The size of a tensor's axis that meets axis ``k`` of a tensor of ``rank`` axes."""
    place = k - rank + len(value.shape)
    return value.shape[place] if place >= 0 else 1


def _at(value: Value, k: int, rank: int) -> Axis | None:
    shift = rank - len(value.shape)
    axis = value.axes[k - shift]
    return axis and axis.renamed({old: old + shift for old in range(len(value.shape))})


def along(units: Units, x: Value, k: int, parameters: Sequence[Any]) -> Axis | None:
    """Axis ``k`` of a tensor, which meets the only axis of vectors."""
    vectors = [value.axes[0] for value in parameters if isinstance(value, Value)]
    return units.agree(x.axes[k], *vectors) if x.shape[k] > 1 else None


def linear(units: Units, shape: Sequence[int], x: Value, w: Value, b: Value | None = None) -> Value:
    """x (..., I), w (O, I), b (O)."""
    last = len(x.shape) - 1
    if x.shape[last] > 1:
        axis = units.plain(x.axes[last])
        units.agree(axis, w.axes[1])
        x = x.with_axis(last, axis)
    rest = units.without(x, last)
    out = along(units, Value(w.shape[:1], w.axes[:1]), 0, [b])
    return Value(tuple(shape), (*rest.axes, out))


def matmul(units: Units, shape: Sequence[int], a: Value, b: Value) -> Value:
    """a (..., n, k) and b (..., k, m), batch axes broadcast."""
    if min(len(a.shape), len(b.shape)) < 2:
        units.rigid(*a.axes, *b.axes)
        return Value.fixed(shape)
    rank = len(shape)
    left, right = units.without(a, len(a.shape) - 2), units.without(b, len(b.shape) - 1)  # (..., k) each
    if a.shape[-1] > 1:
        units.agree(_at(left, rank - 2, rank - 1), _at(right, rank - 2, rank - 1))
    batch = [units.without(value, len(value.shape) - 1) for value in (left, right)]
    axes = broadcast(units, shape[:-2], batch).axes
    n = _at(units.without(a, len(a.shape) - 1), rank - 2, rank - 1)
    m = _at(units.without(b, len(b.shape) - 2), rank - 2, rank - 1)
    return Value(tuple(shape), (*axes, n, m))


def addmm(units: Units, shape: Sequence[int], bias: Value, a: Value, b: Value, **_: Any) -> Value:
    return broadcast(units, shape, [bias, matmul(units, shape, a, b)])


def attention(
    units: Units,
    shape: Sequence[int],
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> Value:
    """softmax(q k^T + mask) v over the last two axes; heads that share keys stay, and positions in a causal one."""
    if q.shape[:-2] != k.shape[:-2]:
        units.rigid(*q.axes, *k.axes, *v.axes)
        return Value.fixed(shape)
    if is_causal:
        units.rigid(q.axes[-2], k.axes[-2], v.axes[-2])
    scores = (*q.shape[:-1], k.shape[-2])
    rank = len(k.shape)
    weights = matmul(units, scores, q, k.permuted([*range(rank - 2), rank - 1, rank - 2]))
    if mask is not None:
        weights = broadcast(units, scores, [weights, mask])
    return matmul(units, shape, weights, v)


def convolution(
    units: Units, shape: Sequence[int], x: Value, w: Value, b: Value | None = None, *settings: Any, **named: Any
) -> Value:
    """x (B, C, S...), w (O, I, S...), b (O); a group of outputs sees a group of inputs."""
    groups = x.shape[1] // w.shape[1] if len(x.shape) == len(w.shape) else 0
    units.rigid(*w.axes[2:], *x.axes[2:])
    if not groups:  # an input without a batch axis
        units.rigid(*x.axes, *w.axes, *(b.axes if b else ()))
        return Value.fixed(shape)
    channels = Value(x.shape[1:2], (units.plain(x.axes[1]),))
    filters = Value(w.shape[:2], w.axes[:2])
    per_group, inputs = x.shape[1] // groups, w.shape[1]
    a = units.see(reshape(units, channels, (groups, per_group)))
    f = units.see(reshape(units, filters, (groups, w.shape[0] // groups, inputs)))
    if groups > 1:
        units.agree(a.axes[0], f.axes[0])
    if inputs > 1:
        units.agree(a.axes[1] and a.axes[1].renamed({0: 0, 1: 2}), f.axes[2])
    out = along(units, Value(w.shape[:1], w.axes[:1]), 0, [b])
    return Value(tuple(shape), (units.plain(x.axes[0]), out, *(None for _ in shape[2:])))


def channel_norm(units: Units, shape: Sequence[int], x: Value, *parameters: Any, **_: Any) -> Value:
    """A tensor (B, C, S...) with one number per channel of every parameter."""
    axis = along(units, x, 1, [p for p in parameters if isinstance(p, Value) and p.shape == x.shape[1:2]])
    return x.with_axis(1, axis)


def layer_norm(units: Units, shape: Sequence[int], x: Value, sizes: Sequence[int], *parameters: Any, **_: Any) -> Value:
    """Normalised over the last axes, whose order does not matter; parameters have their shape."""
    return broadcast(units, shape, [x, *(p for p in parameters if isinstance(p, Value))])


def group_norm(units: Units, shape: Sequence[int], x: Value, groups: int, *parameters: Any, **_: Any) -> Value:
    """Normalised over groups of channels; parameters (C)."""
    x = channel_norm(units, shape, x, *parameters)
    if groups > 1:
        channels = Value(x.shape[1:2], (units.plain(x.axes[1]),))
        units.see(reshape(units, channels, (groups, x.shape[1] // groups)))
    return x
