"""Which teacher answers for which image.

The owner of an inverted image is known by construction, so its own logits are the soft labels. A
teacher cannot tell the classes it never saw from one another; its answer is masked to its support.

Legend: N images, T teachers, K classes.
"""

from __future__ import annotations

import torch

MASKED = -1e4  # far below any logit, finite so that 0 * log 0 never appears


def soft_labels(
    logits: torch.Tensor, teacher_id: torch.Tensor, priors: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Class probabilities (N, K) of every image's owner at a temperature, zero outside the owner's support.

    Args:
        logits: (N, K), each row from the image's owner.
        teacher_id: (N,), row of ``priors``.
        priors: (T, K), zero where a teacher has no support.
    """
    outside = priors[teacher_id] == 0  # (N, K)
    return (logits.float() / temperature).masked_fill(outside, MASKED).softmax(1)
