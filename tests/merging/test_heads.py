"""Heads of checkpoints that know different classes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dmm_cli.digest import hashing
from dmm_cli.errors import DmmError
from dmm_cli.inputs import Source, resolve_source, resolve_sources
from dmm_cli.merging import engine
from dmm_cli.merging.heads import head_union, unlike_heads
from dmm_cli.merging.recipe import Recipe, check

FIRST, SECOND = ["cat", "dog", "fox"], ["fox", "owl", "cat", "elk"]
UNION = ["cat", "dog", "fox", "owl", "elk"]


def net(rows: int, seed: int, head: str = "fc") -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        "conv.weight": draw.normal(size=(4, 3, 3, 3)).astype(np.float32),
        f"{head}.weight": draw.normal(size=(rows, 4)).astype(np.float32),
        f"{head}.bias": draw.normal(size=rows).astype(np.float32),
    }


@pytest.fixture
def source(write):
    """``source("a", FIRST, seed=0)`` writes a checkpoint that names its classes, or none."""

    def make(name: str, classes: Sequence[str] | None, seed: int = 0, rows: int | None = None, head="fc") -> Source:
        metadata = None if classes is None else {"dmm.classes": json.dumps(classes)}
        return resolve_source(str(write(name, metadata, **net(rows or len(classes or ()), seed, head))))

    return make


def merged(sources: list[Source], tmp_path: Path, recipe: Recipe = Recipe()) -> dict[str, np.ndarray]:
    output = tmp_path / "out.safetensors"
    engine.merge(sources, output, recipe, {"format": "pt"}, force=True)
    return load_file(output)


def expected_rows(heads: list[np.ndarray], lists: list[list[str]], weights: Sequence[float]) -> np.ndarray:
    """Class by class, the weighted mean over the checkpoints that know it."""
    rows = []
    for name in UNION:
        own = [(w, h[c.index(name)]) for w, h, c in zip(weights, heads, lists, strict=True) if name in c]
        rows.append(sum(w * row for w, row in own) / sum(w for w, _ in own))
    return np.array(rows)


@pytest.mark.parametrize("head", ["fc", "head.fc", "classifier", "classifier.3"])
@pytest.mark.parametrize("weights", [(), (3.0, 1.0)])
def test_the_merged_head_has_a_row_for_every_class_and_shared_ones_are_averaged(source, tmp_path, head, weights):
    sources = [source("a", FIRST, 0, head=head), source("b", SECOND, 1, head=head)]
    got = merged(sources, tmp_path, Recipe(weights=weights))
    parents = [net(3, 0, head), net(4, 1, head)]
    for part in ("weight", "bias"):
        heads = [parent[f"{head}.{part}"] for parent in parents]
        assert np.allclose(got[f"{head}.{part}"], expected_rows(heads, [FIRST, SECOND], weights or (1, 1)), atol=1e-6)
    mean = np.average([parent["conv.weight"] for parent in parents], axis=0, weights=weights or None)
    assert np.allclose(got["conv.weight"], mean, atol=1e-6)


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0)])
def test_a_checkpoint_of_weight_zero_is_heard_only_about_what_nobody_else_knows(source, tmp_path, weights):
    sources = [source("a", FIRST, 0), source("b", SECOND, 1)]
    got = merged(sources, tmp_path, Recipe(weights=weights))
    parents = [
        dict(zip(names, net(len(names), i)["fc.weight"], strict=True)) for i, names in enumerate([FIRST, SECOND])
    ]
    left_out, counted = parents if weights[1] else parents[::-1]
    expected = {**left_out, **counted}
    assert got["fc.weight"].tobytes() == np.array([expected[name] for name in UNION]).tobytes()


def test_a_checkpoint_that_nobody_needs_is_not_read(write, source, tmp_path):
    left_out = {name: value * np.nan for name, value in net(2, 0).items()}
    sources = [
        source("a", FIRST, 0),
        resolve_source(str(write("b", {"dmm.classes": json.dumps(["dog", "cat"])}, **left_out))),
    ]
    got = merged(sources, tmp_path, Recipe(weights=(1.0, 0.0)))
    assert all(got[name].tobytes() == value.tobytes() for name, value in net(3, 0).items())


def test_lists_of_equal_length_in_another_order_are_joined_by_name(source, tmp_path):
    """The shapes agree, the rows do not."""
    sources = [source("a", ["cat", "dog"], 0), source("b", ["dog", "cat"], 1)]
    got = merged(sources, tmp_path)["fc.weight"]
    a, b = net(2, 0)["fc.weight"], net(2, 1)["fc.weight"]
    assert np.allclose(got, (a + b[::-1]) / 2, atol=1e-7)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "iso_c"])
def test_a_head_of_different_classes_is_joined_also_where_the_method_has_a_base(source, tmp_path, method):
    sources = [source("a", FIRST, 0), source("b", SECOND, 1)]
    got = merged(sources, tmp_path, Recipe(method, base=source("base", None, 9, rows=7)))
    heads = [net(3, 0)["fc.weight"], net(4, 1)["fc.weight"]]
    assert np.allclose(got["fc.weight"], expected_rows(heads, [FIRST, SECOND], (1, 1)), atol=1e-6)


@pytest.mark.parametrize("method", ["karcher", "slerp", "ties", "model_stock"])
@pytest.mark.parametrize("lists", [(SECOND, FIRST), (FIRST, SECOND)])
def test_heads_are_joined_by_methods_that_measure_first(source, tmp_path, method, lists):
    """What is measured is read in the shape each file has; the head, with which it ends, may be the shorter."""
    sources = [source("a", lists[0], 0), source("b", lists[1], 1)]
    base = source("base", None, 9, rows=2) if method in ("ties", "model_stock") else None
    with hashing([*sources, *filter(None, [base])]) as hashes:
        engine.merge(sources, tmp_path / "out.safetensors", Recipe(method, base=base), {}, hashes=hashes)
        hashes.wait(sources)
    got = load_file(tmp_path / "out.safetensors")
    heads = [net(len(names), seed)["fc.weight"] for seed, names in enumerate(lists)]
    joined = expected_rows(heads, list(lists), (1, 1))
    order = list(dict.fromkeys(lists[0] + lists[1]))
    assert np.allclose(got["fc.weight"], joined[[UNION.index(name) for name in order]], atol=1e-6)
    for file in [*sources, *filter(None, [base])]:
        assert file.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()


def test_a_union_of_three_keeps_classes_in_order_of_first_appearance(source):
    union = head_union([source("a", FIRST), source("b", ["owl", "cat"]), source("c", ["elk", "owl", "dog"])])
    assert list(union.classes) == UNION
    assert union.places == ((0, 1, 2), (3, 0), (4, 3, 1))
    assert union.tensors == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(("first", "second"), [(FIRST, FIRST), (FIRST, None), (None, None)])
def test_equal_or_unknown_lists_have_no_union(source, tmp_path, first, second):
    """Then heads of one shape are merged as any weight."""
    sources = [source("a", first, 0, rows=3), source("b", second, 1, rows=3)]
    assert head_union(sources) is None and unlike_heads(sources) == []
    mean = (net(3, 0)["fc.weight"] + net(3, 1)["fc.weight"]) / 2
    assert np.allclose(merged(sources, tmp_path)["fc.weight"], mean, atol=1e-7)


@pytest.mark.parametrize("rows", [3, 4])
def test_the_first_head_is_kept_as_it_is(source, tmp_path, rows):
    """Of as many classes too: they need not be the same."""
    sources = [source("a", None, 0, rows=3), source("b", None, 1, rows=rows)]
    assert sorted(unlike_heads(sources)) == (["fc.bias", "fc.weight"] if rows == 4 else [])
    got = merged(sources, tmp_path, Recipe(head="first"))
    a, b = net(3, 0), net(rows, 1)
    assert all(got[name].tobytes() == a[name].tobytes() for name in ("fc.weight", "fc.bias"))
    assert np.allclose(got["conv.weight"], (a["conv.weight"] + b["conv.weight"]) / 2, atol=1e-7)


def test_unlike_heads_without_names_are_refused(source):
    sources = [source("a", FIRST), source("b", None, rows=4)]
    with pytest.raises(DmmError, match="heads of different sizes") as error:
        check(sources, Recipe())
    assert "--head first" in error.value.hint
    assert [line.rpartition("/")[2] for line in error.value.evidence] == [
        "a.safetensors: fc.bias is [3]",
        "b.safetensors: fc.bias is [4]",
        "a.safetensors: fc.weight is [3, 4]",
        "b.safetensors: fc.weight is [4, 4]",
    ]


@pytest.mark.parametrize(
    "other", [{"fc.weight": np.ones((4, 8))}, {"fc.weight": None, "fc.bias": None}, {"conv.weight": np.ones((8, 3))}]
)
def test_heads_of_other_networks_are_not_taken_for_those_of_other_classes(source, write, other):
    """Of wider features, of none, of another body."""
    tensors = net(4, 1) | other
    third = write("c", **{name: array for name, array in tensors.items() if array is not None})
    sources = [source("a", FIRST), source("b", None, rows=4), *resolve_sources([str(third)])]
    with pytest.raises(DmmError, match="do not have the same tensors"):
        check(sources, Recipe())


def test_a_list_that_does_not_fit_its_head_is_refused_where_shapes_differ(source):
    sources = [source("a", FIRST), source("b", SECOND, rows=5)]
    with pytest.raises(DmmError):
        check(sources, Recipe())


def test_other_tensors_of_different_shapes_are_refused_under_every_policy(write):
    paths = [write(name, conv__weight=np.ones((rows, 2), np.float32)) for name, rows in (("a", 3), ("b", 4))]
    for head in ("union", "first"):
        with pytest.raises(DmmError, match="do not have the same tensors") as error:
            check([resolve_source(str(path)) for path in paths], Recipe(head=head))
        assert "conv.weight is [4, 2], not [3, 2]" in error.value.evidence[0]


def test_lists_that_differ_without_a_head_to_join_are_refused(source):
    """Here the classifier has a name that is not known for one: averaged row by row it would mix classes."""
    sources = [source("a", ["cat", "dog"], 0, head="logits"), source("b", ["dog", "cat"], 1, head="logits")]
    for head in ("union", "first"):
        with pytest.raises(DmmError, match="classes") as error:
            check(sources, Recipe(head=head))
        assert "call it fc, head or classifier" in error.value.hint
