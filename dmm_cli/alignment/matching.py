"""Weight matching: the order of one network's units in which its weights resemble another's most.

Git Re-Basin's coordinate ascent (Ainsworth et al., ICLR 2023): for one group at a time, the units of the other
network are assigned to those of the reference so that the sum of products of their weights is largest, while all
other groups stay. Started anywhere, it fails even where one network is a permuted copy of the other: what a unit is
compared by is not yet in order. The first pass therefore takes, again and again, the group of which most is known,
and compares only weights whose other axes are fixed or solved. Then ordinary sweeps, until nothing changes.

Legend: K units and blocks, n positions of an axis, H blocks of a group, D units of one role in a block, m positions
of one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from .apply import identity, permute_tensor
from .places import Places, Term, places_of
from .spec import Spec

SWEEPS = 100  # at most; some 3 to 30 are needed
ROUNDING = 1e-7  # of a group's similarity: a smaller gain is none

Progress = Callable[..., None]


@dataclass(frozen=True)
class Match:
    """An order of units and how well it fits.

    Attributes:
        image: the permutation to apply to the other network, see ``apply``.
        objective: sum of products of all compared weights.
        sweeps: passes over all groups, the first included.
    """

    image: np.ndarray
    objective: float
    sweeps: int


def match(
    reference: Mapping[str, np.ndarray],
    other: Mapping[str, np.ndarray],
    spec: Spec,
    *,
    seed: int = 0,
    restarts: int = 0,
    on_progress: Progress | None = None,
) -> Match:
    """The best order of the other network's units that was found.

    Args:
        reference, other: weights to compare, float32 or float64; what is in only one of them is not compared.
        restarts: further attempts, which take groups in random order; the largest objective wins.
    """
    best = None
    for attempt in range(restarts + 1):
        draw = np.random.default_rng([seed, attempt])
        found = _Matching(reference, other, spec, draw, on_progress).run(shuffled=attempt > 0)
        if best is None or found.objective > best.objective:
            best = found
    return best


def likeness(reference: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], spec: Spec) -> list[np.ndarray]:
    """How alike every unit's weights are in two networks whose units are in one order.

    The mean, over the matrices and kernels it stands in, of the cosine of its weights there: incoming and outgoing ones
    count alike, however large they are.

    Args:
        reference, other: weights to compare, as for ``match``; those of other shapes are left out.

    Returns:
        Of every group a number for each of its units, (units,), in the order of its roles.
    """
    tensors = {
        name: axes
        for name, axes in spec.tensors.items()
        if name in reference and reference[name].ndim > 1 and reference[name].shape == other[name].shape
    }
    return [
        np.concatenate(
            [
                np.mean([_cosines(term, reference, other) for term in terms] or [np.zeros(role.size)], axis=0)
                for terms, role in zip(places.terms, places.group.roles, strict=True)
            ]
        )
        for places in places_of(spec.groups, tensors, reference)
    ]


def _cosines(term: Term, reference: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> np.ndarray:
    """Cosine of the weights of every unit of a term, (units,); 0 where one side is zero."""
    a, b = (_rows(arrays[term.tensor], term).astype(np.float64) for arrays in (reference, other))
    norms = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return (a * b).sum(1) / np.where(norms > 0, norms, 1.0)


class _Matching:
    """One attempt; holds the other network's weights in the order found so far."""

    def __init__(
        self,
        reference: Mapping[str, np.ndarray],
        other: Mapping[str, np.ndarray],
        spec: Spec,
        draw: np.random.Generator,
        on_progress: Progress | None,
    ) -> None:
        self._spec, self._draw, self._on_progress = spec, draw, on_progress
        self._tensors = {name: axes for name, axes in spec.tensors.items() if name in reference and name in other}
        self._reference = {name: reference[name] for name in self._tensors}
        self._other = {name: other[name] for name in self._tensors}
        self._image = identity(spec)
        self._known = ~spec.movable
        self._shares = {
            name: [float(self._known[a.units].mean()) for a in axes] for name, axes in self._tensors.items()
        }
        self._groups = places_of(spec.groups, self._tensors, self._reference)
        self._neighbours = _neighbours(self._groups)

    def run(self, *, shuffled: bool) -> Match:
        """The anchored pass, then sweeps until none finds anything better."""
        self._anchor(shuffled)
        sweeps, stale = 1, set(range(len(self._groups)))
        while stale and sweeps < SWEEPS:
            sweeps += 1
            stale = self._sweep(stale)
        return Match(self._image, self._objective(self._tensors), sweeps)

    def _objective(self, names: Iterable[str]) -> float:
        """The sum of products of the weights of some tensors."""
        pairs = ((self._reference[name].ravel(), self._other[name].ravel()) for name in names)
        return sum(float(np.einsum("i,i", a, b, dtype=np.float64)) for a, b in pairs)

    def _anchor(self, shuffled: bool) -> None:
        left = list(self._groups)
        while left:
            evidence = np.array([places.evidence(self._shares, self._tensors) for places in left])
            if shuffled:
                evidence = evidence * self._draw.exponential(size=len(left))
            places = left.pop(int(evidence.argmax()))
            delta, _ = self._proposal(places, places.all_roles, blocks=True, anchored=True)
            self._move(places, delta)
            self._known[places.group.everything] = True
            for name in places.touched:
                self._shares[name] = self._share_known(name)
            if self._on_progress:
                self._on_progress("align", len(self._groups) - len(left), len(self._groups))

    def _share_known(self, name: str) -> list[float]:
        """The share of units that is in order, of every axis of a tensor."""
        return [float(self._known[axis.units].mean()) for axis in self._tensors[name]]

    def _sweep(self, stale: Set[int]) -> set[int]:
        """Solve groups once, in random order; those that have a neighbour moved since."""
        again: set[int] = set()
        for number in self._draw.permutation(sorted(stale)).tolist():
            again.discard(number)
            places = self._groups[number]
            for which, blocks in places.steps():
                delta, gain = self._proposal(places, which, blocks=blocks, anchored=False)
                if gain > 0 and self._improves(places, delta):
                    again |= self._neighbours[number]
        return again

    def _improves(self, places: Places, delta: np.ndarray) -> bool:
        """Make a move, unless it was only a guess and the weights do not fit better after it."""
        kept, image = {name: self._other[name] for name in places.touched}, self._image
        before = self._objective(kept) if places.is_coupled else None
        self._move(places, delta)
        if before is None or self._objective(kept) > before + ROUNDING * abs(before):
            return True
        self._other.update(kept)
        self._image = image
        return False

    def _move(self, places: Places, delta: np.ndarray) -> None:
        self._image = self._image[delta]
        for name in places.touched:
            self._other[name] = permute_tensor(self._other[name], self._tensors[name], delta)

    def _proposal(
        self, places: Places, which: Sequence[int], *, blocks: bool, anchored: bool
    ) -> tuple[np.ndarray, float]:
        """The best permutation of these roles' units, and with ``blocks`` of the blocks, while all else stays.

        Returns:
            The permutation, and how much better the weights fit after it; 0 where the difference is rounding.
        """
        delta = identity(self._spec)
        group, count = places.group, len(places.group.blocks)
        roles = [group.roles[number] for number in which]
        inner = [
            self._similarity(places.terms[number], role.size, anchored).reshape(*role.shape, *role.shape)
            for number, role in zip(which, roles, strict=True)
        ]  # (H, D, H, D) each
        order = np.arange(count)
        before = after = 0.0
        if blocks and count > 1:
            own = self._similarity(places.block_terms, count, anchored)  # (H, H)
            order = _assigned(own + sum(map(_in_best_order, inner)))
            delta[group.blocks] = group.blocks[order]
            before, after = np.trace(own), own[np.arange(count), order].sum()
        for role, similarity in zip(roles, inner, strict=True):
            units = np.arange(role.shape[1])
            for h, source in enumerate(order):
                found = _assigned(similarity[h, :, source])
                delta[role[h]] = role[source][found]
                before += np.trace(similarity[h, :, h])
                after += similarity[h, units, source, found].sum()
        gain = after - before
        return delta, float(gain) if gain > ROUNDING * abs(before) else 0.0

    def _similarity(self, terms: Sequence[Term], count: int, anchored: bool) -> np.ndarray:
        """Products of the reference's units with the other's, summed over their weights (count, count)."""
        total = np.zeros((count, count))
        for term in terms:
            ours = self._reference[term.tensor]
            if anchored:
                ours = self._only_known(ours, term)
            if ours is not None:
                total += _rows(ours, term) @ _rows(self._other[term.tensor], term).T
        return total

    def _only_known(self, array: np.ndarray, term: Term) -> np.ndarray | None:
        """A tensor with zeros where another axis than the term's is not known; None where nothing is."""
        for axis in self._tensors[term.tensor]:
            if axis is term.axis:
                continue
            known = self._known[axis.units]
            if not known.any():
                return None
            if not known.all():
                kept = (*axis.deps, axis.axis)
                array = array * known[tuple(slice(None) if k in kept else None for k in range(array.ndim))]
        return array


