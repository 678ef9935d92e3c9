"""How surely the teacher sees the wanted class."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import Observation


def cross_entropy(seen: Observation) -> torch.Tensor:
    """Cross-entropy of logits (B, K) against targets (B,), a scalar."""
    return F.cross_entropy(seen.logits.float(), seen.targets)
