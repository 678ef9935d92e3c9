from __future__ import annotations

import copy

import pytest
import torch
from conftest import DIGITS
from torch import nn

from dmm_cli.distillation import losses
from dmm_cli.distillation.lessons import Lessons
from dmm_cli.distillation.refine import refine
from dmm_cli.distillation.settings import Settings
from dmm_cli.errors import DmmError
from dmm_cli.evaluation import load_labelled
from dmm_cli.images import InputSpec, PixelSpace
from dmm_cli.inputs import resolve_source
from dmm_cli.loading import load_model
from dmm_cli.norms import norm_layers
from dmm_cli.runtime import Host

CPU = Host(torch.device("cpu"))


def test_the_distillation_loss_is_scaled_divergence():
    student = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]], requires_grad=True)
    labels = torch.tensor([[0.2, 0.7, 0.1], [0.1, 0.1, 0.8]])
    predicted = (student / 4).softmax(1)
    expected = 16 * (labels * (labels / predicted).log()).sum(1).mean()
    assert losses.distillation(student, labels, 4.0).item() == pytest.approx(expected.item(), rel=1e-5)


def site(name: str) -> nn.Module:
    model, _ = load_model(resolve_source(str(DIGITS / f"site-{name}.safetensors")))
    return model.requires_grad_(False)


def real_lessons() -> Lessons:
    """Real digits of the classes of site a, and real 7s, as their lessons."""
    data = load_labelled(DIGITS / "test.safetensors")
    space = PixelSpace(InputSpec((1, 16, 16), (0.3,), (0.38,)))
    images = space.to_bytes(data.batch(0, 450, InputSpec((1, 16, 16), (0.3,), (0.38,))))
    keep = (data.labels < 5) | (data.labels == 7)
    images, labels = images[keep], data.labels[keep]
    return Lessons(images, space, labels, (labels == 7).long(), ("a", "d"), tuple("0123456789"))


def test_a_student_learns_a_new_class_and_keeps_the_old_ones():
    model, lessons, teachers = site("a").requires_grad_(True), real_lessons(), [site("a"), site("d")]
    layers = [layer for _, layer in norm_layers(model)]
    history, retention = refine(model, layers, lessons, teachers, Settings(steps=100, batch=64, noise=0.0), CPU)
    old, new = retention
    assert (old.label, new.label) == ("a", "d") and (old.images, new.images) == (225, 45)
    assert new.before == 0.0 and new.after > 90 and old.before > 95 and old.after > 90
    assert history.curves["loss"][-1] < 0.2 * history.curves["loss"][0]
    assert all(len(curve) == len(history.step) for curve in history.curves.values())
    assert [item.name for item in old.classes] == list("01234") and [item.name for item in new.classes] == ["7"]
    assert sum(item.images for item in old.classes) == 225
    mean = sum(item.images * item.after for item in old.classes) / 225
    assert mean == pytest.approx(old.after) and new.classes[0].after == new.after
    assert not model.training


def test_the_same_seed_gives_the_same_weights():
    weights = []
    for _ in range(2):
        model = site("a")
        layers = [layer for _, layer in norm_layers(model)]
        refine(model, layers, real_lessons(), [site("a"), site("d")], Settings(steps=5, batch=32), CPU)
        weights.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


class Masked(nn.Module):
    """A site whose logit of one class is always the same."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__()
        self.own, self.value = site(name), value

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.own(images).index_fill(1, torch.tensor([9]), self.value)


def test_a_loss_that_is_not_finite_ends_the_distillation_at_once():
    with pytest.raises(DmmError, match="loss is nan in step 1"):
        refine(Masked("a", torch.nan), [], real_lessons(), [site("a"), site("d")], Settings(steps=3, batch=32), CPU)


def test_a_student_that_rules_a_class_out_learns_the_others():
    student = Masked("a", -torch.inf).requires_grad_(True)
    teachers = [Masked(name, -torch.inf) for name in "ad"]
    layers = [layer for _, layer in norm_layers(student)]
    settings = Settings(steps=100, batch=64, noise=0.0)
    history, retention = refine(student, layers, real_lessons(), teachers, settings, CPU)
    assert retention[1].before == 0.0 and min(told.after for told in retention) > 90
    assert history.curves["loss"][-1] < 0.2 * history.curves["loss"][0]


def test_no_step_needs_no_teacher_and_leaves_the_weights():
    model, before = site("a"), site("a")
    history, _ = refine(model, [], real_lessons(), [], Settings(steps=0), CPU)
    assert history.step == [] or not history.curves
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), before.parameters(), strict=True))


def test_without_a_step_statistics_are_those_of_every_teachers_own_mix():
    """One teacher has nine dark images of one class and a bright one of another, one has ten of the first, in grey."""
    levels = torch.tensor([0] * 9 + [255] + [128] * 10, dtype=torch.uint8)
    images = levels.view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    targets, owners = torch.tensor([0] * 9 + [1] + [0] * 10), torch.tensor([0] * 10 + [1] * 10)
    space = PixelSpace(InputSpec((1, 2, 2), (0.0,), (1.0,)))
    norm = nn.BatchNorm2d(1)
    student = nn.Sequential(norm, nn.Flatten(), nn.Linear(4, 2)).eval()
    lessons = Lessons(images, space, targets, owners, ("a", "b"), ("dark", "bright"))
    refine(student, [norm], lessons, [], Settings(steps=0), CPU)
    assert norm.running_mean.item() == pytest.approx((0.1 + 128 / 255) / 2, abs=0.02)  # .63 if classes counted alike
