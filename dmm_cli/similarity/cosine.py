"""Cosine of weights or task vectors, in total and per tensor."""

from __future__ import annotations

import numpy as np

from ..header import TensorInfo
from ..names import is_weight
from ..streaming import fit_float32


class Cosine:
    """Cosine over all weight matrices and kernels, from one Gram matrix accumulated in float64."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.grams: dict[str, np.ndarray] = {}

    def wants(self, info: TensorInfo) -> bool:
        return is_weight(info)

    def add(self, name: str, block: np.ndarray) -> None:
        gram = self.grams.setdefault(name, np.zeros((self._count, self._count)))
        gram += products(block)

    def matrix(self) -> np.ndarray:
        return normalise(sum(self.grams.values(), np.zeros((self._count, self._count))))

    def layers(self) -> dict[str, np.ndarray]:
        """The N x N cosine of every tensor."""
        return {name: normalise(gram) for name, gram in self.grams.items()}


def products(block: np.ndarray) -> np.ndarray:
    """Inner products (N, N) of the rows of a block (N, n), in float64 where they do not fit the dtype of the block.

    A block is short enough that its float32 products are exact to 1e-6; the sum over blocks is not.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        gram = block @ block.T
        if not fit_float32(np.diag(gram)):
            wide = block.astype(np.float64)
            gram = wide @ wide.T
    return gram


def normalise(gram: np.ndarray) -> np.ndarray:
    """Gram matrix (N, N) to cosines: 1 between two zero vectors, 0 between a zero vector and another.

    The root is taken of both shares together: equal vectors have the cosine 1, without rounding.
    """
    own = np.diag(gram)
    zero = own == 0
    with np.errstate(invalid="ignore"):  # float64 products, too, may be infinite
        share = gram / np.where(zero, 1.0, own)
        cosine = np.clip(np.sign(gram) * np.sqrt(share * share.T), -1.0, 1.0)
    cosine[np.ix_(zero, zero)] = 1.0
    np.fill_diagonal(cosine, 1.0)
    return cosine
