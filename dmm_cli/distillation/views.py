"""Pseudo-images in random poses, and what all teachers together say of them.

Legend: M views, B images of a batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..examples import Inputs
from .augment import draw_patches, draw_poses, patched, posed
from .lessons import BLOCK, Lessons

PATCHED = 0.5  # share of the views that show parts of two images


@dataclass(frozen=True)
class Views:
    """Images in some poses, with patches of others in some of them, and what a committee says of them.

    Attributes:
        rows: of the images and of the others, int64 (M, 2). poses: of either (M, 2, POSE). patches: (M, 4).
        answers: logits (M, K).
    """

    lessons: Lessons
    rows: torch.Tensor
    poses: torch.Tensor
    patches: torch.Tensor
    answers: torch.Tensor

    def show(self, numbers: torch.Tensor) -> Inputs:
        """Some views (B,), normalised, float32 (B, C, H, W)."""
        return _views(self.lessons, self.rows[numbers], self.poses[numbers], self.patches[numbers])


def draw_views(lessons: Lessons, committee: nn.Module, count: int, strength: float, stream: torch.Generator) -> Views:
    """So many views of images, every class equally likely, in poses of a strength.

    They are drawn once and seen several times: asking all teachers at every step measures slower and teaches the same.
    """
    device = lessons.targets.device
    rows = torch.multinomial(lessons.weights(), 2 * count, replacement=True, generator=stream)
    rows = rows.view(count, 2).to(device)
    poses = draw_poses(2 * count, strength, stream).unflatten(0, (count, 2)).to(device)
    patches = draw_patches(count, PATCHED, stream).to(device)
    with torch.no_grad():
        parts = zip(rows.split(BLOCK), poses.split(BLOCK), patches.split(BLOCK), strict=True)
        answers = torch.cat([committee(_views(lessons, *part)) for part in parts])
    return Views(lessons, rows, poses, patches, answers)


def _views(lessons: Lessons, rows: torch.Tensor, poses: torch.Tensor, patches: torch.Tensor) -> Inputs:
    images, others = (posed(lessons.show(rows[:, n]), poses[:, n]) for n in range(2))
    return patched(images, others, patches)
