"""A model's input: its size, its normalisation, and the way to and from bytes.

Legend: B images, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class InputSpec:
    """Size (C, H, W) and normalisation of a model's input; mean and std are per channel, of pixels in [0, 1]."""

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class PixelSpace:
    """Maps pixels in [0, 1] to normalised images and back, on one device."""

    def __init__(self, spec: InputSpec, device: torch.device | str = "cpu") -> None:
        self._mean, self._std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (spec.mean, spec.std))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], (B, C, H, W), to normalised images."""
        return (pixels - self._mean) / self._std

    def from_bytes(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 to normalised images, float32."""
        return self.normalise(pixels.float() / 255.0)

    def to_bytes(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images to uint8."""
        return ((images * self._std + self._mean) * 255.0).round().clamp(0, 255).to(torch.uint8)
