"""How far apart the data of two checkpoints look to their normalisation layers."""

from __future__ import annotations

import numpy as np

from ..header import TensorInfo
from ..names import RUNNING_MEAN, RUNNING_VAR, kind_of

EPS = 1e-5  # PyTorch's default, keeps a dead channel from dividing by zero


class StatisticsDistance:
    """Jeffreys divergence of the Gaussians that running statistics describe, mean over all channels.

    Per channel ``((m_i - m_j)^2 + v_i) / v_j / 2 + ((m_i - m_j)^2 + v_j) / v_i / 2 - 1``: the sum of
    both Kullback-Leibler divergences (Jeffreys, 1946). 0 for equal statistics; NaN without BatchNorm.
    """

    def __init__(self, count: int) -> None:
        self._means: dict[str, np.ndarray] = {}
        self._variances: dict[str, np.ndarray] = {}
        self._count = count

    def wants(self, info: TensorInfo) -> bool:
        return info.is_float and kind_of(info.name) in (RUNNING_MEAN, RUNNING_VAR)

    def add(self, name: str, block: np.ndarray) -> None:
        layer, _, kind = name.rpartition(".")
        store = self._means if kind == RUNNING_MEAN else self._variances
        held = [store[layer]] if layer in store else []
        store[layer] = np.concatenate([*held, block.astype(np.float64)], axis=1)

    def matrix(self) -> np.ndarray:
        total, channels = np.zeros((self._count, self._count)), 0
        for layer in sorted(self._means.keys() & self._variances.keys()):  # the order decides the last bits
            mean, variance = self._means[layer], self._variances[layer] + EPS  # (N, C)
            gap = np.square(mean[:, None] - mean[None])  # (N, N, C)
            here, there = variance[:, None], variance[None]
            total += ((gap + here) / there / 2 + (gap + there) / here / 2 - 1).sum(-1)
            channels += mean.shape[1]
        return total / channels if channels else np.full_like(total, np.nan)
