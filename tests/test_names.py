from __future__ import annotations

import pytest
import torch

from dmm_cli.architectures import build
from dmm_cli.names import is_head, is_statistic, kind_of

FAMILIES = {
    "resnet18": 2, "vit_tiny_patch16_224": 2, "convnext_atto": 2, "swin_tiny_patch4_window7_224": 2,
    "levit_128s": 4, "levit_conv_128s": 4, "mobilenetv3_small_050": 2, "vgg11": 2, "vgg11_bn": 2, "densenet121": 2,
    "deit_tiny_distilled_patch16_224": 4, "efficientnet_b0": 2, "regnety_002": 2, "mixer_s32_224": 2,
}  # fmt: skip
# Inner layers are called fc in the first four; the classifier is the last of several layers in the others.
UNUSUAL = {
    "pit_ti_224": 2, "sequencer2d_s": 2, "ese_vovnet19b_slim": 2, "rdnet_tiny": 2,
    "efficientvit_b0": 2, "caformer_s18": 2, "inception_next_atto": 2, "repvit_m0_9": 4, "resnet50_clip": 2,
    "cpubone_b0_bfrobust": 2, "efficientvim_m1": 8, "efficientvim_m1_dist": 16, "volo_d1_224": 4,
}  # fmt: skip


def model(spec: str) -> torch.nn.Module:
    """Names and shapes, without memory."""
    with torch.device("meta"):
        return build(spec)


@pytest.mark.parametrize(("name", "tensors"), [*FAMILIES.items(), *UNUSUAL.items()])
def test_the_head_is_what_has_another_shape_for_other_classes(name, tensors):
    seven, nine = (model(f"{name},num_classes={count}").state_dict() for count in (7, 9))
    truth = {key for key in seven if seven[key].shape != nine[key].shape}
    assert {key for key in seven if is_head(key)} == truth
    assert len(truth) == tensors


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_are_the_buffers_of_normalisation_layers(name):
    built = model(name)
    truth = {
        f"{path}.{buffer}"
        for path, module in built.named_modules()
        if getattr(module, "running_var", None) is not None
        for buffer, _ in module.named_buffers(recurse=False)
    }
    assert {key for key in built.state_dict() if is_statistic(key)} == truth
    assert bool(truth) == any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in built.modules())


def test_the_last_part_of_a_name_tells_its_kind():
    assert kind_of("layer1.0.bn1.running_var") == "running_var" and kind_of("running_mean") == "running_mean"
    assert is_statistic("running_var") and not is_statistic("running_var.weight") and not is_statistic("")


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("fc.weight", True), ("model.fc.bias", True), ("head.fc.weight", True), ("classifier.6.weight", True),
        ("last_linear.bias", True), ("head_dist.weight", True), ("conv_head.weight", False), ("fc1.weight", False),
        ("blocks.0.mlp.fc1.weight", False), ("head.norm.weight", False), ("fc.running_mean", False), ("fc", False),
        ("overhead.weight", False), ("heads.weight", False), ("xfc.weight", False),
        ("heads.head.weight", True), ("head.0.weight", False), ("lm_head.weight", True), ("model.score.weight", True),
        ("model.lm_head_norm.weight", False),
    ],
)  # fmt: skip
def test_names_at_the_edge(name, head):
    assert is_head(name) == head
