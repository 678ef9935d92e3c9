"""The networks that draw images, and whatever else goes with them into the teachers.

Legend: B images, Z latent size, C channels, H height, W width.
"""

from __future__ import annotations

import math
from itertools import cycle, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..examples import Examples
from ..spaces import JointSpec, Spec
from .settings import PARTS

LATENT = 32
WIDTH, NARROWEST = 32, 16  # channels at the lowest resolution, and the least at the highest
GREY = 2  # of the highest resolutions add the same to red, green and blue
CONTRAST = 0.4  # deviation of the logarithm of images' contrasts
HIDDEN = 64  # units of the network that draws numbers
SMALLEST = 4  # side of the lowest resolution, roughly; images drawn up from 2 or 8 teach a student less


class Style(NamedTuple):
    """How a generator ends its images and draws up its sketches: each way leaves marks, which a student must not read.

    Attributes:
        edges: "zeros" tell the network where an image ends, but leave a frame; "replicate" does neither.
        sketch: how coarse sketches are drawn up, "nearest" or "bilinear".
        margin: pixels drawn beyond every side and cut off.
    """

    edges: str = "zeros"
    sketch: str = "nearest"
    margin: int = 0


STYLES = (Style(), Style(edges="replicate"), Style(sketch="bilinear"), Style(margin=2))


class Resample(nn.Module):
    """Images (B, C, h, w) at another size, (B, C, H, W).

    Two products with constant matrices: the gradient of torch's own bilinear one differs from run to run on a GPU.

    Args:
        given: (h, w). wanted: (H, W). mode: "nearest" or "bilinear".
    """

    def __init__(self, given: tuple[int, int], wanted: tuple[int, int], mode: str) -> None:
        super().__init__()
        linear = "linear" if mode == "bilinear" else mode
        for name, short, long in zip(("down", "across"), given, wanted, strict=True):
            units = torch.eye(short)[None]  # (1, short, short), a row for each
            self.register_buffer(name, F.interpolate(units, size=long, mode=linear)[0].T, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.down @ images @ self.across.T


class Generator(nn.Module):
    """Latent (B, Z) and condition (B,) to image parameters (B, C, H, W).

    An image is the sum of sketches at all resolutions, from one colour up. Without the coarse ones images of a class
    differ too little from one another in colour and light. Fine detail is grey: left free, the colour of neighbouring
    pixels varies ten times as much as in photographs, whose brightness alone is sharp. The contrast about
    the one colour is drawn: left free, images are more alike than photographs in the energy of what a teacher sees,
    since that keeps the statistics of a batch near the stored ones.

    Args:
        size: (C, H, W) of the images.
        conditions: number of embeddings, one for each class of each teacher.
        style: of edges and sketches.
    """

    def __init__(self, size: tuple[int, int, int], conditions: int, style: Style) -> None:
        super().__init__()
        channels, height, width = size[0], *(side + 2 * style.margin for side in size[1:])
        self._style, zeros = style, int(style.edges == "zeros")
        doublings = max(0, round(math.log2(min(height, width) / SMALLEST)))
        scales = [2**i for i in reversed(range(doublings + 1))]
        self._sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in scales]
        widths = [max(NARROWEST, WIDTH >> i) for i in range(doublings + 1)]
        self.embedding = nn.Embedding(conditions, LATENT)
        self.project = nn.Linear(2 * LATENT, WIDTH * self._sizes[0][0] * self._sizes[0][1])
        self.norm = nn.BatchNorm2d(WIDTH)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=zeros) for a, b in zip([WIDTH, *widths], widths, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.colour = nn.Linear(2 * LATENT, channels)
        grey = GREY if channels == 3 else 0
        planes = [1 if level and level > doublings - grey else channels for level in range(doublings + 1)]
        self.sketches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, plane, 1), Resample(given, self._sizes[-1], style.sketch))
            for width, plane, given in zip(widths[:-1], planes, self._sizes, strict=False)
        )
        self.paint = nn.Conv2d(widths[-1], planes[-1], 3, padding=zeros)

    def forward(self, latent: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        code = torch.cat([latent, self.embedding(condition)], 1)
        features = self.project(code).view(len(latent), WIDTH, *self._sizes[0])  # (B, WIDTH, h, w)
        features = F.leaky_relu(self.norm(features), 0.2)
        colour = self.colour(code)[:, :, None, None]  # (B, C, 1, 1)
        contrast = (CONTRAST * latent[:, 0]).exp()[:, None, None, None]  # (B, 1, 1, 1)
        detail = 0.0
        for level, (size, conv, norm) in enumerate(zip(self._sizes, self.convs, self.norms, strict=True)):
            if features.shape[2:] != size:
                features = F.interpolate(features, size=size)
            features = F.leaky_relu(norm(conv(self._padded(features))), 0.2)
            if level < len(self.sketches):
                detail = detail + self.sketches[level](features)
        image = colour + contrast * (detail + self.paint(self._padded(features)))
        cut = self._style.margin
        return image[:, :, cut : image.shape[2] - cut, cut : image.shape[3] - cut]

    def _padded(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, C, h, w), with their edges repeated (B, C, h + 2, w + 2) unless convolutions add zeros."""
        if self._style.edges == "zeros":
            return features
        for dim in (2, 3):  # the gradient of torch's own replication differs from run to run on a GPU
            last = features.shape[dim] - 1
            features = torch.cat([features.narrow(dim, 0, 1), features, features.narrow(dim, last, 1)], dim)
        return features


class Mixture(nn.Module):
    """Generators that draw in turn, in all styles; for its arguments see ``Generator``.

    They are trained together, so that their images have a teacher's statistics taken together, and each is free to
    draw what the others do not.
    """

    def __init__(self, size: tuple[int, int, int], conditions: int) -> None:
        super().__init__()
        styles = islice(cycle(STYLES), PARTS)
        self.parts = nn.ModuleList(Generator(size, conditions, style) for style in styles)

    def forward(self, latent: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        count = len(self.parts)
        drawn = [part(latent[own::count], condition[own::count]) for own, part in enumerate(self.parts[: len(latent)])]
        turn = torch.arange(len(latent), device=latent.device)
        owner, more = turn % count, len(latent) % count  # the first ``more`` parts draw one image more
        places = owner * (len(latent) // count) + owner.clamp_max(more) + turn // count
        return torch.cat(drawn).index_select(0, places)  # (B, C, H, W)


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
    """A network that draws what a spec describes; for its arguments see ``Generator``.

    An image of one pixel has no places: of one such image a part of a mixture could not normalise its channels.
    """
    if isinstance(spec, JointSpec):
        return JointGenerator(spec, conditions)
    has_places = spec.is_image and spec.size[1:] != (1, 1)
    return (Mixture if has_places else NumberGenerator)(spec.free, conditions)
