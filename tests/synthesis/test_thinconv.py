from __future__ import annotations

import pytest
import torch
from torch import nn

from dmm_cli.synthesis import thinconv
from dmm_cli.synthesis.thinconv import FrozenStem, fold_stems


@pytest.mark.parametrize(
    ("channels", "size", "kernel", "stride", "padding"),
    [(1, (16, 16), 7, 2, 3), (3, (9, 12), 3, 1, 1), (3, (10, 7), (4, 2), (3, 2), 0)],
)
def test_a_stem_has_autograds_gradient(monkeypatch, channels, size, kernel, stride, padding):
    monkeypatch.setattr(thinconv, "BLOCK", 1000)  # several blocks, the last one short
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 8, kernel, stride, padding).requires_grad_(False)
    images = torch.randn(5, channels, *size, requires_grad=True)
    expected = conv(images)
    weights = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), images)
    model = fold_stems(nn.Sequential(conv))
    answer = model(images)
    (gradient,) = torch.autograd.grad((answer * weights).sum(), images)
    assert isinstance(conv, FrozenStem)
    assert torch.equal(answer, expected)
    assert torch.allclose(gradient, expected_gradient, atol=1e-5)


def test_other_convolutions_stay_as_they_are():
    others = [
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Conv2d(3, 4, 3, dilation=2),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    ]
    fold_stems(nn.Sequential(*others))
    assert all(type(other) is nn.Conv2d for other in others)
