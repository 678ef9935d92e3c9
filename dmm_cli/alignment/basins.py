"""Which checkpoints come from one start: told from a sample of their weights, since reading all of them costs a merge.

Weights of one start have a cosine of .81 to .99, those of different starts of less than .005; a sample of a million
weights is good to .001.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from ..chance import SAMPLE, unrelated_cosine
from ..checkpoint import Checkpoint
from ..grouping import components, start_bounds
from ..inputs import Source
from ..names import is_weight


def basins(sources: Sequence[Source]) -> list[list[int]]:
    """Numbers of the checkpoints of each start, in order of first appearance.

    Two share a start where the cosine of their weights says so (``start_bounds``), or where there are no weights to
    take it of: heads and vectors are left out.
    """
    first, *others = sources
    infos = [
        info
        for info in first.tensors.values()
        if is_weight(info) and all(o.tensors[info.name].shape == info.shape for o in others)
    ]
    if not infos:
        return [list(range(len(sources)))]
    gram = np.zeros((len(sources), len(sources)))
    with ExitStack() as stack:
        files = [stack.enter_context(Checkpoint(source)) for source in sources]
        for info in infos:
            rows = np.stack([file.floats(info.name, 0, min(info.numel, SAMPLE)) for file in files]).astype(np.float64)
            gram += info.numel / max(rows.shape[1], 1) * (rows @ rows.T)  # (N, N); what is not sampled is like it
        unrelated = unrelated_cosine(files, infos)
    norms = np.sqrt(np.diag(gram))
    zero = norms == 0
    norms[zero] = 1.0
    cosine = gram / np.outer(norms, norms)
    cosine[np.ix_(zero, zero)] = 1.0
    labels = components(cosine >= start_bounds(unrelated))
    return [np.flatnonzero(labels == label).tolist() for label in dict.fromkeys(labels.tolist())]
