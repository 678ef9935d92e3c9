"""From a similarity matrix to groups that are worth merging, with the reason for every pair.

Steps (notation: cos is the cosine of the weights, heads and one-dimensional tensors left out):

0. checkpoints of different architectures are never together;
1. basins: an edge where the raw cosine is ``BASIN`` of the way from what unrelated units give (see ``chance``)
   to 1; connected components. Models of one start measure .81 to .99, models of different starts what
   unrelated units do, mostly below .005, so any value between parts them, and averaging across basins
   destroys both models. Where cosines with all units in one order are known, an edge is also where that is
   ``ALIGNED`` of the way: such models can be aligned, then merged;
2. inside a basin, average linkage on 1 - cos; the tree is cut at its largest gap if that gap is
   ``GAP`` times the height below it, and no smaller than in trees of the same layers, shuffled (see ``chance``);
   else the basin stays whole. Shuffled trees of real checkpoints have gaps of up to 3.0;
3. where there are pseudo-data, a merge that makes a member forget parts its group (``split_group``);
4. what stays alone while others form groups is divergent: its knowledge must be distilled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .chance import shuffled_cosines
from .groups import assembled
from .manifest import Grouping, LayerSimilarity, PairReason, SimilarityReport

BASIN = 0.3
ALIGNED = 0.5  # trained networks of different starts reach .1 to .3 once aligned, a permuted copy what noise leaves
GAP = 4.0
NOISE = 0.02  # heights below this are one cluster whatever their ratios
ROUNDING = 1e-6


@dataclass(frozen=True)
class _Cut:
    """Where a tree is cut: the cosine, the relative gap there, and the largest in trees of shuffled layers."""

    threshold: float
    gap: float
    chance: float | None = None


@dataclass(frozen=True)
class _Known:
    """What pairs are judged by: matrices (N, N), the basin of every checkpoint, and of each basin where it was cut."""

    cosine: np.ndarray
    raw: np.ndarray
    unrelated: np.ndarray
    reordered: np.ndarray
    basins: np.ndarray | None = None
    cuts: Mapping[int, _Cut] = field(default_factory=dict)

    def reason(self, a: int, b: int, together: bool) -> str:
        """Why the rule "auto" has put two checkpoints together, or not."""
        raw, bound, cut = self.raw[a, b], start_bounds(self.unrelated[a, b]), self.cuts.get(int(self.basins[a]))
        beyond = f", where unrelated units reach {self.unrelated[a, b]:.3f}"
        if self.basins[a] != self.basins[b]:
            return f"different starts: cosine {raw:.3f} is below {bound:.3f}{beyond}"
        if cut and not together:
            shuffled = "" if cut.chance is None else f", with layers shuffled {cut.chance:.1f} at most"
            return f"{_side(self.cosine[a, b], cut.threshold, together)}; the gap there is {cut.gap:.1f}{shuffled}"
        if raw >= bound:
            return f"one start: cosine {raw:.3f} is {bound:.3f} or more{beyond}"
        return f"one start, through others; cosine {raw:.3f}"


def group_checkpoints(report: SimilarityReport, rule: str | float = "auto") -> Grouping:
    """Group the checkpoints of a similarity report; the order of checkpoints does not matter.

    Args:
        report: needs ``cosine`` and, when taken on task vectors, the raw cosine beside it.
        rule: "auto" (the steps above), "all" (one group), or a cosine at which to cut the tree.
    """
    cosine = _matrix(report.measures["cosine"])
    raw, unrelated = _starts(report)
    aligned = _matrix(report.measures["aligned"]) if "aligned" in report.measures else np.zeros_like(raw)
    reordered = (raw < start_bounds(unrelated)) & (aligned >= start_bounds(unrelated, ALIGNED))
    cosine, raw = np.where(reordered, aligned, cosine), np.where(reordered, aligned, raw)
    tree = _tree(cosine)
    known = _Known(cosine, raw, unrelated, reordered)
    if rule == "all":
        labels, threshold = np.zeros(len(cosine), dtype=int), None
    elif rule == "auto":
        basins = components((raw >= start_bounds(unrelated)) | reordered)
        labels, cuts = _auto(report, cosine, basins, reordered)
        threshold = min((cut.threshold for cut in cuts.values()), default=_basin_bound(cosine, raw, unrelated))
        known = replace(known, basins=basins, cuts=cuts)
    else:
        labels, threshold = _by_threshold(report.labels, cosine, float(rule)), float(rule)
    pairs = _pairs(known, labels, rule, threshold)
    heights = tuple(tuple(map(float, row)) for row in tree)
    return assembled(report.labels, labels.tolist(), pairs, str(rule), threshold, heights)


def start_bounds(unrelated: np.ndarray, share: float = BASIN) -> np.ndarray:
    """Cosines at which two checkpoints share a start: this share of the way from what unrelated units have to 1."""
    return unrelated + share * (1.0 - unrelated) - ROUNDING


def _basin_bound(cosine: np.ndarray, raw: np.ndarray, unrelated: np.ndarray) -> float | None:
    """The highest bound of a basin, where the tree is of the cosines (N, N) that the basins are of; else None."""
    bounds = start_bounds(unrelated)[~np.eye(len(raw), dtype=bool)]
    alike = np.array_equal(cosine, raw, equal_nan=True) and np.isfinite(bounds).any()
    return float(np.nanmax(bounds)) if alike else None


def same_start(report: SimilarityReport) -> np.ndarray:
    """Which checkpoints of a report share a start with their units in the order they have, (N, N)."""
    raw, unrelated = _starts(report)
    return raw >= start_bounds(unrelated)


def split_group(grouping: Grouping, out: Sequence[int], reason: str) -> Grouping:
    """The grouping with some members of one of its groups in a group of their own instead.

    Args:
        out: indices of those members.
        reason: why they do not go together with the others.
    """
    home = {i: number for number, group in enumerate(grouping.groups) for i in group.members}
    home |= dict.fromkeys(out, len(grouping.groups))
    labels = [home[i] for i in range(len(home))]
    pairs = tuple(
        replace(pair, together=False, reason=reason) if pair.together and labels[pair.a] != labels[pair.b] else pair
        for pair in grouping.pairs
    )
    return assembled(grouping.labels, labels, pairs, grouping.rule, grouping.threshold, grouping.linkage)


def _matrix(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    return np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=np.float64)


def _tree(cosine: np.ndarray) -> np.ndarray:
    if len(cosine) < 2:
        return np.empty((0, 4))
    from scipy.cluster.hierarchy import linkage  # a quarter of a second, for those who group by similarity
    from scipy.spatial.distance import squareform

    distance = np.clip(1.0 - np.nan_to_num(cosine), 0.0, 2.0)  # not comparable: as far apart as strangers
    distance = (distance + distance.T) / 2
    np.fill_diagonal(distance, 0.0)
    return linkage(squareform(distance, checks=False), method="average")


def _cut(tree: np.ndarray, threshold: float) -> np.ndarray:
    if not len(tree):
        return np.zeros(1, dtype=int)
    from scipy.cluster.hierarchy import fcluster

    return fcluster(tree, 1.0 - threshold + 1e-12, criterion="distance")


def _starts(report: SimilarityReport) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of the weights, and those that unrelated units have."""
    raw = _matrix(report.raw_cosine or report.measures["cosine"])
    return raw, _matrix(report.unrelated) if report.unrelated else np.zeros_like(raw)


