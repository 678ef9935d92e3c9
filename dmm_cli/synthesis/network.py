"""The networks that draw images, and whatever else goes with them into the teachers.

Legend: B images, Z latent size, C channels, H height, W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..examples import Examples
from ..spaces import JointSpec, Spec

LATENT = 32
WIDTH, NARROWEST = 32, 16  # channels at the lowest resolution, and the least at the highest
HIDDEN = 64  # units of the network that draws numbers
SMALLEST = 4  # side of the lowest resolution, roughly; images drawn up from 2 or 8 teach a student less


class Generator(nn.Module):
    """Latent (B, Z) and condition (B,) to image parameters (B, C, H, W).

    Args:
        size: (C, H, W) of the images.
        conditions: number of embeddings, one for each class of each teacher.
    """

    def __init__(self, size: tuple[int, int, int], conditions: int) -> None:
        super().__init__()
        channels, height, width = size
        doublings = max(0, round(math.log2(min(height, width) / SMALLEST)))
        scales = [2**i for i in reversed(range(doublings + 1))]
        self._sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in scales]
        widths = [max(NARROWEST, WIDTH >> i) for i in range(doublings + 1)]
        self.embedding = nn.Embedding(conditions, LATENT)
        self.project = nn.Linear(2 * LATENT, WIDTH * self._sizes[0][0] * self._sizes[0][1])
        self.norm = nn.BatchNorm2d(WIDTH)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in zip([WIDTH, *widths], widths, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.paint = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, latent: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        features = self.project(torch.cat([latent, self.embedding(condition)], 1))
        features = features.view(len(latent), WIDTH, *self._sizes[0])  # (B, WIDTH, h, w)
        features = F.leaky_relu(self.norm(features), 0.2)
        for size, conv, norm in zip(self._sizes, self.convs, self.norms, strict=True):
            if features.shape[2:] != size:
                features = F.interpolate(features, size=size)
            features = F.leaky_relu(norm(conv(features)), 0.2)
        return self.paint(features)


class NumberGenerator(nn.Module):
    """Latent (B, Z) and condition (B,) to values (B, *size) of an input that is no image."""

    def __init__(self, size: tuple[int, ...], conditions: int) -> None:
        super().__init__()
        self._size = size
        self.embedding = nn.Embedding(conditions, LATENT)
        self.layers = nn.Sequential(
            nn.Linear(2 * LATENT, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.LeakyReLU(0.2),
            nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.LeakyReLU(0.2),
            nn.Linear(HIDDEN, math.prod(size)),
        )  # fmt: skip

    def forward(self, latent: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        values = self.layers(torch.cat([latent, self.embedding(condition)], 1))
        return values.unflatten(1, self._size)  # (B, *size)


class JointGenerator(nn.Module):
    """A network for each of several inputs, which draw from one latent: what they draw belongs together."""

    def __init__(self, spec: JointSpec, conditions: int) -> None:
        super().__init__()
        self._names = spec.names
        self.parts = nn.ModuleList(drawing(part, conditions) for part in spec.specs)

    def forward(self, latent: torch.Tensor, condition: torch.Tensor) -> Examples:
        return Examples({name: part(latent, condition) for name, part in zip(self._names, self.parts, strict=True)})


def drawing(spec: Spec, conditions: int) -> nn.Module:
    """A network that draws what a spec describes; for its arguments see ``Generator``."""
    if isinstance(spec, JointSpec):
        return JointGenerator(spec, conditions)
    return (Generator if spec.is_image else NumberGenerator)(spec.free, conditions)
