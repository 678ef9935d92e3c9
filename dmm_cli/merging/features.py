"""Runs methods on features: solves the layers of a drafted merge one after the other, on what they see.

As in RegMean++ (Nguyen et al., 2025) the images of every parent go through the merged network, whose layers before
are solved already, and BatchNorm works with the statistics of each batch, since its own are still to be found.
For methods with the trait "outputs" they also go through their parent as it is. Where a partial merge keeps units of
one parent side by side with others, that parent says what these are to give for the images of all.
Linear layers and convolutions of one group, over one axis or two, are solved. What else there is stays the
weighted mean: biases, grouped convolutions and those of volumes, padding other than by a number of zeros, subclasses
that change their weights or inputs, tied weights, and layers whose inputs are not of single images.

Legend: N checkpoints, B images of a batch, P positions, S features of a position, R x S a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..checkpoint import Checkpoint
from ..examples import Inputs, forward, hooked, on_input
from ..inputs import Source
from ..recalibration import tied_layers
from ..runtime import generator
from ..widths import own_rows
from . import METHODS
from .method import Layer
from .recipe import Recipe, loose_heads

POSITIONS = 16  # at most, of those in one image a layer works at, drawn at random: neighbours see much the same
UNFOLDED = 1 << 24  # numbers of unfolded patches held at once


class Batch(NamedTuple):
    """Images (B, C, H, W) of several parents, or all their inputs, and whose each is (B,)."""

    images: Inputs
    owners: torch.Tensor


class Place(NamedTuple):
    """A layer by its path in the module, and how often a pass uses it."""

    path: str
    layer: nn.Module
    uses: int

    @property
    def weight(self) -> str:
        """The name of its weight."""
        return f"{self.path}.weight" if self.path else "weight"


@torch.no_grad()
def solve_layers(
    model: nn.Module,
    parents: Sequence[Source],
    recipe: Recipe,
    batches: Sequence[Batch],
    owners: Sequence[int],
    norms: Sequence[nn.Module],
    modules: Sequence[nn.Module] = (),
) -> dict[str, float]:
    """Solve every layer that can be, in the order they are used, in place.

    One layer's Gram matrices are held at a time, in float64; the number of their rows is the number of images
    times ``POSITIONS`` at most.

    Args:
        model: the weighted mean of the parents, in eval mode, on the device of the batches.
        owners: the number each parent has in the batches.
        norms: layers with running statistics, which stay as they are.
        modules: the parents' own, in eval mode, on the same device; for methods with the trait "outputs".

    Returns:
        Of the weight of every layer solved, its norm over the weighted mean of the parents' norms.
    """
    lengths = {}
    method = METHODS.load(recipe.method)
    fixed = loose_heads(parents, recipe)
    with ExitStack() as stack:
        files = [stack.enter_context(Checkpoint(parent)) for parent in parents]
        stack.enter_context(_batch_statistics(norms))
        for place in _in_order(model, batches[0].images):
            if place.weight in fixed:
                continue
            own = place.layer.weight
            weights = _weights(files, place)
            shares = torch.tensor(
                recipe.weights_of((place.weight,), len(files)), dtype=torch.float64, device=own.device
            )
            shares /= shares.sum()
            asked = _asked(parents, place) if modules else []
            moments = _moments(model, place, weights, batches, owners, modules, asked, recipe.seed)
            merged = method(Layer(weights, moments[0], shares, moments[1]), **recipe.parameters_of(place.weight))
            own.copy_(merged.view_as(own))
            parents_norm = float(shares @ weights.flatten(1).norm(dim=1))
            lengths[place.weight] = float(merged.norm()) / parents_norm if parents_norm else 1.0
    return lengths


@contextmanager
def _batch_statistics(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let layers normalise every batch by itself, without a trace in their running statistics."""
    for layer in layers:
        layer.training, layer.track_running_stats = True, False
    try:
        yield
    finally:
        for layer in layers:
            layer.training, layer.track_running_stats = False, True