def _neighbours(groups: Sequence[Places]) -> list[set[int]]:
    """For every group those that share a tensor with it: what is best for them changes when it moves."""
    touching: dict[str, set[int]] = {}
    for number, places in enumerate(groups):
        for name in places.touched:
            touching.setdefault(name, set()).add(number)
    return [
        set().union(*(touching[name] for name in places.touched)) - (set() if places.is_coupled else {number})
        for number, places in enumerate(groups)
    ]


def _in_best_order(similarity: np.ndarray) -> np.ndarray:
    """Similarity of blocks (H, H) whose units (H, D, H, D) are in the best order."""
    count, units = len(similarity), np.arange(similarity.shape[1])
    total = np.empty((count, count))
    for h, g in np.ndindex(count, count):
        part = similarity[h, :, g]  # (D, D)
        total[h, g] = part[units, _assigned(part)].sum()
    return total


def _rows(array: np.ndarray, term: Term) -> np.ndarray:
    """The weights of every unit of a term (units, m * rest)."""
    front = (*term.axis.deps, term.axis.axis)
    flat = np.moveaxis(array, front, range(len(front))).reshape(term.axis.units.size, -1)
    return flat[term.positions].reshape(len(term.positions), -1)


def _assigned(similarity: np.ndarray) -> np.ndarray:
    """For every row its column, so that the sum is largest."""
    return linear_sum_assignment(similarity, maximize=True)[1]
