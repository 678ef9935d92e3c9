"""How readily a finished student names each class, set right.

A student is taught under noise and at a temperature, and its statistics are reset in the end. As it is then it leans to
some classes, most of all where it is unsure, so on images unlike those it was taught with. One number for each class,
added to its logits, makes it name every class of the pseudo-images as often as the committee does.

Legend: N images, B images of a batch, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..examples import Inputs, forward, hooked
from .lessons import BLOCK, Lessons

ITERATIONS = 100


@torch.no_grad()
def balance(student: nn.Module, lessons: Lessons, committee: nn.Module) -> None:
    """Shift the biases of the layer that gives the student's logits, in place; without such a layer nothing is done.

    Images count as if every class were equally likely.

    Args:
        student: left in eval mode. committee: gives logits (B, K) of inputs (B, C, H, W).
    """
    last = _answering(student.eval(), next(lessons.in_order(1)))
    if last is None:
        return
    batches = [(forward(student, part), committee(part)) for part in lessons.in_order(BLOCK)]
    given, wanted = (torch.cat(part).double() for part in zip(*batches, strict=True))  # (N, K) each
    last.bias += offsets(given, wanted.softmax(1), lessons.weights().to(given)).to(last.bias)


def offsets(logits: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What, added to logits, brings their mean probabilities to those wanted: (K,), their sum 0.

    Minimises ``sum_n w_n CE(wanted_n, softmax(logits_n + b))``, whose gradient is the difference of the two means
    (calibration by biases alone: Guo et al., ICML 2017), by L-BFGS.

    Args:
        logits: float64 (N, K). wanted: probabilities (N, K). weights: (N,).
    """
    shifts = logits.new_zeros(logits.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([shifts], max_iter=ITERATIONS, line_search_fn="strong_wolfe")
    shares = weights / weights.sum()

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        total = shares @ F.cross_entropy(logits + shifts, wanted, reduction="none")
        total.backward()
        return total

    with torch.enable_grad():
        optimiser.step(loss)
    return (shifts - shifts.mean()).detach()


def _answering(model: nn.Module, inputs: Inputs) -> nn.Linear | None:
    """The linear layer with biases whose output is the model's, if there is one."""
    said: dict[nn.Linear, torch.Tensor] = {}
    layers = [part for part in model.modules() if isinstance(part, nn.Linear) and part.bias is not None]
    with hooked(layer.register_forward_hook(lambda own, _, out: said.__setitem__(own, out)) for layer in layers):
        logits = forward(model, inputs)
    return next((layer for layer, out in said.items() if out is logits or torch.equal(out, logits)), None)
