from __future__ import annotations

import numpy as np
import pytest
import torch

from dmm_cli.architectures import build
from dmm_cli.header import TensorInfo
from dmm_cli.merging.batchnorm import merged_variance, pair_layers

FAMILIES = {
    "resnet18": 20,
    "vgg11_bn": 8,
    "mobilenetv3_small_100": 34,
    "efficientnet_b0": 49,
    "regnety_002": 44,
    "repvgg_a0": 44,
    "ghostnet_100": 80,
    "densenet121": 59,
}
FEWER = {
    "resnetv2_18": 8, "ese_vovnet19b_dw": 9, "nextvit_small": 13, "dpn48b": 0, "mixnet_s": 4, "repvit_m0_9": 83,
    "xcit_nano_12_p16_224": 4,
}  # fmt: skip


def producers(model: torch.nn.Module) -> dict[str, str | None]:
    """For every BatchNorm layer the convolution whose output tensor it received, by watching one forward pass."""
    made: dict[int, tuple[str, torch.Tensor]] = {}
    found: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, i, out, name=name: made.update({out.data_ptr(): (name, out)}))
        if getattr(module, "running_var", None) is not None:
            module.register_forward_pre_hook(
                lambda m, i, name=name: found.update({name: made.get(i[0].data_ptr(), (None,))[0]})
            )
    with torch.no_grad():
        model.eval()(torch.randn(1, 3, 64, 64))
    return found


@pytest.mark.parametrize(("name", "pairs"), FAMILIES.items())
def test_pairs_read_from_names_are_the_ones_the_network_computes(name, pairs):
    expected, got = computed_and_read(name)
    assert got == expected
    assert sum(conv is not None for conv in expected.values()) == pairs


@pytest.mark.parametrize(("name", "pairs"), FEWER.items())
def test_where_names_do_not_tell_nothing_is_paired(name, pairs):
    """Normalisation comes first in some or all blocks, or one follows several convolutions, or a sum."""
    expected, got = computed_and_read(name)
    read = {layer: weight for layer, weight in got.items() if weight}
    assert read == {layer: expected[layer] for layer in read} and len(read) == pairs


def computed_and_read(name: str) -> tuple[dict[str, str | None], dict[str, str | None]]:
    model = build(name)
    infos = {key: TensorInfo(key, "F32", tuple(value.shape), 0, 0) for key, value in model.state_dict().items()}
    computed = {layer: f"{conv}.weight" if conv else None for layer, conv in producers(model).items()}
    return computed, {layer: weight for layer, weight in pair_layers(infos).items() if layer in computed}


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [
        ("pre_norm 4, conv1_1x1 8 4, norm1 8, conv2_kxk 8 8, norm2 8", {"norm1": "conv1_1x1", "norm2": "conv2_kxk"}),
        ("conv_dw 8 1, bn_dw 8, conv_pw 8 8, bn_pw 8", {"bn_dw": "conv_dw", "bn_pw": "conv_pw"}),
        ("qkv 8 8, group_conv3x3 8 8, norm 8, projection 8 8", {}),
        ("conv2d 8 4, bn 8", {"bn": "conv2d"}),
        ("0 8 4, 1 8, 2 8, 4 8 8, 5 8, 6 4", {"1": "0", "5": "4"}),
        ("a.bn 4, a.conv 8 4, b.bn 8, b.conv 8 8", {}),  # of one kind, which normalises first
        ("a.conv 8 4, a.bn 8, b.conv 8 8, b.bn 8", {"a.bn": "a.conv", "b.bn": "b.conv"}),
    ],
)
def test_layers_are_paired_by_number_or_ending_in_every_block_of_a_kind(layers, pairs):
    infos = {}
    for text in layers.split(", "):
        layer, *shape = text.split()
        name = f"{layer}.running_var" if len(shape) == 1 else f"{layer}.weight"
        infos[name] = TensorInfo(name, "F32", (*map(int, shape), *[1, 1] * (len(shape) > 1)), 0, 0)
    found = {layer: weight for layer, weight in pair_layers(infos).items() if weight}
    assert found == {layer: f"{conv}.weight" for layer, conv in pairs.items()}


def test_the_variance_of_merged_filters_matches_a_simulation():
    """Filters on white inputs: the merged layer's output variance is known by drawing a million inputs."""
    draw = np.random.default_rng(0)
    filters = draw.normal(size=(3, 2, 9))
    shares = np.array([0.5, 0.3, 0.2])
    variances = np.square(filters).sum(2)  # of unit white noise through each parent's filter
    inputs = draw.normal(size=(1_000_000, 9))
    merged = np.einsum("n,nck->ck", shares, filters)
    simulated = (inputs @ merged.T).var(0)
    assert np.allclose(merged_variance(filters, variances, shares), simulated, rtol=0.01)
    assert (merged_variance(filters, variances, shares) < shares @ variances).all(), "averaging shrinks it"


def test_without_a_filter_deviations_are_averaged():
    variances = np.array([[4.0, 1.0], [16.0, 1.0]])
    assert np.allclose(merged_variance(None, variances, np.array([0.5, 0.5])), [9.0, 1.0])


def test_equal_parents_keep_their_variance_exactly():
    variance = np.random.default_rng(1).random(5)
    filters = np.stack([np.random.default_rng(2).normal(size=(5, 3))] * 2)
    got = merged_variance(filters, np.stack([variance] * 2), np.array([1 / 3, 2 / 3]))
    assert (got == variance).all()


def test_a_running_variance_that_is_no_vector_is_not_paired():
    shapes = {"m.conv.weight": (4, 4), "m.bn.running_var": (), "n.conv.weight": (4, 4), "n.bn.running_var": (4,)}
    infos = {name: TensorInfo(name, "F32", shape, 0, 0) for name, shape in shapes.items()}
    assert pair_layers(infos) == {"n.bn": "n.conv.weight"}
