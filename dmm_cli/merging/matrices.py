"""Runs methods that need whole matrices, on the device of choice.

Legend: N checkpoints, R x S a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch

from ..runtime import deterministic

Method = Callable[..., torch.Tensor]


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """A tensor as a matrix: its first axis against all others; None for what is a vector or a number.

    Leading axes of length 1 do not count, so that position embeddings (1, tokens, width) are matrices.
    """
    while shape and shape[0] == 1:
        shape = shape[1:]
    return (shape[0], prod(shape[1:])) if len(shape) > 1 and prod(shape[1:]) > 1 else None


def load_linear_algebra(device: torch.device) -> None:
    """On a GPU, once: threads that load it at the same time crash."""
    if device.type == "cuda":
        torch.linalg.eigvalsh(torch.eye(2, device=device))


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
        noise: see ``rounding``, for methods with the trait "noise".

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
