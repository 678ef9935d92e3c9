"""What chance alone would give: the nulls above which grouping's thresholds stand.

Legend: N checkpoints, m kernels of k weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod

import numpy as np

from .checkpoint import Checkpoint
from .header import TensorInfo
from .manifest import LayerSimilarity

SAMPLE = 1 << 13  # first weights of every tensor
DEVIATIONS = 3.0
SHUFFLES = 99  # a gap above all of them is there by chance in one case of a hundred


@np.errstate(over="ignore", invalid="ignore")  # squares of float64 values may be infinite
def unrelated_cosine(files: Sequence[Checkpoint], infos: Iterable[TensorInfo]) -> np.ndarray:
    """The cosine (N, N) two checkpoints have at most when the units of one are in random order, as if unrelated.

    What is left then is what all units have in common, such as a mean that is not zero, or the shape of a kernel.
    Over all orders of the m kernels a_i and b_j of two tensors, ``sum_i <a_i, b_order(i)>`` has the mean
    ``m <mean a, mean b>`` and, about these means, a variance of ``sum_i |a_i|^2 sum_j |b_j|^2 / (m - 1)`` at most
    (Hoeffding 1951). Summed over tensors, and ``DEVIATIONS`` of its standard deviations taken for sure, this is the
    null; kernels beyond a sample of each tensor are taken to be like it.
    """
    mean, variance = np.zeros((2, len(files), len(files)))
    squares = np.zeros(len(files))
    for info in infos:
        if not info.numel:
            continue
        size = prod(info.shape[2:])
        count = info.numel // size
        sampled = min(count, max(1, SAMPLE // size))
        rows = np.stack([file.floats(info.name, 0, sampled * size) for file in files]).astype(np.float64)
        kernels = rows.reshape(len(files), sampled, size)  # (N, m, k)
        middle = kernels.mean(1)  # (N, k)
        spread = count / sampled * np.square(kernels - middle[:, None]).sum((1, 2))  # (N,)
        mean += count * middle @ middle.T
        variance += np.outer(spread, spread) / max(count - 1, 1)
        squares += spread + count * np.square(middle).sum(1)
    scale = np.sqrt(np.outer(squares, squares))
    return np.clip((mean + DEVIATIONS * np.sqrt(variance)) / np.where(scale, scale, 1.0), 0.0, 1.0)


def shuffled_cosines(layers: Sequence[LayerSimilarity], members: Sequence[int]) -> Iterator[np.ndarray]:
    """Cosines between chimeras (N, N), ``SHUFFLES`` times: every layer comes from another of the members.

    Each layer deals out the members in an order of its own, so that what the layers say of single pairs stays, and
    what they agree on is lost.
    """
    held = np.ix_(members, members)
    grams = []
    for layer in layers:
        norms = np.array(layer.norms, dtype=np.float64)[list(members)]  # (N,)
        grams.append(np.array(layer.cosine, dtype=np.float64)[held] * np.outer(norms, norms))
    for number in range(SHUFFLES):
        draw = np.random.default_rng(number)
        orders = (draw.permutation(len(members)) for _ in grams)
        total = sum(gram[np.ix_(order, order)] for gram, order in zip(grams, orders, strict=True))
        norms = np.sqrt(np.diag(total))
        norms[norms == 0] = 1.0
        yield total / np.outer(norms, norms)
