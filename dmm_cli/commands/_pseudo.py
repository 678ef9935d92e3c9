"""Pseudo-images of some checkpoints, as their networks take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import DmmError
from ..inputs import Source

if TYPE_CHECKING:
    import torch

    from ..synthesis.pseudodata import PseudoData


def balanced_images(
    data: PseudoData, parents: Sequence[Source], seed: int, salt: str, device: torch.device
) -> Iterator[torch.Tensor]:
    """Class-balanced batches (B, C, H, W) of the parents' images, normalised.

    Raises:
        DmmError: nothing was made from a parent.
    """
    import numpy as np
    import torch

    from ..images import InputSpec, PixelSpace
    from ..recalibration import balanced_batches, balanced_weights
    from ..runtime import generator

    places = [data.place_of(parent) for parent in parents]
    rows = np.flatnonzero(np.isin(data.teacher_id, places))
    weights = balanced_weights(torch.from_numpy(data.targets[rows]), data.logits.shape[1])
    space = PixelSpace(InputSpec(data.images.shape[1:], data.mean, data.std), device)
    images = space.from_bytes(torch.from_numpy(data.images[rows]).to(device))
    return balanced_batches(images, weights, generator(seed, salt))


@contextmanager
def readable_errors(data: Source, model: str) -> Iterator[None]:
    """Turn what torch says of images that do not fit a model into a message that names both."""
    try:
        yield
    except RuntimeError as error:
        raise DmmError(
            f"pseudo-images of {data.path} do not go through {model}",
            evidence=[str(error).splitlines()[0]],
            hint="use pseudo-data that were synthesized from these checkpoints",
        ) from error
