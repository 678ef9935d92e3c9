"""The contract every merge method keeps, then the closed form or an independent computation of each.

Legend: N tasks, n elements, R x S a matrix.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from conftest import find

from dmm_cli.errors import DmmError
from dmm_cli.merging import CALIBRATIONS, METHODS
from dmm_cli.merging.drop import drop_and_rescale
from dmm_cli.merging.facts import trim_threshold
from dmm_cli.merging.iso_cts import iso_cts
from dmm_cli.merging.matrices import matrix_shape
from dmm_cli.merging.method import Block, Facts, effective_parameters
from dmm_cli.merging.svc import svc
from dmm_cli.merging.wudi import wudi

SHAPE = (8, 6)  # of the matrices that tasks are, where it does not matter
EVERY = [*METHODS, *CALIBRATIONS]
ORDERLESS = [name for name in METHODS if "random" not in METHODS.traits(name)]
SPECTRAL = [*(name for name in METHODS if "matrices" in METHODS.traits(name)), *CALIBRATIONS]


def traits(name: str) -> tuple[str, ...]:
    return METHODS.traits(name) if name in METHODS else ("calibration",)


def count_for(name: str) -> int:
    return 2 if "pair" in traits(name) else 3


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def merged(name: str, tasks: np.ndarray, weights=None, shape=SHAPE, seed: int = 0, **parameters) -> np.ndarray:
    """What a method makes of tasks (N, n), called as its trait says; a calibration gets their sum."""
    weights = np.ones(len(tasks)) if weights is None else np.array(weights, float)
    matrices = torch.from_numpy(tasks.copy()).reshape(len(tasks), *shape) if name in SPECTRAL else None
    if name in CALIBRATIONS:
        return CALIBRATIONS.load(name)(matrices.sum(0), matrices, **parameters).numpy().reshape(-1)
    method = METHODS.load(name)
    if "coefficients" in traits(name):
        coefficients = method(Facts(weights, tasks @ tasks.T if "gram" in traits(name) else None), **parameters)
        assert coefficients.shape == (len(tasks),)
        return coefficients @ tasks
    if "matrices" in traits(name):
        weighted = matrices * torch.from_numpy(weights)[:, None, None]
        return method(weighted, **parameters).numpy().reshape(-1)
    block = Block(
        tasks.copy(),
        weights.astype(tasks.dtype),
        thresholds(tasks, effective_parameters(method, parameters)["density"]) if "trim" in traits(name) else None,
        np.random.Generator(np.random.SFC64(seed)) if "random" in traits(name) else None,
    )
    return method(block, **parameters)


def thresholds(tasks: np.ndarray, density: float) -> np.ndarray:
    return find(trim_threshold(density, *tasks.shape, tasks.dtype), [tasks])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def rotation(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(normal(size, size, seed=seed))[0]


# The contract.


@pytest.mark.parametrize("name", EVERY)
def test_every_method_says_what_it_does(name):
    table = METHODS if name in METHODS else CALIBRATIONS
    assert table.summary(name)
    assert table.load(name).__doc__
    assert name in CALIBRATIONS or traits(name)[0] in ("coefficients", "elements", "matrices")


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
    function = (METHODS if name in METHODS else CALIBRATIONS).load(name)
    return {
        key: item.default
        for key, item in inspect.signature(function).parameters.items()
        if item.kind is inspect.Parameter.KEYWORD_ONLY
    }


PARAMETERS = [(name, key) for name in EVERY for key in parameters_of(name)]
SCALED = [name for name, key in PARAMETERS if key == "scale"]


@pytest.mark.parametrize(("name", "key"), PARAMETERS)
def test_a_parameter_is_taken_as_given_and_a_misspelt_one_is_named(name, key):
    function = (METHODS if name in METHODS else CALIBRATIONS).load(name)
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


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 3, 2, 2), (5, 12)), ((5, 4), (5, 4)), ((1, 7, 4), (7, 4)), ((1, 1, 7), None), ((5, 1), None),
        ((32, 1, 3, 3), (32, 9)), ((5, 1, 1, 1), None), ((5,), None), ((), None), ((1,), None),
    ],
)  # fmt: skip
def test_a_tensor_is_a_matrix_of_its_first_axis_against_the_others(shape, expected):
    assert matrix_shape(shape) == expected


# Coefficients.


def test_linear_is_the_weighted_mean():
    tasks = normal(3, 48)
    assert np.allclose(merged("linear", tasks, [3, 1, 0]), np.average(tasks, axis=0, weights=[3, 1, 0]), rtol=1e-13)


def test_task_arithmetic_adds_task_vectors_by_their_weights():
    tasks = normal(2, 48)
    assert np.allclose(merged("task_arithmetic", tasks), 0.3 * (tasks[0] + tasks[1]), rtol=1e-13)
    assert np.allclose(merged("task_arithmetic", tasks, [1, 2], scale=0.5), 0.5 * tasks[0] + tasks[1], rtol=1e-13)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("angle", [0.05, 1.2, 3.1])
def test_slerp_walks_the_circle_at_constant_speed(angle, share):
    """On the unit circle the answer is known: the point at ``share`` of the angle."""
    tasks = np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
    expected = [np.cos(share * angle), np.sin(share * angle)]
    assert np.allclose(merged("slerp", tasks, [1 - share, share]), expected, atol=1e-12)


@pytest.mark.parametrize("other", [[2.0, 0.0], [1.0, 0.001], [-1.0, 0.0], [0.0, 0.0]])
def test_slerp_of_collinear_opposite_or_zero_tensors_is_linear(other):
    tasks = np.array([[1.0, 0.0], other])
    assert np.allclose(merged("slerp", tasks, [1, 3]), 0.25 * tasks[0] + 0.75 * tasks[1])


def karcher_mean(tasks: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Steepest descent on the sphere, with full vectors."""
    units = tasks / np.linalg.norm(tasks, axis=1, keepdims=True)
    mean = shares @ units
    mean /= np.linalg.norm(mean)
    for _ in range(500):
        tangent = np.zeros_like(mean)
        for share, unit in zip(shares, units, strict=True):
            aside = unit - (unit @ mean) * mean
            tangent += share * np.arccos(np.clip(unit @ mean, -1, 1)) * aside / max(np.linalg.norm(aside), 1e-300)
        length = np.linalg.norm(tangent)
        mean = np.cos(length) * mean + np.sin(length) * tangent / max(length, 1e-300)
        mean /= np.linalg.norm(mean)
    return (shares @ np.linalg.norm(tasks, axis=1)) * mean


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.01, 0.3, 3.0])
def test_karcher_is_the_mean_that_descent_on_the_vectors_finds(count, spread):
    tasks = (normal(48) + spread * normal(count, 48, seed=1)) * np.arange(1.0, count + 1)[:, None]
    weights = np.arange(count, 0.0, -1.0)
    expected = karcher_mean(tasks, weights / weights.sum())
    assert np.allclose(merged("karcher", tasks, weights), expected, atol=1e-7 * np.linalg.norm(expected))


