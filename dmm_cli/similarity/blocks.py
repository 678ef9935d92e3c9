"""The interface of a measure.

Legend: N checkpoints, n elements of a block.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..header import TensorInfo


class Measure(Protocol):
    """Accumulates one N x N matrix over the blocks of all tensors it ``wants``."""

    def __init__(self, count: int) -> None: ...

    def wants(self, info: TensorInfo) -> bool:
        """Whether the blocks of this tensor are to be given to ``add``."""

    def add(self, name: str, block: np.ndarray) -> None:
        """Take one block, float32 or float64 (N, n)."""

    def matrix(self) -> np.ndarray:
        """The result, float64 (N, N); NaN where it is not defined."""
