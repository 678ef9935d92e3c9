from __future__ import annotations

import pytest
import torch

from dmm_cli.examples import Examples, cat, each, forward, hooked, joined, named
from dmm_cli.images import InputSpec
from dmm_cli.spaces import JointSpec, TokenSpec, space_of

A, B = torch.arange(12.0).view(6, 2), torch.arange(6) % 3


def same(left: Examples, right: Examples) -> bool:
    return left.parts.keys() == right.parts.keys() and all(
        torch.equal(left.parts[name], right.parts[name]) for name in left.parts
    )


def test_examples_have_the_rows_of_each_input():
    whole = Examples({"a": A, "b": B})
    assert len(whole) == 6
    assert same(whole[torch.tensor([4, 1])], Examples({"a": A[[4, 1]], "b": B[[4, 1]]}))
    assert same(whole[1::2], Examples({"a": A[1::2], "b": B[1::2]}))
    assert [len(part) for part in whole.split([1, 5])] == [1, 5]
    assert same(cat(list(whole.split(4))), whole) and torch.equal(cat([A[:2], A[2:]]), A)
    held = whole.clone()
    held.copy_(each(whole, lambda part: part + 1))
    assert same(held, Examples({"a": A + 1, "b": B + 1})) and A[0, 0] == 0


def test_one_input_goes_by_position_and_several_by_name():
    assert named(A) == {"images": A} and joined({"images": A}) is A
    assert forward(lambda x: x, A) is A
    assert torch.equal(forward(lambda b, a: a * 10 + b[:, None], Examples({"a": A, "b": B})), A * 10 + B[:, None])


def test_each_input_has_a_space_of_its_own():
    parts = (InputSpec((1, 1, 2), (0.5,), (0.25,)), TokenSpec((2,), 3), InputSpec((2,), (1.0, 2.0), (2.0, 4.0)))
    space = space_of(JointSpec(("image", "tokens", "vector"), parts))
    raw = Examples(
        {
            "image": torch.tensor([[[[0.0, 100.0]]]]),
            "tokens": torch.tensor([[[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]]]),
            "vector": torch.tensor([[1.0, -1.0]]),
        }
    )
    seen = space.draw(raw)
    assert seen.parts["image"].tolist() == [[[[0.0, 2.0]]]], "a sigmoid, then mean and deviation"
    assert seen.parts["tokens"].tolist() == [[[1, 0, 0], [0, 0, 1]]], "one token each"
    kept = space.to_bytes(seen)
    assert kept.parts["image"].tolist() == [[[[128, 255]]]] and kept.parts["image"].dtype == torch.uint8
    assert kept.parts["tokens"].tolist() == [[0, 2]] and kept.parts["vector"].tolist() == [[3.0, -2.0]]
    back = space.from_bytes(kept)
    assert back.parts["tokens"].tolist() == [[0, 2]] and back.parts["vector"].tolist() == [[1.0, -1.0]]


def test_hooks_are_taken_off_when_a_pass_fails():
    layer, seen = torch.nn.Linear(2, 2), []
    with pytest.raises(RuntimeError), hooked([layer.register_forward_pre_hook(lambda *_: seen.append(1))]):
        layer(torch.zeros(1, 3))
    layer(torch.zeros(1, 2))
    assert seen == [1]
