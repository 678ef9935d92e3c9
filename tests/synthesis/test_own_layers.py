"""Networks with layers of their own, or that they do not use: what ``dmm record`` tells of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS, dmm
from safetensors.numpy import load_file, save_file
from torch import nn

from dmm_cli.trust import grant

grant([__name__])

INPUT = {"size": [1, 8, 8], "mean": [0.3], "std": [0.4]}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Real digits 0, 1 and 2 of 8 x 8 pixels."""
    path, data = tmp_path_factory.mktemp("digits") / "data.safetensors", load_file(DIGITS / "test.safetensors")
    chosen = data["labels"] < 3
    save_file({"images": data["images"][chosen], "labels": data["labels"][chosen]}, path)
    return path


class OwnNorm(nn.Module):
    """A layer as language models define it for themselves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class FirstNorm(OwnNorm):
    """A layer that takes channels first, and keeps their number as torch's LayerNorm does, or as it is given."""

    def __init__(self, width: int, normalized_shape: object) -> None:
        super().__init__(width)
        self.normalized_shape = normalized_shape


class Scalar(nn.Module):
    """Standardises inputs by one mean and one variance that it keeps of them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.tensor(0.1))
        self.register_buffer("running_var", torch.tensor(0.9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.running_mean) * self.running_var.rsqrt()


class Classifier(nn.Module):
    """Digits of 8 x 8 pixels, through layers of its own."""

    def __init__(self, num_classes: int = 3, known: bool = True) -> None:
        super().__init__()
        self.own, self.norm = OwnNorm(64), nn.LayerNorm(64) if known else nn.Identity()
        self.fc, self.num_classes = nn.Linear(64, num_classes), num_classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.own(images.flatten(1))))


def test_layers_of_unknown_classes_are_told(digits, tmp_path):
    for known in (True, False):
        net, out = tmp_path / f"{known}.safetensors", tmp_path / f"{known}-stats.safetensors"
        metadata = {"dmm.arch": f"{__name__}:Classifier,known={known}", "dmm.input": json.dumps(INPUT)}
        save_file({name: value.numpy() for name, value in Classifier(3, known).state_dict().items()}, net, metadata)
        result = dmm("record", net, "--data", digits, "-o", out, "--json")
        told = "not recorded, since dmm does not know their class: own"
        assert told in result.stderr, result.stderr
        assert result.exit_code == (0 if known else 2)
        if known:
            (network,) = json.loads(result.stdout)["networks"]
            assert network["warnings"] == [told] and [layer["name"] for layer in network["layers"]] == ["norm"]
        else:
            assert "no normalisation layers that dmm knows" in result.stderr and not out.exists()


class Alike(Classifier):
    """A network whose own layer has the attributes of one of torch's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.own = Scalar() if kind == "scalar" else FirstNorm(64, {"tuple": (64,), "int": 64}[kind])


