"""Where a student starts: from the checkpoint that knows most of what it is to be taught."""

from __future__ import annotations

import torch
from torch import nn

from ..examples import answer
from .lessons import BLOCK, Lessons


@torch.no_grad()
def agreement(model: nn.Module, lessons: Lessons) -> torch.Tensor:
    """Whether a model, as it is, names the target of every image: bool (N,)."""
    model.eval()
    answers = torch.cat([answer(model, part).argmax(1) for part in lessons.in_order(BLOCK)])
    return answers == lessons.targets


def retained(model: nn.Module, lessons: Lessons) -> float:
    """Share of the targets that a model names, in per cent, every class counting alike."""
    hits = agreement(model, lessons).cpu().double()
    weights = lessons.weights().double()
    return 100.0 * float(hits @ weights / weights.sum())
