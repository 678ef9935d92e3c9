"""How to merge, checked against what the headers tell. Loads no array library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import DmmError, printable
from ..inputs import Source, require_same_tensors
from . import METHODS


@dataclass(frozen=True)
class Recipe:
    """How to merge.

    Attributes:
        weights: one per checkpoint, or empty for equal ones.
        parameters: of the method; missing ones take its defaults.
    """

    method: str = "linear"
    weights: tuple[float, ...] = ()
    parameters: dict[str, Any] = field(default_factory=dict)
    base: Source | None = None


def check(sources: Sequence[Source], recipe: Recipe) -> None:
    """Everything about a merge that headers can tell.

    Raises:
        DmmError: tensors differ, weights do not fit, the method is unknown, lacks its base or is not
            defined for this many checkpoints.
    """
    traits = METHODS.traits(recipe.method)
    if "base" in traits and recipe.base is None:
        raise DmmError(f"{recipe.method} needs the common start", hint="name it with --base")
    if "pair" in traits and len(sources) > 2:
        raise DmmError(
            f"{recipe.method} merges two checkpoints, not {len(sources)}", hint="use --method linear for more"
        )
    require_same_tensors([*sources, *([recipe.base] if recipe.base else [])])
    _require_same_kinds(sources)
    _check_weights(recipe.weights, len(sources))


def _check_weights(weights: Sequence[float], count: int) -> None:
    if weights and len(weights) != count:
        raise DmmError(f"{len(weights)} weights for {count} checkpoints", hint="give one each: --weights 1,2")
    if weights and not (all(math.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0):
        shown = ", ".join(f"{weight:g}" for weight in weights)
        raise DmmError(f"weights must be zero or more, with a positive sum: {shown}")


def _require_same_kinds(sources: Sequence[Source]) -> None:
    for name, info in sources[0].tensors.items():
        for source in sources[1:]:
            other = source.tensors[name]
            if other.is_float != info.is_float or (not info.is_float and other.dtype != info.dtype):
                raise DmmError(
                    f"tensor {printable(name)} is {info.dtype} in {sources[0].path} and {other.dtype} in {source.path}"
                )
