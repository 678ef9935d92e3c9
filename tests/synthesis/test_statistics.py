from __future__ import annotations

import pytest
import torch
from torch import nn

from dmm_cli.synthesis.losses import Observation
from dmm_cli.synthesis.losses.norm import norm
from dmm_cli.synthesis.losses.total_variation import total_variation
from dmm_cli.synthesis.statistics import LayerStatistics, NormLayer, ShiftedMoments, StatisticsRecorder


@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 3, 4, 5), 1), ((8, 3), 1), ((6, 7, 3), -1), ((2, 4, 5, 3), -1), ((6, 3, 4, 5), -3)]
)
def test_moments_and_their_gradient_are_autograds(shape, axis):
    torch.manual_seed(0)
    features = torch.randn(shape, dtype=torch.float64).float().requires_grad_(True)
    centre = torch.randn(shape[axis])
    shift, variance = ShiftedMoments.apply(features, centre, axis)
    dims = [dim for dim in range(len(shape)) if dim != axis % len(shape)]
    reference = features.detach().clone().requires_grad_(True)
    expected_variance, mean = torch.var_mean(reference, dims, correction=0)
    assert torch.allclose(shift, mean - centre, atol=1e-6)
    assert torch.allclose(variance, expected_variance, atol=1e-5)
    weights = torch.randn(2, shape[axis])
    (weights[0] * shift + weights[1] * variance).sum().backward()
    (weights[0] * mean + weights[1] * expected_variance).sum().backward()
    assert torch.allclose(features.grad, reference.grad, atol=1e-6)


def test_a_large_mean_does_not_drown_the_variance():
    torch.manual_seed(0)
    features = 1e4 + torch.randn(4096, 1)
    _, variance = ShiftedMoments.apply(features, torch.tensor([1e4]))
    assert variance.item() == pytest.approx(features.double().var(correction=0).item(), rel=1e-3)


def test_the_recorder_sees_inputs_and_leaves_no_hook():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2)).eval()
    layers = [NormLayer(layer, layer.running_mean, layer.running_var) for layer in (model[1], model[3])]
    images = torch.randn(5, 1, 6, 6)
    with StatisticsRecorder(layers) as recorder:
        model(images)
        seen = recorder.take()
        assert recorder.take() == []
    first = model[0](images)
    assert torch.allclose(seen[0].shift, first.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(seen[1].variance, model[:3](images).var((0, 2, 3), correction=0), atol=1e-5)
    assert all(not layer.module._forward_pre_hooks for layer in layers)


def observed(features: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> Observation:
    shift, spread = ShiftedMoments.apply(features, mean)
    layer = LayerStatistics(shift, spread, variance, 0.0)
    return Observation(features, torch.zeros(1), torch.zeros(1), [layer])


def test_the_statistics_loss_is_twice_the_gaussian_divergence():
    torch.manual_seed(0)
    features = torch.randn(64, 3)
    mean, variance = torch.tensor([0.3, -1.0, 0.0]), torch.tensor([2.0, 0.5, 1.0])
    batch = torch.distributions.Normal(features.mean(0), features.var(0, correction=0).sqrt())
    stored = torch.distributions.Normal(mean, variance.sqrt())
    expected = 2 * torch.distributions.kl_divergence(batch, stored).mean()
    assert norm(observed(features, mean, variance)).item() == pytest.approx(expected.item(), rel=1e-4)
    perfect = observed(features, features.mean(0), features.var(0, correction=0))
    assert norm(perfect).item() == pytest.approx(0, abs=1e-6)


def test_total_variation_of_a_ramp():
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert total_variation(Observation(ramp, ramp, ramp, [])).item() == 1.0
    assert total_variation(Observation(torch.ones(1, 1, 4, 4), ramp, ramp, [])).item() == 0.0
