"""Ids for the units of a network, and what is known about them.

Every axis of a tensor that may be permuted carries labels: one unit id per position. Operations either pass labels
on, or tell that two axes hold the same units (``agree``). An axis (h, d) of heads has two kinds of ids: those of the
units, which depend on the head they are in, and those of the heads themselves, the *blocks*, parents of their units.
What is not known to be safe is told to be ``rigid``: the positions of that axis are fixed, one by one.

Legend: n positions of an axis; axes that labels depend on come before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np


@dataclass(frozen=True)
class Axis:
    """Labels of one axis of a tensor.

    Attributes:
        labels: unit ids, int64 (size of each axis in ``deps``..., n).
        deps: other axes of the same tensor, in order, on whose position the labels depend.
    """

    labels: np.ndarray
    deps: tuple[int, ...] = ()

    def over(self, axes: Sequence[int]) -> np.ndarray:
        """Labels with a dimension for each of ``axes``, of size 1 where they do not depend on it."""
        return self.labels[tuple(slice(None) if k in self.deps else None for k in axes)]

    def renamed(self, places: dict[int, int]) -> Axis:
        """The same labels where the axes of the tensor have other numbers."""
        order = sorted(range(len(self.deps)), key=lambda k: places[self.deps[k]])
        labels = self.labels.transpose(*order, -1)
        return Axis(labels, tuple(places[self.deps[k]] for k in order))


@dataclass(frozen=True)
class Value:
    """A tensor as far as alignment is concerned; an axis of None has fixed positions."""

    shape: tuple[int, ...]
    axes: tuple[Axis | None, ...]

    @classmethod
    def fixed(cls, shape: Iterable[int]) -> Value:
        """A tensor none of whose axes may be permuted."""
        shape = tuple(shape)
        return cls(shape, (None,) * len(shape))

    def permuted(self, order: Sequence[int]) -> Value:
        """The axes in another order."""
        places = {old: new for new, old in enumerate(order)}
        axes = (self.axes[old] for old in order)
        shape = tuple(self.shape[old] for old in order)
        return Value(shape, tuple(axis and axis.renamed(places) for axis in axes))

    def with_axis(self, k: int, axis: Axis | None) -> Value:
        """Another axis in the place of axis ``k``."""
        return replace(self, axes=(*self.axes[:k], axis, *self.axes[k + 1 :]))


class Units:
    """All units of a network.

    Attributes:
        parents: unit or block id to the id of the block it is in.
        edges: arrays (2, k) of ids that are the same unit.
        seen: labels (rows, n) of every axis of every tensor; a row for each position of the axes they depend on.
        pinned: labels (rows, n) of axes whose positions are fixed.
    """

    def __init__(self) -> None:
        self.count = 0
        self.parents: dict[int, int] = {}
        self.edges: list[np.ndarray] = []
        self.seen: list[np.ndarray] = []
        self.pinned: list[np.ndarray] = []

    def fresh(self, *shape: int) -> np.ndarray:
        """New ids."""
        first = self.count
        self.count += int(np.prod(shape))
        return np.arange(first, self.count).reshape(shape)

    def see(self, value: Value) -> Value:
        """Record where units stand in a tensor: units that do not stand alike everywhere cannot change places."""
        self.seen += [axis.labels.reshape(-1, axis.labels.shape[-1]) for axis in value.axes if axis]
        return value

    def rigid(self, *axes: Axis | None) -> None:
        """Fix the positions of axes; of units that depend on their block, the positions in the block."""
        self.pinned += [axis.labels.reshape(-1, axis.labels.shape[-1]) for axis in axes if axis]

    def equate(self, a: np.ndarray, b: np.ndarray) -> None:
        """These ids, position by position, are the same units; shapes are broadcast."""
        pair = np.stack(np.broadcast_arrays(a, b)).reshape(2, -1)
        self.edges.append(np.unique(pair[:, pair[0] != pair[1]], axis=1))

    def agree(self, *axes: Axis | None) -> Axis | None:
        """Axes that meet position by position; fixed positions fix those they meet."""
        if not axes or None in axes:
            self.rigid(*axes)
            return None
        return reduce(self._same, axes)

    def _same(self, a: Axis, b: Axis) -> Axis:
        deps = tuple(sorted({*a.deps, *b.deps}))
        left, right = np.broadcast_arrays(a.over(deps), b.over(deps))
        self.equate(left, right)
        return Axis(left, deps)

    def tied(self, axis: Axis | None, k: int) -> Axis | None:
        """Labels that no longer depend on axis ``k``: units at its different positions become the same."""
        if axis is None or k not in axis.deps:
            return axis
        place = axis.deps.index(k)
        first = axis.labels.take([0], axis=place)
        self.equate(axis.labels, first)
        return Axis(first.squeeze(place), axis.deps[:place] + axis.deps[place + 1 :])

    def plain(self, axis: Axis | None) -> Axis | None:
        """Labels that depend on no other axis."""
        return reduce(self.tied, axis.deps, axis) if axis else None

    def without(self, value: Value, k: int) -> Value:
        """A tensor that lost axis ``k`` to a sum, a mean or a contraction."""
        places = {old: old - (old > k) for old in range(len(value.shape))}
        kept = [self.tied(axis, k) for number, axis in enumerate(value.axes) if number != k]
        return Value(value.shape[:k] + value.shape[k + 1 :], tuple(axis and axis.renamed(places) for axis in kept))

    def blocks(self, labels: np.ndarray) -> np.ndarray:
        """Ids of the blocks, shape (...), that an axis of units (..., n) is divided into."""
        held = np.array([self.parents.get(unit, -1) for unit in labels.ravel().tolist()]).reshape(labels.shape)
        first = held[..., 0]
        whole = bool((held == first[..., None]).all())  # nobody shares a block with a unit of another row
        if whole and (first >= 0).all() and len(np.unique(first)) == first.size:
            return first
        new = self.fresh(*labels.shape[:-1])
        nested = whole and len(np.unique(labels)) == labels.size
        for block, inside, outer in zip(new.ravel(), labels.reshape(-1, labels.shape[-1]), first.ravel(), strict=True):
            for unit in inside.tolist():
                self._put(unit, int(block), nested)
            if nested and outer >= 0:
                self.parents[int(block)] = int(outer)
        return new

    def _put(self, unit: int, block: int, nested: bool) -> None:
        """Put a unit in a block: inside the one it was in, or, where two divisions cross, in both, as one."""
        if unit in self.parents and not nested:
            self.edges.append(np.array([[self.parents[unit]], [block]]))
        else:
            self.parents[unit] = block
