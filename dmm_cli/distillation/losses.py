"""What the student is taught with.

Legend: B images, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def distillation(student_logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """``T^2 KL(labels || softmax(student / T))``, mean over the batch (Hinton et al., 2015).

    Args:
        student_logits: (B, K). labels: probabilities (B, K), already at the temperature.
    """
    predicted = (student_logits / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(predicted, labels, reduction="batchmean")


def anchor(
    student_logits: torch.Tensor, initial_logits: torch.Tensor, mask: torch.Tensor, temperature: float
) -> torch.Tensor:
    """``T^2 KL`` to the student's own first answers, over the images in ``mask`` (B,), mean over the batch.

    Holds what merging kept: only images of teachers whose weights are in the student are anchored.
    """
    before = (initial_logits / temperature).softmax(1)
    after = (student_logits / temperature).log_softmax(1)
    divergence = F.kl_div(after, before, reduction="none").sum(1)  # (B,)
    return temperature**2 * (divergence * mask).mean()
