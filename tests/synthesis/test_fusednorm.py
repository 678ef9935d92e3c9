from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import shell
from torch import nn

pytest.importorskip("triton", reason="triton comes with torch for CUDA alone")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


class Network(nn.Module):
    """Three layers that are measured: a ReLU in place follows one at once, one behind a sum, and one is left alone."""

    def __init__(self, width: int, affine: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, 5, 3)]
        )
        self.norms = nn.ModuleList([*(nn.BatchNorm2d(width, affine=affine) for _ in range(2)), nn.BatchNorm2d(5)])
        self.relus = nn.ModuleList([nn.ReLU(inplace=True), nn.ReLU(inplace=True), nn.ReLU()])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = self.relus[0](self.norms[0](self.convs[0](images)))
        second = self.norms[1](self.convs[1](first))
        second += first
        return self.relus[2](self.norms[2](self.convs[2](self.relus[1](second))))


def network(width: int, affine: bool = True) -> Network:
    torch.manual_seed(0)
    model = Network(width, affine)
    for layer in model.norms:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
        if layer.affine:
            layer.weight.data.normal_()
            layer.bias.data.normal_()
    return model.eval().requires_grad_(False)


def watch_fused(model: Network) -> list[tuple[bool, bool]]:
    """What each layer does in its one pass, as it is done: whether a shortcut is added, and a ReLU."""
    done = []

    def watched(layer):
        def normalised(features, shortcut=None, rectify=False):
            done.append((shortcut is not None, rectify))
            return type(layer).normalised(layer, features, shortcut, rectify)

        return normalised

    for layer in model.norms:
        layer.normalised = watched(layer)
    return done


def check(width: int, images: torch.Tensor, dtype: torch.dtype, affine: bool, tolerance: float) -> None:
    """Outputs, statistics and gradients against float64 on plain layers, in the first pass and in a later one."""
    from dmm_cli.runtime import deterministic
    from dmm_cli.synthesis.fusednorm import fuse_norms
    from dmm_cli.synthesis.statistics import NormLayer, StatisticsRecorder

    plain = network(width, affine)
    fused = fuse_norms(copy.deepcopy(plain), DEVICE).to(DEVICE, dtype)
    for mine, layer in zip(fused.norms, plain.norms, strict=True):
        for name, value in layer.state_dict().items():
            getattr(mine, name).data = value.to(DEVICE)  # float32 in mixed precision
    reference = plain.double()
    for mine, theirs in zip(fused.convs, reference.convs, strict=True):  # their rounding is not what is tested
        theirs.weight.data, theirs.bias.data = mine.weight.cpu().double(), mine.bias.cpu().double()

    def passed(model, given, means):
        given = given.clone().requires_grad_(True)
        layers = [NormLayer(norm, mean, norm.running_var) for norm, mean in zip(model.norms, means, strict=True)]
        with deterministic(given.device), StatisticsRecorder(layers) as recorder:  # convolutions too, as in a synthesis
            answer = model(given)
            seen = recorder.take()
            terms = [part.shift.square().sum() + part.variance.log().sum() for part in seen]
            (grad,) = torch.autograd.grad(answer.double().sin().sum() + 100 * sum(terms), given)
        return [answer, grad, *(value for part in seen for value in (part.shift, part.variance))]

    done = watch_fused(fused)
    other = torch.linspace(-1, 1, 5)  # statistics that were recorded elsewhere
    means = [norm.running_mean for norm in reference.norms[:2]]
    expected = passed(reference, images.double(), [*means, other.double()])
    means = [norm.running_mean for norm in fused.norms[:2]]
    first = None
    for turn in range(3):
        found = passed(fused, images.to(DEVICE, dtype), [*means, other.to(DEVICE)])
        assert [norm.waits for norm in fused.norms] == [True, True, False]
        assert done == ([(False, False)] * 3 if turn == 0 else [(False, True), (True, True), (False, False)])
        done.clear()
        first = first or found  # what follows a layer is learned in this pass, and must not be seen in its bits
        assert [torch.equal(*pair) for pair in zip(first, found, strict=True)] == [True] * len(first)
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine.detach().cpu().double() - theirs).norm() <= tolerance * theirs.norm(), turn


