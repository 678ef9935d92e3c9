"""Who gets which images, and how a site sees them.

Legend: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SMALLEST = 100  # images of a client: fewer do not train a network
BASE_SHARE = 0.05  # of every class, which no client gets
EVEN = 100.0  # alpha under which clients have nearly the same classes


def base_and_rest(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images of a common start, a twentieth of every class, and of all others."""
    draw = np.random.default_rng([seed, 0])
    mine = [draw.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    base = np.sort(np.concatenate([index[: int(len(index) * BASE_SHARE)] for index in mine]))
    return base, np.setdiff1d(np.arange(len(labels)), base)


def dirichlet(labels: np.ndarray, clients: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Every class dealt out to the clients by shares from Dirichlet(alpha) (as Yurochkin et al., ICML 2019).

    Drawn again until every client has ``SMALLEST`` images, as is usual: at .01 some would have none.

    Returns:
        Disjoint indices into ``labels`` (N,), sorted, one array per client, together all of them.
    """
    draw = np.random.default_rng([seed, 1])
    while True:
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label in np.unique(labels):
            index = draw.permutation(np.flatnonzero(labels == label))
            cuts = np.cumsum(draw.dirichlet([alpha] * clients))[:-1] * len(index)
            for part, own in zip(parts, np.split(index, cuts.round().astype(int)), strict=True):
                part.append(own)
        found = [np.sort(np.concatenate(part)) for part in parts]
        if min(map(len, found)) >= SMALLEST:
            return found


def _grey(images: np.ndarray, _: np.random.Generator) -> np.ndarray:
    luma = images.transpose(0, 2, 3, 1) @ np.array([0.299, 0.587, 0.114])  # (N, H, W), ITU-R BT.601
    return np.repeat(luma[:, None], 3, 1)


def _inverted(images: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return 255.0 - images


def _blurred(images: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """The binomial filter 1 4 6 4 1 along both axes, a deviation of one pixel."""
    for axis in (2, 3):
        wide = np.pad(images, [(2, 2) if dim == axis else (0, 0) for dim in range(4)], mode="edge")
        size = images.shape[axis]
        taps = [wide.take(range(shift, shift + size), axis) for shift in range(5)]
        images = sum(weight * tap for weight, tap in zip((1, 4, 6, 4, 1), taps, strict=True)) / 16.0
    return images


def _noisy(images: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return images + draw.normal(0.0, 25.0, images.shape)


def _rotated(images: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Red to green to blue to red: every hue turned by a third of the circle."""
    return images[:, [2, 0, 1]]


RENDERINGS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "grey": _grey,
    "inverted": _inverted,
    "blurred": _blurred,
    "noisy": _noisy,
    "rotated colours": _rotated,
}


def rendered(images: np.ndarray, name: str, seed: int) -> np.ndarray:
    """Images, uint8 (N, 3, H, W), as the site of that rendering sees them; the same for the same seed."""
    result = np.empty_like(images)
    draw = np.random.default_rng([seed, 2])
    for start in range(0, len(images), 1000):  # float64 of all of them at once would be 1.2 GB
        part = RENDERINGS[name](images[start : start + 1000].astype(np.float64), draw)
        result[start : start + 1000] = part.round().clip(0, 255)
    return result
