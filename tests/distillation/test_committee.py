from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from dmm_cli.distillation.committee import RIDGE, Committee, fit
from dmm_cli.distillation.lessons import Lessons
from dmm_cli.distillation.settings import Settings
from dmm_cli.distillation.views import draw_views
from dmm_cli.images import InputSpec, PixelSpace
from dmm_cli.runtime import generator


def test_the_regression_is_the_one_of_scikit_learn():
    stream = torch.Generator().manual_seed(0)
    features = torch.randn(300, 7, generator=stream, dtype=torch.float64)
    targets = (features[:, :3] + torch.randn(300, 3, generator=stream, dtype=torch.float64)).argmax(1)
    weights = torch.rand(300, generator=stream, dtype=torch.float64) + 0.1
    slopes, offsets = fit(features, targets, weights, 3)
    other = LogisticRegression(C=300 / (2 * RIDGE * float(weights.sum())), tol=1e-10, max_iter=10000)
    other.fit(features.numpy(), targets.numpy(), weights.numpy())
    expected = torch.from_numpy(other.predict_proba(features.numpy()))
    assert (features @ slopes + offsets).softmax(1) == pytest.approx(expected, abs=1e-4)
    assert slopes.T.numpy() == pytest.approx(other.coef_, abs=1e-3)


class Half(nn.Module):
    """Tells two of four classes apart, by the side that is bright, and may be far surer of itself than another."""

    def __init__(self, classes: tuple[int, int], rows: slice, bias: float) -> None:
        super().__init__()
        self._classes, self._rows, self._bias = classes, rows, bias

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        part = images[:, 0, self._rows]  # (B, 4, 8)
        logits = images.new_full((len(images), 4), -5.0)
        seen = torch.stack([part[..., :4], part[..., 4:]], 1).mean((2, 3))
        logits[:, list(self._classes)] = 3.0 * seen + self._bias
        return logits


def lessons() -> Lessons:
    """Four classes: the quarter of an image that is bright."""
    stream = torch.Generator().manual_seed(0)
    targets = torch.arange(400) % 4
    images = torch.randint(0, 100, (400, 1, 8, 8), generator=stream)
    for number, target in enumerate(targets.tolist()):
        row, column = divmod(target, 2)
        images[number, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 100
    space = PixelSpace(InputSpec((1, 8, 8), (0.5,), (0.3,)))
    return Lessons(images.to(torch.uint8), space, targets, targets // 2, ("top", "bottom"), tuple("abcd"))


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(2)


TEACHERS = [Half((0, 1), slice(0, 4), 0.0), Half((2, 3), slice(4, 8), 30.0)]


def test_a_committee_knows_whom_to_believe():
    data = lessons()
    images = data.show(torch.arange(400))
    mean = torch.stack([teacher(images) for teacher in TEACHERS]).mean(0)
    assert (mean.argmax(1) == data.targets).float().mean() < 0.6, "the one that is sure of itself wins"
    answers = data.committee(TEACHERS, Settings())(images)
    assert answers.shape == (400, 4) and (answers.argmax(1) == data.targets).float().mean() > 0.98


def test_the_committee_counts_every_class_alike():
    data = lessons()
    seen = torch.cat([torch.zeros(90, 1, 8, 8), torch.zeros(10, 1, 8, 8)])
    targets = torch.cat([torch.zeros(90), torch.ones(10)]).long()
    weights = torch.cat([torch.full((90,), 1 / 90), torch.full((10,), 1 / 10)])
    answers = Committee(TEACHERS, [seen], targets, weights, 4)(data.show(torch.arange(2)) * 0)
    assert answers[0, 0].item() == pytest.approx(answers[0, 1].item(), abs=1e-3)


class Certain(Half):
    """The same, but the classes that it does not know are ruled out."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = super().forward(images)
        return logits.masked_fill(logits == -5.0, -torch.inf)


def test_teachers_that_rule_classes_out_are_believed_as_others_are():
    data = lessons()
    teachers = [Certain((0, 1), slice(0, 4), 0.0), Certain((2, 3), slice(4, 8), 30.0)]
    answers = data.committee(teachers, Settings())(data.show(torch.arange(400)))
    assert answers.isfinite().all() and (answers.argmax(1) == data.targets).float().mean() > 0.98


def test_views_are_answered_as_they_are_shown():
    data = lessons()
    committee = data.committee(TEACHERS, Settings())
    views = draw_views(data, committee, 200, 0.5, torch.Generator().manual_seed(1))
    numbers = torch.arange(200)
    assert torch.allclose(views.answers, committee(views.show(numbers)), atol=1e-5)
    plain = data.show(views.rows[:, 0])
    changed = (views.show(numbers) - plain).abs().amax((1, 2, 3)) > 0.1
    assert changed.float().mean() > 0.9
    assert data.targets[views.rows].flatten().bincount().tolist() == pytest.approx([100] * 4, abs=35)


class Quarters(nn.Module):
    """Sees how bright the quarters of an image are, and has no class to say it with."""

    def __init__(self, places: bool) -> None:
        super().__init__()
        self._places, self.classifier = places, nn.Linear(4, 4)
        nn.init.zeros_(self.classifier.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        quarters = nn.functional.avg_pool2d(images, 4).flatten(1)  # (B, 4)
        if not self._places:
            return self.classifier(quarters)
        spread = torch.tensor([0.5, 1.5])[:, None] * quarters[:, None]  # (B, 2 places, 4)
        return self.classifier(spread).mean(1)


@pytest.mark.parametrize("places", [False, True])
def test_a_committee_reads_what_a_teacher_has_no_class_for(places):
    data, teacher = lessons(), Quarters(places)
    images = data.show(torch.arange(400))
    assert teacher(images).std(0).max() == 0
    answers = data.committee([teacher], Settings())(images)
    assert (answers.argmax(1) == data.targets).float().mean() > 0.98
    assert not teacher.classifier._forward_pre_hooks


class Places(nn.Module):
    """A classifier of every pixel, whose last linear layer is given pixels as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(1, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images[:, 0].reshape(-1, 1)  # (B H W, 1)
        return self.classifier(pixels).view(len(images), -1, 4).mean(1)


def test_features_of_places_are_not_those_of_images():
    data, teacher = lessons(), Places()
    images = data.show(torch.arange(8))
    assert data.committee([teacher], Settings())(images).shape == (8, 4)


def test_a_committee_is_fitted_to_disturbed_images_too():
    data = lessons()
    strengths = (0.0, 0.0), (0.5, 0.0), (0.0, 0.25)
    seen = [torch.cat(list(data.disturbed(150, *strength, stream()))) for strength in strengths]
    plain = data.show(torch.arange(400))
    assert torch.allclose(seen[0], plain, atol=1e-5)
    assert all((part - plain).abs().mean() > 0.05 for part in seen[1:])
    twice = [plain, *data.disturbed(512, 0.5, 0.25, generator(0, "committee"))]
    expected = Committee(TEACHERS, twice, data.targets.repeat(2), torch.ones(800), 4)
    assert torch.allclose(data.committee(TEACHERS, Settings())(plain), expected(plain), atol=1e-3)
    once = Committee(TEACHERS, [plain, plain], data.targets.repeat(2), torch.ones(800), 4)
    assert not torch.allclose(expected(plain), once(plain), atol=1e-2)
