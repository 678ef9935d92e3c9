"""Whether a permuted network still computes the same function: in float64, where rounding cannot hide a mistake."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import DmmError, is_out_of_memory, summary
from ..examples import in_trees
from ..runtime import generator
from .apply import permute
from .spec import Spec

TOLERANCE = 1e-8  # of the largest output; reordered sums in float64 differ by 1e-13 or so
JITTER = 0.1  # of a tensor's own deviation, or of one where it has none

State = Mapping[str, torch.Tensor]


def verify(name: str, model: nn.Module, spec: Spec, image: np.ndarray, size: tuple[int, ...]) -> float:
    """Compare a network with its permuted copy on random input, with its own weights and with random ones near them.

    Weights that happen to be zero or equal hide a wrong permutation; the random ones do not.

    Args:
        name: of the checkpoint, for the message.
        model: the module with its weights, in eval mode; it is left in float64, with others.
        size: of one input, without the batch axis.

    Returns:
        The largest difference of an output, over the largest output.

    Raises:
        DmmError: the outputs differ.
    """
    model = model.double()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    images = torch.randn(1, *size, generator=generator(0, "verify"), dtype=torch.float64)
    differences = [_difference(name, model, state, spec, image, images)]
    jitter(state)
    differences.append(_difference(name, model, state, spec, image, images))
    worst = float(np.max(differences))  # NaN if one is
    if not worst <= TOLERANCE:
        raise DmmError(
            f"{name} would not compute the same function with its units in another order",
            evidence=[f"outputs of {type(model).__name__} differ by {worst:.1e} of the largest, in float64"],
            hint="this architecture cannot be aligned; nothing was written",
        )
    return worst


def _difference(
    name: str, model: nn.Module, state: State, spec: Spec, image: np.ndarray, images: torch.Tensor
) -> float:
    """The largest difference of an output after the permutation, over the largest output."""
    before = outputs(name, model, state, images)  # (outputs,)
    permuted = permute({key: tensor.numpy() for key, tensor in state.items()}, spec, image)
    after = outputs(name, model, {key: torch.from_numpy(array) for key, array in permuted.items()}, images)
    return float((after - before).abs().max() / before.abs().max().clamp_min(1e-300))


def jitter(state: State) -> None:
    """Add noise to every float tensor, in place; what is nowhere negative, as what a root is taken of, stays so."""
    draw = generator(0, "jitter")
    for tensor in state.values():
        if tensor.is_floating_point():
            positive = bool((tensor >= 0).all())
            spread = float(tensor.std(correction=0)) or 1.0
            tensor += torch.randn(tensor.shape, generator=draw, dtype=torch.float64) * (JITTER * spread)
            if positive:
                tensor.abs_()


def outputs(name: str, model: nn.Module, state: State, images: torch.Tensor) -> torch.Tensor:
    """All outputs of the network, flat.

    Raises:
        DmmError: it fails, but for lack of memory.
    """
    model.load_state_dict(dict(state))
    try:
        with torch.no_grad():
            leaves = pytree.tree_leaves(in_trees(model(images)))
            return torch.cat([leaf.flatten() for leaf in leaves if isinstance(leaf, torch.Tensor)])
    except Exception as error:  # whatever the module itself may raise
        if is_out_of_memory(error):
            raise
        raise DmmError(
            f"{name} does not run in float64, so that no order of its units can be verified",
            evidence=[summary(error)],
        ) from error
