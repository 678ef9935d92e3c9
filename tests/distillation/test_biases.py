from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dmm_cli.distillation.biases import calibrate_biases, offsets
from dmm_cli.distillation.lessons import Lessons
from dmm_cli.images import InputSpec, PixelSpace

SHIFT = torch.tensor([1.5, -2.0, 0.0, 0.5])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4)).eval()


def lessons() -> Lessons:
    """Three times as many images of the first class as of any other."""
    images = torch.randint(0, 256, (600, 1, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    targets = (torch.arange(600) % 6 - 2).clamp_min(0)
    space = PixelSpace(InputSpec((1, 8, 8), (0.5,), (0.3,)))
    return Lessons(images, space, targets, targets * 0, ("one",), tuple("abcd"))


def test_planted_offsets_are_found_and_taken_back():
    committee, student, data = network(), network(), lessons()
    with torch.no_grad():
        student[-1].bias += SHIFT
    calibrate_biases(student.train(), data, committee)
    assert not student.training
    moved = (student[-1].bias - committee[-1].bias).detach()
    assert moved.tolist() == pytest.approx([SHIFT.mean().item()] * 4, abs=1e-3)


def test_a_student_names_every_class_as_often_as_the_committee_where_classes_count_alike():
    committee, student, data = network(), network(), lessons()
    with torch.no_grad():
        student[1].weight.mul_(-1.0)
        calibrate_biases(student, data, committee)
        answers = [model(data.show(torch.arange(600))).softmax(1) for model in (student, committee)]
    means = [torch.stack([given[data.targets == c].mean(0) for c in range(4)]).mean(0) for given in answers]
    assert means[0].tolist() == pytest.approx(means[1].tolist(), abs=1e-5)
    assert (answers[0] - answers[1]).abs().max() > 0.05


def test_images_count_by_their_weights():
    stream = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 500, 4, generator=stream, dtype=torch.float64) * 3
    shares = torch.rand(500, generator=stream, dtype=torch.float64)
    found = offsets(logits, other.softmax(1), 7.0 * shares)
    given, wanted = (shares @ values.softmax(1) for values in (logits + found, other))
    assert given.tolist() == pytest.approx(wanted.tolist(), rel=1e-5)
    assert found.sum().item() == pytest.approx(0.0, abs=1e-12)


def test_a_class_that_is_ruled_out_leaves_the_offsets_of_the_others_finite():
    stream = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 500, 4, generator=stream, dtype=torch.float64)
    logits[:, 3] = -torch.inf
    other[:, 3] -= 100.0
    found = offsets(logits, other.softmax(1), torch.ones(500).double())
    given, wanted = (values.softmax(1).mean(0) for values in (logits + found, other))
    assert given.tolist() == pytest.approx(wanted.tolist(), abs=1e-3)


@pytest.mark.parametrize(
    "student",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh()),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False)),
        nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten()),
    ],
    ids=["what follows is no bias", "no biases", "no linear layer"],
)
def test_a_student_whose_logits_no_bias_gives_is_left_alone(student):
    before = copy.deepcopy(student.state_dict())
    calibrate_biases(student, lessons(), network())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