def test_karcher_of_two_is_the_point_slerp_walks_to():
    tasks = normal(2, 48)
    tasks /= np.linalg.norm(tasks, axis=1, keepdims=True)
    assert np.allclose(merged("karcher", tasks, [1, 3]), merged("slerp", tasks, [1, 3]), atol=1e-8)


@pytest.mark.parametrize("count", [2, 4, 9])
def test_karcher_of_directions_around_an_axis_is_the_axis(count):
    """Directions at the corners of a regular polygon around an axis: by symmetry, the axis, at their length."""
    turn = 2 * np.pi * np.arange(count) / count
    tasks = 5 * np.stack([np.cos(turn) * np.sin(1.1), np.sin(turn) * np.sin(1.1), np.full(count, np.cos(1.1))], 1)
    assert np.allclose(merged("karcher", tasks), [0, 0, 5], atol=1e-8)


@pytest.mark.parametrize("tasks", [[[1.0, 0.0], [-1.0, 0.0]], [[1.0, 2.0], [0.0, 0.0]], [[1.0, 0.0], [2.0, 1e-4]]])
def test_karcher_of_opposite_zero_or_collinear_tensors_is_linear(tasks):
    assert np.allclose(merged("karcher", np.array(tasks)), np.mean(tasks, axis=0), atol=1e-12)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_model_stock_is_the_papers_formula_on_the_vectors(count):
    tasks = normal(48) + normal(count, 48, seed=1)
    cosines = [cosine(tasks[i], tasks[j]) for i in range(count) for j in range(i)]
    mean = sum(cosines) / len(cosines)
    ratio = count * mean / (1 + (count - 1) * mean)
    assert 0.2 < ratio < 1
    assert np.allclose(merged("model_stock", tasks), ratio * tasks.mean(0), rtol=1e-12)


