"""From teachers to pseudo-data: class priors, an engine, and the images its teacher recognises.

Legend: T teachers, N images, B images of a batch, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..curves import Recorder
from ..errors import DmmError
from ..images import InputSpec, PixelSpace
from ..manifest import History
from ..runtime import one_thread
from . import ENGINES
from .prior import from_predictions
from .pseudodata import PseudoData, TeacherRecord
from .settings import Progress, Settings
from .teacher import Teacher


def synthesize(
    teachers: Sequence[Teacher],
    spec: InputSpec,
    settings: Settings,
    device: torch.device,
    on_progress: Progress | None = None,
) -> tuple[PseudoData, History]:
    """Invert the normalisation statistics of all teachers into labelled pseudo-data.

    Args:
        teachers: frozen and on ``device``; where a prior is missing it is estimated.

    Returns:
        The images every teacher recognises as their target (at most ``settings.count`` each, in
        teacher order), and the curves of the loss terms.

    Raises:
        DmmError: a teacher recognises none of its images.
    """
    with one_thread(device):
        return _synthesize(teachers, spec, settings, device, on_progress)


def _synthesize(
    teachers: Sequence[Teacher],
    spec: InputSpec,
    settings: Settings,
    device: torch.device,
    on_progress: Progress | None,
) -> tuple[PseudoData, History]:
    engine = ENGINES.load(settings.engine)(teachers, spec, settings, device)
    ready = list(teachers)
    if any(teacher.prior is None for teacher in teachers):
        seen = engine.explore(on_progress)
        ready = [_with_prior(teacher, logits) for teacher, logits in zip(teachers, seen, strict=True)]
    recorder = Recorder(settings.steps)
    engine.fit([teacher.prior for teacher in ready], recorder, on_progress)
    space = PixelSpace(spec, device)
    parts = [
        _harvest(teacher, engine.candidates(number, teacher.prior), space, settings.count)
        for number, teacher in enumerate(ready)
    ]
    history = recorder.history()
    return _assemble(ready, parts, spec, history), history


def _with_prior(teacher: Teacher, logits: torch.Tensor) -> Teacher:
    """The teacher with the prior it came with, or with the one its logits (B, K) on explored images tell."""
    if teacher.prior is not None:
        return teacher
    return replace(teacher, prior=from_predictions(logits), prior_from="estimated")


def _harvest(teacher: Teacher, candidates, space: PixelSpace, count: int) -> dict[str, np.ndarray | int]:
    """The first ``count`` candidates that the teacher, shown the bytes, classifies as their target."""
    kept: list[tuple[torch.Tensor, ...]] = []
    accepted = rejected = 0
    for images, targets in candidates:
        pixels = space.to_bytes(images)
        logits = teacher.logits(space.from_bytes(pixels)).cpu()
        good = torch.nonzero(logits.argmax(1) == targets)[: count - accepted, 0]
        rejected += int((logits.argmax(1) != targets).sum())
        accepted += len(good)
        confidence = logits.softmax(1).gather(1, targets[:, None])[:, 0]
        kept.append((pixels.cpu()[good], targets[good], logits[good], confidence[good]))
        if accepted >= count:
            break
    if not accepted:
        raise DmmError(
            f"{teacher.label} recognises none of its {rejected} pseudo-images",
            hint="give it more --steps, or a higher --loss cross_entropy=...",
        )
    images, targets, logits, confidence = (torch.cat(column).numpy() for column in zip(*kept, strict=True))
    return {
        "images": images,
        "targets": targets,
        "logits": logits.astype(np.float16),
        "confidence": confidence.astype(np.float16),
        "accepted": accepted,
        "rejected": rejected,
    }


def _assemble(teachers: Sequence[Teacher], parts: Sequence[dict], spec: InputSpec, history: History) -> PseudoData:
    owner = np.repeat(np.arange(len(parts), dtype=np.int16), [part["accepted"] for part in parts])
    arrays = {
        name: np.concatenate([part[name] for part in parts]) for name in ("images", "targets", "logits", "confidence")
    }
    records = tuple(
        TeacherRecord(
            teacher.label,
            teacher.sha256,
            tuple(round(float(value), 6) for value in teacher.prior),
            part["accepted"],
            part["rejected"],
        )
        for teacher, part in zip(teachers, parts, strict=True)
    )
    return PseudoData(
        **arrays,
        teacher_id=owner,
        bn_loss=np.array(history.curves.get("norm", ()), dtype=np.float32),
        teachers=records,
        mean=spec.mean,
        std=spec.std,
    )
