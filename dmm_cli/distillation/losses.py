"""What the student is taught with.

Legend: B images, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..examples import floored


def distillation(student_logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """``T^2 KL(labels || softmax(student / T))``, mean over the batch (Hinton et al., 2015).

    Args:
        student_logits: (B, K). labels: probabilities (B, K), already at the temperature.
    """
    predicted = (floored(student_logits) / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(predicted, labels, reduction="batchmean")
