"""Which classes a teacher was trained on, and how often: estimated without any data."""

from __future__ import annotations

import torch

from ..metadata import require_class_mix

FLOOR = 0.0125  # classes of a smaller share are outside the teacher's support
FLOOR_OF_UNIFORM = 0.125  # or of less than this in 1 / K: smoothed labels give .1 / K to what was never seen


def from_counts(counts: list[float], num_classes: int, label: str) -> torch.Tensor:
    """Class prior (K,) from sample counts, summing to 1.

    Raises:
        DmmError: the list does not fit the classifier, or holds a negative number or only zeros.
    """
    require_class_mix(counts, num_classes, label)
    prior = torch.tensor(counts, dtype=torch.float64)
    return (prior / prior.sum()).float()


def from_predictions(logits: torch.Tensor) -> torch.Tensor:
    """Class prior (K,) from a teacher's logits (B, K) over images that match its statistics.

    A classifier that was trained to the minimum of the cross-entropy gives each class, on average over its training
    data, the probability of the share that it has of them: the derivative by the class's bias is their difference.
    Images inverted on the statistics alone follow the mix that produced these statistics, so their average tells it,
    and a rare class, of which a teacher is seldom sure, has its share. What is below ``FLOOR`` is dropped.
    """
    shares = logits.float().softmax(1).mean(0)  # (K,)
    known = shares >= min(FLOOR, FLOOR_OF_UNIFORM / len(shares))
    prior = torch.where(known, shares, torch.zeros_like(shares))
    return prior / prior.sum()


def draw_targets(prior: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Class labels (count,) in the proportions of the prior (K,), in random order.

    Systematic sampling: every class gets its share rounded up or down, so that a rare class is
    never missed by bad luck when its share of ``count`` is one image or more.
    """
    offset = torch.rand((), generator=generator)
    positions = (torch.arange(count) + offset) / count  # (count,)
    targets = torch.searchsorted(prior.double().cumsum(0), positions.double(), right=True)
    targets = targets.clamp_max(int(prior.nonzero().max()))
    return targets[torch.randperm(count, generator=generator)]
