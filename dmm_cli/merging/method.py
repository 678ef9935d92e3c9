"""What a merge method is. Its keyword-only arguments are its parameters; the table says which kind it is.

*coefficients* maps ``Facts`` of a whole tensor to one number per checkpoint, (N,). The result is the sum of
checkpoints times coefficients; with the trait "base", the base plus the sum of task vectors times coefficients.

*elements* maps a ``Block`` of task vectors to the merged task vector, (n,). Blocks are independent.

*matrices* maps whole task matrices times their weights, a float32 or float64 torch tensor (N, R, S), to the
merged task matrix, (R, S); with the trait "noise" also, float64 (2, N), how large the rounding of stored weights can be
in them, see ``rounding``. A convolution is the matrix out x in * height * width. Tensors of fewer than
two dimensions are not matrices: they take the weighted mean of the task vectors.

*features* maps a ``Layer``, a weight in all checkpoints and what it is multiplied with, to the merged weight, (R, S).
The engine only drafts such a merge, as the weighted mean; ``features`` then solves it layer by layer on pseudo-data.

Loads no array library.

Legend: N checkpoints, n elements of a block, R x S a matrix.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import DmmError, printable
from ..registry import mistyped

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Facts:
    """What coefficients are computed from.

    Attributes:
        weights: float64 (N,), as given, not normalised.
        gram: float64 (N, N), inner products of the whole tensors, of the task vectors where there is a base;
            None for methods without the trait "gram".
    """

    weights: np.ndarray
    gram: np.ndarray | None = None

    @property
    def shares(self) -> np.ndarray:
        """The weights scaled to sum to 1, (N,)."""
        return self.weights / self.weights.sum()


@dataclass(frozen=True)
class Block:
    """One block of one tensor, of every task vector.

    Attributes:
        values: float32 or float64 (N, n); a method may overwrite it.
        weights: of the same dtype (N,), as given, not normalised.
        thresholds: (N,), the smallest magnitude to keep, for methods with the trait "trim".
        stream: random numbers of this block alone, for methods with the trait "random".
    """

    values: np.ndarray
    weights: np.ndarray
    thresholds: np.ndarray | None = None
    stream: np.random.Generator | None = None


@dataclass(frozen=True)
class Layer:
    """One layer of every checkpoint, a convolution as the matrix out x in * height * width.

    Attributes:
        weights: float64 (N, R, S).
        grams: float64 (N, S, S), the mean outer product of the layer's inputs for each checkpoint's images.
        shares: float64 (N,), the weights of the checkpoints scaled to sum to 1.
        targets: float64 (N, R, S), the mean outer product of what the layer gives in the checkpoint itself, less the
            merged bias, and these inputs; for methods with the trait "outputs".
    """

    weights: torch.Tensor
    grams: torch.Tensor
    shares: torch.Tensor
    targets: torch.Tensor | None = None


def effective_parameters(function: Callable, given: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a method, defaults filled in.

    Raises:
        DmmError: a parameter the method does not have, or one that is not a number.
    """
    defaults = {
        name: item.default
        for name, item in inspect.signature(function).parameters.items()
        if item.kind is inspect.Parameter.KEYWORD_ONLY
    }
    _require_known(function.__name__, defaults, given)
    return {**defaults, **given}


def check_parameters(method: str, kinds: Mapping[str, str], given: Mapping[str, Any]) -> None:
    """Refuse what a method would refuse, before it is loaded.

    Args:
        kinds: of every parameter the method has, from ``KINDS``.

    Raises:
        DmmError: a parameter the method does not have, one that is not a number, or one out of its range.
    """
    _require_known(method, kinds, given)
    for name, value in given.items():
        for require in KINDS[kinds[name]]:
            require(name, value)


def _require_known(method: str, known: Collection[str], given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name not in known:
            raise mistyped(f"{method} has no parameter {printable(name)}", name, known, listed="it has")
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise DmmError(f"parameter {name} of {method} is a number, not {printable(str(value))}")


def require_positive(name: str, value: float) -> None:
    """Raise DmmError where a parameter is below 0."""
    if value < 0:
        raise DmmError(f"{name} must not be negative: {value:g}")


def require_share(name: str, value: float) -> None:
    """Raise DmmError unless a parameter lies between 0 and 1."""
    if not 0.0 <= value <= 1.0:
        raise DmmError(f"{name} must lie between 0 and 1, not {value:g}")


def require_whole(name: str, value: float) -> None:
    """Raise DmmError where a parameter has a fraction."""
    if value != int(value):
        raise DmmError(f"{name} must be a whole number, not {value:g}")


KINDS: dict[str, tuple[Callable[[str, float], None], ...]] = {
    "number": (),
    "positive": (require_positive,),
    "count": (require_positive, require_whole),
    "share": (require_share,),
}
