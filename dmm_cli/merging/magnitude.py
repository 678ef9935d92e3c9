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
        self._passes = dtype.itemsize * 8 // DIGIT
        self._prefix = np.zeros(len(ranks), self._bits)
        self._level = 0

    @property
    def done(self) -> bool:
        """Whether all digits are found."""
        return self._level == self._passes

    def measure(self, rows: np.ndarray) -> np.ndarray:
        """How many of a block's elements (N, n) continue the digits found so far with each digit, (N, BINS)."""
        shift = self._bits.type(DIGIT * (self._passes - 1 - self._level))
        found = np.empty((len(rows), BINS), np.int64)
        for row, counts, prefix in zip(rows, found, self._prefix, strict=True):
            digits = np.abs(row).view(self._bits) >> shift
            if self._level:
                first = prefix << self._bits.type(DIGIT)
                digits = digits[(digits >= first) & (digits - first < BINS)] - first
            counts[:] = np.bincount(digits.astype(np.intp), minlength=BINS)
        return found

    def take(self, total: np.ndarray) -> None:
        """Take the counts (N, BINS) over all blocks and go one digit further."""
        for n, row in enumerate(total):
            above = row[::-1].cumsum()[::-1]  # elements with this digit or a larger one, (BINS,)
            digit = int(np.flatnonzero(above >= self._ranks[n])[-1])
            self._ranks[n] -= above[digit + 1] if digit + 1 < BINS else 0
            self._prefix[n] = (self._prefix[n] << self._bits.type(DIGIT)) | self._bits.type(digit)
        self._level += 1

    def result(self) -> np.ndarray:
        """The k-th largest magnitudes (N,), once ``done``."""
        return self._prefix.view(self._dtype)