@pytest.mark.parametrize(("angle", "ratio"), [(np.pi / 2, 0.0), (np.pi / 3, 2 / 3), (0.0, 1.0), (2.0, 0.0), (3.1, 0.0)])
def test_model_stock_stays_at_the_base_unless_task_vectors_agree(angle, ratio):
    """Two vectors at an angle: t = 2 cos / (1 + cos), 0 from a right angle on and 1 for equal ones."""
    tasks = np.array([[2.0, 0.0], [np.cos(angle), np.sin(angle)]])
    assert np.allclose(merged("model_stock", tasks, [1, 3]), ratio * (0.25 * tasks[0] + 0.75 * tasks[1]), atol=1e-12)


# Elements.


def plain_ties(tasks: np.ndarray, weights: np.ndarray, density: float) -> np.ndarray:
    """TIES with a full sort and a loop over the elements."""
    kept = tasks.copy()
    for row in kept:
        smallest = np.sort(np.abs(row))[::-1][max(1, int(density * len(row))) - 1]
        row[np.abs(row) < smallest] = 0.0
    result = np.zeros(tasks.shape[1])
    for j, column in enumerate(kept.T):
        sign = 1.0 if weights @ column >= 0 else -1.0
        agreeing = [(w, x) for w, x in zip(weights, column, strict=True) if x * sign > 0]
        if agreeing:
            result[j] = sum(w * x for w, x in agreeing) / sum(w for w, _ in agreeing)
    return result


@pytest.mark.parametrize("density", [0.001, 0.2, 0.55, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [4.0, 1.0, 0.5, 2.0]])
@pytest.mark.parametrize("digits", [6, 0])
def test_ties_is_trim_elect_and_disjoint_mean(density, weights, digits):
    """Rounded to whole numbers many magnitudes are equal, and many sums are zero."""
    tasks = np.round(normal(4, 300), digits)
    got = merged("ties", tasks, weights, density=density, scale=0.5)
    assert np.allclose(got, 0.5 * plain_ties(tasks, np.array(weights), density), atol=1e-14)


def test_ties_keeps_elements_as_large_as_the_smallest_kept():
    """Two of ten are to be kept; three have the second largest magnitude and stay, all of them."""
    task = np.array([[1.0, -2.0, 0.0, 2.0, 5.0, 2.0, 1.0, 1.0, 0.5, -1.0]])
    assert merged("ties", task).tolist() == [0, -2, 0, 2, 5, 2, 0, 0, 0, 0]


@pytest.mark.parametrize(("first", "expected"), [(-3.0, 3.0), (-4.0, -4.0), (2.0, 2.5)])
def test_ties_takes_the_mean_of_those_that_have_the_elected_sign(first, expected):
    """Against one 3: a sum of zero elects the positive sign, a larger negative wins, alike are averaged."""
    assert merged("ties", np.array([[first], [3.0]]), density=1.0).tolist() == [expected]


def drop(seed: int, count: int, size: int, density: float) -> np.ndarray:
    block = Block(np.ones((count, size)), np.ones(count), stream=np.random.Generator(np.random.SFC64(seed)))
    return drop_and_rescale(block, density)


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9])
def test_dare_keeps_a_share_of_elements_and_rescales_it(density):
    """Shares within five standard deviations of a binomial; the density is rounded to a 65536th."""
    size = 400_001
    kept = drop(0, 2, size, density)
    places = kept != 0
    assert np.allclose(kept[places], 1 / density, rtol=0.5 / 65536 / density)
    assert len(np.unique(kept[places])) == 1
    for share, probability in ((places[0].mean(), density), ((places[0] & places[1]).mean(), density**2)):
        deviation = np.sqrt(probability * (1 - probability) / size)
        assert abs(share - probability) < 5 * deviation + 1 / 65536
    assert abs(kept.mean() - 1) < 5 * np.sqrt((1 - density) / density / kept.size), "unbiased"


