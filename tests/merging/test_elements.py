"""Methods on single elements: TIES against a plain loop, DARE against probabilities.

Legend: N tasks, n elements.
"""

from __future__ import annotations

import numpy as np
import pytest
from conftest import merged, normal

from dmm_cli.merging.drop import drop_and_rescale
from dmm_cli.merging.method import Block


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
