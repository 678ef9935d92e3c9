"""What the example inputs of a network tell of it."""

from __future__ import annotations

import torch
from torch import nn

from dmm_cli.signature import examples_of, vocabularies


class Pair(nn.Module):
    """Two sentences, each in a language of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(5, 4), nn.Embedding(9, 4)
        tokens = torch.zeros(2, 3, dtype=torch.int64)
        self.example_inputs = {"first": tokens, "second": tokens}

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (self.first(first) + self.second(second)).mean(1)


def test_one_tensor_may_be_the_example_of_several_inputs():
    model = Pair()
    assert vocabularies(model, examples_of(model)) == {"first": 5, "second": 9}
