"""How often two checkpoints agree on the sign of a weight."""

from __future__ import annotations

import numpy as np

from ..header import TensorInfo
from ..names import is_weight


class SignAgreement:
    """Share of weights whose sign (-, 0, +) is equal; 1/2 is expected of unrelated models.

    Sign conflicts are what TIES (Yadav et al., NeurIPS 2023) resolves before it averages.
    """

    def __init__(self, count: int) -> None:
        self._equal = np.zeros((count, count))
        self._seen = 0

    def wants(self, info: TensorInfo) -> bool:
        return is_weight(info)

    def add(self, name: str, block: np.ndarray) -> None:
        negative, positive = block < 0, block > 0
        for i in range(len(block)):
            for j in range(i):
                differ = (negative[i] ^ negative[j]) | (positive[i] ^ positive[j])
                equal = block.shape[1] - np.count_nonzero(differ)
                self._equal[i, j] += equal
                self._equal[j, i] += equal
        self._seen += block.shape[1]

    def matrix(self) -> np.ndarray:
        share = self._equal / self._seen if self._seen else np.full_like(self._equal, np.nan)
        np.fill_diagonal(share, 1.0)
        return share
