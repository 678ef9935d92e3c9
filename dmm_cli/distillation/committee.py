"""All teachers as one: who is to be believed is learned from their pseudo-data.

A teacher of two classes sees one of them in whatever it is shown, so a mean of teachers guesses wrong where each knows
its own classes alone. How all of them answer to the images of one is known from the pseudo-data, and a multinomial
logistic regression on what they say, side by side, learns it: stacking (Wolpert, 1992), without data. Unlike the owner
of an image it can answer for images that belong to nobody, and of a deformed image it says what it shows now.

What a teacher says are its logits, and the features that they are made from: these tell classes apart that the teacher
has no names for.

Legend: N images, B images of a batch, T teachers, K classes, F features of a teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..examples import Inputs, answer, floored, hooked, on_input, require_finite
from .convex import minimise

RIDGE = 200.0  # weight of the squared slopes beside the loss of all images; of 10,000, three times it measures alike


class Committee(nn.Module):
    """Logits of inputs, from what all teachers say of them.

    Args:
        teachers: frozen networks of one list of classes. images: batches (B, C, H, W) of pseudo-images.
        targets: of all images (N,). weights: of all images (N,), by which they count. classes: how many there are.
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        images: Iterable[Inputs],
        targets: torch.Tensor,
        weights: torch.Tensor,
        classes: int,
    ) -> None:
        super().__init__()
        self._teachers = nn.ModuleList(teachers)
        with torch.no_grad():
            seen = torch.cat([self._side_by_side(part) for part in images]).double()  # (N, T (K + F))
        mean, scale = seen.mean(0), seen.std(0, correction=0).clamp_min(1e-6)
        slopes, offsets = fit(seen.sub_(mean).div_(scale), targets, weights.to(mean), classes)
        slopes = slopes / scale[:, None]
        self.register_buffer("slopes", slopes.float())  # (T (K + F), K)
        self.register_buffer("offsets", (offsets - mean @ slopes).float())  # (K,)

    def forward(self, inputs: Inputs) -> torch.Tensor:
        """Logits, float32 (B, K)."""
        return self._side_by_side(inputs) @ self.slopes + self.offsets

    def _side_by_side(self, inputs: Inputs) -> torch.Tensor:
        return torch.cat([_testimony(teacher, inputs) for teacher in self._teachers], 1)  # (B, T (K + F))


def _testimony(teacher: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Logits and what the last linear layer is given, mean over places if there are any: float32 (B, K + F).

    Of a network without a linear layer the logits alone, (B, K).

    Raises:
        DmmError: logits are NaN or infinite.
    """
    held: list[torch.Tensor] = []
    last = [module for module in teacher.modules() if isinstance(module, nn.Linear)][-1:]
    with hooked(on_input(layer, held.append) for layer in last):
        logits = answer(teacher, inputs)
    require_finite(teacher, logits)
    rows = [part for part in held[-1:] if len(part) == len(logits)]  # not of one that works on places as rows
    features = [part.flatten(1, -2).mean(1) if part.dim() > 2 else part for part in rows]  # (B, F)
    return torch.cat([floored(logits.float()), *[part.float() for part in features]], 1)


def fit(
    features: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multinomial logistic regression with a ridge on its slopes.

    Minimises ``N sum_n w_n CE(x_n S + o, y_n) / sum_n w_n + RIDGE |S|^2``.

    Args:
        features: float64 (N, D). targets: (N,). weights: (N,).

    Returns:
        Slopes (D, K) and offsets (K,).
    """
    slopes = features.new_zeros(features.shape[1], classes, requires_grad=True)
    offsets = features.new_zeros(classes, requires_grad=True)
    shares = weights / weights.sum()

    def loss() -> torch.Tensor:
        errors = F.cross_entropy(features @ slopes + offsets, targets, reduction="none")
        return shares @ errors + RIDGE / len(targets) * slopes.square().sum()

    minimise(loss, [slopes, offsets])
    return slopes.detach(), offsets.detach()
