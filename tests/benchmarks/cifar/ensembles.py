"""What all clients say together: references that need every network to answer.

Legend: N images, T clients, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dmm_cli.distillation.lessons import Lessons
from dmm_cli.distillation.settings import Settings
from dmm_cli.images import PixelSpace
from dmm_cli.inputs import resolve_source
from dmm_cli.loading import load_model
from dmm_cli.runtime import resolve_device
from dmm_cli.synthesis.pseudodata import load_pseudo_data

from .training import SPEC

BATCH = 500


def within_known_classes(clients: Sequence[Path], data: Path, test: Path) -> float:
    """Accuracy in per cent of the mean of the logits of those clients that know a class, by dmm's estimate."""
    teachers = load_pseudo_data(resolve_source(str(data))).teachers
    priors = np.array([teacher.prior for teacher in teachers])  # (T, K)
    known = torch.from_numpy(priors > 0).float().to(resolve_device("auto"))  # (T, K)
    models = _models(clients)

    def answer(images: torch.Tensor) -> torch.Tensor:
        logits = torch.stack([model(images) for model in models])  # (T, N, K)
        return (logits * known[:, None]).sum(0) / known.sum(0).clamp_min(1)

    return _accuracy(answer, test)


def committee(clients: Sequence[Path], data: Path, test: Path, seed: int) -> float:
    """Accuracy in per cent of what dmm teaches its student: the committee of all clients, fitted on pseudo-data."""
    drawn = load_pseudo_data(resolve_source(str(data)))
    arrays = (drawn.images, drawn.targets, drawn.teacher_id.astype(np.int64))
    device = resolve_device("auto")
    images, targets, owners = (torch.from_numpy(array).to(device) for array in arrays)
    names = tuple(teacher.label for teacher in drawn.teachers)
    classes = tuple(map(str, range(drawn.logits.shape[1])))
    lessons = Lessons(images, PixelSpace(SPEC, device), targets, owners, names, classes)
    return _accuracy(lessons.committee(_models(clients), Settings(seed=seed)), test)


def _models(clients: Sequence[Path]) -> list[nn.Module]:
    models = (load_model(resolve_source(str(path)))[0] for path in clients)
    return [model.requires_grad_(False).to(resolve_device("auto")) for model in models]


@torch.inference_mode()
def _accuracy(answer, test: Path) -> float:
    with np.load(test) as file:
        images, labels = map(torch.from_numpy, (file["images"], file["labels"]))
    device = resolve_device("auto")
    space = PixelSpace(SPEC, device)
    parts = (space.from_bytes(part.to(device)) for part in images.split(BATCH))
    answers = torch.cat([answer(part).argmax(1).cpu() for part in parts])
    return 100.0 * float((answers == labels).double().mean())