def _in_order(model: nn.Module, images: Inputs) -> list[Place]:
    """Layers to solve in the order of their first use."""
    calls: dict[str, int] = {}
    foreign = set()

    def hook(name: str):
        def count(features: torch.Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            if len(features) % len(images):
                foreign.add(name)

        return count

    tied = tied_layers(model)
    layers = {name: layer for name, layer in model.named_modules() if _is_solvable(layer) and name not in tied}
    with hooked(on_input(layer, hook(name)) for name, layer in layers.items()):
        forward(model, images)
    return [Place(name, layers[name], count) for name, count in calls.items() if name not in foreign]


def _is_solvable(layer: nn.Module) -> bool:
    if type(layer) in (nn.Conv1d, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def _weights(files: Sequence[Checkpoint], place: Place) -> torch.Tensor:
    """A layer's weights in all checkpoints, float64 (N, R, S)."""
    rows = np.stack([file.floats(place.weight).astype(np.float64) for file in files])
    weight = place.layer.weight
    return torch.from_numpy(rows).to(weight.device).view(len(files), len(weight), -1)  # (N, R, S)


def _asked(parents: Sequence[Source], place: Place) -> list[dict[int, torch.Tensor]]:
    """Of every parent's images: which parents say what outputs are to be, 1 in (R,) where they do, else 0."""
    weight = place.layer.weight
    alone = [weight.new_zeros(len(weight), dtype=torch.float64) for _ in parents]  # outputs that one parent alone has
    for rows, mask in zip(own_rows(parents[0], place.weight), alone, strict=False):
        mask[rows] = 1.0
    asked = []
    for n in range(len(parents)):
        others = {m: mask for m, mask in enumerate(alone) if m != n and mask.any()}
        asked.append({n: 1.0 - sum(others.values(), torch.zeros_like(alone[n])), **others})
    return asked


class _Enough(Exception):
    """A pass has come as far as it needs to."""


def _inputs(model: nn.Module, place: Place, images: Inputs) -> list[torch.Tensor]:
    """What the layer of a place is given in a pass, once for every use."""
    seen = []

    def keep(features: torch.Tensor) -> None:
        seen.append(features)
        if len(seen) == place.uses:
            raise _Enough

    with hooked([on_input(model.get_submodule(place.path), keep)]), suppress(_Enough):
        forward(model, images)
    return seen


def _moments(
    model: nn.Module,
    place: Place,
    weights: torch.Tensor,
    batches: Sequence[Batch],
    owners: Sequence[int],
    modules: Sequence[nn.Module],
    asked: Sequence[dict[int, torch.Tensor]],
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Grams (N, S, S) and, with the parents' modules, targets (N, R, S) of a ``Layer`` with these weights.

    Args:
        asked: with the parents' modules, see ``_asked``.
    """
    grams = weights.new_zeros(len(owners), weights.shape[2], weights.shape[2])  # (N, S, S)
    targets = torch.zeros_like(weights) if modules else None  # (N, R, S)
    counts = [0] * len(owners)
    for number, batch in enumerate(batches):
        seen = _inputs(model, place, batch.images)
        for n, owner in enumerate(owners):
            own = batch.owners == owner
            if not own.any():
                continue
            theirs = {m: _inputs(modules[m], place, batch.images[own]) for m in asked[n]} if modules else {}
            for use, inputs in enumerate(seen):
                inputs = inputs.unflatten(0, (len(own), -1))[own].flatten(0, 1)  # of these images alone
                salt = (seed, "features", place.weight, number, use, owner)
                rows = features_of(place.layer, inputs, int(own.sum()), generator(*salt)).flatten(0, 1).double()
                grams[n].addmm_(rows.T, rows)
                counts[n] += len(rows)
                for m, given in theirs.items():
                    given = features_of(place.layer, given[use], int(own.sum()), generator(*salt)).flatten(0, 1)
                    answers = given.double() @ weights[m].T + _bias_beyond(place, modules[m])  # (rows, R)
                    targets[n].addmm_((answers * asked[n][m]).T, rows)
    rows_seen = torch.tensor(counts, device=grams.device).clamp_min(1)[:, None, None]
    return grams / rows_seen, targets / rows_seen if modules else None


def _bias_beyond(place: Place, parent: nn.Module) -> torch.Tensor | float:
    """What a parent's layer adds beyond what the merged one adds, (R,)."""
    if place.layer.bias is None:
        return 0.0
    return parent.get_submodule(place.path).bias.double() - place.layer.bias.double()


def features_of(layer: nn.Module, inputs: torch.Tensor, count: int, stream: torch.Generator) -> torch.Tensor:
    """What a layer's weight is multiplied with, (B, P, S), at up to ``POSITIONS`` positions of each of B images."""
    if isinstance(layer, nn.Linear):
        return _drawn(inputs.reshape(count, -1, inputs.shape[-1]), stream)  # (B, P, S)
    unfold = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    if isinstance(layer, nn.Conv1d):  # as a convolution of images of one row
        inputs = inputs.unsqueeze(2)  # (B, C, 1, L)
        unfold = tuple((least, *value) for least, value in zip((1, 1, 0, 1), unfold, strict=True))
    parts = inputs.split(max(1, UNFOLDED // (inputs[0].numel() * math.prod(unfold[0]))))
    return torch.cat([_drawn(F.unfold(part, *unfold).mT, stream) for part in parts])


def _drawn(places: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
    """Some positions of each image: (B, P, S) to (B, ``POSITIONS``, S) at most."""
    count, positions, width = places.shape
    if positions <= POSITIONS:
        return places
    chosen = torch.rand(count, positions, generator=stream).topk(POSITIONS, dim=1).indices  # (B, POSITIONS)
    return places.gather(1, chosen[:, :, None].expand(-1, -1, width).to(places.device))
