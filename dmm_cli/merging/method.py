"""What a merge method is: a function on one block of one tensor; its keyword-only arguments are its parameters.

Legend: N checkpoints, n elements of a block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DmmError, printable
from ..registry import did_you_mean


@dataclass(frozen=True)
class Block:
    """One block of one tensor, of every checkpoint.

    Attributes:
        values: float64 (N, n).
        weights: float64 (N,), as given, not normalised.
        base: float64 (n,) for methods with the trait "base", else None.
        gram: float64 (N, N), inner products of the *whole* tensors, for methods with the trait "gram", else None.
    """

    values: np.ndarray
    weights: np.ndarray
    base: np.ndarray | None = None
    gram: np.ndarray | None = None

    @property
    def shares(self) -> np.ndarray:
        """The weights scaled to sum to 1, (N,)."""
        return self.weights / self.weights.sum()


def effective_parameters(function: Callable, given: dict[str, Any]) -> dict[str, Any]:
    """All parameters of a method, defaults filled in.

    Raises:
        DmmError: a parameter the method does not have.
    """
    defaults = {
        name: item.default
        for name, item in inspect.signature(function).parameters.items()
        if item.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for name in given.keys() - defaults.keys():
        near = did_you_mean(name, defaults)
        raise DmmError(
            f"{function.__name__} has no parameter {printable(name)}",
            evidence=[f"it has: {', '.join(defaults) or 'none'}"],
            hint=f"did you mean {near}?" if near else None,
        )
    return {**defaults, **given}
