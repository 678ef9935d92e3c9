"""What some methods must know of a whole tensor before they can merge a block of it.

A fact is found in rounds: every block is measured, and the sum over all blocks taken.

Legend: N checkpoints, n elements of a block.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..streaming import fit_float32
from .magnitude import Selection
from .method import require_share

ROUNDING = 1e-6  # 0.29 * 100 is 28.999999999999996


class Fact(Protocol):
    """Something to find out about one tensor of N checkpoints.

    Attributes:
        rounds: how often all blocks are measured.
    """

    rounds: int

    def measure(self, rows: np.ndarray) -> np.ndarray:
        """The contribution of a block, (N, n) checkpoints or task vectors; changes nothing."""

    def add(self, contribution: np.ndarray) -> None:
        """Take the contribution of a block."""

    def end_round(self) -> None:
        """Take note that all blocks are in."""

    def result(self) -> np.ndarray:
        """What was found, after all rounds."""


class Gram:
    """Inner products (N, N), float32 within a block, where they fit, and float64 between blocks."""

    rounds = 1

    def __init__(self, count: int) -> None:
        self._total = np.zeros((count, count))

    def measure(self, rows: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            products = _products(rows)
            squares = np.diag(products)
            fit = fit_float32(squares) or fit_float32(squares[rows.any(1)])  # of rows of zeros they are exact
            return products if fit else _products(rows.astype(np.float64))

    def add(self, contribution: np.ndarray) -> None:
        self._total += contribution

    def end_round(self) -> None:
        pass

    def result(self) -> np.ndarray:
        return self._total


def _products(rows: np.ndarray) -> np.ndarray:
    products = np.empty((len(rows), len(rows)))
    for i, row in enumerate(rows):  # pair by pair: BLAS takes nine times as long for a product of three long rows
        for j in range(i, len(rows)):
            products[i, j] = products[j, i] = np.dot(row, rows[j])
    return products


class Known:
    """A fact that needs no data."""

    rounds = 0

    def __init__(self, value: np.ndarray) -> None:
        self._value = value

    def result(self) -> np.ndarray:
        return self._value


def trim_threshold(density: float, count: int, numel: int, dtype: np.dtype) -> Fact:
    """The magnitudes (N,) that the share ``density`` of each of ``count`` tensors reaches.

    The share is rounded down to whole elements, one at least; a density of 0 keeps none, of 1 all.

    Raises:
        DmmError: the density is not a share.
    """
    require_share("density", density)
    if density in (0, 1) or not numel:
        return Known(np.full(count, 0.0 if density == 1 else np.inf))
    return Selection(np.full(count, max(1, int(density * numel + ROUNDING))), dtype)
