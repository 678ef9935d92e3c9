from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from dmm_cli.errors import DmmError
from dmm_cli.grouping import group_checkpoints
from dmm_cli.groups import assembled, given_groups, stated
from dmm_cli.manifest import Grouping, LayerSimilarity, SimilarityReport, SourceRecord, dump


def report(matrix, names="abcdefghij") -> SimilarityReport:
    rows = tuple(tuple(float(v) for v in row) for row in np.asarray(matrix, dtype=float))
    sources = tuple(SourceRecord(name, f"{name}.safetensors") for name, _ in zip(names, rows, strict=False))
    return SimilarityReport(sources, {"cosine": rows}, ())


def members(grouping: Grouping) -> list[set[str]]:
    return [{grouping.labels[i] for i in group.members} for group in grouping.groups]


def groups_from_record(record, labels, origin) -> Grouping:
    found = stated(record, labels, origin)
    return group_checkpoints(found) if isinstance(found, SimilarityReport) else found


def blocks(*sizes: int, inside: float = 0.95, outside: float = 0.0) -> np.ndarray:
    owner = np.repeat(np.arange(len(sizes)), sizes)
    matrix = np.where(owner[:, None] == owner[None], inside, outside)
    np.fill_diagonal(matrix, 1.0)
    return matrix


def test_planted_starts_are_found_and_the_lone_ones_are_divergent():
    grouping = group_checkpoints(report(blocks(3, 1, 1)))
    assert members(grouping) == [{"a", "b", "c"}, {"d"}, {"e"}]
    assert grouping.divergent == (3, 4)
    together = {(pair.b, pair.a): pair.together for pair in grouping.pairs}
    assert together[0, 1] and not together[0, 3] and len(together) == 10
    assert "different starts" in next(p.reason for p in grouping.pairs if (p.b, p.a) == (0, 3))


def test_nothing_is_divergent_when_all_share_a_start():
    grouping = group_checkpoints(report(blocks(4, inside=0.9)))
    assert members(grouping) == [set("abcd")] and grouping.divergent == ()


def test_two_tight_clusters_in_one_basin_are_cut_at_their_gap():
    matrix = blocks(2, 2, inside=0.97, outside=0.4)
    grouping = group_checkpoints(report(matrix))
    assert members(grouping) == [{"a", "b"}, {"c", "d"}]
    assert 0.4 < grouping.threshold < 0.97


def test_the_order_of_checkpoints_does_not_matter():
    matrix = blocks(2, 1, 2)
    expected = members(group_checkpoints(report(matrix)))
    for order in itertools.permutations(range(5)):
        names = "".join("abcde"[i] for i in order)
        assert members(group_checkpoints(report(matrix[np.ix_(order, order)], names))) == expected


def test_threshold_and_all():
    matrix = np.array([[1, 0.9, 0.6], [0.9, 1, 0.6], [0.6, 0.6, 1]])
    assert members(group_checkpoints(report(matrix), 0.7)) == [{"a", "b"}, {"c"}]
    assert members(group_checkpoints(report(matrix), 0.5)) == [{"a", "b", "c"}]
    assert members(group_checkpoints(report(matrix), "all")) == [{"a", "b", "c"}]


def test_checkpoints_that_cannot_be_compared_are_never_together():
    matrix = blocks(2, 2, inside=0.5, outside=np.nan)
    for rule in ("auto", 0.0, -1.0):
        assert members(group_checkpoints(report(matrix), rule)) == [{"a", "b"}, {"c", "d"}]


def test_layers_that_one_of_another_architecture_lacks_say_as_much_of_the_others():
    cosine = np.array([[1, 0.97, 0.5], [0.97, 1, 0.5], [0.5, 0.5, 1]])

    def layered(matrix: np.ndarray, norms: tuple[float | None, ...]) -> SimilarityReport:
        rows = tuple(tuple(None if np.isnan(value) else value for value in row) for row in matrix)
        layers = tuple(LayerSimilarity(name, (2, 2), rows, 0.5, norms) for name in ("one", "two"))
        return replace(report(matrix), layers=layers)

    beside = np.pad(cosine, (0, 1), constant_values=np.nan)
    beside[3, 3] = 1
    alone = members(group_checkpoints(layered(cosine, (1.0, 1.0, 1.0))))
    assert members(group_checkpoints(layered(beside, (1.0, 1.0, 1.0, None)))) == [*alone, {"d"}]


def test_equal_distances_are_joined_in_one_order():
    """Of a chain with equal links, which end is joined to the middle is a matter of order."""
    matrix = np.array([[1, 0.8, 0.2], [0.8, 1, 0.8], [0.2, 0.8, 1]])
    for order in itertools.permutations(range(3)):
        names = "".join("abc"[i] for i in order)
        found = members(group_checkpoints(report(matrix[np.ix_(order, order)], names), 0.7))
        assert found == [{"a", "b"}, {"c"}]


