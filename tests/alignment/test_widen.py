"""Units of two networks side by side."""

from __future__ import annotations

import copy
import json
import os

import numpy as np
import pytest
import torch
from networks import KINDS, arrays, lively
from safetensors.numpy import save_file

from dmm_cli.alignment.align import align
from dmm_cli.alignment.apply import permute, random_image
from dmm_cli.alignment.spec import Spec
from dmm_cli.alignment.trace import trace
from dmm_cli.alignment.widen import widen, widened
from dmm_cli.architectures import build
from dmm_cli.errors import DmmError
from dmm_cli.inputs import Source, resolve_source
from dmm_cli.loading import load_model
from dmm_cli.widths import WIDTHS, resize

ARCH, SIZE = KINDS["residual"]


def saved(path, tensors: dict[str, np.ndarray], arch: str, size: tuple[int, ...], **metadata: str) -> Source:
    space = {"size": size, "mean": [0.5] * size[0], "std": [0.5] * size[0]}
    save_file(tensors, path, {"dmm.arch": arch, "dmm.input": json.dumps(space), **metadata})
    return resolve_source(str(path))


def pair_of(tmp_path, kind: str) -> tuple[list[Source], Spec]:
    """Two networks with random weights, and what may move in them."""
    arch, size = KINDS[kind]
    sources = [saved(tmp_path / f"{n}.safetensors", arrays(lively(arch, n)), arch, size) for n in range(2)]
    return sources, trace(lively(arch), size)


