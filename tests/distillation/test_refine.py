from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS
from torch import nn

from dmm_cli.architectures import load_model, norm_layers
from dmm_cli.distillation import losses
from dmm_cli.distillation.augment import NOISE, add_noise, augment, deform
from dmm_cli.distillation.lessons import Lessons
from dmm_cli.distillation.refine import Settings, refine
from dmm_cli.distillation.routing import soft_labels
from dmm_cli.evaluation import load_labelled
from dmm_cli.images import InputSpec, PixelSpace
from dmm_cli.inputs import resolve_source
from dmm_cli.runtime import Host

CPU = Host(torch.device("cpu"))


def test_soft_labels_are_the_owners_inside_its_support():
    logits = torch.tensor([[2.0, 1.0, 5.0], [1.0, 0.0, 3.0]])
    priors = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    labels = soft_labels(logits, torch.tensor([0, 1]), priors, 2.0)
    assert torch.allclose(labels[0, :2], (logits[0, :2] / 2).softmax(0), atol=1e-6)
    assert labels[0, 2] == 0 and labels[1].tolist() == [0, 0, 1]


def test_the_distillation_loss_is_scaled_divergence():
    student = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]], requires_grad=True)
    labels = torch.tensor([[0.2, 0.7, 0.1], [0.1, 0.1, 0.8]])
    predicted = (student / 4).softmax(1)
    expected = 16 * (labels * (labels / predicted).log()).sum(1).mean()
    assert losses.distillation(student, labels, 4.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_anchor_holds_masked_images_only():
    first = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    now = torch.tensor([[0.0, 1.0], [5.0, 2.0]])
    assert losses.anchor(first, first, torch.ones(2), 2.0).item() == pytest.approx(0, abs=1e-7)
    masked = losses.anchor(now, first, torch.tensor([1.0, 0.0]), 2.0)
    p, q = (first[0] / 2).softmax(0), (now[0] / 2).softmax(0)
    assert masked.item() == pytest.approx((4 * (p * (p / q).log()).sum() / 2).item(), rel=1e-5)


def test_deformations_stay_within_their_limits():
    stream = torch.Generator().manual_seed(0)
    images = torch.zeros(64, 1, 32, 32)
    images[:, :, 12:20, 12:20] = 1.0
    assert augment(images, 0.0, stream) is images
    moved = deform(images, 0.5, stream)
    axis = torch.arange(32.0)
    mass = moved.sum((1, 2, 3))
    column = (moved.sum((1, 2)) * axis).sum(1) / mass
    row = (moved.sum((1, 3)) * axis).sum(1) / mass
    for centre in (row, column):
        assert (centre - 15.5).abs().max() < 32 / 16 + 0.6 and centre.std() > 0.5
    assert mass.min() > 64 * 0.7 and mass.max() < 64 * 1.4
    first, second = (augment(images, 1.0, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, second)
    flat = torch.full((2, 1, 8, 8), 0.7)
    assert torch.allclose(deform(flat, 1.0, stream), flat, atol=1e-6), "the border is repeated"


def test_every_image_gets_noise_of_its_own_level():
    noisy = add_noise(torch.zeros(500, 1, 16, 16), 0.5, torch.Generator().manual_seed(0))
    levels = noisy.std((1, 2, 3))
    assert levels.max() < 0.5 * NOISE * 1.15 and levels.min() < 0.05 * NOISE
    assert levels.mean().item() == pytest.approx(0.25 * NOISE, rel=0.1)


def real_lessons(inside: bool) -> tuple[nn.Module, Lessons]:
    """Site a as a student, and real 7s and 8s as its lessons."""
    model, _ = load_model(resolve_source(str(DIGITS / "site-a.safetensors")))
    data = load_labelled(DIGITS / "test.safetensors")
    space = PixelSpace(InputSpec((1, 16, 16), (0.3,), (0.38,)))
    images = space.to_bytes(data.batch(0, 450, InputSpec((1, 16, 16), (0.3,), (0.38,))))
    keep = (data.labels < 5) | (data.labels == 7)
    images, labels = images[keep], data.labels[keep]
    owner = (labels == 7).long()
    priors = torch.zeros(2, 10)
    priors[0, :5], priors[1, 7] = 0.2, 1.0
    logits = F.one_hot(labels, 10).float() * 10
    names = ("a", "d"), tuple("0123456789")
    return model, Lessons(images, space, labels, owner, logits, priors, *names, torch.tensor([inside, False]))


def test_a_student_learns_a_new_class_and_keeps_the_old_ones():
    model, lessons = real_lessons(inside=True)
    untouched = {name: value.clone() for name, value in model.state_dict().items() if "num_batches" in name}
    layers = [layer for _, layer in norm_layers(model)]
    history, retention = refine(model, layers, lessons, Settings(steps=100, batch=64, augment=0.0), CPU)
    old, new = retention
    assert (old.label, new.label) == ("a", "d") and (old.images, new.images) == (225, 45)
    assert new.before == 0.0 and new.after > 90 and old.before > 95 and old.after > 90
    assert history.curves["distillation"][-1] < history.curves["distillation"][0]
    assert all(len(curve) == len(history.step) for curve in history.curves.values())
    assert [item.name for item in old.classes] == list("01234") and [item.name for item in new.classes] == ["7"]
    assert sum(item.images for item in old.classes) == 225
    mean = sum(item.images * item.after for item in old.classes) / 225
    assert mean == pytest.approx(old.after) and new.classes[0].after == new.after
    assert not model.training
    assert untouched.keys() <= model.state_dict().keys()


def test_the_same_seed_gives_the_same_weights():
    weights = []
    for _ in range(2):
        model, lessons = real_lessons(inside=False)
        refine(model, [layer for _, layer in norm_layers(model)], lessons, Settings(steps=5, batch=32), CPU)
        weights.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
