"""What a view, reshape, flatten, squeeze or unflatten does to the labels of a tensor's axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from .units import Axis, Units, Value

Span = tuple[tuple[int, ...], tuple[int, ...]]


def reshape(units: Units, value: Value, shape: Sequence[int]) -> Value:
    """The tensor in another shape, its elements in the same order.

    An axis that is divided gives blocks and the units inside them; (block, unit) put together give units again. An
    axis beside one of fixed positions, put together with it, repeats its units. Two axes of independent units cannot
    be put together: they become rigid.
    """
    axes: list[Axis | None] = [None] * len(shape)
    spans = list(_spans(value.shape, shape))
    for ins, outs in spans:
        finest = _finest(units, value, ins)
        if finest is not None:
            for place, axis in _divided(units, value, finest, (ins, outs), spans, shape):
                axes[place] = axis
    return Value(tuple(shape), tuple(axes))


def _spans(old: Sequence[int], new: Sequence[int]) -> Iterator[Span]:
    """Runs of axes before and after that hold the same elements; axes of size 1 are left out."""
    left = [k for k, size in enumerate(old) if size != 1]
    right = [k for k, size in enumerate(new) if size != 1]
    while left and right:
        ins, outs = [left.pop(0)], [right.pop(0)]
        while (here := prod(old[k] for k in ins)) != (there := prod(new[k] for k in outs)):
            (ins if here < there else outs).append((left if here < there else right).pop(0))
        yield tuple(ins), tuple(outs)


def _finest(units: Units, value: Value, ins: Sequence[int]) -> int | None:
    """The axis whose labels tell the units of a run, None where there is none."""
    labelled = [k for k in ins if value.axes[k]]
    for k in labelled:
        if all(other == k or other in value.axes[k].deps for other in labelled):
            return k
    units.rigid(*(value.axes[k] for k in labelled))
    return None


def _divided(
    units: Units, value: Value, k: int, span: Span, spans: Sequence[Span], shape: Sequence[int]
) -> Iterator[tuple[int, Axis]]:
    """The labels of axis ``k``, as the axes that its run becomes."""
    axis = value.axes[k]
    touched = [other for other in spans if other == span or set(other[0]) & set(axis.deps)]
    before = [i for ins, _ in touched for i in ins]
    after = [i for _, outs in touched for i in outs]
    order = [*(d for d in axis.deps), k]
    labels = axis.labels.transpose(np.argsort(order))  # dimensions in the order of the tensor's axes
    labels = labels[tuple(slice(None) if i in order else None for i in before)]
    labels = np.broadcast_to(labels, [value.shape[i] for i in before]).reshape([shape[i] for i in after])
    for place in reversed(range(len(after))):  # positions of an axis that all hold the same units are fixed
        if (labels == labels.take([0], axis=place)).all():
            labels = labels.take(0, axis=place)
            del after[place]
    levels = [i for i in after if i in span[1]]
    lead = [i for i in after if i not in span[1]]
    labels = labels.transpose([after.index(i) for i in (*lead, *levels)])
    while levels:
        yield levels[-1], _sorted(labels, [*lead, *levels[:-1]])
        labels = units.blocks(labels) if len(levels) > 1 else labels
        levels.pop()


def _sorted(labels: np.ndarray, deps: list[int]) -> Axis:
    order = np.argsort(deps, kind="stable")
    return Axis(labels.transpose(*order, len(deps)), tuple(deps[i] for i in order))
