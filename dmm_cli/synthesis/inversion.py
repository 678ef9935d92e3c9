"""From teachers to pseudo-data: class priors, an engine, and the images its teacher recognises.

Legend: T teachers, N images, B images of a batch, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..errors import DmmError
from ..images import InputSpec, PixelSpace
from ..manifest import History
from ..runtime import generator as random_stream
from . import ENGINES
from .canvas import Progress, Recorder, Settings
from .objective import Objective
from .pixels import optimise_pixels
from .prior import from_predictions
from .pseudodata import PseudoData, TeacherRecord
from .teacher import Teacher

PRIOR_IMAGES, PRIOR_STEPS = 128, 60


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
    objective = Objective(settings.weights)
    space = PixelSpace(spec, device)
    ready = [
        teacher if teacher.prior is not None else estimate_prior(teacher, spec, settings.seed, number, device)
        for number, teacher in enumerate(teachers)
    ]
    recorder = Recorder(settings.steps)
    engine = ENGINES.load(settings.engine)(ready, spec, settings, device)
    engine.fit(objective, recorder, on_progress)
    parts = [
        _harvest(teacher, engine.candidates(number), space, settings.count) for number, teacher in enumerate(ready)
    ]
    history = recorder.history()
    return _assemble(ready, parts, spec, history), history


def estimate_prior(teacher: Teacher, spec: InputSpec, seed: int, number: int, device: torch.device) -> Teacher:
    """The teacher with a class prior estimated from images inverted on the statistics alone."""
    stream = random_stream(seed, "prior", number)
    targets = torch.zeros(PRIOR_IMAGES, dtype=torch.int64, device=device)
    only_statistics = Objective({"batchnorm": 1.0, "cross_entropy": 0.0})
    space = PixelSpace(spec, device)
    images, _ = optimise_pixels(teacher, targets, spec, space, only_statistics, PRIOR_STEPS, stream)
    prior = from_predictions(teacher.logits(images)).cpu()
    return replace(teacher, prior=prior, prior_from="estimated")


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
        bn_loss=np.array(history.curves.get("batchnorm", ()), dtype=np.float32),
        teachers=records,
        mean=spec.mean,
        std=spec.std,
    )
