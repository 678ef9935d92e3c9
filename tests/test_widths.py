"""Modules that take the widths of a checkpoint's tensors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dmm_cli.architectures import build
from dmm_cli.errors import DmmError
from dmm_cli.inputs import resolve_source
from dmm_cli.loading import load_model
from dmm_cli.widths import WIDTHS, resize

RESNET = "resnet18,num_classes=5,layers=(1,1,1,1)"


def depthwise(width: int) -> nn.Module:
    """Every channel with two filters of its own."""
    filters = nn.Conv2d(width, 2 * width, 3, groups=width)
    return nn.Sequential(nn.Conv2d(3, width, 1), filters, nn.BatchNorm2d(2 * width))


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (f"{RESNET},channels=(8,12,16,20)", f"{RESNET},channels=(9,13,18,24)"),
        ("test_widths:depthwise,width=4", "test_widths:depthwise,width=7"),
        ("densenet121,growth_rate=6,block_config=(2,2)", "densenet121,growth_rate=8,block_config=(2,2)"),
    ],
)
def test_a_resized_network_is_the_one_that_is_built_so_wide(narrow, wide):
    """Another state dict of the same architecture loads, and gives what its own network gives."""
    expected, model = build(wide).eval(), build(narrow).eval()
    resize(model, shapes(expected))
    model.load_state_dict(expected.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), expected(images))
    for ours, theirs in zip(model.modules(), expected.modules(), strict=True):
        for attribute in ("in_channels", "out_channels", "groups", "num_features", "in_features", "out_features"):
            if isinstance(ours, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
                assert getattr(ours, attribute, None) == getattr(theirs, attribute, None)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.LayerNorm(4), {"weight": (6,), "bias": (6,)}),
        (nn.Conv2d(8, 8, 3, groups=4), {"weight": (12, 2, 3, 3), "bias": (12,)}),
        (nn.ConvTranspose2d(4, 4, 3), {"weight": (6, 4, 3, 3)}),
        (nn.Conv2d(4, 4, 3), {"weight": (4, 4, 5, 5)}),
        (nn.Linear(4, 4), {"weight": (4, 4, 1)}),
    ],
)
def test_what_has_no_width_of_its_own_is_refused(layer, shape):
    model = nn.Sequential(nn.Identity(), layer)
    with pytest.raises(DmmError, match=rf"1 \({type(layer).__name__}\) cannot be widened"):
        resize(model, {f"1.{name}": own for name, own in shape.items()})


def test_only_metadata_that_say_so_make_a_network_wider(tmp_path):
    spec = f"{RESNET},channels=(8,12,16,20)"
    state = build(spec.replace("8,12", "8,14")).state_dict()
    save_file(state, tmp_path / "plain.safetensors", {"dmm.arch": spec})
    with pytest.raises(DmmError, match="does not fit"):
        load_model(resolve_source(str(tmp_path / "plain.safetensors")))
    metadata = {"dmm.arch": spec, WIDTHS: json.dumps({"layer2.0.conv1.weight[0]": [12, 14]})}
    save_file(state, tmp_path / "wide.safetensors", metadata)
    model, found = load_model(resolve_source(str(tmp_path / "wide.safetensors")))
    assert found.spec == spec and np.array_equal(model.layer2[0].conv1.weight.detach(), state["layer2.0.conv1.weight"])
    save_file({**state, "conv1.bias": torch.zeros(8)}, tmp_path / "biased.safetensors", metadata)
    with pytest.raises(DmmError, match="does not fit") as error:
        load_model(resolve_source(str(tmp_path / "biased.safetensors")))
    assert error.value.evidence == ("unknown conv1.bias",)
    del state["fc.bias"]
    save_file(state, tmp_path / "short.safetensors", metadata)
    with pytest.raises(DmmError, match="does not fit"):
        load_model(resolve_source(str(tmp_path / "short.safetensors")))
