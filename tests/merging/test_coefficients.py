"""Methods that weigh whole tensors, against closed forms and independent computations."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import cosine, merged, normal


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