def outputs(source: Source, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_model(source)[0].double()(images)


# of these kinds, the groups that stay merged: those of the residual stream where it is normalised over channels, of
# heads, of grouped convolutions, and what is split at numbers that are fixed
@pytest.mark.parametrize(
    ("kind", "merged"),
    [
        ("residual", []),
        ("concatenated", []),
        ("grouped", [f"layer{n}.0.conv1.weight[0]" for n in (1, 2, 3, 4)]),
        ("heads", ["cls_token[2]", "blocks.0.attn.qkv.weight[0]", "blocks.1.attn.qkv.weight[0]"]),
        ("flattened", ["0.weight[0]"]),
        ("gated", ["parts.weight[0]", "parts.weight[0]"]),
    ],
)
def test_both_networks_compute_what_they_did_and_what_cannot_be_widened_is_told(kind, merged, tmp_path):
    sources, spec = pair_of(tmp_path, kind)
    found = widen(*sources, spec, 0.4)
    assert found.difference < 1e-12
    assert [group.name for group, apart in zip(spec.groups, found.apart, strict=True) if apart < 0] == merged
    for group, apart in zip(spec.groups, found.apart, strict=True):
        assert apart in (-1, group.size - round(0.4 * group.size))
    images = torch.randn(3, *KINDS[kind][1], dtype=torch.float64)
    for number, source in enumerate(sources):
        path = tmp_path / f"wide-{number}.safetensors"
        found.write(number, path, {**source.metadata, WIDTHS: json.dumps(found.widths)})
        wide = resolve_source(str(path))
        assert torch.allclose(outputs(wide, images), outputs(source, images), rtol=1e-9, atol=1e-12)
        assert found.parameters[1] == sum(
            info.numel for info in wide.tensors.values() if info.is_float and "running" not in info.name
        )


def test_a_network_whose_file_has_changed_since_is_not_written(tmp_path):
    sources, spec = pair_of(tmp_path, "residual")
    found = widen(*sources, spec, 0.4)
    os.utime(sources[1].path)
    with pytest.raises(DmmError, match=r"1\.safetensors changed while"):
        found.write(1, tmp_path / "wide.safetensors", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]


@pytest.mark.parametrize(
    ("arch", "size"), [KINDS["residual"], KINDS["concatenated"], ("networks:separable", (3, 8, 8))]
)
def test_with_no_unit_merged_the_mean_is_the_mean_of_the_logits(arch, size):
    """In float64; running variances of units side by side are equal in both, so that any mean of them is theirs."""
    models = [lively(arch, seed).double() for seed in range(2)]
    spec = trace(lively(arch), size)
    states = [{name: value.numpy() for name, value in model.state_dict().items()} for model in models]
    wide = widened(*states, spec, spec.movable)
    mean = {name: torch.from_numpy(0.3 * wide[0][name] + 0.7 * wide[1][name]) for name in wide[0]}
    for name in models[0].state_dict().keys() - mean.keys():
        mean[name] = 0.3 * models[0].state_dict()[name] + 0.7 * models[1].state_dict()[name]
    both = copy.deepcopy(models[0])
    resize(both, {name: tuple(value.shape) for name, value in mean.items()})
    both.load_state_dict(mean)
    images = torch.randn(4, *size, dtype=torch.float64)
    with torch.no_grad():
        a, b = (model(images) for model in models)
        assert torch.allclose(both(images), 0.3 * a + 0.7 * b, rtol=1e-9, atol=1e-12)
        assert (a - b).abs().max() > 0.01


def test_exactly_the_units_that_were_replaced_stay_apart(tmp_path):
    """A network, and a permuted copy some of whose units in every block's inner layer are others."""
    model = lively(ARCH)
    own, spec, draw = arrays(model), trace(model, SIZE), np.random.default_rng(0)
    other, replaced = {name: array.copy() for name, array in own.items()}, {}
    for block in ("layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0"):
        names = [f"{block}.{name}" for name in ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight")]
        units = draw.permutation(len(own[names[0]]))[: len(own[names[0]]) // 4]
        for name in names:
            foreign = draw.normal(size=own[name].shape).astype(np.float32) * own[name].std()
            where = (slice(None), units) if "conv2" in name else units
            other[name][where] = foreign[where]
        replaced[f"{names[0]}[0]"] = sorted(units.tolist())
    scrambled = permute(other, spec, random_image(spec, draw))
    sources = [saved(tmp_path / f"{n}.safetensors", t, ARCH, SIZE) for n, t in enumerate((own, scrambled))]
    (found,) = align([[source] for source in sources])
    found.write(tmp_path / "aligned.safetensors", sources[1].metadata)
    wide = widen(sources[0], resolve_source(str(tmp_path / "aligned.safetensors")), found.spec, 0.75)
    assert wide.difference < 1e-12
    checked = 0
    for group, apart in zip(found.spec.groups, wide.apart, strict=True):
        units = replaced.get(group.name)
        if units:
            norm = group.name.replace("conv1.weight[0]", "bn1.weight")
            ours, theirs = (tensors[norm].tolist() for tensors in wide.arrays)
            assert ours == theirs and apart == len(units)  # what is merged is equal, what is not is in both
            places = [place + sum(unit < place for unit in units) for place in range(group.size)]
            assert [ours[place] for place in places] == own[norm].tolist()
            beside = sorted(ours[places[unit] + 1] for unit in units)
            assert beside == sorted(other[norm][units].tolist())
            checked += 1
    assert checked == len(replaced)


def test_a_share_of_all_units_is_merged_and_the_rest_stands_beside_it():
    """Hand-made: two units, of which the second is apart, between fixed inputs and outputs."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 1))
    spec = trace(model, (1,))
    first, second = ({"0.weight": [[a], [b]], "0.bias": [c, d], "1.weight": [[e, f]], "1.bias": [g]}
                     for a, b, c, d, e, f, g in ((1, 2, 3, 4, 5, 6, 7), (10, 20, 30, 40, 50, 60, 70)))  # fmt: skip
    first, second = ({name: np.array(value, float) for name, value in state.items()} for state in (first, second))
    (group,) = spec.groups
    apart = np.zeros(spec.count, bool)
    apart[group.roles[0][0, 1]] = True
    a, b = widened(first, second, spec, apart)
    assert a["0.weight"].tolist() == [[1], [2], [20]] and b["0.weight"].tolist() == [[10], [2], [20]]
    assert a["0.bias"].tolist() == [3, 4, 40] and b["0.bias"].tolist() == [30, 4, 40]
    assert a["1.weight"].tolist() == [[5, 6, 0]] and b["1.weight"].tolist() == [[50, 0, 60]]
    assert a.keys() == {"0.weight", "0.bias", "1.weight"}


@pytest.mark.parametrize(
    ("arch", "size"), [("networks:only_normalised", (6,)), ("networks:tied", (6,)), ("networks:counted", (3, 8, 8))]
)
def test_a_network_that_cannot_be_widened_is_refused(arch, size, tmp_path):
    sources = [saved(tmp_path / str(n), arrays(lively(arch, n)), arch, size) for n in range(2)]
    with pytest.raises(DmmError, match="can be kept side by side"):
        widen(*sources, trace(build(arch), size), 0.5)


def test_nor_is_one_of_whose_tied_weights_the_files_hold_one(tmp_path):
    tensors = [arrays(lively("networks:tied", n)) for n in range(2)]
    for held in tensors:
        del held["again.weight"]
    sources = [saved(tmp_path / str(n), held, "networks:tied", (6,)) for n, held in enumerate(tensors)]
    with pytest.raises(DmmError, match="can be kept side by side"):
        widen(*sources, trace(build("networks:tied"), (6,)), 0.5)
