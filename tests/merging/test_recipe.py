from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import small_net

from dmm_cli.errors import DmmError
from dmm_cli.inputs import Source, resolve_source
from dmm_cli.merging import METHODS
from dmm_cli.merging.recipe import DTYPES, Override, Recipe, check


@pytest.fixture
def source(write):
    def make(name: str, **arrays: np.ndarray) -> Source:
        return resolve_source(str(write(name, **(arrays or small_net(0)))))

    return make


@pytest.fixture
def pair(source) -> list[Source]:
    return [source("a"), source("b")]


LAYERED = Recipe(
    "ties",
    parameters={"scale": 1.0, "density": 0.5},
    weights=(1.0, 2.0),
    overrides=(
        Override("layer*", {"scale": 0.3}),
        Override("*.1.*", {"density": 0.0}, (0.0, 1.0)),
        Override("layer1.*", weights=(5.0, 6.0)),
        Override("layer1.1.[bw]*", {"scale": 0.0}),
    ),
)


@pytest.mark.parametrize(
    ("name", "parameters", "weights"),
    [
        ("fc.weight", {"scale": 1.0, "density": 0.5}, (1.0, 2.0)),
        ("layer2.0.weight", {"scale": 0.3, "density": 0.5}, (1.0, 2.0)),
        ("fc.1.weight", {"scale": 1.0, "density": 0.0}, (0.0, 1.0)),
        ("layer2.1.weight", {"scale": 0.3, "density": 0.0}, (0.0, 1.0)),
        ("layer1.0.weight", {"scale": 0.3, "density": 0.5}, (5.0, 6.0)),
        ("layer1.1.weight", {"scale": 0.0, "density": 0.0}, (5.0, 6.0)),
        ("layer1.1.conv", {"scale": 0.3, "density": 0.0}, (5.0, 6.0)),
        ("LAYER1.1.weight", {"scale": 1.0, "density": 0.0}, (0.0, 1.0)),
    ],
)
def test_later_overrides_win_for_the_names_they_match(name, parameters, weights):
    assert LAYERED.parameters_of(name) == parameters
    assert LAYERED.weights_of((name,), 2) == weights


def test_without_weights_all_checkpoints_count_the_same():
    assert Recipe().weights_of(("w",), 3) == (1.0, 1.0, 1.0)
    assert Recipe(overrides=(Override("w", {"scale": 0.0}),)).weights_of(("w",), 2) == (1.0, 1.0)
    assert Recipe(weights=(0.0, 1.0)).weights_of(("w",), 2) == (0.0, 1.0)


@pytest.mark.parametrize("method", METHODS.names())
def test_a_recipe_that_fits_is_accepted(source, pair, method):
    base = source("base") if "base" in METHODS.traits(method) else None
    needs = {"base": base, "features": source("pseudo") if "features" in METHODS.traits(method) else None}
    for dtype in (None, *DTYPES):
        check(pair, Recipe(method, **needs, dtype=dtype))
    check(pair, Recipe(method, **needs, overrides=(Override("conv1.*", weights=(0.0, 1.0)),)))
    if base:
        check(pair, Recipe(method, base=base, calibrate="svc", calibration={"alpha": 0.5}))
    if base is None:
        with pytest.raises(DmmError, match=f"--calibrate svc works on task vectors, which {method} has none of"):
            check(pair, Recipe(method, **needs, calibrate="svc"))


@pytest.mark.parametrize("method", [name for name in METHODS if "base" in METHODS.traits(name)])
def test_a_method_on_task_vectors_refuses_to_run_without_their_start(pair, method):
    with pytest.raises(DmmError, match=f"{method} needs the common start") as error:
        check(pair, Recipe(method))
    assert "--base" in error.value.hint


