from __future__ import annotations

import pytest
import torch
from torch import nn

from dmm_cli.errors import DmmError
from dmm_cli.signature import examples_of, joint_spec
from dmm_cli.spaces import JointSpec, TokenSpec
from dmm_cli.synthesis.soft import require_soft, soften

CPU = torch.device("cpu")


class Reader(nn.Module):
    """Words and their places; ``masked`` also counts the words that are not zero."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.words, self.places, self.masked = nn.Embedding(7, 3), nn.Embedding(4, 3), masked

    def forward(self, words: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        seen = self.words(words) + self.places(torch.arange(4))
        return seen.sum(1) * scale + ((words != 0).sum(1, keepdim=True) if self.masked else 0)

    def example_inputs(self) -> dict[str, torch.Tensor]:
        return {"words": torch.tensor([[0, 1, 2, 3]]), "scale": torch.zeros(1, 3)}


def test_the_vocabulary_is_that_of_the_embedding_that_looks_the_tokens_up():
    model = Reader()
    spec = joint_spec("reader", model, examples_of(model), {"scale": {"std": [2.0]}}, (), ())
    assert isinstance(spec, JointSpec) and spec.names == ("scale", "words")
    assert spec.parts["words"] == TokenSpec((4,), 7) and spec.parts["scale"].std == (2.0,)
    model.words = nn.Identity()
    with pytest.raises(DmmError, match="Reader does not take its example_inputs"):
        joint_spec("reader", model, examples_of(model), {}, (), ())


def test_weights_of_tokens_mix_rows_and_reach_them_by_a_gradient():
    model = soften(Reader())
    weights = torch.rand(2, 4, 7, requires_grad=True)
    scale = torch.rand(2, 3)
    answer = model(weights, scale)
    wanted = (weights @ model.words.weight + model.places.weight).sum(1) * scale
    assert torch.allclose(answer, wanted)
    answer.sum().backward()
    assert torch.allclose(weights.grad, (scale @ model.words.weight.T)[:, None].expand(2, 4, 7), atol=1e-6)


def test_tokens_that_do_more_than_be_looked_up_are_refused():
    for masked in (False, True):
        model = soften(Reader(masked))
        spec = joint_spec("reader", model, examples_of(model), {}, (), ())
        if not masked:
            require_soft("reader", model, spec, CPU)
            continue
        with pytest.raises(DmmError, match="reader uses tokens otherwise than through its embedding"):
            require_soft("reader", model, spec, CPU)
