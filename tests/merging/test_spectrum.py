from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from dmm_cli.merging.spectrum import polar_factor, thin_svd

RANKS = {"tall": (9, 4, 4), "wide": (4, 9, 4), "square": (6, 6, 6), "deficient": (9, 7, 3), "one": (5, 6, 1)}


def matrix(rows: int, columns: int, rank: int) -> np.ndarray:
    draw = np.random.default_rng(rows + columns)
    return draw.normal(size=(rows, rank)) @ draw.normal(size=(rank, columns))


@pytest.mark.parametrize(("rows", "columns", "rank"), RANKS.values(), ids=RANKS)
def test_the_svd_is_numpys(rows, columns, rank):
    given = matrix(rows, columns, rank)
    u, s, v = (part.numpy() for part in thin_svd(torch.from_numpy(given)))
    left, values, right = np.linalg.svd(given, full_matrices=False)
    assert u.shape == left.shape and s.shape == values.shape and v.shape == right.shape
    assert np.allclose(s, values, rtol=1e-9, atol=1e-12 * values[0]) and (np.diff(s) <= 0).all()
    assert np.allclose((u * s) @ v, given, rtol=0, atol=1e-12 * values[0])
    present = np.diag((np.arange(len(s)) < rank).astype(float))
    assert np.allclose(u.T @ u, present, atol=1e-9) and np.allclose(v @ v.T, present, atol=1e-9)
    for mine, numpys in ((u.T[:rank], left.T[:rank]), (v[:rank], right[:rank])):
        assert np.allclose(np.abs(np.sum(mine * numpys, axis=1)), 1.0, atol=1e-9), "the same directions, up to sign"


def test_float32_is_decomposed_in_float64():
    given = torch.from_numpy(matrix(8, 5, 5).astype(np.float32))
    parts = thin_svd(given)
    assert all(part.dtype == torch.float64 for part in parts)
    assert np.allclose(parts[1], np.linalg.svd(given.double().numpy(), compute_uv=False), rtol=1e-12)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_a_zero_matrix_has_no_directions(shape):
    assert all((part == 0).all() for part in thin_svd(torch.zeros(shape)))
    assert (polar_factor(torch.zeros(shape)) == 0).all()


@pytest.mark.parametrize("scale", [1e-150, 1e-20, 1e20, 1e150])
def test_the_scale_of_a_matrix_does_not_matter(scale):
    given = matrix(6, 5, 3)
    u, s, v = thin_svd(torch.from_numpy(scale * given))
    assert np.allclose(s / scale, np.linalg.svd(given, compute_uv=False), rtol=1e-9, atol=1e-12)
    assert np.allclose(((u * s) @ v) / scale, given, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(9, 4), (4, 9), (6, 6)])
def test_the_polar_factor_is_scipys(rows, columns):
    given = matrix(rows, columns, min(rows, columns))
    expected, _ = scipy.linalg.polar(given)
    assert np.allclose(polar_factor(torch.from_numpy(given)), expected, atol=1e-10)


def test_columns_that_repeat_share_one_direction():
    """Of two equal columns each gets half of the squared length; a missing direction is not made up."""
    column = np.array([[3.0], [0.0], [4.0]])
    got = polar_factor(torch.from_numpy(np.hstack([column, column])))
    assert np.allclose(got, np.hstack([column, column]) / 5 / np.sqrt(2), atol=1e-12)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e5])
def test_columns_of_very_different_lengths_become_orthonormal(condition):
    draw = np.random.default_rng(0)
    left, _ = np.linalg.qr(draw.normal(size=(30, 8)))
    right, _ = np.linalg.qr(draw.normal(size=(8, 8)))
    given = (left * np.geomspace(1, 1 / condition, 8)) @ right.T
    assert np.allclose(polar_factor(torch.from_numpy(given)), left @ right.T, atol=1e-6)
