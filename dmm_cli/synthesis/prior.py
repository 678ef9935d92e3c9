"""Which classes a teacher was trained on, and how often: estimated without any data."""

from __future__ import annotations

import torch

from ..errors import DmmError

SUPPORT_FLOOR = 0.01  # classes rarer than this are outside the teacher's support
SURE = 0.9  # probability from which an answer counts, unless most answers are below it


def from_counts(counts: list[float], num_classes: int, label: str) -> torch.Tensor:
    """Class prior (K,) from sample counts, summing to 1.

    Raises:
        DmmError: the list does not fit the classifier, or holds a negative number or only zeros.
    """
    if len(counts) != num_classes or min(counts) < 0 or sum(counts) <= 0:
        raise DmmError(
            f"class counts of {label} do not describe a class mix",
            evidence=[f"{len(counts)} counts for {num_classes} classes: {counts}"],
            hint="give one count of zero or more per class, at least one above zero",
        )
    prior = torch.tensor(counts, dtype=torch.float64)
    return (prior / prior.sum()).float()


def from_predictions(logits: torch.Tensor) -> torch.Tensor:
    """Class prior (K,) from a teacher's logits (B, K) over images that match its statistics.

    Images inverted on the statistics alone follow the class mix that produced these statistics. What
    the teacher is sure of is counted; classes under one per cent are dropped.
    """
    confidence, answers = logits.float().softmax(1).max(1)  # (B,)
    sure = answers[confidence >= min(SURE, float(confidence.median()))]
    prior = torch.bincount(sure, minlength=logits.shape[1]) / len(sure)  # (K,)
    prior = torch.where(prior < SUPPORT_FLOOR, torch.zeros_like(prior), prior)
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
