"""Networks of one input that is no image: signals, volumes and vectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dmm
from networks import arrays, lively
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import nn

from dmm_cli.alignment.apply import permute, random_image
from dmm_cli.alignment.trace import trace
from dmm_cli.errors import DmmError
from dmm_cli.images import InputSpec
from dmm_cli.signature import single_spec
from dmm_cli.spaces import JointSpec, parsed, recorded, space_of

SIZES = {"signal": (2, 24), "volume": (1, 6, 6, 6), "vector": (12,)}


class Net(nn.Module):
    """Two layers on what ``kind`` names."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        layer, norm = {
            "signal": (lambda a, b: nn.Conv1d(a, b, 3), nn.BatchNorm1d),
            "volume": (lambda a, b: nn.Conv3d(a, b, 3), nn.BatchNorm3d),
            "vector": (nn.Linear, nn.BatchNorm1d),
        }[kind]
        self.num_classes = 3
        self.example_inputs = {"values": torch.zeros(2, *SIZES[kind])}
        self.first, self.norm, self.second = layer(SIZES[kind][0], 8), norm(8), layer(8, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        features = self.second(self.norm(self.first(values)).relu()).relu()
        return self.head(features.flatten(2).mean(2) if features.dim() > 2 else features)


class ByName(Net):
    """Takes its input by name alone."""

    def forward(self, *, values: torch.Tensor) -> torch.Tensor:
        return super().forward(values)


net, by_name = Net, ByName


def saved(path: Path, kind: str, tensors: dict | None = None, seed: int = 0, **stated: list[float]) -> Path:
    facts = {"dmm.arch": f"test_numbers:net,kind={kind}", "dmm.input": json.dumps({"values": stated})}
    save_file(tensors or lively(facts["dmm.arch"], seed).state_dict(), path, facts)
    return path


@pytest.mark.parametrize("kind", SIZES)
def test_every_stage_takes_them(tmp_path, kind):
    a, b = (saved(tmp_path / f"{seed}.safetensors", kind, seed=seed) for seed in range(2))
    pseudo, out = tmp_path / "pseudo.safetensors", tmp_path / "out.safetensors"
    for words in (
        ["synthesize", a, b, "--count", 16, "--steps", 6, "-o", pseudo, "--loss", "cross_entropy=1"],
        [
            "merge",
            a,
            b,
            "--method",
            "pleas",
            "--align",
            "never",
            "--recalibrate",
            pseudo,
            "-o",
            tmp_path / "m.safetensors",
        ],
        ["distill", a, a, b, "--data", pseudo, "--steps", 3, "-o", out],
    ):
        result = dmm(*words)
        assert result.exit_code == 0, result.stderr
        if words[0] == "merge":  # torch unfolds no volumes: of these the head alone is solved
            assert f"{1 if kind == 'volume' else 3} layers solved (pleas)" in result.stdout
    drawn = load_file(pseudo)
    assert drawn["values"].shape[1:] == SIZES[kind]
    np.savez(tmp_path / "data.npz", values=drawn["values"], labels=drawn["targets"])
    model = lively(f"test_numbers:net,kind={kind}")
    model.load_state_dict({name: torch.from_numpy(array) for name, array in load_file(out).items()})
    hits = model(torch.from_numpy(drawn["values"])).argmax(1).numpy() == drawn["targets"]
    told = json.loads(dmm("evaluate", out, "--data", tmp_path / "data.npz", "--json").stdout)["rows"][0]["accuracy"]
    assert np.isclose(told, 100 * hits.mean())


def test_options_that_change_images_alone_are_told_to_be_idle(tmp_path):
    a, plain, moved = (saved(tmp_path / "a.safetensors", "vector"), *(tmp_path / f"{n}.safetensors" for n in "pm"))
    words = ["synthesize", a, "--count", 8, "--steps", 4, "--batch", 8, "--class-prior", "1,1,1"]
    asked = ["--jitter", 1, "--flip", "--loss", "total_variation=1"]
    assert "warning" not in dmm(*words, "-o", plain).stderr
    told = dmm(*words, *asked, "-o", moved).stderr
    for flag in ("--jitter", "--flip", "--loss total_variation"):
        assert f"warning: {flag} changes nothing: no image goes in" in told
    with safe_open(moved, "np") as file:
        parameters = json.loads(file.metadata()["dmm.parameters"])
    assert not {"jitter", "flip"} & parameters.keys()
    assert np.array_equal(load_file(plain)["values"], load_file(moved)["values"])


@pytest.mark.parametrize("kind", SIZES)
def test_units_in_another_order_are_put_in_order(tmp_path, kind):
    model = lively(f"test_numbers:net,kind={kind}")
    spec = trace(model, SIZES[kind])
    other = permute(arrays(model), spec, random_image(spec, np.random.default_rng(1)))
    a = saved(tmp_path / "a.safetensors", kind)
    b = saved(
        tmp_path / "b.safetensors", kind, {name: torch.from_numpy(np.array(array)) for name, array in other.items()}
    )
    assert dmm("align", a, b, "-o", tmp_path / "c.safetensors").exit_code == 0
    found, wanted = load_file(tmp_path / "c.safetensors"), load_file(a)
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_what_cannot_be_called_by_position_is_not_aligned(tmp_path):
    paths = [saved(tmp_path / f"{seed}.safetensors", "vector", seed=seed) for seed in range(2)]
    flags = ["--arch", "test_numbers:by_name,kind=vector", "-o", tmp_path / "out.safetensors"]
    refused = dmm("align", *paths, *flags)
    assert refused.exit_code == 2 and "takes values, and dmm aligns networks of images" in refused.stderr
    assert "dmm merge --align never" in refused.stderr
    assert dmm("merge", *paths, "--align", "never", *flags).exit_code == 0


@pytest.mark.parametrize(
    ("size", "mean", "shape"),
    [
        ((2, 5), (1.0, 2.0), (2, 1)),  # channels first, as Conv1d takes them
        ((5, 2), (1.0, 2.0), (1, 2)),  # features last
        ((2, 2), (1.0, 2.0), (2, 1)),
        ((2, 3, 4, 5), (1.0, 2.0), (2, 1, 1, 1)),
        ((3,), (1.0, 2.0, 3.0), (3,)),
        ((4, 3), (2.0,), (1,)),
        ((4, 3), (2.0,) * 3, (1,)),
    ],
)
def test_means_and_deviations_belong_to_channels(size, mean, shape):
    spec = single_spec("net", size, mean, (4.0,))
    values = torch.randn(7, *size, generator=torch.Generator().manual_seed(0))
    seen = space_of(spec).from_bytes(values)
    assert torch.allclose(seen, (values - torch.tensor(spec.mean).view(shape)) / 4.0)
    assert torch.allclose(space_of(spec).to_bytes(seen), values, atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "std", "told"),
    [
        ((1.0, 2.0, 3.0), (1.0,), "3 means and 1"),
        ((3.0,) * 7, (1.0,), "7 means and 1"),
        ((1.0, 2.0), (1.0,) * 5, "2 means and 5"),
    ],
)
def test_means_of_other_numbers_of_channels_are_refused(mean, std, told):
    with pytest.raises(DmmError, match=rf"{told} deviations for numbers of \[2, 5\]"):
        single_spec("net", (2, 5), mean, std)


