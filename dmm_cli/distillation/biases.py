"""The last biases of a finished student, calibrated: how readily it names each class.

A student is taught under noise and at a temperature, and its statistics are reset in the end. As it is then it leans to
some classes, most of all where it is unsure, so on images unlike those it was taught with. One number for each class,
added to its logits, makes it name every class of the pseudo-images as often as the committee does.

Legend: N images, B images of a batch, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..examples import Inputs, answer, floored, hooked
from .convex import minimise
from .lessons import BLOCK, Lessons


@torch.no_grad()
def calibrate_biases(student: nn.Module, lessons: Lessons, committee: nn.Module) -> None:
    """Shift the biases of the layer that gives the student's logits, in place; without such a layer nothing is done.

    Images count as if every class were equally likely.

    Args:
        student: left in eval mode. committee: gives logits (B, K) of inputs (B, C, H, W).
    """
    last = _answering(student.eval(), next(lessons.in_order(1)))
    if last is None:
        return
    batches = [(answer(student, part), committee(part)) for part in lessons.in_order(BLOCK)]
    given, wanted = (torch.cat(part).double() for part in zip(*batches, strict=True))  # (N, K) each
    last.bias += offsets(given, wanted.softmax(1), lessons.weights().to(given)).to(last.bias)


def offsets(logits: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What, added to logits, brings their mean probabilities to those wanted: (K,), their sum 0.

    Minimises ``sum_n w_n CE(wanted_n, softmax(logits_n + b))``, whose gradient is the difference of the two means
    (vector scaling of Guo et al., ICML 2017, of which the offsets alone).

    Args:
        logits: float64 (N, K). wanted: probabilities (N, K). weights: (N,).
    """
    shifts = logits.new_zeros(logits.shape[1], requires_grad=True)
    shares, finite = weights / weights.sum(), floored(logits)
    minimise(lambda: shares @ F.cross_entropy(finite + shifts, wanted, reduction="none"), [shifts])
    return (shifts - shifts.mean()).detach()


def _answering(model: nn.Module, inputs: Inputs) -> nn.Linear | None:
    """The linear layer with biases whose output is the model's, if there is one."""
    said: dict[nn.Linear, torch.Tensor] = {}
    layers = [part for part in model.modules() if isinstance(part, nn.Linear) and part.bias is not None]
    with hooked(layer.register_forward_hook(lambda own, _, out: said.__setitem__(own, out)) for layer in layers):
        logits = answer(model, inputs)
    return next((layer for layer, out in said.items() if torch.equal(out, logits)), None)
