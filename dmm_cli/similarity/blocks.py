"""The interface of a measure, and the kinds of tensors it may ask for.

Legend: N checkpoints, n elements of a block.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..header import TensorInfo
from ..names import is_head, is_statistic


def is_weight(info: TensorInfo) -> bool:
    """Whether a tensor is a float parameter of two or more dimensions outside the classifier.

    One-dimensional tensors are left out: normalisation scales start at one and biases at zero, so
    they look alike in models that share nothing. Heads are, since class lists may differ.
    """
    return info.is_float and len(info.shape) >= 2 and not is_statistic(info.name) and not is_head(info.name)


class Measure(Protocol):
    """Accumulates one N x N matrix over the blocks of all tensors it ``wants``."""

    def __init__(self, count: int) -> None: ...

    def wants(self, info: TensorInfo) -> bool:
        """Whether the blocks of this tensor are to be given to ``add``."""

    def add(self, name: str, block: np.ndarray) -> None:
        """Take one block, float32 or float64 (N, n)."""

    def matrix(self) -> np.ndarray:
        """The result, float64 (N, N); NaN where it is not defined."""
