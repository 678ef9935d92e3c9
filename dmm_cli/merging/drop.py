"""Random sparsification, as DARE does it.

Legend: N checkpoints, n elements of a block.
"""

from __future__ import annotations

import numpy as np

from .method import Block, require_share

LEVELS = 1 << 16  # a drawn element is 16 random bits: half the work of a float32, and a density good to 1e-5


def drop_and_rescale(block: Block, density: float) -> np.ndarray:
    """Keep each element with probability ``density`` and divide it by that (Yu et al., ICML 2024), (N, n).

    Raises:
        DmmError: the density is not a share.
    """
    require_share("density", density)
    kept = round(density * LEVELS)
    values, width = block.values, block.values.shape[1]
    for row in values:
        draws = block.stream.bit_generator.random_raw(-(-width // 4)).view(np.uint16)[:width]
        row *= draws < kept
    values *= values.dtype.type(LEVELS / max(kept, 1))
    return values
