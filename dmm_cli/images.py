"""A model's input: its size, its normalisation, and the way to and from bytes.

Legend: B images, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class InputSpec:
    """Size and normalisation of one input of a model.

    Attributes:
        size: (C, H, W) of images, or the shape of numbers.
        mean, std: per channel, of pixels in [0, 1] where they are images. Of numbers one for all, or as many as the
            first dimension has, (C, L) as Conv1d takes it, or as many as the last, (T, F).
    """

    size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not self.is_image and len(set(values)) == 1:
                object.__setattr__(self, name, values[:1])  # said once, however often it was

    @property
    def is_image(self) -> bool:
        """Whether it is of pixels."""
        return len(self.size) == 3

    @property
    def free(self) -> tuple[int, ...]:
        """Shape of the parameters that draw one example."""
        return self.size

    @property
    def stored(self) -> str:
        """The dtype in files."""
        return "uint8" if self.is_image else "float32"


def channel_counts(size: tuple[int, ...]) -> set[int]:
    """As how many values an input's mean or deviation may be said: one for all, or one for each channel."""
    return {1, size[0]} if len(size) == 3 else {1, size[0], size[-1]}


class PixelSpace:
    """Maps pixels in [0, 1] to normalised images and back, on one device."""

    def __init__(self, spec: InputSpec, device: torch.device | str = "cpu") -> None:
        self._mean, self._std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (spec.mean, spec.std))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], (B, C, H, W), to normalised images."""
        return (pixels - self._mean) / self._std

    def draw(self, raw: torch.Tensor) -> torch.Tensor:
        """Free parameters (B, C, H, W) to normalised images."""
        return self.normalise(raw.sigmoid())

    def from_bytes(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 to normalised images, float32."""
        return self.normalise(pixels.float() / 255.0)

    def to_bytes(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images to uint8."""
        return ((images * self._std + self._mean) * 255.0).round().clamp(0, 255).to(torch.uint8)
