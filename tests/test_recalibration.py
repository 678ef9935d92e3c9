from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import Tied
from torch import nn

from dmm_cli.recalibration import (
    BATCH,
    BATCHES,
    balanced_weights,
    drawn_rows,
    owner_weights,
    repair,
    reset_statistics,
)


def test_every_class_present_is_equally_likely():
    targets = torch.tensor([0] * 90 + [2] * 10)
    weights = balanced_weights(targets, 3)
    assert weights[targets == 0].sum() == pytest.approx(weights[targets == 2].sum())
    images = targets.float().view(-1, 1, 1, 1)
    batches = [images[rows] for rows in drawn_rows(weights, torch.Generator().manual_seed(0))]
    assert [len(batch) for batch in batches] == [BATCH] * BATCHES
    assert torch.cat(batches).eq(2).float().mean() == pytest.approx(0.5, abs=0.05)


def test_every_owner_has_its_share_and_no_image_of_it_is_likelier():
    weights = owner_weights(torch.tensor([2] * 30 + [0] * 10), [0.25, 0.0, 0.75])
    assert torch.allclose(weights, torch.tensor(0.025))
    assert owner_weights(torch.tensor([1, 0, 1]), [1.0, 0.0]).tolist() == [0.0, 1.0, 0.0]


def test_reset_statistics_are_the_mean_over_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    batches = [torch.randn(8, 3) * scale for scale in (1.0, 3.0)]
    counter = model[0].num_batches_tracked.clone()
    reset_statistics(model, [model[0]], batches)
    assert torch.allclose(model[0].running_mean, torch.stack([b.mean(0) for b in batches]).mean(0), atol=1e-6)
    assert torch.allclose(model[0].running_var, torch.stack([b.var(0) for b in batches]).mean(0), atol=1e-6)
    assert model[0].momentum == 0.1 and model[0].num_batches_tracked == counter and not model.training


class Normed(nn.BatchNorm1d):
    """With a layer of its own inside, as timm's have."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(super().forward(x))


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_reset_statistics_are_those_of_the_network_that_is_evaluated(training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 4), Normed(4), nn.Linear(4, 3), nn.BatchNorm1d(3))
    images = torch.randn(64, 3)
    reset_statistics(model.train(training), [model[2], model[4]], [images])
    for layer, inputs in ((model[2], model[1](images)), (model[4], model[:4](images))):
        assert torch.allclose(layer.running_mean, inputs.mean(0), atol=1e-5)
        assert torch.allclose(layer.running_var, inputs.var(0), rtol=0.05)
    assert not any(module.training for module in model.modules())


class Frozen(nn.Module):
    """BatchNorm as detectors have it: four buffers, and nothing else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight / (self.running_var + 1e-5).sqrt()
        return (x - self.running_mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]


@torch.no_grad()
def test_statistics_of_many_pixels_are_good_to_rounding():
    """Channels last, torch adds up the values of a channel one by one."""
    stream = torch.Generator().manual_seed(0)
    patches = 1 + torch.rand(64, 4, 4, 4, generator=stream)
    images = patches.repeat_interleave(40, 2).repeat_interleave(40, 3).contiguous(memory_format=torch.channels_last)
    model = nn.Sequential(nn.BatchNorm2d(4))
    reset_statistics(model, [model[0]], [images])
    variance, mean = torch.var_mean(images.double(), (0, 2, 3))
    assert torch.allclose(model[0].running_mean.double(), mean, rtol=1e-6)
    assert torch.allclose(model[0].running_var.double(), variance, rtol=1e-6)


def test_what_is_no_batchnorm_or_is_not_used_keeps_its_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3, track_running_stats=True), Frozen(3))
    model.extend([nn.BatchNorm2d(3), nn.Flatten()])
    model.unused = nn.BatchNorm2d(3)
    model.forward = lambda x: model[4](model[3](model[2](model[1](model[0](x)))))
    layers = [model[1], model[2], model[3], model.unused]
    for layer in layers:
        layer.running_mean += torch.rand(3)
        layer.running_var += torch.rand(3)
    model.unused.num_batches_tracked += 5
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(16, 2, 6, 6)
    inputs = model.eval()[2](model[1](model[0](images)))
    reset_statistics(model, layers, [images])
    assert torch.allclose(model[3].running_mean, inputs.mean((0, 2, 3)), atol=1e-6)
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {"3.running_mean", "3.running_var"}


class Net(nn.Module):
    """A convolution, a layer norm, a linear layer without a bias and one with, and a classifier."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(2, 6, 3)
        self.norm = nn.LayerNorm(6)
        self.plain = nn.Linear(6, 6, bias=False)
        self.linear = nn.Linear(6, 5)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).relu().flatten(2).transpose(1, 2)  # (B, H W, C)
        return self.head(self.linear(self.plain(self.norm(x)).relu()).relu().mean(1))


def statistics(net: nn.Module, name: str, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of a layer's output per channel, taken by hand."""
    seen = []
    handle = dict(net.named_modules())[name].register_forward_hook(lambda *a: seen.append(a[2]))
    net(images)
    handle.remove()
    channels = seen[0].movedim(1 if name == "conv" else -1, 0).flatten(1)  # (C, values)
    return channels.mean(1), channels.std(1, unbiased=False)


