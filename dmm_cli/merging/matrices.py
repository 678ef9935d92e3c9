"""Runs methods that need whole matrices, on the device of choice.

Legend: N checkpoints, R x S a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..runtime import deterministic

Method = Callable[..., torch.Tensor]

MARGIN = 1.25  # rounding of matrices from 2 x 2 to 64 x 576 exceeds what large ones have by a factor of 1.18 at most


class Float(NamedTuple):
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


FLOATS = {
    "BF16": Float(2.0**-7, 2.0**-126),
    "F16": Float(2.0**-10, 2.0**-14),
    "F32": Float(2.0**-23, 2.0**-126),
    "F64": Float(2.0**-52, 2.0**-1022),
}


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """A tensor as a matrix: its first axis against all others; None for what is a vector or a number.

    Leading axes of length 1 do not count, so that position embeddings (1, tokens, width) are matrices.
    """
    while shape and shape[0] == 1:
        shape = shape[1:]
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 and math.prod(shape[1:]) > 1 else None


def load_linear_algebra(device: torch.device) -> None:
    """On a GPU, once: threads that load it at the same time crash."""
    if device.type == "cuda":
        torch.linalg.eigvalsh(torch.eye(2, device=device))


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
    own, *others = (FLOATS[dtype] for dtype in dtypes)
    size, noise = np.abs(base), []
    least = np.maximum(size, size.dtype.type(own.normal))
    whole = own.edge(least, shape)
    for task, other in zip(tasks, others, strict=True):
        changed = task != 0
        stored = np.maximum(np.maximum(size, np.abs(base + task)), size.dtype.type(other.normal))
        shared = whole if changed.all() else own.edge(least * changed, shape)
        noise.append((other.edge(stored * changed, shape), shared))
    return np.array(noise).T


def merge_matrices(
    tasks: np.ndarray,
    shape: tuple[int, int],
    device: torch.device,
    method: Method,
    parameters: dict[str, Any],
    noise: np.ndarray | None,
) -> np.ndarray:
    """Give task vectors (N, R * S) to a method as matrices (N, R, S); the merged task vector, (R * S,).

    Args:
        noise: see ``rounding_noise``, for methods with the trait "noise".

    Raises:
        DmmError: a parameter is out of its range.
    """
    with deterministic(device), torch.no_grad():
        stacked = torch.from_numpy(tasks).to(device).view(len(tasks), *shape)  # (N, R, S)
        given = () if noise is None else (torch.from_numpy(noise),)
        return method(stacked, *given, **parameters).cpu().numpy().reshape(-1)


def calibrate_matrix(
    merged: np.ndarray,
    tasks: np.ndarray,
    shape: tuple[int, int],
    device: torch.device,
    calibration: Method,
    parameters: dict[str, Any],
) -> np.ndarray:
    """Post-process a merged task vector (R * S,) as a matrix, next to the tasks (N, R * S)."""
    with deterministic(device), torch.no_grad():
        stacked = torch.from_numpy(tasks).to(device).view(len(tasks), *shape)  # (N, R, S)
        matrix = torch.from_numpy(merged).to(device).view(shape)  # (R, S)
        return calibration(matrix, stacked, **parameters).cpu().numpy().reshape(-1)
