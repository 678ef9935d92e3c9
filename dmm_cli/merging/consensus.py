"""Sign election, as TIES does it.

Legend: N checkpoints, n elements of a block.
"""

from __future__ import annotations

import numpy as np


def disjoint_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean (n,) of those task vectors (N, n) that have the sign of the weighted sum; overwrites them.

    Zeros have no sign, and a sum of zero counts as positive (Yadav et al., NeurIPS 2023, steps 2 and 3).
    """
    sign = np.copysign(values.dtype.type(1), weights @ values + values.dtype.type(0))  # (n,); -0 + 0 is +0
    np.multiply(values, sign, out=values)
    np.maximum(values, np.zeros_like(values), out=values)  # magnitudes of those who agree, else 0
    total = weights @ values
    count = weights @ np.greater(values, 0, out=values)
    count += count == 0
    return sign * total / count
