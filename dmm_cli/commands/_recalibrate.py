"""Set the activation statistics of a merged checkpoint right on pseudo-data of its parents."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DmmError
from ..inputs import Source

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from ..synthesis.pseudodata import PseudoData


@dataclass(frozen=True)
class Recalibration:
    """Pseudo-data to recalibrate on, and how to build the module."""

    data: Source
    arch: str | None = None
    device: str = "auto"
    seed: int = 0


def recalibrate(
    merged: Source,
    output: Path,
    parents: Sequence[Source],
    weights: Sequence[float],
    settings: Recalibration,
    *,
    inputs: Sequence[Path] = (),
    force: bool = False,
) -> str:
    """Write a merged checkpoint with BatchNorm statistics reset, or, without such layers, with repaired layers.

    Args:
        weights: of the parents, empty for equal ones.

    Returns:
        What was done, in words.

    Raises:
        DmmError: the pseudo-data hold nothing of a parent or do not fit the model, or the output is refused.
    """
    import torch

    from .. import architectures
    from ..checkpoint import save_like
    from ..recalibration import repair, reset_statistics
    from ..runtime import one_thread, resolve_device
    from ..synthesis.pseudodata import load_pseudo_data

    where = resolve_device(settings.device)
    model = architectures.load_model(merged, settings.arch)[0].to(where)
    layers = architectures.norm_layers(model)
    with one_thread(where), _readable_errors(settings.data, merged):
        batches = _batches(load_pseudo_data(settings.data), parents, settings.seed, where)
        if layers:
            reset_statistics(model, [layer for _, layer in layers], batches)
            names = [name for name, _ in layers]
            done = f"{len(names)} BatchNorm layers reset"
        else:
            modules = (architectures.load_model(parent, settings.arch)[0].to(where) for parent in parents)
            shares = torch.tensor(weights or [1.0] * len(parents))
            names = repair(model, modules, (shares / shares.sum()).tolist(), list(batches), skip=_heads(model))
            done = f"{len(names)} layers rescaled (REPAIR)"
    record = json.dumps({"data": settings.data.sha256, "seed": settings.seed, "what": done}, sort_keys=True)
    metadata = {**merged.metadata, "dmm.recalibrated": record}
    save_like(output, merged, _tensors(model, names), metadata, inputs=inputs, force=force)
    return f"{done} on pseudo-data of {len(parents)} parents"


@contextmanager
def draft(output: Path) -> Iterator[Path]:
    """A place beside the output for the merge that is to be recalibrated; nothing stays there."""
    path = output.parent / f".dmm-{os.urandom(8).hex()}.safetensors"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _batches(data: PseudoData, parents: Sequence[Source], seed: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Class-balanced batches of the parents' images, normalised."""
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
    return balanced_batches(images, weights, generator(seed, "recalibrate"))


def _heads(model: nn.Module) -> list[str]:
    from ..names import is_head

    return [name for name, _ in model.named_modules() if is_head(f"{name}.weight")]


def _tensors(model: nn.Module, layers: Sequence[str]) -> Mapping[str, np.ndarray]:
    """The tensors that belong to these layers themselves."""
    owned = set(layers)
    state = model.state_dict()
    return {name: value.cpu().numpy() for name, value in state.items() if name.rpartition(".")[0] in owned}


@contextmanager
def _readable_errors(data: Source, merged: Source) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DmmError(
            f"pseudo-images of {data.path} do not go through {merged.label}",
            evidence=[str(error).splitlines()[0]],
            hint="use pseudo-data that were synthesized from the checkpoints that are merged",
        ) from error
