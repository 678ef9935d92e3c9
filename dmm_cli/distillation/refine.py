"""The refinement loop: a student learns from its teachers' pseudo-data.

Legend: N images, B images of a batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..curves import Recorder
from ..manifest import History, Retention
from ..recalibration import balanced_batches, balanced_weights, reset_statistics
from ..runtime import generator as random_stream
from ..runtime import mixed_precision, one_thread, seeded
from . import losses
from .augment import augment
from .routing import soft_labels

Progress = Callable[..., None]
WARM_UP = 0.1


@dataclass(frozen=True)
class Lessons:
    """Pseudo-data as the loop needs it, on its device.

    Attributes:
        images: normalised float32 (N, C, H, W). targets, teacher_id: int64 (N,).
        logits: of each image's owner, (N, K). priors: (T, K). labels: names of the T teachers.
        inside: (T,), whether a teacher's weights are part of the student.
    """

    images: torch.Tensor
    targets: torch.Tensor
    teacher_id: torch.Tensor
    logits: torch.Tensor
    priors: torch.Tensor
    labels: tuple[str, ...]
    inside: torch.Tensor


@dataclass(frozen=True)
class Settings:
    """How to refine.

    Attributes:
        cross_entropy, anchor: weights beside the distillation term.
        augment: strength of the random changes of pose and texture, see ``augment.augment``.
    """

    steps: int = 400
    batch: int = 128
    learning_rate: float = 3e-3
    temperature: float = 2.0
    cross_entropy: float = 1.0
    anchor: float = 1.0
    augment: float = 1.0
    seed: int = 0


def refine(
    student: nn.Module,
    layers: list[nn.Module],
    lessons: Lessons,
    settings: Settings,
    on_progress: Progress | None = None,
) -> tuple[History, tuple[Retention, ...]]:
    """Distil pseudo-data into the student, in place; the last step is the result.

    Statistics of ``layers`` are reset on class-balanced pseudo-data before and after.

    Returns:
        Curves of the loss terms and of the agreement with the targets, and agreement per teacher.
    """
    device = lessons.images.device
    with one_thread(device), seeded(settings.seed, "distill"):  # the global stream feeds dropout
        before = _agreement(student, lessons)
        _reset(student, layers, lessons, settings.seed, "before")
        history = _train(student, lessons, settings, on_progress) if settings.steps else History((), {})
        _reset(student, layers, lessons, settings.seed, "after")
        after = _agreement(student, lessons)
    return history, _retention(lessons, before, after)


def _train(student: nn.Module, lessons: Lessons, settings: Settings, on_progress: Progress | None) -> History:
    device = lessons.images.device
    initial = copy.deepcopy(student).eval().requires_grad_(False)
    labels = soft_labels(lessons.logits, lessons.teacher_id, lessons.priors, settings.temperature)
    student.train().requires_grad_(True)
    rate = settings.learning_rate
    optimiser = torch.optim.AdamW(student.parameters(), rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, rate, total_steps=settings.steps + 1, pct_start=WARM_UP, cycle_momentum=False
    )
    recorder = Recorder(settings.steps)
    for step, (index, images) in enumerate(_batches(lessons, settings)):
        with mixed_precision(device):
            logits = student(images)
            with torch.no_grad():
                first = initial(images)
        terms = _terms(logits.float(), first.float(), labels[index], lessons, index, settings)
        loss = terms["distillation"] + settings.cross_entropy * terms["cross_entropy"]
        loss = loss + settings.anchor * terms["anchor"]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if recorder.wants(step):
            agreement = 100.0 * (logits.argmax(1) == lessons.targets[index]).float().mean()
            shown = recorder.add(step, {**terms, "loss": loss, "agreement": agreement})
            if on_progress:
                on_progress("distill", step + 1, settings.steps, loss=shown["loss"], agreement=shown["agreement"])
    student.requires_grad_(False)
    return recorder.history()


def _terms(
    logits: torch.Tensor,
    first: torch.Tensor,
    labels: torch.Tensor,
    lessons: Lessons,
    index: torch.Tensor,
    settings: Settings,
) -> dict[str, torch.Tensor]:
    mask = lessons.inside[lessons.teacher_id[index]].float()  # (B,)
    return {
        "distillation": losses.distillation(logits, labels, settings.temperature),
        "cross_entropy": F.cross_entropy(logits, lessons.targets[index]),
        "anchor": losses.anchor(logits, first, mask, settings.temperature),
    }


def _batches(lessons: Lessons, settings: Settings) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Class-balanced batches: indices (B,) and augmented images (B, C, H, W)."""
    stream = random_stream(settings.seed, "batches")
    weights = balanced_weights(lessons.targets.cpu(), lessons.logits.shape[1])
    for _ in range(settings.steps):
        index = torch.multinomial(weights, settings.batch, replacement=True, generator=stream)
        index = index.to(lessons.images.device)
        yield index, augment(lessons.images[index], settings.augment, stream)


def _reset(student: nn.Module, layers: list[nn.Module], lessons: Lessons, seed: int, when: str) -> None:
    stream = random_stream(seed, "reset", when)
    weights = balanced_weights(lessons.targets.cpu(), lessons.logits.shape[1])
    reset_statistics(student, layers, balanced_batches(lessons.images, weights, stream))


@torch.no_grad()
def _agreement(student: nn.Module, lessons: Lessons) -> torch.Tensor:
    """Whether the student names the target, bool (N,)."""
    student.eval()
    answers = torch.cat([student(part).argmax(1) for part in lessons.images.split(512)])
    return answers == lessons.targets


def _retention(lessons: Lessons, before: torch.Tensor, after: torch.Tensor) -> tuple[Retention, ...]:
    rows = []
    for number, label in enumerate(lessons.labels):
        mine = lessons.teacher_id == number
        share = [100.0 * float(hits[mine].double().mean()) for hits in (before, after)]
        rows.append(Retention(label, int(mine.sum()), *share))
    return tuple(rows)
