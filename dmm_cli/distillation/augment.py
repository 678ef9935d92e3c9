"""Random changes of pose and texture.

Inversion finds few poses of each class, and every teacher's images carry a texture of their own; a
student that reads either learns who drew an image instead of what it shows. A pose is part of what
teachers are asked about; noise, of which most of them know nothing, is the student's alone.

Legend: B images, C channels, H height, W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..examples import Inputs, each, joined, named

SHIFT, ROTATION, SCALE, SHEAR = 1 / 8, math.radians(24), 0.24, 0.3  # at strength 1
POSE = 6  # numbers that tell how an image is deformed
NOISE = 1.2  # standard deviations of normalised pixels, at strength 1
SPREAD = 1.0  # of a number that is no pixel, in its own deviations over the batch, at strength 1


def draw_poses(count: int, strength: float, stream: torch.Generator) -> torch.Tensor:
    """How far to move, turn, scale and shear so many images: (count, POSE), uniform in plus and minus a strength."""
    return ((2.0 * torch.rand(POSE, count, generator=stream) - 1.0) * strength).T


def posed(inputs: Inputs, poses: torch.Tensor) -> Inputs:
    """Images (B, C, H, W) in poses (B, POSE); other inputs as they are."""
    return each(inputs, lambda part: deform(part, poses) if _is_image(part) else part)


def deform(images: torch.Tensor, poses: torch.Tensor) -> torch.Tensor:
    """Move, turn, scale and shear every image (B, C, H, W) as its pose (B, POSE), in units of the limits, says.

    What comes in from outside repeats the border. A turn is one of pixels, whatever the sides.
    """
    turn, lean, width, height, across, along = poses.unbind(1)  # (B,) each
    angle, shear = ROTATION * turn, SHEAR * lean
    wide, high = 1.0 + SCALE * width, 1.0 + SCALE * height
    right, down = 2.0 * SHIFT * across, 2.0 * SHIFT * along  # the grid spans [-1, 1]
    cosine, sine = angle.cos(), angle.sin()
    tall = images.shape[2] / images.shape[3]
    first = torch.stack([wide * cosine, shear - sine * tall, right], 1)
    second = torch.stack([shear + sine / tall, high * cosine, down], 1)
    maps = torch.stack([first, second], 1).to(images.device)  # (B, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def draw_patches(count: int, share: float, stream: torch.Generator) -> torch.Tensor:
    """Rectangles in so many images, (count, 4): top, left, bottom, right, in parts of a side.

    They cover a uniform share of an image, as in CutMix (Yun et al., ICCV 2019), but of all but a ``share`` of the
    images, of which they cover nothing.
    """
    middles, area = torch.rand(count, 2, generator=stream), torch.rand(count, 1, generator=stream)
    some = torch.rand(count, 1, generator=stream) < share
    half = torch.where(some, area.sqrt() / 2, 0.0)  # (count, 1)
    return torch.cat([middles - half, middles + half], 1)


def patched(inputs: Inputs, others: Inputs, patches: torch.Tensor) -> Inputs:
    """Images (B, C, H, W) with patches (B, 4) of others in the same place; inputs that are no images stay."""

    def patch(image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if not _is_image(image):
            return image
        top, left, bottom, right = patches[:, :, None].unbind(1)  # (B, 1) each
        rows, columns = (_middles(side, image.device) for side in image.shape[2:])
        high, wide = (rows > top) & (rows < bottom), (columns > left) & (columns < right)  # (B, H), (B, W)
        return torch.where(high[:, None, :, None] & wide[:, None, None, :], other, image)

    return joined({name: patch(part, named(others)[name]) for name, part in named(inputs).items()})


def _is_image(part: torch.Tensor) -> bool:
    """Whether an input is of pixels, (B, C, H, W), as tokens of three dimensions are not."""
    return part.dim() == 4 and part.is_floating_point()


def _middles(side: int, device: torch.device) -> torch.Tensor:
    """Of the pixels along a side, in parts of it: (side,)."""
    return (torch.arange(side, device=device) + 0.5) / side


def add_noise(inputs: Inputs, strength: float, stream: torch.Generator) -> Inputs:
    """White noise on normalised images (B, C, H, W) and other numbers (B, ...); tokens stay.

    Every example has a level of its own, of pixels up to ``NOISE``, of other numbers up to ``SPREAD`` times their
    deviation over the batch. At strength 0 all come back as they are.
    """
    if strength == 0:
        return inputs

    def disturb(part: torch.Tensor) -> torch.Tensor:
        if not part.is_floating_point():
            return part
        limit = NOISE if _is_image(part) else SPREAD * part.std(0, correction=0)
        level = strength * torch.rand(len(part), *[1] * (part.dim() - 1), generator=stream)
        noise = level * torch.randn(part.shape, generator=stream)
        return part + noise.to(part.device) * limit

    return each(inputs, disturb)
