"""Random changes of pose and texture.

Inversion finds few poses of each class, and every teacher's images carry a texture of their own; a
student that reads either learns who drew an image instead of what it shows.

Legend: B images, C channels, H height, W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..examples import Inputs, each

SHIFT, ROTATION, SCALE, SHEAR = 1 / 8, math.radians(24), 0.24, 0.3  # at strength 1
NOISE = 1.2  # standard deviations of normalised pixels, at strength 1
SPREAD = 1.0  # of a number that is no pixel, in its own deviations over the batch, at strength 1


def augment(inputs: Inputs, strength: float, stream: torch.Generator) -> Inputs:
    """Images (B, C, H, W) under random affine maps and noise, other numbers under noise, tokens as they are.

    At strength 0 all come back as they are.
    """
    if strength == 0:
        return inputs

    def change(part: torch.Tensor) -> torch.Tensor:
        if part.dim() == 4:
            return add_noise(deform(part, strength, stream), strength, stream)
        return disturb(part, strength, stream) if part.is_floating_point() else part

    return each(inputs, change)


def deform(images: torch.Tensor, strength: float, stream: torch.Generator) -> torch.Tensor:
    """Move, turn, scale and shear every image (B, C, H, W) by its own draw, uniform in plus and minus the limits.

    What comes in from outside repeats the border.
    """
    draw = (2.0 * torch.rand(6, len(images), generator=stream) - 1.0) * strength
    angle, shear = ROTATION * draw[0], SHEAR * draw[1]
    wide, high = 1.0 + SCALE * draw[2], 1.0 + SCALE * draw[3]
    right, down = 2.0 * SHIFT * draw[4], 2.0 * SHIFT * draw[5]  # the grid spans [-1, 1]
    cosine, sine = angle.cos(), angle.sin()
    first = torch.stack([wide * cosine, shear - sine, right], 1)
    second = torch.stack([shear + sine, high * cosine, down], 1)
    maps = torch.stack([first, second], 1).to(images.device)  # (B, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def add_noise(images: torch.Tensor, strength: float, stream: torch.Generator) -> torch.Tensor:
    """White noise on normalised images (B, C, H, W), each with its own level up to ``NOISE``."""
    level = NOISE * strength * torch.rand(len(images), 1, 1, 1, generator=stream)
    noise = level * torch.randn(images.shape, generator=stream)
    return images + noise.to(images.device)


def disturb(values: torch.Tensor, strength: float, stream: torch.Generator) -> torch.Tensor:
    """White noise on numbers (B, ...), in the deviation of each over the batch, with a level per example."""
    level = SPREAD * strength * torch.rand(len(values), *[1] * (values.dim() - 1), generator=stream)
    noise = level * torch.randn(values.shape, generator=stream)
    return values + noise.to(values.device) * values.std(0, correction=0)
