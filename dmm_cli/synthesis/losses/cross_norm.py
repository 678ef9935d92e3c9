"""How far a batch is, in another teacher's network, from what was recorded there of the teacher's own data."""

from __future__ import annotations

import torch

from . import Observation
from .norm import divergence


def cross_norm(seen: Observation) -> torch.Tensor:
    """As ``norm``, in the network of another teacher; 0 where nothing was recorded.

    A teacher that saw one class has hardly learned to see, and its own statistics tell little of its images; the
    networks of others see them better. The use of such statistics is our addition.
    """
    return divergence(seen.elsewhere) if seen.elsewhere else seen.logits.new_zeros((), dtype=torch.float32)
