"""One operation between two layers: the groups it leaves, counted by hand, and the function unchanged."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmm_cli.alignment.apply import random_image
from dmm_cli.alignment.rules import RULES
from dmm_cli.alignment.trace import export, trace
from dmm_cli.alignment.verify import verify
from dmm_cli.errors import DmmError

WIDTH, TOKENS = 8, 4


class Between(nn.Module):
    """Tokens (batch, TOKENS, WIDTH) of a layer, an operation on them, and another layer."""

    def __init__(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.operation = nn.Linear(5, WIDTH), operation
        self.last = nn.Linear(operation(torch.zeros(1, TOKENS, WIDTH)).shape[-1], 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.operation(self.first(x).sigmoid()))


def shared_keys(heads: torch.Tensor) -> torch.Tensor:
    """Four heads (batch, 4, TOKENS, 2), the keys of the first two and their values for all."""
    few = heads[:, :2]
    return F.scaled_dot_product_attention(heads, few, few, enable_gqa=True).transpose(1, 2).flatten(-2)


FREE, NOTHING = [8], []
CASES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], list[int]]] = {
    "softmax over units": (lambda h: h.softmax(-1), FREE),
    "softmax over tokens": (lambda h: h.softmax(1), FREE),
    "mean over tokens": (lambda h: h.mean(1), FREE),
    "norm of units": (lambda h: h / h.norm(dim=-1, keepdim=True), FREE),
    "layer norm": (lambda h: F.layer_norm(h, (WIDTH,)), FREE),
    "root mean square norm": (lambda h: F.rms_norm(h, (WIDTH,)), FREE),
    "layer norm over tokens too": (lambda h: F.layer_norm(h, (TOKENS, WIDTH)), FREE),
    "channels first": (lambda h: F.avg_pool1d(h.transpose(1, 2), 2).transpose(1, 2), FREE),
    "group norm": (lambda h: F.group_norm(h.transpose(1, 2), 4).transpose(1, 2), [8]),
    "attention over tokens": (lambda h: F.scaled_dot_product_attention(h, h, h), FREE),
    "causal attention": (lambda h: F.scaled_dot_product_attention(h, h, h, is_causal=True), FREE),
    "heads that share keys": (lambda h: shared_keys(h.unflatten(-1, (4, 2)).transpose(1, 2)), NOTHING),
    "a vector turned": (lambda h: h * torch.arange(WIDTH).t(), NOTHING),
    "product of tokens": (lambda h: h @ h.transpose(1, 2) @ h, FREE),
    "unused units are a group of their own": (lambda h: h.narrow(-1, 2, 4), [4, 4]),
    "first and last units": (lambda h: torch.cat([h[..., 6:], h[..., :2]], -1), [2, 2, 4]),
    "every other unit": (lambda h: h[..., ::2], [4, 4]),
    "gated linear unit": (lambda h: F.glu(h), [4]),
    "halves that are averaged": (lambda h: h.unflatten(-1, (2, 4)).mean(-2), [4]),
    "copies behind one another": (lambda h: h.repeat(1, 1, 2), FREE),
    "copies side by side": (lambda h: torch.stack([h, h], -1).flatten(-2), FREE),
    "an unlike copy": (lambda h: torch.cat([h, h.tanh()], -1), FREE),
    "shuffled channels": (lambda h: h.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2), FREE),
    "units among constants": (lambda h: torch.cat([h, torch.ones(len(h), TOKENS, 2)], -1), FREE),
    "tokens flattened into units": (lambda h: h.flatten(1), FREE),
    "one unit picked": (lambda h: h[..., 3:4], NOTHING),
    "positions added": (lambda h: h + torch.arange(WIDTH), NOTHING),
    "rolled": (lambda h: h.roll(1, -1), NOTHING),
    "rolled tokens": (lambda h: h.roll(1, 1), FREE),
    "padded": (lambda h: F.pad(h, (1, 1)), NOTHING),
    "padded tokens": (lambda h: F.pad(h, (0, 0, 1, 1)), FREE),
    "running sum": (lambda h: h.cumsum(-1), NOTHING),
    "flipped": (lambda h: h.flip(-1), NOTHING),
    "sorted": (lambda h: h.sort(-1).values, NOTHING),
    "rotated heads": (lambda h: (h.unflatten(-1, (2, 4)) * torch.arange(4.0)).flatten(-2), [8]),
}


@pytest.mark.parametrize("case", CASES)
def test_groups_and_function(case):
    operation, sizes = CASES[case]
    model = Between(operation).eval()
    spec = trace(model, (TOKENS, 5))
    assert sorted(group.size for group in spec.groups) == sizes
    image = random_image(spec, np.random.default_rng(1))
    assert verify(case, model, spec, image, (TOKENS, 5)) < 1e-12


def test_rotated_heads_change_places_and_their_units_do_not():
    (group,) = trace(Between(CASES["rotated heads"][0]).eval(), (TOKENS, 5)).groups
    assert len(group.blocks) == 2 and [role.shape for role in group.roles] == [(2, 1)] * 4


def test_without_a_rule_the_table_is_what_decides():
    model = Between(lambda h: h.cumsum(-1).sort(-1).values).eval()
    names = {
        str(node.target).split(".")[1] for node in export(model, (TOKENS, 5)).graph.nodes if "aten" in str(node.target)
    }
    assert {"cumsum", "sort"} <= names - set(RULES) and {"linear", "sigmoid"} <= set(RULES)


def test_what_a_rule_was_not_written_for_is_told(monkeypatch):
    monkeypatch.setitem(RULES, "sigmoid", lambda units, shape, value: value.axes[7])
    with pytest.raises(DmmError, match="cannot be followed through sigmoid") as error:
        trace(Between(lambda h: h).eval(), (TOKENS, 5))
    assert "IndexError" in error.value.evidence[0] and "--align never" in error.value.hint
