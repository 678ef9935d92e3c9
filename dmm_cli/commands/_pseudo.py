"""Pseudo-images of some checkpoints, as their networks take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import DmmError, is_out_of_memory, summary
from ..inputs import Source

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from ..examples import Inputs
    from ..manifest import Retention
    from ..synthesis.pseudodata import PseudoData


def distinct_images(
    data: PseudoData, parents: Sequence[Source], seed: int, salt: str, device: torch.device, batch: int
) -> Iterator[Inputs]:
    """Class-balanced batches (B, C, H, W), or of all inputs, of the parents' images, normalised, none twice in a batch.

    As many images as ``owned_images`` draws, in all, or one batch of all if they are no more than a batch.

    Raises:
        DmmError: nothing was made from a parent.
    """
    import torch

    from ..recalibration import BATCH, BATCHES, balanced_weights
    from ..runtime import generator

    images, rows = images_of(data, parents, device)
    weights = balanced_weights(torch.from_numpy(data.targets[rows]), data.logits.shape[1])
    stream, size = generator(seed, salt), min(batch, len(rows))
    for _ in range(BATCHES * BATCH // batch if size < len(rows) else 1):
        yield images[torch.multinomial(weights, size, generator=stream).to(device)]


def owned_images(
    data: PseudoData, parents: Sequence[Source], seed: int, salt: str, device: torch.device
) -> Iterator[tuple[Inputs, torch.Tensor]]:
    """Class-balanced batches (B, C, H, W), or of all inputs, of the parents' images, normalised; and teachers (B,).

    Raises:
        DmmError: nothing was made from a parent.
    """
    import torch

    from ..recalibration import balanced_weights, drawn_rows
    from ..runtime import generator

    images, rows = images_of(data, parents, device)
    weights = balanced_weights(torch.from_numpy(data.targets[rows]), data.logits.shape[1])
    owners = torch.from_numpy(data.teacher_id[rows]).to(device)
    drawn = (part.to(device) for part in drawn_rows(weights, generator(seed, salt)))
    return ((images[part], owners[part]) for part in drawn)


def mixed_images(
    data: PseudoData, parents: Sequence[Source], shares: Sequence[float], seed: int, salt: str, device: torch.device
) -> Iterator[Inputs]:
    """Batches (B, ...) of the parents' inputs by their shares, normalised, each parent's in its own class mix.

    Raises:
        DmmError: nothing was made from a parent.
    """
    import numpy as np
    import torch

    from ..recalibration import drawn_rows, owner_weights
    from ..runtime import generator

    images, rows = images_of(data, parents, device)
    places = [data.place_of(parent) for parent in parents]
    by_place = np.bincount(places, shares, minlength=len(data.teachers))
    weights = owner_weights(torch.from_numpy(data.teacher_id[rows]).long(), by_place.tolist())
    return (images[part.to(device)] for part in drawn_rows(weights, generator(seed, salt)))


def images_of(data: PseudoData, parents: Sequence[Source], device: torch.device) -> tuple[Inputs, np.ndarray]:
    """The parents' images, normalised (N, C, H, W), or all inputs, and their rows in the pseudo-data, (N,).

    Raises:
        DmmError: nothing was made from a parent.
    """
    import numpy as np
    import torch

    from ..examples import each
    from ..spaces import space_of

    rows = np.flatnonzero(np.isin(data.teacher_id, [data.place_of(parent) for parent in parents]))
    held = each(data.images[rows], torch.from_numpy).to(device)
    return space_of(data.spec, device).from_bytes(held), rows


def retention(
    model: nn.Module, data: PseudoData, parents: Sequence[Source], device: torch.device
) -> tuple[Retention, ...]:
    """How far the parents, and a model in their place, agree with the targets of each parent's images."""
    import torch

    from ..examples import answer, percentage
    from ..manifest import Retention

    found = []
    for parent in parents:
        images, rows = images_of(data, [parent], device)
        with torch.no_grad():
            answers = torch.cat([answer(model, part).argmax(1) for part in images.split(512)]).cpu().numpy()
        targets = data.targets[rows]
        shares = [percentage(own == targets) for own in (data.logits[rows].argmax(1), answers)]
        found.append(Retention(parent.label, len(rows), *shares))
    return tuple(found)


@contextmanager
def readable_errors(data: Source, model: str) -> Iterator[None]:
    """Turn what a model says of images that do not fit it into a message that names both."""
    try:
        yield
    except Exception as error:  # whatever it is, it is the network's
        ours = isinstance(error, DmmError) and error.__cause__ is None
        if ours or is_out_of_memory(error):
            raise
        raise DmmError(
            f"pseudo-images of {data.path} do not go through {model}",
            evidence=[summary(error.__cause__ or error)],
            hint="use pseudo-data that were synthesized from these checkpoints",
        ) from error
