"""Linear CKA of activations: how alike networks answer, whatever the order or rotation of their units.

Kornblith et al., ICML 2019; with the unbiased HSIC of Song et al., JMLR 2012, summed over batches as Nguyen et
al., ICLR 2021, do, so that neither the number of units nor that of images inflates it.

Legend: N checkpoints, B images of a batch, F features of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from ..errors import DmmError
from ..examples import Inputs, called, forward, hooked

BATCH = 128  # images whose products are taken with one another
ROUNDING = 1e-9  # of float32 activations, squared
FEWEST = 4  # images, for the estimate to be defined

Matrices = dict[str, torch.Tensor]


@torch.no_grad()
def cka(
    models: Sequence[nn.Module], batches: Sequence[Inputs], on_progress: Callable[..., None] | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """CKA of every two networks of one architecture on the same images, (N, N), and by layer.

    Layers are the outputs of convolutions and linear layers; the matrix is their mean. What a network makes the same
    of all images has no part in its similarities, but counts as 0 against a network that does not.

    Args:
        models: in eval mode, on the device of the images.
        batches: normalised inputs, each (B, ...), no image twice in one, which would count as alike whatever networks
            make of it; those of fewer than ``FEWEST`` are left out.

    Raises:
        DmmError: the networks have no such layers.
    """
    sums: dict[str, torch.Tensor] = {}  # (N, N) each
    scales: dict[str, torch.Tensor] = {}  # (N,) each
    usable = [batch for batch in batches if len(batch) >= FEWEST]
    for number, batch in enumerate(usable):
        grams = [_grams(model, batch) for model in models]
        for name in grams[0]:
            both = torch.stack([own[name] for own in grams])  # (N, B, B)
            sums[name] = sums.get(name, 0) + _hsic(both)
            scales[name] = scales.get(name, 0) + both.square().mean((1, 2))
        if on_progress:
            on_progress("cka", number + 1, len(usable))
    if not sums:
        raise DmmError(
            f"{called(models[0])} has no convolution or linear layer whose outputs cka could compare",
            hint="leave out --data and --measure cka",
        )
    layers = {name: _normalised(sums[name].cpu().numpy(), scales[name].cpu().numpy()) for name in sums}
    known = np.ma.masked_invalid(list(layers.values()))  # (layers, N, N)
    return known.mean(0).filled(1.0), layers  # networks that tell nothing of any image are alike


def _grams(model: nn.Module, images: Inputs) -> Matrices:
    """Inner products (B, B) of what every layer makes of the images."""
    found: Matrices = {}

    def hook(name: str):
        def keep(_: nn.Module, inputs: object, output: torch.Tensor) -> None:
            if len(output) % len(images):
                return  # what it works on are not the images, but positions for example
            features = output.reshape(len(images), -1).double()  # (B, F)
            found[name] = features @ features.T

        return keep

    affine = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    handles = [
        layer.register_forward_hook(hook(name)) for name, layer in model.named_modules() if isinstance(layer, affine)
    ]
    with hooked(handles):
        forward(model, images)
    return found


def _hsic(grams: torch.Tensor) -> torch.Tensor:
    """Unbiased HSIC (N, N) of every two Gram matrices (N, B, B); Song et al. 2012, equation 5."""
    count = grams.shape[1]
    grams = grams.clone()
    grams.diagonal(dim1=1, dim2=2).zero_()
    flat, rows = grams.flatten(1), grams.sum(2)  # (N, B B), (N, B)
    totals = rows.sum(1)  # (N,)
    trace = flat @ flat.T
    mean = totals.outer(totals) / ((count - 1) * (count - 2))
    cross = 2.0 / (count - 2) * rows @ rows.T
    hsic = (trace + mean - cross) / (count * (count - 3))
    return (hsic + hsic.T) / 2.0  # products leave the two halves some bits apart


def _normalised(hsic: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """CKA (N, N) from sums of HSIC, NaN between networks whose features are the same for all images.

    Args:
        scale: (N,), what the sums would be about if features were not centred; below ``ROUNDING`` of it they are noise.
    """
    varies = np.diag(hsic) > ROUNDING * scale
    own = np.sqrt(np.where(varies, np.diag(hsic), np.inf))  # against anything else, what does not vary counts 0
    ratio = np.clip(hsic / np.outer(own, own), -1.0, 1.0)
    return np.where(varies[:, None] | varies, ratio, np.nan)
