"""The k-th largest magnitude of a tensor, exactly and without holding or sorting it.

The bits of a non-negative float, read as an integer, are in the order of its value. Counting them by their
first 16 bits finds the first 16 bits of the answer, counting those that share them finds the next, and so
on (a radix select): two passes over float32, four over float64.

Legend: N checkpoints, n elements of a block.
"""

from __future__ import annotations

import numpy as np

DIGIT, BINS = 16, 1 << 16


class Selection:
    """Finds, for N tensors of one size, the magnitude that the k largest elements of each reach.

    Args:
        ranks: k of each tensor, 1 for the largest element.
        dtype: float32 or float64.
    """

    def __init__(self, ranks: np.ndarray, dtype: np.dtype) -> None:
        self._ranks, self._dtype = ranks.copy(), dtype
        self._bits = np.dtype(f"u{dtype.itemsize}")
        self.rounds = dtype.itemsize * 8 // DIGIT
        self._prefix = np.zeros(len(ranks), self._bits)
        self._level = 0
        self._counts: np.ndarray | None = None  # only while a round goes on: there is one for every tensor

    def measure(self, rows: np.ndarray) -> np.ndarray:
        """How many of a block's elements (N, n) continue the digits found so far with each digit, (N, BINS)."""
        shift = self._bits.type(DIGIT * (self.rounds - 1 - self._level))
        found = np.empty((len(rows), BINS), np.int64)
        for row, counts, prefix in zip(rows, found, self._prefix, strict=True):
            digits = np.abs(row).view(self._bits) >> shift
            if self._level:
                first = prefix << self._bits.type(DIGIT)
                digits = digits[(digits >= first) & (digits - first < BINS)] - first
            counts[:] = np.bincount(digits.astype(np.intp), minlength=BINS)
        return found

    def add(self, contribution: np.ndarray) -> None:
        """Add the counts (N, BINS) of a block."""
        if self._counts is None:
            self._counts = contribution
        else:
            self._counts += contribution

    def end_round(self) -> None:
        """Go one digit further."""
        for n, row in enumerate(self._counts):
            above = row[::-1].cumsum()[::-1]  # elements with this digit or a larger one, (BINS,)
            digit = int(np.flatnonzero(above >= self._ranks[n])[-1])
            self._ranks[n] -= above[digit + 1] if digit + 1 < BINS else 0
            self._prefix[n] = (self._prefix[n] << self._bits.type(DIGIT)) | self._bits.type(digit)
        self._level += 1
        self._counts = None

    def result(self) -> np.ndarray:
        """The k-th largest magnitudes (N,), after all rounds."""
        return self._prefix.view(self._dtype)