def test_a_method_on_features_refuses_to_run_without_pseudo_data(pair):
    with pytest.raises(DmmError, match="regmean needs pseudo-data of the checkpoints") as error:
        check(pair, Recipe("regmean"))
    assert "--recalibrate" in error.value.hint


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe("tie"), "unknown merge method: tie"),
        (Recipe(weights=(1.0,)), "1 weights for 2 checkpoints"),
        (Recipe(weights=(1.0, 2.0, 3.0)), "3 weights for 2 checkpoints"),
        (Recipe(weights=(1.0, -1.0)), "zero or more, with a positive sum: 1, -1"),
        (Recipe(weights=(0.0, 0.0)), "positive sum: 0, 0"),
        (Recipe(weights=(1.0, float("nan"))), "positive sum: 1, nan"),
        (Recipe(weights=(1.0, float("inf"))), "positive sum: 1, inf"),
        (Recipe(overrides=(Override("fc.*", weights=(1.0,)),)), "1 weights for 2 checkpoints"),
        (Recipe(overrides=(Override("fc.*", weights=(0.0, 0.0)),)), "positive sum"),
        (Recipe(overrides=(Override("head.*", {}),)), r"no tensor matches head\.\*"),
        (Recipe(overrides=(Override("FC.*", {}),)), r"no tensor matches FC\.\*"),
        (Recipe(overrides=(Override("", {}),)), "no tensor matches "),
        (Recipe(calibrate="svd"), "unknown calibration: svd"),
        (Recipe(head="last"), "unknown head policy: last"),
        (Recipe(dtype="float8"), "unknown dtype: float8"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(pair, recipe, words):
    with pytest.raises(DmmError, match=words):
        check(pair, recipe)


@pytest.mark.parametrize(
    ("recipe", "hint"),
    [
        (Recipe(weights=(1.0,)), "give one each: --weights 1,2"),
        (Recipe(overrides=(Override("fc.*", weights=(1.0,)),)), "give one each: --param 'fc.*:weights=1,2'"),
    ],
)
def test_a_wrong_number_of_weights_is_told_with_what_was_said(pair, recipe, hint):
    with pytest.raises(DmmError) as error:
        check(pair, recipe)
    assert error.value.hint == hint


def test_a_method_for_two_refuses_three_and_takes_one(source, pair):
    with pytest.raises(DmmError, match="slerp merges two checkpoints, not 3"):
        check([*pair, source("c")], Recipe("slerp"))
    check(pair[:1], Recipe("slerp"))


def test_a_near_name_is_suggested(pair):
    with pytest.raises(DmmError) as error:
        check(pair, Recipe("karchr"))
    assert error.value.hint == "did you mean karcher?"


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"w": np.ones((2, 3))}, r"b\.safetensors: w is \[2, 3\], not \[3, 2\]"),
        ({"v": np.ones((3, 2))}, r"b\.safetensors lacks w"),
        ({"w": np.ones((3, 2)), "x": np.ones(1)}, r"b\.safetensors also holds x"),
        ({"w": np.ones((3, 2), np.int64)}, r"tensor w is F64 in .*a\.safetensors and I64 in .*b\.safetensors"),
    ],
)
@pytest.mark.parametrize("role", ["checkpoint", "base"])
def test_another_structure_is_refused_in_a_checkpoint_and_in_the_base(source, arrays, words, role):
    first, other = source("a", w=np.ones((3, 2))), source("b", **arrays)
    sources, base = ([first, other], first) if role == "checkpoint" else ([first, first], other)
    with pytest.raises(DmmError) as error:
        check(sources, Recipe("ties", base=base))
    lines = [error.value.what, *error.value.evidence]
    assert any(re.search(words, line) for line in lines), lines


def test_float_dtypes_may_differ_and_integer_dtypes_may_not(source):
    check([source("a", w=np.ones(3, np.float32)), source("b", w=np.ones(3, np.float16))], Recipe())
    with pytest.raises(DmmError, match=r"tensor t is I64 in .* and I32 in"):
        check([source("c", t=np.ones(3, np.int64)), source("d", t=np.ones(3, np.int32))], Recipe())
