"""The contract every merge method keeps, and the parameters it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import pytest
from conftest import SPECTRAL, cosine, merged, normal, rotation, traits

from dmm_cli.errors import DmmError
from dmm_cli.merging import CALIBRATIONS, METHODS, parameters
from dmm_cli.merging.method import check_parameters, effective_parameters
from dmm_cli.registry import Registry

EVERY = [*METHODS, *CALIBRATIONS]
ORDERLESS = [name for name in METHODS if "random" not in METHODS.traits(name)]


def count_for(name: str) -> int:
    return 2 if "pair" in traits(name) else 3


def table_of(name: str) -> Registry:
    return METHODS if name in METHODS else CALIBRATIONS


# The contract.


@pytest.mark.parametrize("name", EVERY)
def test_every_method_says_what_it_does(name):
    assert table_of(name).summary(name)
    assert table_of(name).load(name).__doc__
    assert name in CALIBRATIONS or traits(name)[0] in ("coefficients", "elements", "matrices", "features")


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("kind", ["random", "single", "zero", "equal", "one is zero", "opposite", "one number"])
def test_the_result_is_finite_and_of_the_shape_of_a_task(name, kind):
    tasks = normal(1 if kind == "single" else count_for(name), 48)
    if kind == "zero":
        tasks[:] = 0
    elif kind == "equal":
        tasks[:] = tasks[0]
    elif kind == "one is zero":
        tasks[1] = 0
    elif kind == "opposite":
        tasks[1] = -tasks[0]
    elif kind == "one number":
        tasks[:, 1:] = 0
    result = merged(name, tasks)
    assert result.shape == (48,) and result.dtype == np.float64 and np.isfinite(result).all()
    if kind == "zero":
        assert (result == 0).all()
    if kind == "equal" and "random" not in traits(name):
        assert cosine(result, tasks[0]) > 0.5, "the result goes where all tasks go"


@pytest.mark.parametrize("name", EVERY)
def test_float32_gives_what_float64_gives(name):
    tasks = normal(count_for(name), 48).astype(np.float32)
    narrow, wide = merged(name, tasks), merged(name, tasks.astype(np.float64))
    assert np.allclose(narrow, wide, rtol=1e-5, atol=1e-5)
    if "elements" in traits(name):
        assert narrow.dtype == np.float32


@pytest.mark.parametrize("name", [*ORDERLESS, *CALIBRATIONS])
def test_the_order_of_checkpoints_does_not_matter(name):
    tasks, weights = normal(count_for(name), 48), np.array([3.0, 1.0, 2.0])[: count_for(name)]
    assert np.allclose(merged(name, tasks, weights), merged(name, tasks[::-1], weights[::-1]), atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("factor", [-1.0, 1e-6, 1e6])
def test_scaled_tasks_give_a_scaled_result(name, factor):
    """A negative factor too: no method prefers a sign, but for sums of zero, which do not occur here."""
    tasks = normal(count_for(name), 48)
    assert np.allclose(merged(name, factor * tasks) / factor, merged(name, tasks), atol=1e-9)


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (7, 7)])
def test_a_method_on_matrices_does_not_depend_on_the_coordinates(name, shape):
    """Rotating rows and columns of all tasks rotates the result: no axis is special."""
    tasks = normal(3, *shape)
    left, right = rotation(shape[0], 1), rotation(shape[1], 2)
    turned = np.ascontiguousarray(left @ tasks @ right)
    plain = merged(name, tasks.reshape(3, -1), shape=shape).reshape(shape)
    assert np.allclose(merged(name, turned.reshape(3, -1), shape=shape).reshape(shape), left @ plain @ right, atol=1e-9)


@pytest.mark.parametrize("name", ["linear", "slerp", "karcher", "model_stock"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_mean_of_one_checkpoint_or_of_equal_ones_is_that_checkpoint(name, count):
    tasks = np.repeat(normal(1, 48), count, axis=0)
    assert np.allclose(merged(name, tasks, [3.0, 1.0][:count]), tasks[0], rtol=1e-13)


@pytest.mark.parametrize("name", ["linear", "karcher", "task_arithmetic", "ties"])
def test_a_checkpoint_of_weight_zero_does_not_count(name):
    tasks = normal(3, 48)
    assert np.allclose(merged(name, tasks, [2.0, 1.0, 0.0]), merged(name, tasks[:2], [2.0, 1.0]), atol=1e-8)


# Parameters.


def parameters_of(name: str) -> dict[str, float]:
    return {
        key: item.default
        for key, item in inspect.signature(table_of(name).load(name)).parameters.items()
        if item.kind is inspect.Parameter.KEYWORD_ONLY
    }


PARAMETERS = [(name, key) for name in EVERY for key in parameters_of(name)]
SCALED = [name for name, key in PARAMETERS if key == "scale"]


@pytest.mark.parametrize(("name", "key"), PARAMETERS)
def test_a_parameter_is_taken_as_given_and_a_misspelt_one_is_named(name, key):
    function = table_of(name).load(name)
    assert effective_parameters(function, {}) == parameters_of(name)
    for value in (0.0, 0.7):
        assert effective_parameters(function, {key: value}) == {**parameters_of(name), key: value}
    misspelt = key[:-2] + key[:-3:-1]
    with pytest.raises(DmmError, match=f"{name} has no parameter {misspelt}") as error:
        effective_parameters(function, {misspelt: 1.0})
    assert error.value.hint == f"did you mean {key}?"
    assert all(other in error.value.evidence[0] for other in parameters_of(name))
    with pytest.raises(DmmError, match=f"parameter {key} of {name} is a number, not much"):
        effective_parameters(function, {key: "much"})


@pytest.mark.parametrize("name", EVERY)
def test_the_table_lists_the_parameters_of_the_function(name):
    assert list(parameters(table_of(name), name)) == list(parameters_of(name))


def complaint(function: Callable, *arguments, **keywords) -> str | None:
    try:
        function(*arguments, **keywords)
    except DmmError as error:
        return str(error)


@pytest.mark.parametrize(("name", "key"), PARAMETERS)
@pytest.mark.parametrize("value", [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5])
def test_the_table_refuses_the_values_that_the_function_refuses(name, key, value):
    told = complaint(check_parameters, name, parameters(table_of(name), name), {key: value})
    assert told == complaint(merged, name, normal(2, 48), **{key: value})


@pytest.mark.parametrize("name", ["linear", "slerp", "karcher", "model_stock"])
def test_a_method_without_parameters_takes_none(name):
    assert parameters_of(name) == {}
    with pytest.raises(DmmError, match="has no parameter scale") as error:
        effective_parameters(METHODS.load(name), {"scale": 1.0})
    assert error.value.evidence == ("it has: none",)


@pytest.mark.parametrize("name", SCALED)
def test_a_scale_multiplies_the_result_and_zero_is_zero(name):
    tasks = normal(3, 48)
    assert np.allclose(merged(name, tasks, scale=2.0), 2 * merged(name, tasks, scale=1.0), rtol=1e-12)
    assert (merged(name, tasks, scale=0.0) == 0).all()


@pytest.mark.parametrize(("name", "key"), [(n, k) for n, k in PARAMETERS if k in ("density", "common")])
@pytest.mark.parametrize("value", [-0.01, 1.01])
def test_a_share_outside_zero_to_one_is_refused(name, key, value):
    with pytest.raises(DmmError, match=f"{key} must lie between 0 and 1"):
        merged(name, normal(2, 48), **{key: value})


@pytest.mark.parametrize("name", [name for name, key in PARAMETERS if key == "density"])
def test_a_density_of_zero_keeps_nothing(name):
    assert (merged(name, normal(3, 48), density=0.0) == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much"])
def test_a_parameter_that_is_no_finite_number_is_refused(value):
    with pytest.raises(DmmError, match="parameter scale of ties is a number, not"):
        effective_parameters(METHODS.load("ties"), {"scale": value})
