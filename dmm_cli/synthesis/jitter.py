"""Images moved a little before a teacher sees them, so that what they show does not hang on one place.

Legend: B images, C channels, H height, W width.
"""

from __future__ import annotations

import torch

from ..examples import Inputs
from ..spaces import Spec, each_image
from .settings import Settings


def draw_moves(count: int, settings: Settings, stream: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Rows down, columns right, and whether to flip, int64 (3, B), for ``moved``; nothing where nothing moves."""
    if not (settings.jitter or settings.flip):
        return ()
    shifts = torch.randint(-settings.jitter, settings.jitter + 1, (2, count), generator=stream)
    flips = torch.randint(1 + settings.flip, (1, count), generator=stream)
    return (torch.cat([shifts, flips]),)


def moved(inputs: Inputs, spec: Spec, *moves: torch.Tensor) -> Inputs:
    """Every image flipped and rolled by its own draw, as DeepInversion moves whole batches; other inputs as they are.

    One gather by index: a CUDA graph replays it, and its gradient is exact, since every pixel has one place. The
    images that belong to one example move together.

    Args:
        moves: of ``draw_moves``.
    """
    if not moves:
        return inputs
    return each_image(inputs, spec, lambda part: _gathered(part, *moves))


def _gathered(images: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
    height, width = images.shape[2:]
    down, right, flip = moves[:, :, None]  # (B, 1) each
    rows = (torch.arange(height, device=images.device) - down) % height  # (B, H)
    columns = (torch.arange(width, device=images.device) - right) % width  # (B, W)
    columns = torch.where(flip > 0, width - 1 - columns, columns)
    index = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)  # (B, H * W)
    pixels = images.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H * W, C), where it lies in memory if channels are last
    taken = pixels.gather(1, index[:, :, None].expand(-1, -1, pixels.shape[2]))
    return taken.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # (B, C, H, W)