def _auto(
    report: SimilarityReport, cosine: np.ndarray, basins: np.ndarray, reordered: np.ndarray
) -> tuple[np.ndarray, dict[int, _Cut]]:
    """A label for every checkpoint, and of every basin that was cut where."""
    labels, cuts = np.zeros(len(cosine), dtype=int), {}
    for basin, members in _parts(report.labels, basins):
        inside = np.ix_(members, members)
        tree = _tree(cosine[inside])
        inner = np.zeros(len(members), dtype=int)
        cut = _largest_gap(tree)
        if cut and cut.gap >= GAP:
            layers = [layer for layer in report.layers if _complete(layer, members)]
            shuffled = shuffled_cosines(layers, members) if layers and not reordered[inside].any() else []
            cut = replace(cut, chance=max((_largest_gap(_tree(one)).gap for one in shuffled), default=None))
            if cut.gap >= (cut.chance or 0.0) * (1.0 - ROUNDING):
                cuts[basin], inner = cut, _cut(tree, cut.threshold)
        labels[members] = labels.max() + 1 + inner
    return labels, cuts


def _by_threshold(names: Sequence[str], cosine: np.ndarray, threshold: float) -> np.ndarray:
    """A label for every checkpoint, from the trees of what can be compared."""
    labels = np.zeros(len(cosine), dtype=int)
    for _, members in _parts(names, components(~np.isnan(cosine))):
        labels[members] = labels.max() + 1 + _cut(_tree(cosine[np.ix_(members, members)]), threshold)
    return labels


def _parts(names: Sequence[str], labels: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    """Every label with its members, which go by name: their order decides which of equal distances is joined first."""
    for label in np.unique(labels):
        yield int(label), sorted(np.flatnonzero(labels == label), key=lambda i: names[i])


def _complete(layer: LayerSimilarity, members: Sequence[int]) -> bool:
    return bool(layer.norms) and all(layer.norms[i] is not None for i in members)


def components(edges: np.ndarray) -> np.ndarray:
    """A label for every node of a graph (N, N): equal ones are connected."""
    labels = np.arange(len(edges))
    for i, j in zip(*np.nonzero(edges), strict=True):
        labels[labels == labels[j]] = labels[i]
    return labels


def _largest_gap(tree: np.ndarray) -> _Cut | None:
    """The largest relative gap between merge heights, and the cosine in its middle; None of fewer than three leaves."""
    heights = np.maximum(tree[:, 2], NOISE) if len(tree) else np.empty(0)
    if len(heights) < 2:
        return None
    ratios = heights[1:] / heights[:-1]
    best = int(ratios.argmax())
    return _Cut(1.0 - float(np.sqrt(heights[best] * heights[best + 1])), float(ratios[best]))


def _pairs(known: _Known, labels: np.ndarray, rule: str | float, threshold: float | None) -> tuple[PairReason, ...]:
    pairs = []
    for a in range(len(labels)):
        for b in range(a):
            together, cosine = bool(labels[a] == labels[b]), float(known.cosine[a, b])
            if np.isnan(cosine):
                reason = "different architectures"
            elif rule == "all":
                reason = "one group was asked for"
            elif rule == "auto":
                reason = known.reason(a, b, together)
            else:
                reason = _side(cosine, threshold, together)
            if known.reordered[a, b]:
                reason += ", with the units in one order"
            pairs.append(PairReason(a, b, together, None if np.isnan(cosine) else cosine, reason))
    return tuple(pairs)


def _side(cosine: float, threshold: float, together: bool) -> str:
    """On which side of a cut two checkpoints are."""
    if together and cosine >= threshold:
        return f"cosine {cosine:.3f}, cut at {threshold:.3f}"
    if together:
        return f"joined through others on average; cosine {cosine:.3f}, cut at {threshold:.3f}"
    return f"cut at {threshold:.3f}: cosine {cosine:.3f}" + ("" if cosine < threshold else ", apart on average")
