from __future__ import annotations

import pytest
import torch

from dmm_cli.errors import DmmError
from dmm_cli.runtime import generator
from dmm_cli.synthesis.prior import draw_targets, from_counts, from_predictions


def test_counts_become_shares():
    assert from_counts([30, 0, 10], 3, "a").tolist() == [0.75, 0.0, 0.25]
    for counts in ([1, 2], [1, -1, 1], [0, 0, 0]):
        with pytest.raises(DmmError, match="class counts of a"):
            from_counts(counts, 3, "a")


def test_sure_answers_are_counted_and_doubts_are_not():
    sure = torch.eye(4)[[0] * 60 + [1] * 39 + [2]] * 20
    doubtful = torch.eye(4)[[3] * 50] * 0.1
    assert from_predictions(torch.cat([sure, doubtful])).tolist() == pytest.approx([0.6, 0.39, 0.01, 0.0])


def test_when_most_answers_are_doubtful_the_surer_half_counts():
    doubtful = torch.eye(3)[[0] * 6 + [1] * 4]
    assert from_predictions(doubtful).tolist() == pytest.approx([0.6, 0.4, 0.0])


@pytest.mark.parametrize("seed", range(5))
def test_targets_follow_the_prior_to_the_image(seed):
    prior = torch.tensor([0.5, 0.0, 0.25, 0.24, 0.01])
    targets = draw_targets(prior, 100, generator(seed))
    assert torch.bincount(targets, minlength=5).tolist() == [50, 0, 25, 24, 1]
    small = torch.bincount(draw_targets(prior, 10, generator(seed)), minlength=5)
    assert ((small - 10 * prior).abs() <= 1).all() and small.sum() == 10


def test_targets_are_shuffled_by_the_stream():
    prior = torch.full((10,), 0.1)
    first, again = (draw_targets(prior, 50, generator(0)) for _ in range(2))
    assert torch.equal(first, again) and first.tolist() != sorted(first.tolist())
