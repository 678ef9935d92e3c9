"""Which units of a network may change places, and where in the state dict they stand.

Legend: K units and blocks, n positions of an axis, H blocks of a group, D units of one role in a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .units import Axis, Units, Value


@dataclass(frozen=True)
class TensorAxis:
    """One axis of a tensor that holds units.

    Attributes:
        axis: its number.
        deps: axes before it on whose position its units depend (a grouped convolution's inputs, on its outputs).
        units: ids (size of each axis in ``deps``..., n); an id may stand at several positions.
    """

    axis: int
    deps: tuple[int, ...]
    units: np.ndarray


@dataclass(frozen=True)
class Group:
    """Units that may change places with one another, and with nothing else.

    A group of one block is a set of units, all alike. In one of several, blocks (heads, groups of a convolution)
    change places as a whole, and units inside a block with those of the same role.

    Attributes:
        name: a tensor it moves, and the axis.
        blocks: ids (H,); with one block, -1.
        roles: per role the ids of its units (H, D).
    """

    name: str
    blocks: np.ndarray
    roles: tuple[np.ndarray, ...]

    @property
    def size(self) -> int:
        """The number of units."""
        return sum(role.size for role in self.roles)

    @property
    def form(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of its blocks and roles."""
        return (self.blocks.shape, *(role.shape for role in self.roles))

    @property
    def everything(self) -> np.ndarray:
        """All ids, of units and blocks."""
        blocks = self.blocks if len(self.blocks) > 1 else self.blocks[:0]
        return np.concatenate([blocks, *(role.ravel() for role in self.roles)])


@dataclass(frozen=True)
class Spec:
    """The permutations under which a network computes the same function.

    Attributes:
        count: K, the number of ids.
        tensors: of the state dict, those with units that may move, and their axes.
        groups: which units may change places; ids in no group stay.
        unread: parameters on which no output depends, at least not outside training.
    """

    count: int
    tensors: dict[str, tuple[TensorAxis, ...]]
    groups: tuple[Group, ...]
    unread: tuple[str, ...] = ()

    @cached_property
    def movable(self) -> np.ndarray:
        """Whether an id is in a group, bool (K,)."""
        mask = np.zeros(self.count, bool)
        for group in self.groups:
            mask[group.everything] = True
        return mask


def build_spec(units: Units, parameters: Mapping[str, Value]) -> Spec:
    """The spec that follows from what is known about the units.

    Args:
        parameters: tensors of the state dict with their labels.
    """
    members = _components(units)
    count = int(members.max(initial=-1)) + 1
    parent = np.full(count, -1)
    for child, block in units.parents.items():
        parent[members[child]] = members[block]
    role, place = _colours(units, members, count)
    tensors = {
        name: tuple(_tensor_axis(k, axis, members) for k, axis in enumerate(value.axes) if axis)
        for name, value in parameters.items()
    }
    named = _names(tensors, count)
    groups = _groups(parent, role, place, named)
    spec = Spec(count, tensors, tuple(sorted(groups, key=lambda group: int(named.first[group.everything].min()))))
    kept = {name: tuple(a for a in axes if spec.movable[a.units].any()) for name, axes in tensors.items()}
    return Spec(count, {name: axes for name, axes in kept.items() if axes}, spec.groups)


def _components(units: Units) -> np.ndarray:
    """The class of every id: equal ones, and the blocks that equal ones are in, are one; int (ids,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    children = np.array(sorted(units.parents.items()), dtype=np.int64).reshape(-1, 2)
    edges = np.concatenate([np.empty((2, 0), np.int64), *units.edges], axis=1)
    while True:
        graph = coo_array((np.ones(edges.shape[1], bool), (edges[0], edges[1])), shape=(units.count, units.count))
        members = connected_components(graph, directed=False)[1]
        owner = np.full(units.count, -1)
        owner[members[children[:, 0]]] = children[:, 1]  # of all parents of one class, any
        pairs = np.stack([children[:, 1], owner[members[children[:, 0]]]])
        pairs = pairs[:, members[pairs[0]] != members[pairs[1]]]
        if not pairs.size:
            return members
        edges = np.concatenate([edges, pairs], axis=1)


def _colours(units: Units, members: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Two colours of every id, uint64 (K,): its role, and its place.

    Ids of one role stand in the same axes of the same tensors, as often, wherever their block is; of one place also
    at the same positions of the axes they depend on. Both are sums of hashes, which do not depend on the order.
    """
    role, place = np.zeros((2, count), np.uint64)
    token = 0
    for labels in units.seen:
        classes = members[labels]
        rows = np.broadcast_to(np.arange(len(labels))[:, None], labels.shape)
        np.add.at(role, classes, _hash(np.full(labels.shape, token)))
        np.add.at(place, classes, _hash(token + 1 + rows))
        token += 1 + len(labels)
    for labels in units.pinned:
        positions = np.broadcast_to(token + np.arange(labels.shape[1]), labels.shape)
        np.add.at(role, members[labels], _hash(positions))
        token += labels.shape[1]
    return role, place + role


def _hash(numbers: np.ndarray) -> np.ndarray:
    """Splitmix64 of integers, uint64."""
    x = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _tensor_axis(k: int, axis: Axis, members: np.ndarray) -> TensorAxis:
    return TensorAxis(k, axis.deps, members[axis.labels])


@dataclass(frozen=True)
class _Names:
    """For every id, the number of the first tensor axis it stands in (or ``absent``), and the axes' names."""

    first: np.ndarray
    names: Sequence[str]
    absent: int

    def of(self, ids: np.ndarray) -> str:
        return self.names[int(self.first[ids].min())]


def _names(tensors: Mapping[str, Sequence[TensorAxis]], count: int) -> _Names:
    axes = [(f"{name}[{a.axis}]", a.units) for name, own in tensors.items() for a in own]
    first = np.full(count, len(axes))
    for number in reversed(range(len(axes))):
        first[axes[number][1]] = number
    return _Names(first, [name for name, _ in axes], len(axes))


def _groups(parent: np.ndarray, role: np.ndarray, place: np.ndarray, named: _Names) -> list[Group]:
    """Blocks that may change places, then units that may within a fixed block or outside of any."""
    is_block = np.zeros(len(parent), bool)
    is_block[parent[parent >= 0]] = True
    is_unit = ~is_block & (named.first < named.absent)
    inside = _gathered(np.flatnonzero(parent >= 0), parent)
    sets: dict[tuple, list[int]] = {}
    for block, ids in inside.items():
        roles = _gathered(ids, role)
        if is_unit[ids].all() and all(len(np.unique(place[part])) == 1 for part in roles.values()):
            kinds = tuple(sorted((key, len(part)) for key, part in roles.items()))
            sets.setdefault((int(place[block]), int(parent[block]), kinds), []).append(block)
    groups = [_block_group(np.array(blocks), inside, role, named) for blocks in sets.values() if len(blocks) > 1]
    free = is_unit.copy()
    for group in groups:
        free[group.everything] = False
    for ids in _gathered(np.flatnonzero(free), place, parent).values():
        if len(ids) > 1:
            groups.append(Group(named.of(ids), np.array([-1]), (ids[None],)))
    return groups


def _gathered(ids: np.ndarray, *keys: np.ndarray) -> dict[tuple[int, ...] | int, np.ndarray]:
    """Ids by the value of their keys."""
    found: dict[tuple[int, ...] | int, list[int]] = {}
    for number in ids.tolist():
        key = tuple(int(k[number]) for k in keys)
        found.setdefault(key if len(key) > 1 else key[0], []).append(number)
    return {key: np.array(numbers) for key, numbers in found.items()}


def _block_group(blocks: np.ndarray, inside: Mapping, role: np.ndarray, named: _Names) -> Group:
    per_block = [_gathered(inside[int(block)], role) for block in blocks]
    roles = tuple(np.stack([own[key] for own in per_block]) for key in per_block[0])
    everything = np.concatenate([part.ravel() for part in roles])
    return Group(named.of(everything), blocks, roles)
