"""Networks that draw."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dmm_cli.images import InputSpec
from dmm_cli.synthesis.network import LATENT, Generator, Mixture, Resample, Style, drawing
from dmm_cli.synthesis.settings import PARTS

CONDITIONS = 3


def drawn(network: torch.nn.Module, count: int) -> torch.Tensor:
    stream = torch.Generator().manual_seed(0)
    latent = torch.randn(count, LATENT, generator=stream)
    return network.eval()(latent, torch.arange(count) % CONDITIONS)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_resampling_and_its_gradient_are_those_of_torch(mode):
    images = torch.randn(2, 3, 5, 4, requires_grad=True)
    weights = torch.randn(2, 3, 18, 16)
    found, expected = Resample((5, 4), (18, 16), mode)(images), F.interpolate(images, (18, 16), mode=mode)
    assert torch.allclose(found, expected, atol=1e-5)
    gradients = [torch.autograd.grad((out * weights).sum(), images)[0] for out in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-4)


@pytest.mark.parametrize(("edges", "frame"), [("zeros", True), ("replicate", False)])
def test_only_zeros_leave_a_frame(edges, frame):
    """Where the lowest resolution is the same everywhere, nothing but the edges can tell one place from another."""
    network = Generator((3, 32, 32), CONDITIONS, Style(edges=edges))
    torch.nn.init.zeros_(network.project.weight)
    bias = torch.randn(network.norm.num_features, 1)
    network.project.bias.data.copy_(bias.expand(-1, network.project.out_features // len(bias)).flatten())
    image = drawn(network, 1)
    assert bool(image.var((2, 3)).max() > 1e-6) == frame


def test_an_image_of_one_pixel_is_drawn():
    network = drawing(InputSpec((3, 1, 1), (0.5,) * 3, (0.5,) * 3), CONDITIONS).train()
    count = PARTS  # one for each part of a mixture
    assert network(torch.randn(count, LATENT), torch.zeros(count).long()).shape == (count, 3, 1, 1)


def test_a_margin_is_drawn_and_cut_off():
    whole, cut = Generator((1, 20, 24), CONDITIONS, Style()), Generator((1, 16, 20), CONDITIONS, Style(margin=2))
    cut.load_state_dict(whole.state_dict())
    assert torch.equal(drawn(cut, 4), drawn(whole, 4)[:, :, 2:-2, 2:-2])


@pytest.mark.parametrize(("channels", "grey"), [(1, False), (2, False), (3, True)])
def test_fine_detail_of_red_green_and_blue_is_grey(channels, grey):
    """Differences of colours are the same within blocks of 4 x 4 pixels, while brightness differs in them."""
    with torch.no_grad():
        image = drawn(Generator((channels, 32, 32), CONDITIONS, Style()), 4)
    blocks = F.interpolate(F.avg_pool2d(image, 4), scale_factor=4)
    assert (image - blocks).abs().max() > 1e-2
    apart = (image - blocks) - (image - blocks).mean(1, keepdim=True)  # (B, C, H, W)
    assert (apart.abs().max() < 1e-5) == (grey or channels == 1)


def test_images_that_are_alike_but_for_their_contrast_have_it_drawn():
    """Where nothing else reads the latent's first number, its exponential scales all but the one colour."""
    network = Generator((3, 16, 16), CONDITIONS, Style()).eval()
    for layer in (network.project, network.colour):
        layer.weight.data[:, 0] = 0.0
    latent = torch.randn(LATENT, generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    latent[:, 0] = torch.tensor([0.0, 1.0, -2.0])
    with torch.no_grad():
        images = network(latent, torch.zeros(3, dtype=torch.int64))
        plain = network.colour(torch.cat([latent, network.embedding.weight[[0, 0, 0]]], 1))[:, :, None, None]
    usual, strong, weak = images - plain
    assert usual.std() > 1e-2
    assert torch.allclose(strong, usual * math.exp(0.4), atol=1e-5)
    assert torch.allclose(weak, usual * math.exp(-0.8), atol=1e-5)


def test_a_mixture_lets_its_generators_draw_in_turn():
    network = Mixture((3, 8, 8), CONDITIONS)
    count = len(network.parts) + 3  # some draw twice, some once
    images, alone = drawn(network, count), [drawn(part, count) for part in network.parts]
    for number in range(count):
        same = [torch.allclose(images[number], others[number], atol=1e-5) for others in alone]
        assert same == [part == number % len(network.parts) for part in range(len(network.parts))]


def test_fewer_images_than_generators_can_be_drawn_and_learned_from():
    network = Mixture((1, 16, 16), CONDITIONS).train()
    network(torch.randn(1, LATENT), torch.zeros(1, dtype=torch.int64)).sum().backward()
    assert network.parts[0].paint.bias.grad is not None and network.parts[1].paint.bias.grad is None