@pytest.mark.parametrize("kind", ["tuple", "int", "scalar"])
def test_layers_are_known_by_their_class_and_not_by_their_attributes(digits, tmp_path, kind):
    net, out = tmp_path / "net.safetensors", tmp_path / "stats.safetensors"
    metadata = {"dmm.arch": f"{__name__}:Alike,kind={kind}", "dmm.input": json.dumps(INPUT)}
    save_file({name: value.numpy() for name, value in Alike(kind).state_dict().items()}, net, metadata)
    result = dmm("record", net, "--data", digits, "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    assert [layer["name"] for layer in json.loads(result.stdout)["networks"][0]["layers"]] == ["norm"]
    assert ("dmm does not know their class: own" in result.stderr) == (kind != "scalar")


class Partly(Classifier):
    """A network with a layer that no pass goes through, and with weights that are normalised."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(num_classes)
        self.own, self.idle = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)), nn.LayerNorm(64)


def test_a_whole_record_makes_no_warning_where_a_layer_is_idle(digits, tmp_path):
    net, stats, out = (tmp_path / f"{name}.safetensors" for name in ("net", "stats", "out"))
    metadata = {"dmm.arch": f"{__name__}:Partly", "dmm.input": json.dumps(INPUT)}
    save_file({name: value.numpy() for name, value in Partly().state_dict().items()}, net, metadata)
    recorded = dmm("record", net, "--data", digits, "-o", stats)
    assert recorded.exit_code == 0 and "does not use it: idle" in recorded.stderr, recorded.stderr
    assert "warning" not in recorded.stderr
    flags = ["--count", 8, "--steps", 2, "--batch", 8, "--class-prior", "1,1,1"]
    result = dmm("synthesize", net, "--statistics", stats, "-o", out, *flags)
    assert "leaves out" not in result.stderr and (result.exit_code == 0 or "recognises none" in result.stderr)


class PerImage(Classifier):
    """A network that normalises every image, and keeps the mean of their variances."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(num_classes)
        self.norm = nn.InstanceNorm1d(1, track_running_stats=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(images.flatten(2)).flatten(1))


def test_statistics_of_every_image_are_recorded_as_those_of_batches(digits, tmp_path):
    net, stats, out = (tmp_path / f"{name}.safetensors" for name in ("net", "stats", "out"))
    model = PerImage().train()
    with torch.no_grad():
        model(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    metadata = {"dmm.arch": f"{__name__}:PerImage", "dmm.input": json.dumps(INPUT)}
    save_file({name: value.numpy() for name, value in model.state_dict().items()}, net, metadata)
    flags = ["--count", 8, "--steps", 2, "--batch", 8, "--class-prior", "1,1,1", "-o", out]
    refused = dmm("synthesize", net, *flags)
    assert refused.exit_code == 2 and "0 BatchNorm layers" in refused.stderr and "dmm record" in refused.stderr
    assert dmm("record", net, "--data", digits, "-o", stats).exit_code == 0
    result = dmm("synthesize", net, "--statistics", stats, *flags)
    assert result.exit_code == 0 or "recognises none" in result.stderr, result.stderr


class Uncalled(nn.Module):
    """A network that normalises by its layer's numbers, and not by the layer."""

    num_classes = 3

    def __init__(self, bound: bool = False) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(64), nn.Linear(64, 3)
        if bound:  # to this very network, whose copies then call its layers
            self.forward = lambda images: self.called(images)

    def called(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(images.flatten(1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        own = self.norm
        return self.fc(F.batch_norm(images.flatten(1), own.running_mean, own.running_var, own.weight, own.bias))


class Wary(nn.Module):
    """A network that normalises what is not blank."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(64), nn.Linear(64, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        seen = images.flatten(1)
        return self.fc(self.norm(seen) if seen.any() else seen)


def test_layers_that_a_blank_image_does_not_reach_count_as_called(tmp_path):
    torch.manual_seed(0)
    state = {name: value.numpy() for name, value in Wary().state_dict().items()}
    state["norm.running_mean"] = np.linspace(0, 1, 64, dtype=np.float32)
    net = tmp_path / "net.safetensors"
    save_file(state, net, {"dmm.arch": f"{__name__}:Wary", "dmm.input": json.dumps(INPUT)})
    result = dmm("synthesize", net, "--engine", "pixels", "--steps", 30, "--count", 8, "-o", tmp_path / "p.safetensors")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("bound", [False, True])
def test_layers_with_statistics_that_are_not_called_are_refused(tmp_path, bound):
    state = {name: value.numpy() for name, value in Uncalled().state_dict().items()}
    state["norm.running_mean"] = np.linspace(0, 1, 64, dtype=np.float32)
    net = tmp_path / "net.safetensors"
    save_file(state, net, {"dmm.arch": f"{__name__}:Uncalled,bound={bound}", "dmm.input": json.dumps(INPUT)})
    result = dmm("synthesize", net, "--steps", 2, "--count", 8, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2 and "does not call the layers" in result.stderr, result.stderr
    assert "\n  norm\n" in result.stderr and list(tmp_path.iterdir()) == [net]
