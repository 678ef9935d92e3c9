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

from ..manifest import History, Retention
from ..runtime import generator as random_stream
from ..runtime import mixed_precision
from . import losses
from .batchnorm import reset_statistics
from .routing import balanced_weights, soft_labels

Progress = Callable[..., None]
RESET_BATCHES, RESET_BATCH = 8, 256
RECORDS = 60
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
        shift: images are moved by up to this many pixels in each direction.
    """

    steps: int = 600
    batch: int = 128
    learning_rate: float = 1e-3
    temperature: float = 2.0
    cross_entropy: float = 1.0
    anchor: float = 1.0
    shift: int = 1
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
    before = _agreement(student, lessons)
    _reset(student, layers, lessons, settings.seed, "before")
    initial = copy.deepcopy(student).eval().requires_grad_(False)
    labels = soft_labels(lessons.logits, lessons.teacher_id, lessons.priors, settings.temperature)
    student.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(
        student.parameters(), settings.learning_rate, weight_decay=0.0, fused=device.type == "cuda"
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        settings.learning_rate,
        total_steps=settings.steps + 1,
        pct_start=WARM_UP,
        cycle_momentum=False,
    )
    steps: list[int] = []
    curves: dict[str, list[float]] = {}
    every = max(1, settings.steps // RECORDS)
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
        if step % every == 0 or step + 1 == settings.steps:
            agreement = (logits.argmax(1) == lessons.targets[index]).float().mean()
            shown = {"loss": float(loss.detach()), "agreement": 100.0 * float(agreement)}
            steps.append(step)
            for name, value in {
                **{k: float(v.detach()) for k, v in terms.items()},
                "agreement": shown["agreement"],
            }.items():
                curves.setdefault(name, []).append(value)
            if on_progress:
                on_progress("distill", step + 1, settings.steps, **shown)
    student.requires_grad_(False)
    _reset(student, layers, lessons, settings.seed, "after")
    after = _agreement(student, lessons)
    history = History(tuple(steps), {name: tuple(values) for name, values in curves.items()})
    return history, _retention(lessons, before, after)


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
    """Class-balanced batches: indices (B,) and shifted images (B, C, H, W)."""
    stream = random_stream(settings.seed, "batches")
    weights = balanced_weights(lessons.targets.cpu(), lessons.logits.shape[1])
    for _ in range(settings.steps):
        index = torch.multinomial(weights, settings.batch, replacement=True, generator=stream)
        offsets = torch.randint(-settings.shift, settings.shift + 1, (2, settings.batch), generator=stream)
        index = index.to(lessons.images.device)
        yield index, _shift(lessons.images[index], offsets.to(index.device), settings.shift)


def _shift(images: torch.Tensor, offsets: torch.Tensor, reach: int) -> torch.Tensor:
    """Move every image (B, C, H, W) by its own offsets (2, B); the border is repeated."""
    if not reach:
        return images
    count, _, height, width = images.shape
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    rows = torch.arange(height, device=images.device)[None] + reach + offsets[0, :, None]  # (B, H)
    columns = torch.arange(width, device=images.device)[None] + reach + offsets[1, :, None]  # (B, W)
    number = torch.arange(count, device=images.device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return moved.permute(0, 3, 1, 2)


def _reset(student: nn.Module, layers: list[nn.Module], lessons: Lessons, seed: int, when: str) -> None:
    stream = random_stream(seed, "reset", when)
    weights = balanced_weights(lessons.targets.cpu(), lessons.logits.shape[1])
    index = torch.multinomial(weights, RESET_BATCHES * RESET_BATCH, replacement=True, generator=stream)
    parts = index.to(lessons.images.device).split(RESET_BATCH)
    reset_statistics(student, layers, (lessons.images[part] for part in parts))


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
