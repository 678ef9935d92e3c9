"""Grouping on a zoo: several starts, several fine-tunings of each, an odd architecture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS, dmm
from safetensors.torch import load_file, save_file

from dmm_cli.alignment.apply import permute, random_image
from dmm_cli.alignment.trace import trace
from dmm_cli.architectures import build
from dmm_cli.inputs import resolve_source
from dmm_cli.loading import load_model

ARCH = "resnet18,num_classes=10,in_chans=1,layers=(1,1,1,1),channels=(8,8,16,16)"
ODD = "test_vit,num_classes=10,in_chans=1"
INPUT = json.dumps({"size": [1, 32, 32], "mean": [0.5], "std": [0.5]})
TUNINGS = {"ada": 4, "bob": 3, "cy": 2, "dee": 1}  # fine-tunings of each start


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> list[Path]:
    """Ten networks of four starts, two of another architecture and one of a third."""
    directory = tmp_path_factory.mktemp("zoo")
    paths = []

    def save(name: str, spec: str, state: dict[str, torch.Tensor]) -> None:
        paths.append(directory / f"{name}.safetensors")
        save_file(state, paths[-1], {"dmm.arch": spec, "dmm.input": INPUT})

    for number, (start, count) in enumerate(TUNINGS.items()):
        torch.manual_seed(number)
        state = build(ARCH).state_dict()
        for tuning in range(count):
            draw = torch.Generator().manual_seed(100 * number + tuning)
            moved = {
                name: value + 0.2 * value.std().nan_to_num() * torch.randn(value.shape, generator=draw)
                if value.is_floating_point() and value.ndim > 1
                else value.clone()
                for name, value in state.items()
            }
            save(f"{start}-{tuning}", ARCH, moved)
    torch.manual_seed(50)
    odd = build(ODD).state_dict()
    save("odd-0", ODD, odd)
    save("odd-1", ODD, {name: value + 0.01 * torch.ones_like(value) for name, value in odd.items()})
    save("lone", "test_convnext,num_classes=10", build("test_convnext,num_classes=10").state_dict())
    return paths


@pytest.fixture(scope="module")
def reordered(zoo, tmp_path_factory) -> Path:
    """The first network of the zoo with its units in another order, and noise of .3 of a deviation on top."""
    model, _ = load_model(resolve_source(str(zoo[0])))
    spec = trace(model, (1, 32, 32))
    image = random_image(spec, np.random.default_rng(0))
    held = {name: value.numpy() for name, value in model.state_dict().items()}
    floats = permute({name: value for name, value in held.items() if value.dtype == np.float32}, spec, image)
    state = {name: torch.tensor(value) for name, value in {**held, **floats}.items()}
    draw = torch.Generator().manual_seed(7)
    for name, value in state.items():
        if value.ndim > 1:
            state[name] = value + 0.3 * value.std() * torch.randn(value.shape, generator=draw)
    path = tmp_path_factory.mktemp("reordered") / "reordered.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, path, {"dmm.arch": ARCH, "dmm.input": INPUT})
    return path


WANTED = sorted(
    [[f"{start}-{tuning}" for tuning in range(count)] for start, count in TUNINGS.items()]
    + [["odd-0", "odd-1"], ["lone"]]
)


def groups(record: dict) -> list[list[str]]:
    labels = record["labels"]
    return sorted(sorted(labels[i] for i in group["members"]) for group in record["groups"])


@pytest.mark.parametrize("order", range(3))
def test_every_start_and_architecture_is_a_group_whatever_the_order(zoo, tmp_path, order):
    paths = [zoo[i] for i in np.random.default_rng(order).permutation(len(zoo))]
    out = tmp_path / "merged"
    result = dmm("merge", *paths, "--group", "auto", "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)["grouping"]
    assert groups(record) == WANTED
    names = [sorted(record["labels"][i] for i in group["members"]) for group in record["groups"]]
    assert names[0] == WANTED[0] and len(list(out.glob("*.safetensors"))) == len(WANTED)
    reasons = {frozenset((record["labels"][p["a"]], record["labels"][p["b"]])): p["reason"] for p in record["pairs"]}
    assert reasons[frozenset(("ada-0", "odd-0"))] == "different architectures"
    assert "different starts" in reasons[frozenset(("ada-0", "bob-0"))]
    assert "one start" in reasons[frozenset(("ada-0", "ada-1"))]
    assert sorted(record["labels"][i] for i in record["divergent"]) == ["dee-0", "lone"]


def test_similarity_through_a_pipe_gives_the_same_groups_and_the_same_bytes(zoo, tmp_path):
    seen = dmm("similarity", *zoo, "--json", "--figure", tmp_path / "map.png")
    assert seen.exit_code == 0, seen.stderr
    cosine = json.loads(seen.stdout)["measures"]["cosine"]
    assert cosine[0][-1] is None and cosine[0][1] > 0.9 and cosine[-1][-1] == 1.0
    piped = dmm("merge", "--group", "-", "-o", tmp_path / "piped", "-q", text=seen.stdout)
    direct = dmm("merge", *zoo, "--group", "auto", "-o", tmp_path / "direct", "-q")
    assert piped.exit_code == direct.exit_code == 0, piped.stderr
    for one, other in zip(piped.stdout.split(), direct.stdout.split(), strict=True):
        assert Path(one).read_bytes() == Path(other).read_bytes()


def test_a_copy_in_another_order_is_known_once_units_are_put_in_order(zoo, reordered, tmp_path):
    paths = [*zoo[:2], zoo[5], reordered]
    blind = json.loads(dmm("merge", *paths, "--group", "auto", "-o", tmp_path / "blind", "--json").stdout)
    assert groups(blind["grouping"]) == [["ada-0", "ada-1"], ["bob-1"], ["reordered"]]
    out = tmp_path / "out"
    result = dmm("merge", *paths, "--group", "auto", "--align", "always", "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert groups(record["grouping"]) == [["ada-0", "ada-1", "reordered"], ["bob-1"]]
    reasons = [pair["reason"] for pair in record["grouping"]["pairs"] if pair["together"]]
    assert sum("with the units in one order" in reason for reason in reasons) == 2
    merged, first = load_file(out / "group-0.safetensors"), load_file(zoo[0])
    for name in ("conv1.weight", "layer1.0.conv1.weight"):
        a, b = merged[name].flatten(), first[name].flatten()
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.9
    seen = dmm("similarity", *paths, "--measure", "cosine", "--measure", "aligned", "--json")
    piped = dmm("merge", "--group", "-", "--align", "never", "-o", tmp_path / "piped", "--json", text=seen.stdout)
    assert groups(json.loads(piped.stdout)["grouping"]) == groups(record["grouping"])


def test_different_architectures_are_refused_where_all_are_to_be_merged_or_no_two_are_alike(zoo, tmp_path):
    for flags in (["merge", "-o", tmp_path / "out.safetensors"], ["similarity"]):
        result = dmm(flags[0], zoo[0], zoo[-1], *flags[1:])
        assert result.exit_code == 2 and "do not have the same tensors" in result.stderr
    site = DIGITS / "site-a.safetensors"
    result = dmm("merge", *zoo[:2], site, "--weights", "1,2", "--group", "auto", "-o", tmp_path / "out")
    assert result.exit_code == 2 and "2 weights for 3 checkpoints" in result.stderr
    assert "hint: give one each: --weights 1,2,3\n" in result.stderr
