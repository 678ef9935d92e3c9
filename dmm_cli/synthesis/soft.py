"""Embeddings that take weights of all tokens in place of tokens: there is a gradient with respect to weights.

Legend: B examples, V tokens of the vocabulary, E numbers of an embedding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import DmmError, printable
from ..examples import Examples, answer
from ..spaces import JointSpec, Spec, TokenSpec

TOLERANCE = 1e-4  # of the largest logit


class SoftEmbedding(nn.Embedding):
    """An embedding of tokens (B, ...) or of their weights (B, ..., V): (B, ..., E)."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens @ self.weight if tokens.is_floating_point() else super().forward(tokens)


def soften(model: nn.Module) -> nn.Module:
    """Make every plain embedding a ``SoftEmbedding``, in place."""
    for module in model.modules():
        if type(module) is nn.Embedding:
            module.__class__ = SoftEmbedding
    return model


def _numbers(*shape: int) -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, math.prod(shape)).view(shape)


@torch.no_grad()
def require_soft(label: str, model: nn.Module, spec: Spec, device: torch.device) -> None:
    """Raise DmmError unless a softened model answers to weights of one token each as it does to these tokens."""
    parts = spec.parts if isinstance(spec, JointSpec) else {}
    if not any(isinstance(part, TokenSpec) for part in parts.values()):
        return
    hard = {name: _numbers(2, *part.size).to(device) for name, part in parts.items()}
    soft = dict(hard)
    for name, part in parts.items():
        if isinstance(part, TokenSpec):
            places = torch.arange(2 * hard[name][0].numel(), device=device) % part.vocabulary
            hard[name] = places.view(2, *part.size)
            soft[name] = F.one_hot(hard[name], part.vocabulary).float()  # (2, ..., V)
    answers = answer(model, Examples(hard))
    try:
        difference = float((answer(model, Examples(soft)) - answers).abs().max() / answers.abs().max())
    except (DmmError, RuntimeError) as error:
        difference = str(error).splitlines()[0]
    if not isinstance(difference, float) or not difference <= TOLERANCE:
        raise DmmError(
            f"{label} uses tokens otherwise than through its embedding, so they cannot be inverted",
            evidence=[f"with weights of tokens in their place: {printable(str(difference))}"],
            hint="let the network do with tokens nothing but look them up in nn.Embedding layers",
        )