def test_groups_come_back_from_every_record():
    similarity = report(blocks(2, 1))
    grouping = group_checkpoints(similarity)
    labels = list(similarity.labels)
    for record in (
        similarity.to_json(),
        grouping.to_json(),
        {"grouping": grouping.to_json()},
        {"groups": [["a", "b"]]},
    ):
        assert members(groups_from_record(record, labels, "f")) == [{"a", "b"}, {"c"}]
    assert Grouping.from_json(grouping.to_json()) == grouping
    assert SimilarityReport.from_json(similarity.to_json()) == similarity
    assert dump(grouping).startswith('{\n  "schema": "dmm.groups/1"')


def test_a_report_is_read_in_the_order_of_the_arguments():
    similarity = report(blocks(2, 1, 2, outside=0.1))
    own = {name: row for name, row in zip(similarity.labels, similarity.measures["cosine"], strict=True)}
    for order in itertools.permutations("abcde"):
        grouping = groups_from_record(similarity.to_json(), order, "f")
        assert grouping.labels == order
        assert members(grouping) == [{"a", "b"}, {"d", "e"}, {"c"}]
        for pair in grouping.pairs:
            assert pair.similarity == own[order[pair.a]][ord(order[pair.b]) - ord("a")]


def test_groups_that_do_not_fit():
    with pytest.raises(DmmError) as error:
        given_groups(["a", "b"], [["a", "x"], ["a"]], "g.json")
    assert list(error.value.evidence) == ["unknown: x", "twice: a", "known: a, b"]
    with pytest.raises(DmmError, match="compares other checkpoints"):
        groups_from_record(report(blocks(2)).to_json(), ["a", "z"], "f")
    with pytest.raises(DmmError, match="holds no groups"):
        groups_from_record({}, ["a"], "f")


class Walked(tuple):
    """Pairs that count how often they are looked at."""

    seen = 0

    def __iter__(self) -> Iterator:
        for pair in super().__iter__():
            self.seen += 1
            yield pair


@pytest.mark.parametrize("groups", [1, 5, 40])
def test_pairs_are_looked_at_once_however_many_groups_there_are(groups):
    grouping = group_checkpoints(report(np.eye(40), [f"m{number:02}" for number in range(40)]), "all")
    pairs = Walked(grouping.pairs)
    found = assembled(grouping.labels, [number % groups for number in range(40)], pairs, "rule")
    assert len(found.groups) == groups and pairs.seen == len(pairs)


SIMILAR = report(blocks(2)).to_json()
LAYER = {"name": "w", "shape": [2, 2], "minimum": 0.5}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"groups": [3]}, "not a group: 3"),
        ({"groups": [["a"], [0]]}, "not a group: \\[0\\]"),
        ({"groups": [{"members": [9]}]}, "not a group: .*9"),
        ({"groups": [{"members": [-1]}]}, "not a group"),
        ({"groups": [{"m": [9]}]}, "not a group"),
        ({"groups": [{"members": [0]}], "labels": [7]}, "holds no groups"),
        ({"groups": {"a": 1}}, "holds no groups"),
        ({"grouping": 3}, "holds no groups"),
        ({**SIMILAR, "measures": {}}, "does not compare every checkpoint"),
        ({**SIMILAR, "measures": 3}, "damaged"),
        ({**SIMILAR, "measures": {"cosine": [[1, 0.5], [0.5]]}}, "does not compare every checkpoint"),
        ({**SIMILAR, "measures": {"cosine": [[1, "x"], [0.5, 1]]}}, 'damaged .*"x"'),
        ({**SIMILAR, "unrelated": [[0.1]]}, "does not compare every checkpoint"),
        ({**SIMILAR, "raw_cosine": [[1, 1, 1]] * 3}, "does not compare every checkpoint"),
        ({**SIMILAR, "layers": [{**LAYER, "cosine": [[1]]}]}, "does not compare every checkpoint"),
        ({**SIMILAR, "measures": {"cosine": [[1, 5.0], [5.0, 1]]}}, "5.0 and 5.0 for b and a: no similarity"),
        ({**SIMILAR, "measures": {"cosine": [[1, True], [True, 1]]}}, "no similarity"),
        ({**SIMILAR, "measures": {"cosine": [[1, float("inf")]] * 2}}, "no similarity"),
        ({**SIMILAR, "measures": {"cosine": [[1, 0.5], [None, 1]]}}, "None one way and 0.5 the other for b and a"),
        ({**SIMILAR, "measures": {**SIMILAR["measures"], "bn": [[0, 3], [4, 0]]}}, "4 one way and 3 the other"),
        ({**SIMILAR, "raw_cosine": [[1, 1.1], [1.1, 1]]}, "no similarity"),
        ({"groups": []}, "holds no groups"),
        ({"groups": [[]]}, "holds no groups"),
        ({"groups": [{"members": [False]}]}, "not a group"),
        ({**SIMILAR, "layers": [3]}, "not a LayerSimilarity record: 3"),
        ({**SIMILAR, "sources": [{"label": 1, "path": "a"}]}, "damaged"),
        ({key: value for key, value in SIMILAR.items() if key != "layers"}, "incomplete"),
    ],
)
def test_damaged_records_are_refused_by_name(record, words):
    with pytest.raises(DmmError, match=words) as error:
        groups_from_record(record, ["a", "b"], "g.json")
    assert "g.json" in error.value.what
