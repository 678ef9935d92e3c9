"""Set the activation statistics of a merged checkpoint right on pseudo-data of its parents."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..inputs import Source
from ._pseudo import balanced_images, readable_errors

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


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
    with one_thread(where), readable_errors(settings.data, merged.label):
        pseudo = load_pseudo_data(settings.data)
        batches = balanced_images(pseudo, parents, settings.seed, "recalibrate", where)
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


def _heads(model: nn.Module) -> list[str]:
    from ..names import is_head

    return [name for name, _ in model.named_modules() if is_head(f"{name}.weight")]


def _tensors(model: nn.Module, layers: Sequence[str]) -> Mapping[str, np.ndarray]:
    """The tensors that belong to these layers themselves."""
    owned = set(layers)
    state = model.state_dict()
    return {name: value.cpu().numpy() for name, value in state.items() if name.rpartition(".")[0] in owned}