def check_waiting() -> None:
    """A layer that waits for its ReLU is the normalised features to whatever comes instead."""
    from dmm_cli.synthesis.fusednorm import FusedReLU, Waiting, fuse_norms
    from dmm_cli.synthesis.statistics import ShiftedMoments

    plain = network(4).norms[0]
    norm, relu = fuse_norms(nn.Sequential(copy.deepcopy(plain), nn.ReLU(inplace=True)), DEVICE).to(DEVICE)
    assert type(relu) is FusedReLU
    features, shortcut = torch.randn(2, 2, 4, 5, 6)

    def follow(layer, then) -> list[torch.Tensor]:
        given = [part.to(DEVICE).requires_grad_(True) for part in (features, shortcut)]
        told = []
        if layer is norm:
            norm.tell = lambda *moments: told.append(moments)
            assert isinstance(layer(given[0]), Waiting) == norm.waits
            assert len(told) == (not norm.waits)
        answer = then(layer(given[0]), given[1])
        return [answer, *torch.autograd.grad(answer.sin().sum(), given, allow_unused=True)]

    def summed(waits, other):
        waits += other
        return waits

    def rectified_in_place(waits, other):
        act = relu if type(waits) is Waiting else nn.ReLU(inplace=True)
        waits += other
        act(waits)
        return waits * 1

    def without_a_sum(waits, other):
        return (relu if type(waits) is Waiting else nn.ReLU(inplace=True))(waits) + 0 * other

    def only_half(waits, other):
        return waits.add_(other, alpha=0.5) * waits.shape[1]

    def to_all_alike(waits, other):
        waits += other[:1, :, :1, :1]
        return summed(waits, other)

    def normalised_again(waits, other):
        waits = summed(waits, other)
        return (norm if type(waits) is Waiting else plain)(waits)

    def looked_at_without_gradients(waits, other):
        with torch.no_grad():
            assert waits.shape == other.shape
        return summed(waits, other)

    relu(summed(norm(features.to(DEVICE).requires_grad_(True)), shortcut.to(DEVICE)))
    assert norm.waits
    others = [
        only_half,
        to_all_alike,
        without_a_sum,
        normalised_again,
        looked_at_without_gradients,
        lambda waits, other: torch.cat([other, waits]) + waits.mean(),
    ]
    for then in (rectified_in_place, summed, *others):
        for mine, theirs in zip(follow(norm, then), follow(plain.to(DEVICE), then), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5), then

    def past_the_layer(waits, other):
        return ShiftedMoments.apply(waits, torch.zeros(4, device=DEVICE))[1] + 0 * other.sum()

    def changed_before_its_relu(waits, other):
        other = other * 1
        waits += other
        other.mul_(2)
        return relu(waits)

    for then, words in ((past_the_layer, "a gradient went past"), (changed_before_its_relu, "changed in place")):
        with pytest.raises(RuntimeError, match=words):
            follow(norm, then)


class Readers(nn.Module):
    """Features that are read before their ReLU overwrites them, and a layer that is used once with and once without."""

    def __init__(self) -> None:
        super().__init__()
        self.gated, self.joined, self.shared = (nn.BatchNorm2d(3) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.gated(images)
        gate = features.mean((2, 3), keepdim=True).sigmoid()
        features = self.joined(gate * self.relu(features))
        both = torch.cat([features, -features], 1)
        features = self.shared(self.relu(self.shared(self.relu(features))))
        return torch.cat([both, features], 1)


def check_readers() -> None:
    from dmm_cli.synthesis.fusednorm import fuse_norms

    torch.manual_seed(0)
    plain = Readers().eval().requires_grad_(False).to(DEVICE)
    for layer in (plain.gated, plain.joined, plain.shared):
        layer.running_mean.normal_()
    fused = fuse_norms(copy.deepcopy(plain), DEVICE)
    images = torch.randn(2, 3, 5, 6, device=DEVICE)
    for turn in range(3):
        found = []
        for model in (plain, fused):
            given = images.clone().requires_grad_(True)
            answer = model(given)
            found.append([answer, *torch.autograd.grad(answer.sin().sum(), given)])
        assert fused.gated.waits and fused.joined.waits and fused.shared.waits
        for theirs, mine in zip(*found, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5), turn


def in_interpreter(call: str) -> None:
    """A call of this file where Triton's kernels are run by Python, which is decided when Triton is imported."""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    code = f"import torch, test_fusednorm; torch.manual_seed(1); test_fusednorm.{call}"
    done = shell(code=code, env={"TRITON_INTERPRET": "1", "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr


CASES = [(70, (5, 3, 11, 9), True), (3, (2, 3, 40, 40), True), (130, (3, 3, 6, 7), False)]


@pytest.mark.parametrize(("width", "shape", "affine"), CASES)
def test_a_fused_layer_is_the_plain_one_measured(width, shape, affine):
    if not ON_GPU:
        in_interpreter(f"check({width}, torch.randn({shape}), torch.float32, {affine}, 1e-3)")
        return
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    check(width, images, torch.float32, affine, 1e-3)
    check(width, images.bfloat16().float(), torch.bfloat16, affine, 3e-2)


def check_others() -> None:
    from dmm_cli.synthesis.fusednorm import FusedNorm, fuse_norms

    others = [nn.BatchNorm1d(3), nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3), nn.GELU()]
    model = fuse_norms(nn.Sequential(*others, nn.BatchNorm2d(3)), DEVICE)
    assert [type(layer) for layer in model] == [*map(type, others[:4]), FusedNorm]
    assert all(type(layer).__module__.startswith("torch.") for layer in others)


def test_a_layer_that_waits_for_its_relu_takes_whatever_comes():
    if ON_GPU:
        check_waiting()
    else:
        in_interpreter("check_waiting()")


def test_what_reads_features_before_their_relu_sees_them_unrectified():
    if ON_GPU:
        check_readers()
    else:
        in_interpreter("check_readers()")


def test_other_layers_stay_as_they_are():
    if ON_GPU:
        check_others()
    else:
        in_interpreter("check_others()")
