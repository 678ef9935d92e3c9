"""Cosine of weights or task vectors, in total and per tensor."""

from __future__ import annotations

import numpy as np

from ..header import TensorInfo
from ..names import is_weight


class Cosine:
    """Cosine over all weight matrices and kernels, from one Gram matrix accumulated in float64."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.grams: dict[str, np.ndarray] = {}

    def wants(self, info: TensorInfo) -> bool:
        return is_weight(info)

    def add(self, name: str, block: np.ndarray) -> None:
        gram = self.grams.setdefault(name, np.zeros((self._count, self._count)))
        # a block is short enough that its float32 product is exact to 1e-6; the sum over blocks is not
        gram += block @ block.T

    def matrix(self) -> np.ndarray:
        return normalise(sum(self.grams.values(), np.zeros((self._count, self._count))))

    def layers(self) -> dict[str, np.ndarray]:
        """The N x N cosine of every tensor."""
        return {name: normalise(gram) for name, gram in self.grams.items()}


def normalise(gram: np.ndarray) -> np.ndarray:
    """Gram matrix (N, N) to cosines: 1 between two zero vectors, 0 between a zero vector and another."""
    norm = np.sqrt(np.diag(gram))
    zero = norm == 0
    scale = np.where(zero, 1.0, norm)
    cosine = np.clip(gram / np.outer(scale, scale), -1.0, 1.0)
    cosine[np.ix_(zero, zero)] = 1.0
    np.fill_diagonal(cosine, 1.0)
    return cosine
