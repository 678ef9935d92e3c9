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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from .apply import identity, permute_tensor
from .places import Places, Term, places_of
from .spec import Spec

SWEEPS = 50  # at most; some 3 to 20 are needed
GAIN = 1e-6  # of a group's similarity: a smaller one is rounding

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
        self._shares = {name: [float(self._known[a.units].mean()) for a in axes] for name, axes in self._tensors.items()}
        self._groups = places_of(spec.groups, self._tensors, self._reference)

    def run(self, *, shuffled: bool) -> Match:
        """The anchored pass, then sweeps until none finds anything better."""
        self._anchor(shuffled)
        sweeps = 1
        while sweeps < SWEEPS and self._sweep():
            sweeps += 1
        products = (np.vdot(self._reference[name], self._other[name]) for name in self._tensors)
        return Match(self._image, float(sum(products)), sweeps)

    def _anchor(self, shuffled: bool) -> None:
        left = list(self._groups)
        while left:
            evidence = np.array([places.evidence(self._shares, self._tensors) for places in left])
            if shuffled:
                evidence = evidence * self._draw.exponential(size=len(left))
            places = left.pop(int(evidence.argmax()))
            self._move(places, self._proposal(places, places.all_roles, blocks=True, anchored=True))
            self._known[places.group.everything] = True
            for name in places.touched:
                self._shares[name] = [float(self._known[a.units].mean()) for a in self._tensors[name]]
            if self._on_progress:
                self._on_progress("align", len(self._groups) - len(left), len(self._groups))

    def _sweep(self) -> bool:
        """Solve every group once, in random order; whether anything moved."""
        moved = False
        for number in self._draw.permutation(len(self._groups)):
            places = self._groups[number]
            for which, blocks in places.steps():
                delta = self._proposal(places, which, blocks=blocks, anchored=False)
                moved |= self._improve(places, delta)
        return moved

    def _improve(self, places: Places, delta: np.ndarray) -> bool:
        """Make a move if the weights it touches fit better after it."""
        if (delta == np.arange(len(delta))).all():
            return False
        names = places.touched
        before = sum(float(np.vdot(self._reference[name], self._other[name])) for name in names)
        kept = {name: self._other[name] for name in names}
        image = self._image
        self._move(places, delta)
        after = sum(float(np.vdot(self._reference[name], self._other[name])) for name in names)
        if after > before + GAIN * abs(before):
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
    ) -> np.ndarray:
        """The best permutation of these roles' units, and with ``blocks`` of the blocks, while all else stays."""
        delta = identity(self._spec)
        group = places.group
        count = len(group.blocks)
        roles = [group.roles[number] for number in which]
        inner = [
            self._similarity(places.terms[number], role.size, anchored).reshape(*role.shape, *role.shape)
            for number, role in zip(which, roles, strict=True)
        ]  # (H, D, H, D) each
        order = np.arange(count)
        if blocks and count > 1:
            order = _assigned(self._between(places, inner, anchored))
            delta[group.blocks] = group.blocks[order]
        for role, similarity in zip(roles, inner, strict=True):
            for h, source in enumerate(order):
                delta[role[h]] = role[source][_assigned(similarity[h, :, source])]
        return delta

    def _between(self, places: Places, inner: Sequence[np.ndarray], anchored: bool) -> np.ndarray:
        """Similarity of blocks (H, H): of their own weights, and of their units in the best order."""
        count = len(places.group.blocks)
        total = self._similarity(places.block_terms, count, anchored)
        for similarity in inner:
            units = np.arange(similarity.shape[1])
            for h, g in np.ndindex(count, count):
                part = similarity[h, :, g]  # (D, D)
                total[h, g] += part[units, _assigned(part)].sum()
        return total

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


def _rows(array: np.ndarray, term: Term) -> np.ndarray:
    """The weights of every unit of a term (units, m * rest)."""
    front = (*term.axis.deps, term.axis.axis)
    flat = np.moveaxis(array, front, range(len(front))).reshape(term.axis.units.size, -1)
    return flat[term.positions].reshape(len(term.positions), -1)


def _assigned(similarity: np.ndarray) -> np.ndarray:
    """For every row its column, so that the sum is largest."""
    return linear_sum_assignment(similarity, maximize=True)[1]
