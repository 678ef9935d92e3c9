from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dmm_cli.errors import DmmError
from dmm_cli.runtime import generator
from dmm_cli.synthesis.prior import draw_targets, from_counts, from_predictions


def test_counts_become_shares():
    assert from_counts([30, 0, 10], 3, "a").tolist() == [0.75, 0.0, 0.25]
    for counts in ([1, 2], [1, -1, 1], [0, 0, 0]):
        with pytest.raises(DmmError, match="class counts of a"):
            from_counts(counts, 3, "a")


def test_of_a_classifier_at_its_minimum_the_shares_of_its_training_data_are_found():
    """Classes overlap, so that the rarest, 30 of 1,380 examples, is seldom the likeliest."""
    draw = np.random.default_rng(0)
    counts = [1000, 0, 350, 30]
    labels = np.repeat(range(4), counts)
    features = draw.normal(size=(len(labels), 3)) + 1.2 * np.eye(4, 3)[labels]
    fitted = LogisticRegression(C=1e6, max_iter=1000, tol=1e-8).fit(features, labels)
    logits = np.full((len(labels), 4), -30.0)
    logits[:, fitted.classes_] = fitted.decision_function(features)
    assert (logits.argmax(1) == 3).mean() < 0.01
    expected = np.array(counts) / sum(counts)
    assert from_predictions(torch.from_numpy(logits)).tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_what_is_below_the_floor_is_dropped():
    shares = torch.tensor([0.6, 0.377, 0.013, 0.01])
    kept = from_predictions(shares.log().repeat(20, 1))
    assert kept.tolist() == pytest.approx([0.6 / 0.99, 0.377 / 0.99, 0.013 / 0.99, 0.0])


@pytest.mark.parametrize("classes", [1, 10, 200, 1000])
def test_of_many_even_classes_none_is_dropped_and_smoothed_labels_add_none(classes):
    """Half of the classes were seen, labels smoothed by a tenth."""
    seen = torch.eye(classes)[: (classes + 1) // 2]
    prior = from_predictions((0.9 * seen + 0.1 / classes).log())
    assert prior.sum() == pytest.approx(1.0) and ((prior > 0) == seen.any(0)).all()


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
