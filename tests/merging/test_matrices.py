"""Methods on whole matrices, and the calibration, against their equations and independent computations.

Legend: N tasks, R x S a matrix.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import SHAPE, merged, normal, rotation
from safetensors.torch import load_file, save_file

from dmm_cli.errors import DmmError
from dmm_cli.inputs import resolve_source
from dmm_cli.merging import METHODS, engine, spectrum
from dmm_cli.merging.iso_cts import iso_cts
from dmm_cli.merging.matrices import matrix_shape
from dmm_cli.merging.recipe import Recipe
from dmm_cli.merging.rounding import rounding_noise
from dmm_cli.merging.svc import svc
from dmm_cli.merging.wudi import wudi


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 3, 2, 2), (5, 12)), ((5, 4), (5, 4)), ((1, 7, 4), (7, 4)), ((1, 1, 7), None), ((5, 1), None),
        ((32, 1, 3, 3), (32, 9)), ((5, 1, 1, 1), None), ((5,), None), ((), None), ((1,), None),
    ],
)  # fmt: skip
def test_a_tensor_is_a_matrix_of_its_first_axis_against_the_others(shape, expected):
    assert matrix_shape(shape) == expected


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


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize(("size", "spread"), [(1.0, 0.0), (1.0, 2.0), (1e-6, 0.0)])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_noise_of_rounding_is_what_rounding_adds(dtype, size, spread):
    """Also where some rows hold much larger weights than others, and below the least normal number."""
    weights, shape = size * normal(200, 300) * np.exp(spread * normal(200, 1)), (200, 300)
    error = torch.from_numpy(weights).to(DTYPES[dtype]).double().numpy() - weights
    noise = np.linalg.norm(error, 2)
    alone = rounding_noise(error.reshape(1, -1), weights.ravel(), shape, ["F64", dtype])
    assert noise < alone[0, 0] < 3 * noise and alone[1, 0] < 1e-8 * noise
    stored = weights + error  # the base's rounding, which two tasks share
    shared = rounding_noise(-np.stack([error, error]).reshape(2, -1), stored.ravel(), shape, [dtype, "F64", "F64"])
    assert np.allclose(shared[1], alone[0, 0], rtol=0.05) and shared[0].max() < 1e-8 * noise
    assert spectrum.of_sum(torch.from_numpy(shared)) > np.linalg.norm(2 * error, 2)
    zero = rounding_noise(stored.reshape(1, -1), np.zeros(stored.size), shape, ["F64", dtype])
    assert noise < zero[0, 0] < 3 * noise  # it is of the checkpoint's weights, where the base has none


def test_what_no_task_changes_has_no_noise():
    weights, task = normal(40, 50), 1e-3 * normal(40, 50)
    task[:5] = 0.0
    expected = rounding_noise(task[5:].reshape(1, -1), weights[5:].ravel(), (35, 50), ["F16", "F16"])
    weights[:5] = 1e4
    assert np.allclose(rounding_noise(task.reshape(1, -1), weights.ravel(), (40, 50), ["F16", "F16"]), expected)


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "tsv"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_of_stored_weights_is_no_direction_of_a_task(tmp_path, dtype, name, count):
    """Tasks of rank 4, as LoRA's are: what the merge changes lies in their directions, and they in it."""
    weights, kind = 0.05 * normal(96, 128), DTYPES[dtype]
    size = 5e-4 if dtype == "F32" else 1e-2
    low = [size * normal(96, 4, seed=n) @ normal(4, 128, seed=10 + n) for n in range(count)]
    stored = [torch.from_numpy(array).to(kind) for array in (weights, *(weights + task for task in low))]
    for number, tensor in enumerate(stored):
        save_file({"l.weight": tensor}, tmp_path / f"m{number}.safetensors")
    base, *others = (resolve_source(str(tmp_path / f"m{number}.safetensors")) for number in range(len(stored)))
    recipe = Recipe(name, base=base, dtype="float64", device="cpu")
    engine.merge(others, tmp_path / "out.safetensors", recipe, {})
    task = load_file(tmp_path / "out.safetensors")["l.weight"].numpy() - stored[0].double().numpy()
    values = np.linalg.svd(task, compute_uv=False)
    spaces = [svd(np.hstack(low))[0][:, : 4 * count], svd(np.vstack(low))[2][: 4 * count]]
    outside = task - spaces[0] @ (spaces[0].T @ task @ spaces[1].T) @ spaces[1]
    # rounding turns the directions, by its share of them
    assert np.linalg.norm(outside) < {"F64": 1e-9, "F32": 1e-4, "F16": 0.02, "BF16": 0.15}[dtype] * np.linalg.norm(task)
    assert (values > 1e-4 * values[0]).sum() == 4 * count  # the output is rounded too
    if name != "tsv":
        assert np.allclose(values[: 4 * count], values[0], rtol=1e-5)


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


@pytest.mark.parametrize("parameters", [{"steps": -3}, {"steps": 0.5}, {"ridge": -1.0}, {"rate": -1.0, "steps": 1}])
def test_wudi_refuses_steps_and_ridges_that_make_no_sense(parameters):
    with pytest.raises(DmmError, match=r"negative|whole number"):
        METHODS.load("wudi")(torch.ones(2, 3, 3), **parameters)


def factor_along(u: np.ndarray, matrix: np.ndarray, tasks: np.ndarray, alpha: float) -> float:
    answers = [(u @ matrix) @ (u @ task) / np.sum((u @ task) ** 2) for task in tasks]
    return len(tasks) / sum(max(alpha, answer) for answer in answers)


def plain_svc(matrix: np.ndarray, tasks: np.ndarray, alpha: float) -> np.ndarray:
    left, values, right = svd(matrix)
    result = np.zeros_like(matrix)
    for k, value in enumerate(values):
        result += factor_along(left[:, k], matrix, tasks, alpha) * value * np.outer(left[:, k], right[k])
    return result


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 2.0])
def test_svc_rescales_every_direction_by_how_often_it_is_shared(shape, alpha):
    tasks = normal(*shape, seed=7) + normal(3, *shape)
    matrix = 0.7 * tasks.sum(0)
    got = svc(torch.from_numpy(matrix), torch.from_numpy(tasks), alpha=alpha)
    assert np.allclose(got, plain_svc(matrix, tasks, alpha), atol=1e-9)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (8, 8)])
def test_svc_of_a_flat_spectrum_works_along_the_directions_of_the_sum(shape):
    """Of Iso-C's result any directions are singular ones; float32, as a merge stores it, must not choose them."""
    tasks = 2 * normal(*shape, seed=7) + normal(3, *shape)
    left, _, right = svd(tasks.sum(0))
    flat = METHODS.load("iso_c")(torch.from_numpy(tasks)).float()
    expected = np.zeros(shape)
    for k in range(min(shape)):
        part = left[:, [k]] * float(left[:, k] @ flat.numpy() @ right[k]) @ right[[k]]
        expected += factor_along(left[:, k], part, tasks, 1.0) * part
    assert np.allclose(svc(flat, torch.from_numpy(tasks)), expected, atol=1e-5)


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
