"""The contract every merge method keeps, then the closed form of each."""

from __future__ import annotations

import numpy as np
import pytest

from dmm_cli.errors import DmmError
from dmm_cli.merging import METHODS
from dmm_cli.merging.linear import linear
from dmm_cli.merging.method import Block, effective_parameters
from dmm_cli.merging.slerp import slerp
from dmm_cli.merging.task_arithmetic import task_arithmetic


def block(count: int, seed: int = 0, size: int = 50, weights=None, base=True) -> Block:
    draw = np.random.default_rng(seed)
    values = draw.normal(size=(count, size))
    return Block(
        values,
        np.ones(count) if weights is None else np.array(weights, float),
        draw.normal(size=size) if base else None,
        values @ values.T,
    )


def size_of(name: str) -> int:
    return 2 if "pair" in METHODS.traits(name) else 3


@pytest.mark.parametrize("name", METHODS.names())
def test_contract(name):
    method = METHODS.load(name)
    given = block(size_of(name))
    values, base = given.values.copy(), given.base.copy()
    merged = method(given)
    assert merged.shape == base.shape and merged.dtype == np.float64 and np.isfinite(merged).all()
    assert (given.values == values).all() and (given.base == base).all(), "inputs are not changed"
    order = np.arange(size_of(name))[::-1]
    turned = Block(values[order], given.weights[order], base, given.gram[np.ix_(order, order)])
    assert np.allclose(method(turned), merged), "the order of checkpoints does not matter"
    single = Block(values[:1], np.ones(1), values[0], given.gram[:1, :1])
    assert (method(single) == values[0]).all() if name == "linear" else True
    assert METHODS.summary(name)


@pytest.mark.parametrize("name", METHODS.names())
def test_equal_checkpoints_at_the_base_come_back_bit_for_bit(name):
    row = np.random.default_rng(3).normal(size=40).astype(np.float32).astype(np.float64)
    values = np.stack([row] * size_of(name))
    merged = METHODS.load(name)(Block(values, np.ones(len(values)), row, values @ values.T))
    assert (merged == row).all()


def test_linear_is_the_weighted_mean():
    given = block(3, weights=[3, 1, 0])
    assert np.allclose(linear(given), np.average(given.values, axis=0, weights=[3, 1, 0]), rtol=1e-13)


def test_task_arithmetic_adds_scaled_task_vectors():
    given = block(2, weights=[1, 2])
    expected = given.base + 0.5 * ((given.values[0] - given.base) + 2 * (given.values[1] - given.base))
    assert np.allclose(task_arithmetic(given, scale=0.5), expected, rtol=1e-13)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_slerp_walks_the_circle_at_constant_speed(share):
    """On the unit circle the answer is known: the point at ``share`` of the angle."""
    angle = 1.2
    values = np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
    merged = slerp(Block(values, np.array([1 - share, share]), None, values @ values.T))
    assert np.allclose(merged, [np.cos(share * angle), np.sin(share * angle)], atol=1e-14)


def test_slerp_of_collinear_opposite_or_zero_tensors_is_linear():
    for other in ([2.0, 0.0], [-1.0, 0.0], [0.0, 0.0]):
        values = np.array([[1.0, 0.0], other])
        assert np.allclose(slerp(Block(values, np.ones(2), None, values @ values.T)), values.mean(0))


def test_parameters_are_the_keyword_arguments():
    assert effective_parameters(task_arithmetic, {}) == {"scale": 0.3}
    assert effective_parameters(task_arithmetic, {"scale": 1.0}) == {"scale": 1.0}
    with pytest.raises(DmmError) as error:
        effective_parameters(task_arithmetic, {"scael": 1.0})
    assert error.value.hint == "did you mean scale?"