def test_dare_with_a_density_of_zero_keeps_not_one_of_many_elements():
    assert (drop(0, 2, 400_000, 0.0) == 0).all()


def test_dare_draws_the_same_mask_from_the_same_stream():
    first, again, other = drop(1, 2, 1003, 0.3), drop(1, 2, 1003, 0.3), drop(2, 2, 1003, 0.3)
    assert (first == again).all() and (first != other).any() and (first[0] != first[1]).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dare_with_a_density_of_one_changes_nothing(dtype):
    tasks, weights = normal(2, 1001).astype(dtype), [1.0, 2.0]
    got = merged("dare_linear", tasks, weights, density=1.0, scale=0.5)
    assert np.allclose(got, 0.5 * tasks[0] + tasks[1], rtol=1e-5 if dtype is np.float32 else 1e-13)
    assert np.allclose(
        merged("dare_ties", tasks, weights, density=1.0, scale=1.0), plain_ties(tasks, np.array(weights), 1), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "outcomes"),
    [
        ("dare_linear", {0: 0.5625, 1: 0.1875, -10: 0.1875, -9: 0.0625}),  # density 1/4: neither, one, both
        ("dare_ties", {0: 0.5625, 1: 0.1875, -10: 0.25}),  # where both are left the larger one wins
    ],
)
def test_dare_gives_each_outcome_as_often_as_its_probability(name, outcomes):
    size = 200_000
    tasks = np.tile([[1.0], [-10.0]], size)
    values, counts = np.unique(np.round(merged(name, tasks, density=0.25, scale=0.25), 9), return_counts=True)
    assert sorted(outcomes) == values.tolist()
    for value, count in zip(values, counts, strict=True):
        share = outcomes[int(value)]
        assert abs(count / size - share) < 5 * np.sqrt(share * (1 - share) / size), value


# Matrices.


def svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.linalg.svd(matrix, full_matrices=False)


def polar(columns: np.ndarray) -> np.ndarray:
    left, _, right = svd(columns)
    return left @ right


def disjoint_tasks(count: int, rank: int, shape: tuple[int, int]) -> np.ndarray:
    """Tasks of a rank whose row spaces and column spaces are orthogonal to one another's, (N, R, S)."""
    left, right = rotation(shape[0], 3)[:, : count * rank], rotation(shape[1], 4)[:, : count * rank]
    values = 1 + np.random.default_rng(5).random((count, rank))
    return np.stack(
        [(left[:, i * rank : (i + 1) * rank] * values[i]) @ right[:, i * rank : (i + 1) * rank].T for i in range(count)]
    )


