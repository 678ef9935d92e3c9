"""Whether a permuted network still computes the same function: in float64, where rounding cannot hide a mistake."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import DmmError
from ..names import COUNTER, RUNNING_VAR, kind_of
from ..runtime import generator
from .apply import permute
from .spec import Spec

TOLERANCE = 1e-8  # of the largest output; reordered sums in float64 differ by 1e-13 or so
JITTER = 0.1  # of a tensor's own deviation, and at least of one


def verify(
    name: str, model: nn.Module, arrays: Mapping[str, np.ndarray], spec: Spec, image: np.ndarray, size: tuple[int, ...]
) -> float:
    """Compare a network with its permuted copy on random input, with its own weights and with random ones near them.

    Weights that happen to be zero or equal hide a wrong permutation; the random ones do not.

    Args:
        name: of the checkpoint, for the message.
        model: the module, for its architecture; it is left in float64, with other weights.
        arrays: the state dict, not permuted.
        size: of one input, without the batch axis.

    Returns:
        The largest difference of an output, over the largest output.

    Raises:
        DmmError: the outputs differ.
    """
    model = model.double().eval()
    images = torch.randn(1, *size, generator=generator(0, "verify"), dtype=torch.float64)
    state = {name: torch.from_numpy(np.ascontiguousarray(array)).double() for name, array in arrays.items()}
    worst = 0.0
    for weights in (state, _jittered(state)):
        permuted = permute({name: tensor.numpy() for name, tensor in weights.items()}, spec, image)
        before = _outputs(model, weights, images)
        after = _outputs(model, {name: torch.from_numpy(array) for name, array in permuted.items()}, images)
        worst = max(worst, float((after - before).abs().max() / before.abs().max().clamp_min(1e-300)))
    if not worst <= TOLERANCE:
        raise DmmError(
            f"{name} would not compute the same function with its units in another order",
            evidence=[f"outputs of {type(model).__name__} differ by {worst:.1e} of the largest, in float64"],
            hint="this architecture cannot be aligned; nothing was written",
        )
    return worst


def _jittered(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    draw = generator(0, "jitter")
    changed = {}
    for name, tensor in state.items():
        spread = tensor.std() if tensor.numel() > 1 else tensor.new_tensor(0.0)
        noise = torch.randn(tensor.shape, generator=draw, dtype=torch.float64) * JITTER
        noise *= torch.where(spread > 0, spread, 1.0)
        changed[name] = tensor if kind_of(name) == COUNTER else tensor + noise
        if kind_of(name) == RUNNING_VAR:
            changed[name] = changed[name].abs()
    return changed


def _outputs(model: nn.Module, state: Mapping[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """All outputs of the network, flat."""
    model.load_state_dict(dict(state))
    with torch.no_grad():
        return torch.cat([leaf.flatten() for leaf in pytree.tree_leaves(model(images))])
