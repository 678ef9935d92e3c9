"""Where the units of every group stand in the tensors that are compared.

Legend: H blocks of a group, m positions of one unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from .spec import Group, TensorAxis

Tensors = Mapping[str, Sequence[TensorAxis]]


@dataclass(frozen=True)
class Term:
    """Where units of one role (or blocks) stand in one axis.

    Attributes:
        positions: (units, m), flat over the axes in ``axis.deps`` and the axis itself.
        size: weights of one unit.
    """

    tensor: str
    axis: TensorAxis
    positions: np.ndarray
    size: int


@dataclass(frozen=True)
class Places:
    """Where one group stands.

    Attributes:
        terms: of every role of the group.
        block_terms: of its blocks themselves.
    """

    group: Group
    terms: tuple[tuple[Term, ...], ...]
    block_terms: tuple[Term, ...]

    @cached_property
    def _everywhere(self) -> list[Term]:
        return [*self.block_terms, *(term for terms in self.terms for term in terms)]

    @cached_property
    def touched(self) -> list[str]:
        """Names of the tensors that a move changes."""
        return sorted({term.tensor for term in self._everywhere})

    @cached_property
    def is_coupled(self) -> bool:
        """Whether two axes of one tensor belong to the group."""
        return len({(term.tensor, term.axis.axis) for term in self._everywhere}) > len(self.touched)

    @property
    def all_roles(self) -> range:
        return range(len(self.terms))

    def evidence(self, known: Mapping[str, Sequence[float]], tensors: Tensors) -> float:
        """How many weights of a unit (of one block, of every role) can be compared.

        Args:
            known: per axis of a tensor, the share of its units that is in order.
        """
        total = 0.0
        for term in self._everywhere:
            shares = zip(known[term.tensor], tensors[term.tensor], strict=True)
            total += term.size * prod(share for share, axis in shares if axis is not term.axis)
        return total

    def steps(self) -> Iterator[tuple[Sequence[int], bool]]:
        """Sets of roles to solve at once, and whether blocks move too.

        In a coupled group the joint step is a good guess, and a role alone is solved exactly.
        """
        yield self.all_roles, True
        if self.is_coupled:
            yield from (([number], False) for number in self.all_roles)


def places_of(groups: Sequence[Group], tensors: Tensors, arrays: Mapping[str, np.ndarray]) -> list[Places]:
    """The places of all groups."""
    standing: dict[int, list[tuple[str, TensorAxis, np.ndarray]]] = {}
    for name, axes in tensors.items():
        for axis in axes:
            order = np.argsort(axis.units, axis=None, kind="stable")
            for unit in np.unique(axis.units).tolist():
                standing.setdefault(unit, []).append((name, axis, order))

    def terms(ids: np.ndarray) -> Iterator[Term]:
        for name, axis, order in standing.get(int(ids.flat[0]), []):  # units of one role stand in the same axes
            ordered = axis.units.ravel()[order]
            start, stop = (np.searchsorted(ordered, ids.ravel(), side=side) for side in ("left", "right"))
            positions = order[start[:, None] + np.arange(stop[0] - start[0])]
            yield Term(name, axis, positions, arrays[name].size // axis.units.size * positions.shape[1])

    return [
        Places(
            group,
            tuple(tuple(terms(role)) for role in group.roles),
            tuple(terms(group.blocks)) if len(group.blocks) > 1 else (),
        )
        for group in groups
    ]