@pytest.mark.parametrize("shape", [(10, 7), (7, 10)])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_tsv_adds_decorrelated_leading_components(shape, count):
    tasks = normal(count, *shape)
    kept = max(1, 7 // count)
    parts = [svd(task) for task in tasks]
    left = polar(np.hstack([u[:, :kept] for u, _, _ in parts]))
    right = polar(np.hstack([v[:kept].T for _, _, v in parts]))
    expected = left @ np.diag(np.concatenate([s[:kept] for _, s, _ in parts])) @ right.T
    got = merged("tsv", tasks.reshape(count, -1), shape=shape)
    assert np.allclose(got.reshape(shape), expected, atol=1e-9)


@pytest.mark.parametrize("name", ["tsv", "wudi", "svc"])
def test_tasks_in_orthogonal_spaces_come_back_as_their_sum(name):
    """They do not interfere, so there is nothing to resolve."""
    tasks = disjoint_tasks(3, 2, (9, 7))
    assert np.allclose(merged(name, tasks.reshape(3, -1), shape=(9, 7)).reshape(9, 7), tasks.sum(0), atol=1e-9)


@pytest.mark.parametrize("shape", [(10, 7), (7, 10)])
def test_iso_c_gives_the_sum_a_flat_spectrum(shape):
    tasks = normal(3, *shape)
    left, values, right = svd(tasks.sum(0))
    got = merged("iso_c", tasks.reshape(3, -1), shape=shape).reshape(shape)
    assert np.allclose(np.linalg.svd(got, compute_uv=False), values.mean(), rtol=1e-9)
    assert np.allclose(got, values.mean() * left @ right, atol=1e-9)


@pytest.mark.parametrize("shape", [(14, 10), (10, 14)])
@pytest.mark.parametrize("common", [0.0, 0.4, 0.8, 1.0])
def test_iso_cts_joins_common_and_own_directions(shape, common):
    tasks = normal(2, *shape)
    own = round(10 * (1 - common) / 2)
    left, values, right = (part[..., : 10 - 2 * own] for part in (*svd(tasks.sum(0))[:2], svd(tasks.sum(0))[2].T))
    parts = [(left, values, right)]
    for task in tasks:
        u, s, v = svd(task - left @ left.T @ task)
        parts.append((u[:, :own], s[:own], v[:own].T))
    directions = polar(np.hstack([u for u, _, _ in parts])) @ polar(np.hstack([v for _, _, v in parts])).T
    expected = np.concatenate([s for _, s, _ in parts]).mean() * directions
    got = merged("iso_cts", tasks.reshape(2, -1), shape=shape, common=common).reshape(shape)
    assert np.allclose(got, expected, atol=1e-9)
    assert np.allclose(np.linalg.svd(got, compute_uv=False), np.linalg.svd(got, compute_uv=False)[0], rtol=1e-9)


def test_iso_cts_with_everything_common_is_iso_c():
    tasks = normal(3, 48)
    assert np.allclose(merged("iso_cts", tasks, common=1.0), merged("iso_c", tasks), atol=1e-9)


@pytest.mark.parametrize(("count", "rank"), [(3, 5), (2, 3), (4, 6), (8, 5)])
def test_iso_cts_without_common_directions_is_flat_too(count, rank):
    """Also where the rank is no multiple of the number of tasks."""
    got = iso_cts(torch.from_numpy(normal(count, rank, rank + 1)), common=0.0)
    values = np.linalg.svd(got.numpy(), compute_uv=False)
    assert values[0] > 0 and np.allclose(values, values[0], rtol=1e-6)


def interference(merged: np.ndarray, tasks: np.ndarray) -> float:
    """The loss of WUDI, as its paper writes it."""
    return sum(float(np.sum(((merged - task) @ task.T) ** 2) / np.sum(task**2)) for task in tasks)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (3, 12)])
@pytest.mark.parametrize("ridge", [0.001, 0.1, 10.0])
def test_wudi_solves_its_normal_equations(shape, ridge):
    """The gradient of ``loss + weight |D - sum|^2`` vanishes at the solution, term by term."""
    tasks = normal(3, *shape)
    got = merged("wudi", tasks.reshape(3, -1), shape=shape, ridge=ridge).reshape(shape)
    gram = sum(task.T @ task / np.sum(task**2) for task in tasks)
    weight = ridge * np.linalg.eigvalsh(gram).mean()
    gradient = sum((got - task) @ task.T @ task / np.sum(task**2) for task in tasks) + weight * (got - tasks.sum(0))
    assert np.abs(gradient).max() < 1e-9
    assert interference(got, tasks) < interference(tasks.sum(0), tasks)


def test_wudi_interferes_less_with_a_smaller_ridge_and_stays_at_the_sum_with_a_large_one():
    tasks = normal(4, 5, 30)
    losses = [
        interference(wudi(torch.from_numpy(tasks), ridge=ridge).numpy(), tasks) for ridge in (0.0, 0.01, 0.1, 1.0, 1e9)
    ]
    assert losses == sorted(losses)
    assert losses[-1] == pytest.approx(interference(tasks.sum(0), tasks), rel=1e-6)
    assert losses[0] < 1e-9 * losses[-1], "with fewer rows than columns in all no task need be disturbed"


