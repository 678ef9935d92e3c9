from __future__ import annotations

import math

import pytest
import torch

from dmm_cli.distillation.augment import NOISE, SPREAD, add_noise, deform, draw_patches, draw_poses, patched, posed
from dmm_cli.examples import Examples, named


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_deformations_stay_within_their_limits():
    images = torch.zeros(64, 1, 32, 32)
    images[:, :, 12:20, 12:20] = 1.0
    moved = deform(images, draw_poses(64, 0.5, stream()))
    axis = torch.arange(32.0)
    mass = moved.sum((1, 2, 3))
    column = (moved.sum((1, 2)) * axis).sum(1) / mass
    row = (moved.sum((1, 3)) * axis).sum(1) / mass
    for centre in (row, column):
        assert (centre - 15.5).abs().max() < 32 / 16 + 0.6 and centre.std() > 0.5
    assert mass.min() > 64 * 0.7 and mass.max() < 64 * 1.4
    flat = torch.full((2, 1, 8, 8), 0.7)
    assert torch.allclose(deform(flat, draw_poses(2, 1.0, stream())), flat, atol=1e-6), "the border is repeated"


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 64), (64, 16)])
def test_a_turn_keeps_angles(height, width):
    """By the axis of a bar, whose pixels are counted."""
    images = torch.zeros(1, 1, height, width)
    images[:, :, height // 2 - 1 : height // 2 + 1, width // 2 - 8 : width // 2 + 8] = 1.0
    turned = deform(images, torch.tensor([[0.5, 0.0, 0.0, 0.0, 0.0, 0.0]]))[0, 0]
    down, across = turned.nonzero().double().sub(torch.tensor([height - 1, width - 1]) / 2).T
    weights = turned[turned != 0].double()
    slope = (weights * down * across).sum() / (weights * across.square()).sum()
    assert abs(math.degrees(math.atan(slope))) == pytest.approx(12, abs=1)


def test_a_pose_of_zeros_changes_nothing():
    images = torch.rand(3, 2, 9, 7, generator=stream())
    assert torch.allclose(deform(images, torch.zeros(3, 6)), images, atol=1e-5)
    assert (draw_poses(5, 0.0, stream()) == 0).all()


def test_poses_are_uniform_up_to_the_strength():
    poses = draw_poses(4000, 0.5, stream())
    assert poses.shape == (4000, 6) and poses.abs().max() <= 0.5
    assert poses.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.02)


def test_every_image_gets_noise_of_its_own_level():
    noisy = add_noise(torch.zeros(500, 1, 16, 16), 0.5, stream())
    levels = noisy.std((1, 2, 3))
    assert levels.max() < 0.5 * NOISE * 1.15 and levels.min() < 0.05 * NOISE
    assert levels.mean().item() == pytest.approx(0.25 * NOISE, rel=0.1)
    images = torch.rand(2, 1, 4, 4)
    assert add_noise(images, 0.0, stream()) is images


def test_numbers_get_noise_in_their_own_deviation_and_tokens_none():
    numbers = torch.randn(4000, 2, generator=stream()) * torch.tensor([1.0, 100.0])
    inputs = Examples({"numbers": numbers, "tokens": torch.arange(4000)})
    noisy = named(add_noise(inputs, 0.5, stream(1)))
    added = (noisy["numbers"] - numbers) / numbers.std(0, correction=0)
    # a level uniform in [0, L] and a normal draw have variance L^2 / 3
    assert added.std(0).tolist() == pytest.approx([0.5 * SPREAD / 3**0.5] * 2, rel=0.05)
    assert torch.equal(noisy["tokens"], torch.arange(4000))
    assert torch.equal(named(posed(inputs, torch.ones(4000, 6)))["numbers"], numbers)


def test_tokens_of_three_dimensions_are_no_images():
    tokens = torch.arange(4 * 27).view(4, 3, 3, 3)
    assert torch.equal(posed(tokens, torch.ones(4, 6)), tokens)
    assert torch.equal(patched(tokens, -tokens, torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(4, 4)), tokens)


def test_patches_cover_the_share_of_an_image_that_they_are_to():
    zeros, ones = torch.zeros(4000, 1, 32, 32), torch.ones(4000, 1, 32, 32)
    covered = patched(zeros, ones, draw_patches(4000, 0.5, stream())).mean((1, 2, 3))
    whole = patched(zeros, ones, torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(4000, 4))
    assert (whole == 1).all()
    assert (covered == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert covered.max() > 0.7 and covered[covered > 0].mean() > 0.25


def test_a_patch_lies_where_it_says():
    images, others = torch.zeros(1, 1, 4, 8), torch.ones(1, 1, 4, 8)
    mixed = patched(images, others, torch.tensor([[0.25, 0.5, 0.75, 0.875]]))
    expected = torch.zeros(4, 8)
    expected[1:3, 4:7] = 1.0
    assert torch.equal(mixed[0, 0], expected)
