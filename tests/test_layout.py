"""Networks that stand channels last, and those that do not."""

from __future__ import annotations

import pytest
import torch
from conftest import dmm
from networks import lively
from safetensors.torch import load_file, save_file
from torch import nn

from dmm_cli.layout import place

CPU = torch.device("cpu")
RESNET = "resnet18,num_classes=4,layers=(1,1,1,1),channels=(16,16,16,16)"
NARROW = "resnet18,num_classes=4,layers=(1,1,1,1),channels=(4,4,4,4)"


class Viewing(nn.Module):
    """Asks for a view of its features, which channels last does not have."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.num_classes = 4
        self.look = nn.Sequential(nn.Conv2d(channels, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6 * 16, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.look(images).view(len(images), -1))


class Paired(Viewing):
    """Takes two inputs, and does not tell what they are like."""

    def forward(self, images: torch.Tensor, shift: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return super().forward(images + scale * shift)


viewing, paired = Viewing, Paired


def shown(size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(0))


def is_last(values: torch.Tensor) -> bool:
    return values.stride()[1] == 1


@pytest.mark.parametrize(
    ("spec", "size", "last"), [(RESNET, 32, True), (NARROW, 32, False), ("test_layout:viewing", 8, False)]
)
def test_a_network_answers_as_before_whatever_lies_how(spec, size, last):
    model, images = lively(spec), shown(size)
    before = model(images)
    assert place(model, CPU, images[:2]) == (torch.channels_last if last else torch.contiguous_format)
    seen = []
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(lambda _, inputs, out: seen.append(out))
    for laid in (images, images.contiguous(memory_format=torch.channels_last)):
        assert torch.allclose(model(laid), before, atol=1e-4)
    assert [is_last(features) for features in seen] == [last] * 2


def test_one_channel_is_not_taken_for_channels_last():
    """Its images are contiguous either way, but convolutions go by the strides."""
    model, images = Viewing(1).eval(), shown(8, 1)
    place(model, CPU, images)
    last = torch.empty_strided(images.shape, (64, 1, 8, 1)).copy_(images)
    assert torch.allclose(model(last), model(images), atol=1e-6)


@pytest.mark.parametrize("spec", [RESNET, NARROW])
def test_gradients_are_those_of_double_precision(spec):
    """In strided 1 x 1 convolutions of few channels, channels last, torch has wrong ones on some CPUs, or crashes."""
    model, exact, images = lively(spec), lively(spec).double(), shown(32)
    place(model, CPU, images)
    for _ in range(20):
        model.zero_grad()
        model(images).square().sum().backward()
    exact(images.double()).square().sum().backward()
    for (name, found), wanted in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (found.grad - wanted.grad).norm() < 1e-3 * wanted.grad.norm() + 1e-9, name


def test_every_stage_takes_a_network_that_views_its_features(tmp_path):
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(paths):
        told = {"dmm.arch": "test_layout:viewing", "dmm.input": '{"size": [3, 8, 8], "mean": [0.5], "std": [0.25]}'}
        save_file(lively("test_layout:viewing", seed).state_dict(), path, told)
    drawn, out = tmp_path / "pseudo.safetensors", tmp_path / "out.safetensors"
    few = ["--count", 16, "--steps", 4, "--batch", 8]
    for words in (
        ["synthesize", *paths, "--engine", "pixels", *few, "-o", drawn],
        ["synthesize", *paths, *few, "-o", drawn, "--force"],
        ["distill", paths[0], *paths, "--data", drawn, "--steps", 4, "-o", out],
        ["merge", *paths, "--method", "regmean", "--recalibrate", drawn, "--align", "never", "-o", out, "--force"],
        ["similarity", *paths, "--measure", "cka", "--data", drawn],
    ):
        result = dmm(*words)
        assert result.exit_code == 0, result.stderr
    save_file(
        {"images": load_file(drawn)["images"], "labels": load_file(drawn)["targets"]}, tmp_path / "data.safetensors"
    )
    assert dmm("evaluate", out, "--data", tmp_path / "data.safetensors").exit_code == 0
    assert dmm("record", out, "--data", tmp_path / "data.safetensors", "-o", tmp_path / "s.safetensors").exit_code == 0


@pytest.mark.parametrize("size", ["3,16,16", "1,8,8"])
def test_an_input_that_does_not_fit_is_told(tmp_path, size):
    path, out, data = tmp_path / "viewing.safetensors", tmp_path / "out.safetensors", tmp_path / "data.safetensors"
    save_file(lively("test_layout:viewing").state_dict(), path, {"dmm.arch": "test_layout:viewing"})
    images = torch.zeros(4, *map(int, size.split(",")), dtype=torch.uint8)
    save_file({"images": images, "labels": torch.arange(4)}, data)
    taken = ["--input-size", size, "--mean", "0.5", "--std", "0.25"]
    for words in (["synthesize", path], ["record", path, "--data", data], ["evaluate", path, "--data", data]):
        result = dmm(*words, *taken, "-o", out)
        assert result.exit_code == 2, result.stderr
        assert f"{path} does not take inputs of [{size.replace(',', ', ')}]" in result.stderr
        assert "--input-size" in result.stderr and not out.exists()


def test_a_network_of_several_inputs_that_does_not_tell_them_is_told_how(tmp_path):
    path, data = tmp_path / "paired.safetensors", tmp_path / "data.safetensors"
    save_file(lively("test_layout:paired").state_dict(), path, {"dmm.arch": "test_layout:paired"})
    save_file({"images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "labels": torch.arange(4)}, data)
    for words in (["synthesize", path], ["record", path, "--data", data], ["evaluate", path, "--data", data]):
        result = dmm(*words, "--input-size", "3,8,8", "-o", tmp_path / "out.safetensors")
        assert result.exit_code == 2 and "missing 1 required positional argument: 'shift'" in result.stderr
        assert "hint: it takes images, shift: let it, or its factory's module, have example_inputs" in result.stderr


def test_a_student_of_another_input_is_told(tmp_path):
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("teacher", "student", "drawn", "out")}
    told = '{"size": [3, %d, %d], "mean": [0.5], "std": [0.25]}'
    facts = {"dmm.arch": "test_answers:plain", "dmm.input": told % (16, 16)}
    save_file(lively("test_answers:plain").state_dict(), paths["teacher"], facts)
    facts = {"dmm.arch": "test_layout:viewing", "dmm.input": told % (8, 8)}
    save_file(lively("test_layout:viewing").state_dict(), paths["student"], facts)
    few = ["--count", 16, "--steps", 2, "--batch", 8]
    assert dmm("synthesize", paths["teacher"], *few, "-o", paths["drawn"]).exit_code == 0
    result = dmm("distill", paths["student"], paths["teacher"], "--data", paths["drawn"], "-o", paths["out"])
    assert result.exit_code == 2, result.stderr
    assert f"{paths['student']} does not take inputs of [3, 16, 16]" in result.stderr
    assert "all need the same input" in result.stderr and not paths["out"].exists()
