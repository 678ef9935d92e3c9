"""All teachers as one: who is to be believed is learned from their pseudo-data.

A teacher of two classes sees one of them in whatever it is shown, so a mean of teachers guesses wrong where each knows
its own classes alone. How all of them answer to the images of one is known from the pseudo-data, and a multinomial
logistic regression on their logits side by side learns it: stacking (Wolpert, 1992), without data. Unlike the owner of
an image it can answer for images that belong to nobody, and of a deformed image it says what it shows now.

Legend: N images, B images of a batch, T teachers, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..examples import Inputs, forward

RIDGE = 5.0  # weight of the squared slopes beside the loss of all images; of 5,000, half and ten times it measure alike
ITERATIONS = 200


class Committee(nn.Module):
    """Logits of inputs, from the logits of all teachers.

    Args:
        teachers: frozen networks of one list of classes. images: batches (B, C, H, W) of pseudo-images.
        targets: of all images (N,). weights: of all images (N,), by which they count.
    """

    def __init__(
        self, teachers: Sequence[nn.Module], images: Iterable[Inputs], targets: torch.Tensor, weights: torch.Tensor
    ) -> None:
        super().__init__()
        self._teachers = nn.ModuleList(teachers)
        with torch.no_grad():
            seen = torch.cat([self._side_by_side(part) for part in images]).double().cpu()  # (N, T K)
        mean, scale = seen.mean(0), seen.std(0, correction=0).clamp_min(1e-6)
        classes = seen.shape[1] // len(teachers)
        slopes, offsets = fit((seen - mean) / scale, targets.cpu(), weights.double().cpu(), classes)
        slopes = slopes / scale[:, None]
        device = targets.device
        self.register_buffer("slopes", slopes.float().to(device))  # (T K, K)
        self.register_buffer("offsets", (offsets - mean @ slopes).float().to(device))  # (K,)

    def forward(self, inputs: Inputs) -> torch.Tensor:
        """Logits, float32 (B, K)."""
        return self._side_by_side(inputs) @ self.slopes + self.offsets

    def _side_by_side(self, inputs: Inputs) -> torch.Tensor:
        return torch.cat([forward(teacher, inputs).float() for teacher in self._teachers], 1)  # (B, T K)


def fit(
    features: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multinomial logistic regression with a ridge on its slopes, by L-BFGS.

    Minimises ``N sum_n w_n CE(x_n S + o, y_n) / sum_n w_n + RIDGE |S|^2``.

    Args:
        features: float64 (N, D). targets: (N,). weights: (N,).

    Returns:
        Slopes (D, K) and offsets (K,).
    """
    slopes = torch.zeros(features.shape[1], classes, dtype=features.dtype, requires_grad=True)
    offsets = torch.zeros(classes, dtype=features.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([slopes, offsets], max_iter=ITERATIONS, line_search_fn="strong_wolfe")
    shares = weights / weights.sum()

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        errors = F.cross_entropy(features @ slopes + offsets, targets, reduction="none")
        total = shares @ errors + RIDGE / len(targets) * slopes.square().sum()
        total.backward()
        return total

    optimiser.step(loss)
    return slopes.detach(), offsets.detach()