def test_wudi_by_steps_is_adam_on_the_papers_loss():
    """Against Adam on gradients that torch derives from the loss itself."""
    tasks = torch.from_numpy(normal(3, *SHAPE)).float()
    expected = tasks.sum(0).clone().requires_grad_(True)
    optimiser = torch.optim.Adam([expected], 1e-3)
    for _ in range(20):
        optimiser.zero_grad()
        sum((((expected - t) @ t.T) ** 2).sum() / (t**2).sum() for t in tasks).backward()
        optimiser.step()
    assert torch.allclose(wudi(tasks, steps=20, rate=1e-3).float(), expected, atol=1e-5)


def test_wudi_by_steps_lowers_the_loss_toward_its_minimum():
    tasks = 0.01 * normal(3, *SHAPE)  # as small as task vectors are, so that the published rate gets somewhere
    given = torch.from_numpy(tasks)
    start, least = interference(tasks.sum(0), tasks), interference(wudi(given, ridge=0.0).numpy(), tasks)
    losses = [interference(wudi(given, steps=steps, rate=1e-4).numpy(), tasks) for steps in (10, 100, 300, 1000)]
    assert start > losses[0] > losses[1] > losses[2] > losses[3] > least - 1e-12
    assert losses[3] - least < 0.02 * (start - least)
    assert interference(wudi(given, steps=300).numpy(), tasks) < start, "also at the published rate"


def plain_svc(matrix: np.ndarray, tasks: np.ndarray, alpha: float) -> np.ndarray:
    left, values, right = svd(matrix)
    result = np.zeros_like(matrix)
    for k, value in enumerate(values):
        u = left[:, k]
        answers = [(u @ matrix) @ (u @ task) / np.sum((u @ task) ** 2) for task in tasks]
        factor = len(tasks) / sum(max(alpha, answer) for answer in answers)
        result += factor * value * np.outer(u, right[k])
    return result


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 2.0])
def test_svc_rescales_every_direction_by_how_often_it_is_shared(shape, alpha):
    tasks = normal(*shape, seed=7) + normal(3, *shape)
    matrix = 0.7 * tasks.sum(0)
    got = svc(torch.from_numpy(matrix), torch.from_numpy(tasks), alpha=alpha)
    assert np.allclose(got, plain_svc(matrix, tasks, alpha), atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_svc_of_the_sum_of_equal_tasks_is_that_task(count):
    tasks = np.repeat(normal(1, *SHAPE), count, axis=0)
    assert np.allclose(svc(torch.from_numpy(tasks.sum(0)), torch.from_numpy(tasks)), tasks[0], atol=1e-9)


def test_svc_lengthens_nothing_with_its_default_alpha():
    tasks = normal(4, *SHAPE)
    for matrix in (tasks.sum(0), 0.1 * tasks.sum(0), normal(*SHAPE, seed=8)):
        got = svc(torch.from_numpy(matrix), torch.from_numpy(tasks)).numpy()
        assert (svd(got)[1] <= svd(matrix)[1] * (1 + 1e-9)).all()


@pytest.mark.parametrize("entry", [0.0, 1.0])
def test_svc_with_an_alpha_of_zero_leaves_directions_of_length_zero_alone(entry):
    task = entry * torch.outer(torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]))
    got = svc(2 * task, torch.stack([task, task]), alpha=0.0)
    assert np.allclose(got, task, atol=1e-12)


def test_svc_leaves_tasks_alone_that_touch_different_rows_and_columns():
    tasks = np.zeros((2, 8, 6))
    tasks[0, :4, :3], tasks[1, 4:, 3:] = normal(4, 3), normal(4, 3, seed=1)
    assert np.allclose(svc(torch.from_numpy(tasks.sum(0)), torch.from_numpy(tasks)), tasks.sum(0), atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much"])
def test_a_parameter_that_is_no_finite_number_is_refused(value):
    with pytest.raises(DmmError, match="parameter scale of ties is a number, not"):
        effective_parameters(METHODS.load("ties"), {"scale": value})


@pytest.mark.parametrize("parameters", [{"steps": -3}, {"steps": 0.5}, {"ridge": -1.0}, {"rate": -1.0, "steps": 1}])
def test_wudi_refuses_steps_and_ridges_that_make_no_sense(parameters):
    with pytest.raises(DmmError, match=r"negative|whole number"):
        METHODS.load("wudi")(torch.ones(2, 3, 3), **parameters)
