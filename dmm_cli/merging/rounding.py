"""How large the singular values of task vectors are for no other reason than that weights are stored rounded.

Legend: N checkpoints, R x S a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MARGIN = 1.25  # rounding of matrices from 2 x 2 to 64 x 576 exceeds what large ones have by a factor of 1.18 at most


class Format(NamedTuple):
    """How finely weights are stored.

    Attributes:
        eps: from 1 to the next larger number. normal: the least magnitude that is stored as finely as its size allows.
    """

    eps: float
    normal: float

    def edge(self, magnitudes: np.ndarray, shape: tuple[int, int]) -> float:
        """The largest singular value of the rounding of weights (R * S,); 0 stands for what was not rounded."""
        largest = float(magnitudes.max(initial=0.0))
        if largest == 0.0:
            return 0.0
        scaled = (magnitudes / magnitudes.dtype.type(largest)).reshape(shape)  # whose squares do not underflow
        rows, columns = (np.einsum(f"ij,ij->{axis}", scaled, scaled).max() for axis in "ij")
        return MARGIN * self.eps / math.sqrt(12.0) * largest * float(np.sqrt(rows) + np.sqrt(columns))


FORMATS = {
    "BF16": Format(2.0**-7, 2.0**-126),
    "F16": Format(2.0**-10, 2.0**-14),
    "F32": Format(2.0**-23, 2.0**-126),
    "F64": Format(2.0**-52, 2.0**-1022),
}


def rounding_noise(tasks: np.ndarray, base: np.ndarray, shape: tuple[int, int], dtypes: Sequence[str]) -> np.ndarray:
    """The largest singular value that task vectors have because weights are stored rounded, float64 (2, N).

    The first row is of the rounding of the checkpoints, each by itself, the second of the base's, which all share.
    Errors of at most half a unit in the last place, as likely to be anywhere in it, have a standard deviation of at
    most eps |w| / sqrt(12); where a task is 0, nothing was rounded. A matrix of independent entries of these deviations
    has its largest singular value near the largest norm of a row of deviations plus that of a column (Bandeira & van
    Handel, Ann. Probab. 2016).

    Args:
        tasks: (N, R * S). base: the weights, (R * S,). dtypes: those of the base and of every checkpoint.
    """
    own, *others = (FORMATS[dtype] for dtype in dtypes)
    size, noise = np.abs(base), []
    least = np.maximum(size, size.dtype.type(own.normal))
    whole = own.edge(least, shape)
    for task, other in zip(tasks, others, strict=True):
        changed = task != 0
        stored = np.maximum(np.maximum(size, np.abs(base + task)), size.dtype.type(other.normal))
        shared = whole if changed.all() else own.edge(least * changed, shape)
        noise.append((other.edge(stored * changed, shape), shared))
    return np.array(noise).T