def test_what_is_said_once_or_of_every_channel_is_the_same():
    once = InputSpec((2, 5), (0.5,), (1.0,))
    assert single_spec("net", (2, 5), (0.5,) * 5, (1.0,) * 5) == once
    record = {"values": {"size": [2, 5], "mean": [0.5] * 5, "std": [1.0] * 2}}
    assert parsed(record) == JointSpec(("values",), (once,))
    assert parsed(json.loads(json.dumps(recorded(parsed(record))))) == parsed(record)


def test_flags_of_images_are_refused_where_there_are_none(tmp_path):
    path = saved(tmp_path / "a.safetensors", "signal")
    np.savez(tmp_path / "data.npz", values=np.zeros((4, 2, 24), np.float32), labels=np.zeros(4, np.int64))
    for flags in (["--mean", "0.5"], ["--std", "0.5"]):
        refused = dmm("evaluate", path, "--data", tmp_path / "data.npz", *flags)
        assert refused.exit_code == 2 and "--mean and --std are of images" in refused.stderr
        assert '{"values": {"mean": [0.5], "std": [2]}}' in refused.stderr


def test_arrays_of_other_names_are_told(tmp_path):
    path = saved(tmp_path / "a.safetensors", "vector")
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 12), np.float32), labels=np.zeros(4, np.int64))
    refused = dmm("evaluate", path, "--data", tmp_path / "data.npz")
    assert (
        refused.exit_code == 2 and "no array named values" in refused.stderr and "it holds x, labels" in refused.stderr
    )