@pytest.fixture
def family() -> tuple[Net, list[Net], torch.Tensor]:
    parents = [Net(1).eval(), Net(2).eval()]
    merged = copy.deepcopy(parents[0])
    with torch.no_grad():
        for value, other in zip(merged.parameters(), parents[1].parameters(), strict=True):
            value.lerp_(other, 0.25)
    return merged, parents, torch.randn(64, 2, 5, 5, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_repaired_layers_have_the_parents_statistics(family):
    merged, parents, images = family
    head = copy.deepcopy(merged.head.state_dict())
    assert repair(merged, parents, [0.75, 0.25], [images], skip=["head"]) == ["conv", "plain", "linear"]
    for name in ("conv", "plain", "linear"):
        found = statistics(merged, name, images)
        wanted = [0.75 * a + 0.25 * b for a, b in zip(*(statistics(p, name, images) for p in parents), strict=True)]
        assert torch.allclose(found[1], wanted[1], rtol=1e-4)
        if name != "plain":  # it has no bias to shift its mean with
            assert torch.allclose(found[0], wanted[0], atol=1e-5)
    assert all(torch.equal(value, head[key]) for key, value in merged.head.state_dict().items())


@torch.no_grad()
def test_a_copy_of_its_parents_is_left_as_it_is(family):
    _, parents, images = family
    merged = copy.deepcopy(parents[0])
    repair(merged, [parents[0], parents[0]], [0.5, 0.5], [images, images.flip(0)], skip=["head"])
    assert torch.allclose(merged(images), parents[0](images), atol=1e-5)


@torch.no_grad()
def test_a_channel_that_is_switched_off_stays_finite(family):
    merged, parents, images = family
    merged.conv.weight[0] = 0
    repair(merged, parents, [0.5, 0.5], [images])
    assert all(value.isfinite().all() for value in merged.state_dict().values())
    assert torch.equal(merged.conv.weight[0], torch.zeros_like(merged.conv.weight[0]))


class Standardised(nn.Linear):
    """A layer that does not care for the length of its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


@torch.no_grad()
def test_layers_that_standardise_their_weights_keep_them_and_others_see_what_they_give(family):
    merged, parents, images = family
    for net in (merged, *parents):
        plain, net.plain = net.plain, Standardised(6, 6, bias=False)
        net.plain.weight.copy_(plain.weight)
        nn.utils.parametrizations.weight_norm(net.conv)
    before = {name: value.clone() for name, value in merged.state_dict().items()}
    assert repair(merged, parents, [0.75, 0.25], [images], skip=["head"]) == ["linear"]
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"linear.weight", "linear.bias"}
    found = statistics(merged, "linear", images)
    wanted = [0.75 * a + 0.25 * b for a, b in zip(*(statistics(p, "linear", images) for p in parents), strict=True)]
    assert torch.allclose(found[0], wanted[0], atol=1e-5) and torch.allclose(found[1], wanted[1], rtol=1e-4)


class Fickle(nn.Linear):
    """A layer that standardises its weights where it is told to."""

    def forward(self, x: torch.Tensor, standardise: bool = False) -> torch.Tensor:
        return F.linear(x, F.normalize(self.weight) if standardise else self.weight, self.bias)


class Half(nn.Module):
    """A network that computes in bfloat16, and calls a layer in two ways, and one without rows."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.plain, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, 5)
        self.fickle, self.idle = Fickle(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            self.idle(x[:0])
            return self.last(self.fickle(self.fickle(x=self.plain(x), standardise=True)))


@pytest.mark.parametrize("learns", [True, False])
def test_layers_that_scale_are_found_whatever_they_compute_in(learns):
    merged, *parents = (Half(seed).eval().requires_grad_(learns) for seed in range(3))
    images = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in merged.state_dict().items()}
    assert repair(merged, parents, [0.5, 0.5], [images]) == ["plain", "last"]
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"plain.weight", "last.weight", "last.bias"}
    assert all(parameter.requires_grad == learns for parameter in merged.parameters())


class Recurrent(nn.Module):
    """A network that uses a layer three times."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.again, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 12)
        for layer in self.children():
            nn.init.kaiming_normal_(layer.weight)  # so that the last use still sees something

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        for _ in range(3):
            x = self.again(x).relu()
        return self.head(x)


def spread(net: Recurrent, images: torch.Tensor) -> torch.Tensor:
    """The mean deviation of what the layers of a recurrent network give, use by use."""
    seen = []
    handles = [layer.register_forward_hook(lambda *a: seen.append(a[2].std(0).mean())) for layer in net.children()]
    net(images)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


@torch.no_grad()
def test_a_layer_that_is_used_several_times_is_repaired_for_all_uses():
    parents = [Recurrent(seed).eval() for seed in (1, 2)]
    images = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    batches = [images, images.flip(0)]
    same = copy.deepcopy(parents[0])
    repair(same, [parents[0]] * 2, [0.5, 0.5], batches)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(same.parameters(), parents[0].parameters(), strict=True))

    merged = copy.deepcopy(parents[0])
    for value, other in zip(merged.parameters(), parents[1].parameters(), strict=True):
        value.lerp_(other, 0.5)
    wanted = (spread(parents[0], images) + spread(parents[1], images)) / 2
    assert (spread(merged, images) < 0.8 * wanted).all()
    repair(merged, parents, [0.5, 0.5], batches)
    assert torch.allclose(spread(merged, images), wanted, rtol=0.15)


@torch.no_grad()
def test_tied_layers_keep_their_weights():
    torch.manual_seed(0)
    merged, *parents = (Tied().eval() for _ in range(3))
    before = {name: value.clone() for name, value in merged.state_dict().items()}
    assert repair(merged, parents, [0.5, 0.5], [torch.randn(32, 6)]) == ["shift"]
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"shift.weight", "shift.bias"}
