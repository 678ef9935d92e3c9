"""What some methods must know of a whole tensor before they can merge a block of it.

A fact is found by measuring every block, summing, and taking the sum, as often as it needs; from memory for a
tensor that is held there, else in passes over the files.

Legend: N checkpoints, n elements of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Protocol

import numpy as np

from ..header import TensorInfo
from ..streaming import Piece, cores, in_order, pieces
from .magnitude import Selection
from .method import require_share

ROUNDING = 1e-6  # 0.29 * 100 is 28.999999999999996


class Fact(Protocol):
    """Something to find out about one tensor of N checkpoints."""

    done: bool

    def measure(self, rows: np.ndarray) -> np.ndarray:
        """The contribution of a block, (N, n) checkpoints or task vectors; changes nothing."""

    def take(self, total: np.ndarray) -> None:
        """Take the sum over all blocks."""

    def result(self) -> np.ndarray:
        """What was found, once ``done``."""


class Gram:
    """Inner products (N, N), float32 within a block and float64 between blocks."""

    def __init__(self) -> None:
        self.done = False

    def measure(self, rows: np.ndarray) -> np.ndarray:
        return (rows @ rows.T).astype(np.float64)

    def take(self, total: np.ndarray) -> None:
        self._total, self.done = total, True

    def result(self) -> np.ndarray:
        return self._total


class Known:
    """A fact that needs no data."""

    done = True

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


def find(fact: Fact, blocks: Callable[[], Iterable[np.ndarray]]) -> np.ndarray:
    """Find a fact from blocks in memory."""
    while not fact.done:
        fact.take(sum(fact.measure(rows) for rows in blocks()))
    return fact.result()


def find_in_passes(
    infos: Sequence[TensorInfo], facts: Mapping[str, Fact], read: Callable[[Piece], np.ndarray], block: int
) -> dict[str, np.ndarray]:
    """Find the facts of tensors too large to hold, all of them in each pass over the files."""
    while open_ := [info for info in infos if not facts[info.name].done]:
        jobs = [piece for info in open_ for piece in pieces(info, block)]
        with in_order(lambda piece: facts[piece.name].measure(read(piece)), jobs, cores()) as parts:
            named = zip((job.name for job in jobs), parts, strict=True)
            for name, group in groupby(named, key=lambda item: item[0]):
                facts[name].take(sum(part for _, part in group))
    return {info.name: facts[info.name].result() for info in infos}
