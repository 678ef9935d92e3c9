"""What all clients say together: references that need every network to answer.

Legend: N images, T clients, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dmm_cli.architectures import load_model
from dmm_cli.distillation.lessons import Lessons
from dmm_cli.distillation.settings import Settings
from dmm_cli.images import PixelSpace
from dmm_cli.inputs import resolve_source
from dmm_cli.synthesis.pseudodata import load_pseudo_data

from .training import SPEC

BATCH = 500


def within_known_classes(clients: Sequence[Path], data: Path, test: Path) -> float:
    """Accuracy in per cent of the mean of the logits of those clients that know a class, by dmm's estimate."""
    known = _tensor(load_pseudo_data(resolve_source(str(data))).priors() > 0)  # (T, K)
    models = _models(clients)

    def answer(images: torch.Tensor) -> torch.Tensor:
        logits = torch.stack([model(images) for model in models])  # (T, N, K)
        return (logits * known[:, None]).sum(0) / known.sum(0).clamp_min(1)

    return _accuracy(answer, test)


def committee(clients: Sequence[Path], data: Path, test: Path) -> float:
    """Accuracy in per cent of what dmm teaches its student: the committee of all clients, fitted on pseudo-data."""
    drawn = load_pseudo_data(resolve_source(str(data)))
    arrays = (drawn.images, drawn.targets, drawn.teacher_id.astype(np.int64))
    images, targets, owners = map(torch.from_numpy, arrays)
    names = tuple(teacher.label for teacher in drawn.teachers)
    lessons = Lessons(images, PixelSpace(SPEC), targets, owners, names, tuple(map(str, range(drawn.logits.shape[1]))))
    return _accuracy(lessons.committee(_models(clients), Settings()), test)


def _models(clients: Sequence[Path]) -> list[nn.Module]:
    return [load_model(resolve_source(str(path)))[0].requires_grad_(False) for path in clients]


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).float()


@torch.inference_mode()
def _accuracy(answer, test: Path) -> float:
    with np.load(test) as file:
        images, labels = map(torch.from_numpy, (file["images"], file["labels"]))
    space = PixelSpace(SPEC)
    answers = torch.cat([answer(space.from_bytes(part)).argmax(1) for part in images.split(BATCH)])
    return 100.0 * float((answers == labels).double().mean())
