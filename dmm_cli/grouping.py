"""From a similarity matrix to groups that are worth merging, with the reason for every pair.

Steps (notation: cos is the cosine of the weights, heads and one-dimensional tensors left out):

0. checkpoints of different architectures are never together;
1. basins: an edge where the raw cosine is at least ``BASIN``; connected components. Models of one
   start measure .81 to .99 there, models of different starts below .005, so any value between
   parts them, and averaging across basins destroys both models;
2. inside a basin, average linkage on 1 - cos; the tree is cut at its largest gap if that gap is
   ``GAP`` times the height below it, else the basin stays whole;
3. where there are pseudo-data, a merge that makes a member forget parts its group (``split_group``);
4. what stays alone while others form groups is divergent: its knowledge must be distilled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .errors import DmmError, printable
from .manifest import Group, Grouping, PairReason, SimilarityReport

BASIN = 0.3
GAP = 4.0
NOISE = 0.02  # heights below this are one cluster whatever their ratios


def group_checkpoints(report: SimilarityReport, rule: str | float = "auto") -> Grouping:
    """Group the checkpoints of a similarity report; the order of checkpoints does not matter.

    Args:
        report: needs ``cosine`` and, when taken on task vectors, the raw cosine beside it.
        rule: "auto" (the steps above), "all" (one group), or a cosine at which to cut the tree.
    """
    cosine = _matrix(report.measures["cosine"])
    raw = _matrix(report.raw_cosine) if report.raw_cosine else cosine
    tree = _tree(cosine)
    if rule == "all":
        labels, threshold = np.zeros(len(cosine), dtype=int), None
    elif rule == "auto":
        labels, threshold = _auto(cosine, raw)
    else:
        labels, threshold = _cut(tree, float(rule)), float(rule)
    pairs = _pairs(cosine, raw, labels, rule, threshold)
    return _grouping(report.labels, labels, pairs, str(rule), threshold, tree)


def given_groups(labels: Sequence[str], groups: Sequence[Sequence[str]], origin: str) -> Grouping:
    """Groups the user listed by label; every checkpoint not listed stays alone.

    Raises:
        DmmError: a label is unknown or listed twice.
    """
    listed = [name for group in groups for name in group]
    unknown = [name for name in listed if name not in labels]
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if unknown or twice:
        evidence = [f"unknown: {printable(name)}" for name in unknown] + [f"twice: {printable(n)}" for n in twice]
        raise DmmError(f"groups in {origin} do not fit", evidence=[*evidence, f"known: {', '.join(labels)}"])
    place = {name: number for number, group in enumerate(groups) for name in group}
    numbers = np.array([place.get(name, len(groups) + i) for i, name in enumerate(labels)])
    pairs = tuple(
        PairReason(a, b, bool(numbers[a] == numbers[b]), None, f"listed in {origin}")
        for a in range(len(labels))
        for b in range(a)
    )
    return _grouping(tuple(labels), numbers, pairs, origin, None, np.empty((0, 4)))


def groups_from_record(record: dict, labels: Sequence[str], origin: str) -> Grouping:
    """Groups from JSON: ``{"groups": [["a", "b"], ["c"]]}``, or a grouping, merge or similarity record.

    Raises:
        DmmError: the record holds no groups, or they do not fit the labels.
    """
    schema = record.get("schema")
    if schema == SimilarityReport.SCHEMA:
        report = SimilarityReport.from_json(record)
        if sorted(report.labels) != sorted(labels):
            raise DmmError(
                f"{origin} compares other checkpoints",
                evidence=[f"it holds {', '.join(report.labels)}", f"given are {', '.join(labels)}"],
            )
        return group_checkpoints(report)
    if "grouping" in record:
        record = record["grouping"]
    groups, names = record.get("groups"), record.get("labels", list(labels))
    if not isinstance(groups, list):
        raise DmmError(f"{origin} holds no groups", hint='write {"groups": [["a", "b"], ["c"]]}')
    members = [[names[i] for i in g["members"]] if isinstance(g, dict) else list(g) for g in groups]
    return given_groups(labels, members, origin)


def split_group(grouping: Grouping, out: Sequence[int], reason: str) -> Grouping:
    """The grouping with some members of one of its groups in a group of their own instead.

    Args:
        out: indices of those members.
        reason: why they do not go together with the others.
    """
    labels = np.zeros(len(grouping.labels), dtype=int)
    for number, other in enumerate(grouping.groups):
        labels[list(other.members)] = number
    labels[list(out)] = len(grouping.groups)
    pairs = tuple(
        replace(pair, together=False, reason=reason) if pair.together and labels[pair.a] != labels[pair.b] else pair
        for pair in grouping.pairs
    )
    return _grouping(grouping.labels, labels, pairs, grouping.rule, grouping.threshold, np.array(grouping.linkage))


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


def _auto(cosine: np.ndarray, raw: np.ndarray) -> tuple[np.ndarray, float]:
    basins = components(raw >= BASIN)
    labels = np.zeros(len(cosine), dtype=int)
    thresholds = []
    for basin in np.unique(basins):
        members = np.flatnonzero(basins == basin)
        tree = _tree(cosine[np.ix_(members, members)])
        threshold = _largest_gap(tree)
        if threshold is not None:
            thresholds.append(threshold)
        inner = _cut(tree, threshold) if threshold is not None else np.zeros(len(members), dtype=int)
        labels[members] = labels.max() + 1 + inner
    return labels, min(thresholds, default=BASIN)


def components(edges: np.ndarray) -> np.ndarray:
    """A label for every node of a graph (N, N): equal ones are connected."""
    labels = np.arange(len(edges))
    for i, j in zip(*np.nonzero(edges), strict=True):
        labels[labels == labels[j]] = labels[i]
    return labels


def _largest_gap(tree: np.ndarray) -> float | None:
    """Cosine in the middle of the largest relative gap between merge heights, None when no gap stands out."""
    heights = np.maximum(tree[:, 2], NOISE) if len(tree) else np.empty(0)
    if len(heights) < 2:
        return None
    ratios = heights[1:] / heights[:-1]
    best = int(ratios.argmax())
    return None if ratios[best] < GAP else 1.0 - float(np.sqrt(heights[best] * heights[best + 1]))


def _pairs(
    cosine: np.ndarray, raw: np.ndarray, labels: np.ndarray, rule: str | float, threshold: float | None
) -> tuple[PairReason, ...]:
    pairs = []
    for a in range(len(cosine)):
        for b in range(a):
            together = bool(labels[a] == labels[b])
            reason = _reason(cosine[a, b], raw[a, b], together, rule, threshold)
            value = None if np.isnan(cosine[a, b]) else float(cosine[a, b])
            pairs.append(PairReason(a, b, together, value, reason))
    return tuple(pairs)


def _reason(cosine: float, raw: float, together: bool, rule: str | float, threshold: float | None) -> str:
    if np.isnan(cosine):
        return "different architectures"
    if rule == "all":
        return "one group was asked for"
    if rule == "auto" and not together and raw < BASIN:
        return f"different starts: cosine {raw:.3f} is below {BASIN}"
    if rule == "auto" and together and cosine >= (threshold or BASIN):
        return f"one start: cosine {raw:.3f} is {BASIN} or more"
    bound = BASIN if threshold is None else threshold
    if together:
        return f"joined through others on average; cosine {cosine:.3f}, cut at {bound:.3f}"
    return f"cut at {bound:.3f}: cosine {cosine:.3f}" + ("" if cosine < bound else ", apart on average")


def _grouping(
    names: tuple[str, ...],
    labels: np.ndarray,
    pairs: tuple[PairReason, ...],
    rule: str,
    threshold: float | None,
    tree: np.ndarray,
) -> Grouping:
    clusters = [tuple(int(i) for i in np.flatnonzero(labels == label)) for label in np.unique(labels)]
    # the largest group first, then by name: the same groups in the same order whatever the arguments' order
    clusters.sort(key=lambda members: (-len(members), min(names[i] for i in members)))
    groups = tuple(
        Group(f"group-{number}", members, _group_reason(members, pairs, names))
        for number, members in enumerate(clusters)
    )
    alone = tuple(members[0] for members in clusters if len(members) == 1) if len(clusters) > 1 else ()
    heights = tuple(tuple(float(value) for value in row) for row in tree)
    return Grouping(names, groups, alone, pairs, rule, threshold, heights)


def _group_reason(members: tuple[int, ...], pairs: tuple[PairReason, ...], names: tuple[str, ...]) -> str:
    if len(members) == 1:
        mine = (pair for pair in pairs if members[0] in (pair.a, pair.b) and pair.similarity is not None)
        near = max(mine, key=lambda pair: pair.similarity, default=None)
        return (
            "alone" if near is None else f"alone; nearest is {names[sum((near.a, near.b)) - members[0]]}, {near.reason}"
        )
    inside = [p for p in pairs if p.a in members and p.b in members]
    values = [p.similarity for p in inside if p.similarity is not None]
    span = f"cosine {min(values):.3f} to {max(values):.3f}: " if values else ""
    return span + inside[0].reason
