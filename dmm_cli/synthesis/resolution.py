"""The first steps at half the resolution: a quarter of the work, and large structures come first.

DeepInversion (Yin et al., CVPR 2020) inverts 224-pixel networks that way. The pixels of a block of 2 x 2 start equal;
seen through an average over the block they get equal gradients, and Adam, which moves every one by its own history,
keeps them equal: they are one pixel of the smaller image until the full resolution begins.

Legend: B images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import summary
from ..examples import Inputs, forward, joined, named
from ..spaces import Spec, each_image
from .teacher import Teacher

SMALLEST = 128  # pixels of a side; below, half of it shows too little


def blocks(noise: torch.Tensor) -> torch.Tensor:
    """Noise (B, C, H, W) that is the same number in every block of 2 x 2 pixels."""
    return noise[..., ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)  # (B, C, H, W)


def halved(inputs: Inputs, spec: Spec) -> Inputs:
    """Images (B, C, H, W) at half the resolution; other inputs as they are."""
    return each_image(inputs, spec, lambda part: F.avg_pool2d(part, 2))


@torch.no_grad()
def why_whole(teachers: Sequence[Teacher], spec: Spec, device: torch.device, student: nn.Module | None = None) -> str:
    """Why these networks cannot be shown images at half the resolution; empty where they can."""
    images = [part.size for part in named(spec).values() if part.is_image]
    if not images or any(min(size[1:]) < SMALLEST for size in images):
        return f"no image of {SMALLEST} pixels a side or more goes in"
    if any(side % 2 for size in images for side in size[1:]):
        return "the sides of the images are odd"
    zeros = joined({name: torch.zeros(2, *part.free, device=device) for name, part in named(spec).items()})
    models = {teacher.label: teacher.model for teacher in teachers} | ({"the student": student} if student else {})
    for name, model in models.items():
        try:
            forward(model, halved(zeros, spec))
        except Exception as error:  # whatever a network says to it
            return f"{name} takes one size only: {summary(error)}"
    return ""
