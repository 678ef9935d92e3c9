"""Set a merged checkpoint right on pseudo-data of its parents: its layers, its statistics; and judge it by them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import listed, told_by
from ..inputs import Source
from ..merging import METHODS
from ..names import is_head
from ._pseudo import mixed_images, owned_images, readable_errors, retention

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from ..files import Outputs
    from ..manifest import Retention
    from ..merging.recipe import Recipe
    from ..synthesis.pseudodata import PseudoData


@dataclass(frozen=True)
class Recalibration:
    """Pseudo-data to recalibrate on, and how to build the module."""

    data: Source
    arch: str | None = None
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Recalibrated:
    """A merged network that was set right.

    Attributes:
        tensors: those that have changed.
        lengths: of every weight that was solved, its norm over the weighted mean of the parents' norms.
        done: what was changed, in words.
        retained: of every parent's pseudo-images, how many it and the merged network recognise.
    """

    merged: Source
    tensors: Mapping[str, np.ndarray]
    lengths: Mapping[str, float]
    done: str
    retained: tuple[Retention, ...]

    def save(
        self,
        output: Path,
        settings: Recalibration,
        *,
        inputs: Sequence[Path] = (),
        force: bool = False,
        outputs: Outputs | None = None,
    ) -> None:
        """Write the merged checkpoint with these tensors in it.

        Args:
            outputs: others that it takes its place with.

        Raises:
            DmmError: the output is refused.
        """
        from ..checkpoint import save_like

        record = {"data": settings.data.sha256, "seed": settings.seed, "what": self.done}
        metadata = {**self.merged.metadata, "dmm.recalibrated": json.dumps(record, sort_keys=True)}
        save_like(output, self.merged, self.tensors, metadata, inputs=inputs, force=force, outputs=outputs)


def recalibrate(merged: Source, parents: Sequence[Source], recipe: Recipe, settings: Recalibration) -> Recalibrated:
    """Solve the layers of a merged checkpoint, if its method is one on features, and reset its BatchNorm statistics.

    If there are no such statistics, and no layers were solved, layers are repaired.

    Args:
        recipe: of the parents alone, by which they were merged.

    Raises:
        DmmError: the pseudo-data hold nothing of a parent, or do not fit the model.
    """
    from .. import loading
    from ..layout import place
    from ..norms import norm_layers
    from ..runtime import deterministic, resolve_device
    from ..spaces import example
    from ..synthesis.pseudodata import load_pseudo_data

    where = resolve_device(settings.device)
    data = load_pseudo_data(settings.data)
    with told_by(f"it is the merge of {listed(parent.label for parent in parents)}, before it is set right"):
        model, _ = loading.load_model(merged, settings.arch)
    place(model, where, example(data.spec, where))
    work = _Work(model, data, parents, recipe, settings, where)
    with deterministic(where), readable_errors(settings.data, merged.label):
        lengths = _solve(work) if "features" in METHODS.traits(recipe.method) else {}
        done = [f"{len(lengths)} layers solved ({recipe.method})"] if lengths else []
        changed = set(lengths)
        if not lengths or norm_layers(model):
            layers, words = _set_right(work)
            changed |= {name for name in model.state_dict() if name.rpartition(".")[0] in layers}
            done.append(words)
        retained = retention(model, data, parents, where)
    tensors = {name: value.cpu().numpy() for name, value in model.state_dict().items() if name in changed}
    return Recalibrated(merged, tensors, lengths, ", ".join(done), retained)


@dataclass(frozen=True)
class _Work:
    """The module of a merge, to be changed in place, with its parents and their pseudo-data."""

    model: nn.Module
    data: PseudoData
    parents: Sequence[Source]
    recipe: Recipe
    settings: Recalibration
    device: torch.device

    def parent_modules(self) -> Iterator[nn.Module]:
        """The parents' own modules, one after the other."""
        from ..layout import place
        from ..loading import load_model
        from ..spaces import example

        for parent in self.parents:
            model, _ = load_model(parent, self.settings.arch)
            place(model, self.device, example(self.data.spec, self.device))
            yield model

    def shares(self) -> list[float]:
        """The parents' weights, summing to 1."""
        weights = self.recipe.weights or [1.0] * len(self.parents)
        return [weight / sum(weights) for weight in weights]


def _solve(work: _Work) -> dict[str, float]:
    """Solve the layers of the model; of each weight, its norm over the weighted mean of the parents'."""
    from ..merging.features import Batch, solve_layers
    from ..norms import norm_layers

    drawn = owned_images(work.data, work.parents, work.settings.seed, "features", work.device)
    batches = [Batch(*pair) for pair in drawn]
    owners = [work.data.place_of(parent) for parent in work.parents]
    norms = [layer for _, layer in norm_layers(work.model)]
    modules = list(work.parent_modules()) if "outputs" in METHODS.traits(work.recipe.method) else []
    return solve_layers(work.model, work.parents, work.recipe, batches, owners, norms, modules)


def _set_right(work: _Work) -> tuple[set[str], str]:
    """Reset statistics or rescale layers; the names of the layers that changed, and in words what was done to them."""
    from ..norms import norm_layers
    from ..recalibration import is_batchnorm, repair, reset_statistics

    shares = work.shares()
    batches = mixed_images(work.data, work.parents, shares, work.settings.seed, "recalibrate", work.device)
    layers = {name: layer for name, layer in norm_layers(work.model) if is_batchnorm(layer)}
    if layers:
        reset_statistics(work.model, list(layers.values()), batches)
        return set(layers), f"{len(layers)} BatchNorm layers reset"
    heads = [name for name, _ in work.model.named_modules() if is_head(f"{name}.weight")]
    names = repair(work.model, work.parent_modules(), shares, list(batches), skip=heads)
    return set(names), f"{len(names)} layers rescaled (REPAIR)"


@contextmanager
def draft(output: Path) -> Iterator[Path]:
    """A place beside an output for a merge that is to be recalibrated; nothing stays there."""
    path = output.parent / f".dmm-{os.urandom(8).hex()}.safetensors"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
