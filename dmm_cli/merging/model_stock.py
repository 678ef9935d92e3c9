"""Model Stock."""

from __future__ import annotations

import numpy as np

from .method import Facts


def model_stock(facts: Facts) -> np.ndarray:
    """``theta = t mean + (1 - t) theta_base`` with ``t = N cos / (1 + (N - 1) cos)``, tensor by tensor.

    Jang et al., ECCV 2024; cos is the mean cosine of two task vectors. The mean is weighted. Where the
    task vectors oppose each other so much that t has no finite positive value, the base is kept.
    """
    norms, count = np.sqrt(np.diag(facts.gram)), len(facts.gram)
    if count == 1:
        return facts.shares
    lengths = np.maximum(np.outer(norms, norms), 1e-300)
    pairs = (facts.gram / lengths)[np.triu_indices(count, 1)]
    cosine = float(np.clip(pairs, -1.0, 1.0).mean())
    divisor = 1.0 + (count - 1) * cosine
    return max(count * cosine / divisor, 0.0) * facts.shares if divisor > 1e-6 else np.zeros(count)
