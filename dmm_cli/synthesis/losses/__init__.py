"""The terms of the inversion objective, one file each; the table is in ``dmm_cli.synthesis``.

Every term maps one ``Observation`` to a scalar that is lower for better images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...examples import Inputs
from ..statistics import LayerStatistics


@dataclass(frozen=True)
class Observation:
    """One batch of images and what the teacher made of it.

    Attributes:
        images: (B, C, H, W), normalised, or all inputs of the teacher that are images.
        logits: (B, K).
        targets: (B,), the wanted class of each image.
        layers: the statistics at every normalisation layer, in forward order.
        student_logits: (B, K), of a student that is compared with the teacher, if there is one.
        elsewhere: the statistics at normalisation layers of another teacher's network, if any were recorded there.
    """

    images: Inputs
    logits: torch.Tensor
    targets: torch.Tensor
    layers: list[LayerStatistics]
    student_logits: torch.Tensor | None = None
    elsewhere: list[LayerStatistics] | None = None
