"""Groups of checkpoints as records: those that a user or an earlier stage states, and how any are put together.

Loads no array library: ``grouping`` finds groups, by similarity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

from .errors import DmmError, printable
from .manifest import Group, Grouping, Matrix, PairReason, SimilarityReport

ROUNDING = 1e-6  # of a cosine
HINT = 'write {"groups": [["a", "b"], ["c"]]}'


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
    numbers = [place.get(name, len(groups) + i) for i, name in enumerate(labels)]
    pairs = tuple(
        PairReason(a, b, numbers[a] == numbers[b], None, f"listed in {origin}")
        for a in range(len(labels))
        for b in range(a)
    )
    return assembled(tuple(labels), numbers, pairs, origin)


def stated(record: dict, labels: Sequence[str], origin: str) -> Grouping | SimilarityReport:
    """What JSON says of these checkpoints, in their order, whatever the order it has them in.

    It is ``{"groups": [["a", "b"], ["c"]]}``, a grouping or the record of a merge, or a similarity report.

    Raises:
        DmmError: the record holds neither groups nor similarities, or they do not fit the labels.
    """
    if record.get("schema") == SimilarityReport.SCHEMA:
        report = _whole_report(record, origin)
        if sorted(report.labels) != sorted(labels):
            raise DmmError(
                f"{origin} compares other checkpoints",
                evidence=[f"it holds {', '.join(report.labels)}", f"given are {', '.join(labels)}"],
            )
        return in_order(report, labels)
    return given_groups(labels, _listed(record, labels, origin), origin)


def _whole_report(record: dict, origin: str) -> SimilarityReport:
    """A report whose matrices have a row and a column for every checkpoint."""
    try:
        report = SimilarityReport.from_json(record)
    except DmmError as error:
        raise DmmError(f"{origin}: {error.what}") from None
    cosines = [report.measures.get("cosine", ()), *(layer.cosine for layer in report.layers)]
    cosines += [report.raw_cosine] if report.raw_cosine else []
    others = [*report.measures.values(), *([report.unrelated] if report.unrelated else [])]
    sizes = [len(part) for matrix in (*cosines, *others) for part in (matrix, *matrix)]
    sizes += [len(layer.norms) for layer in report.layers if layer.norms]
    if any(size != len(report.sources) for size in sizes):
        raise DmmError(
            f"{origin} does not compare every checkpoint with every other", hint="make it with dmm similarity --json"
        )
    for matrices, largest in ((cosines, 1.0), (others, math.inf)):
        for matrix in matrices:
            _require_similarities(matrix, largest, report.labels, origin)
    return report


def _require_similarities(matrix: Matrix, largest: float, labels: Sequence[str], origin: str) -> None:
    """Raise DmmError unless a matrix holds numbers up to ``largest``, or nothing, and the same both ways."""
    for a, row in enumerate(matrix):
        for b, value in enumerate(row[: a + 1]):
            mirrored = matrix[b][a]
            if not _is_similarity(value, largest) or not _is_similarity(mirrored, largest):
                fault = f"{value} and {mirrored} for {labels[a]} and {labels[b]}: no similarity"
            elif (value is None) != (mirrored is None) or (value is not None and abs(value - mirrored) > ROUNDING):
                fault = f"{value} one way and {mirrored} the other for {labels[a]} and {labels[b]}"
            else:
                continue
            raise DmmError(f"{origin} holds {printable(fault)}", hint="make it with dmm similarity --json")


def _is_similarity(value: object, largest: float) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value) and abs(value) <= largest + ROUNDING)


def _listed(record: dict, labels: Sequence[str], origin: str) -> list[list[str]]:
    """The labels in every group; members of earlier groupings are indices into the labels these have."""
    inner = record.get("grouping", record)
    groups, names = (inner.get("groups"), inner.get("labels", list(labels))) if isinstance(inner, dict) else (None, [])
    if not isinstance(groups, list) or not _are(str, names):
        raise DmmError(f"{origin} holds no groups", hint=HINT)
    listed = []
    for group in groups:
        members = group.get("members") if isinstance(group, dict) else group
        if isinstance(group, dict) and _are(int, members) and all(0 <= i < len(names) for i in members):
            listed.append([names[i] for i in members])
        elif isinstance(group, list) and _are(str, members):
            listed.append(members)
        else:
            raise DmmError(f"{origin} holds what is not a group: {printable(json.dumps(group))}", hint=HINT)
    if not any(listed):
        raise DmmError(f"{origin} holds no groups", hint=HINT)
    return listed


def _are(kind: type, values: object) -> bool:
    """Whether this is a list of such values."""
    return isinstance(values, list) and all(type(value) is kind for value in values)


def in_order(report: SimilarityReport, labels: Sequence[str]) -> SimilarityReport:
    """The report with its checkpoints, which these labels name, in the order of the labels."""
    places = [report.labels.index(label) for label in labels]

    def moved(matrix: Matrix) -> Matrix:
        return tuple(tuple(matrix[a][b] for b in places) for a in places) if matrix else matrix

    return replace(
        report,
        sources=tuple(report.sources[i] for i in places),
        measures={name: moved(matrix) for name, matrix in report.measures.items()},
        layers=tuple(
            replace(layer, cosine=moved(layer.cosine), norms=tuple(layer.norms[i] for i in places if layer.norms))
            for layer in report.layers
        ),
        raw_cosine=moved(report.raw_cosine),
        unrelated=moved(report.unrelated),
    )


def assembled(
    names: tuple[str, ...],
    numbers: Sequence[int],
    pairs: tuple[PairReason, ...],
    rule: str,
    threshold: float | None = None,
    linkage: tuple[tuple[float, ...], ...] = (),
) -> Grouping:
    """A grouping from a number for every checkpoint, equal ones in one group, and what is known of the pairs.

    The largest group comes first, then they go by name: the same groups in the same order whatever the order of
    the checkpoints.
    """
    clusters = [tuple(i for i, own in enumerate(numbers) if own == number) for number in set(numbers)]
    clusters.sort(key=lambda members: (-len(members), min(names[i] for i in members)))
    home = {i: number for number, members in enumerate(clusters) for i in members}
    told: list[list[PairReason]] = [[] for _ in clusters]  # pairs inside each; of one checkpoint, all that it is in
    for pair in pairs:
        a, b = home[pair.a], home[pair.b]
        for number in {a, b}:
            if a == b or len(clusters[number]) == 1:
                told[number].append(pair)
    groups = tuple(
        Group(f"group-{number}", members, _reason(members, told[number], names))
        for number, members in enumerate(clusters)
    )
    alone = tuple(members[0] for members in clusters if len(members) == 1) if len(clusters) > 1 else ()
    return Grouping(names, groups, alone, pairs, rule, threshold, linkage)


def _reason(members: tuple[int, ...], told: Sequence[PairReason], names: tuple[str, ...]) -> str:
    known = [pair for pair in told if pair.similarity is not None]
    if len(members) == 1:
        near = max(known, key=lambda pair: pair.similarity, default=None)
        return "alone" if near is None else f"alone; nearest is {names[near.a + near.b - members[0]]}, {near.reason}"
    values = [pair.similarity for pair in known]
    span = f"cosine {min(values):.3f} to {max(values):.3f}: " if values else ""
    return span + told[0].reason
