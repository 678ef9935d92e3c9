"""Where a student starts: from the checkpoint that knows most of what it is to be taught."""

from __future__ import annotations

import torch
from torch import nn

from ..examples import answer, require_finite
from .lessons import BLOCK, Lessons


def agreement(model: nn.Module, lessons: Lessons) -> torch.Tensor:
    """Whether a model, as it is, names the target of every image: bool (N,)."""
    return _logits(model, lessons).argmax(1) == lessons.targets


@torch.no_grad()
def _logits(model: nn.Module, lessons: Lessons) -> torch.Tensor:
    model.eval()
    return torch.cat([answer(model, part) for part in lessons.in_order(BLOCK)])  # (N, K)


def retained(model: nn.Module, lessons: Lessons) -> float:
    """Share of the targets that a model names, in per cent, every class counting alike.

    Raises:
        DmmError: it answers with NaN or infinity.
    """
    logits = _logits(model, lessons)
    require_finite(model, logits)
    hits = (logits.argmax(1) == lessons.targets).cpu().double()
    weights = lessons.weights().double()
    return 100.0 * float(hits @ weights / weights.sum())
