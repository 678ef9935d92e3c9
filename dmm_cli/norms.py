"""The normalisation layers of a network, and where their input has channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .examples import Inputs, hooked, run


def norm_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of every layer with running statistics (BatchNorm and its relatives), in module order."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if _is_of_channels(module, "running_mean") and _is_of_channels(module, "running_var")
    ]


def batch_norm_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Those whose running statistics are of whole batches: InstanceNorm's variances are the means of every image's."""
    of_images = nn.modules.instancenorm._InstanceNorm
    return [(name, layer) for name, layer in norm_layers(model) if not isinstance(layer, of_images)]


@dataclass(frozen=True)
class NormInput:
    """A normalisation layer, and where its input has channels: their number, and the dimension they are in."""

    module: nn.Module
    channels: int
    axis: int


def norm_inputs(model: nn.Module) -> dict[str, NormInput]:
    """Every normalisation layer by name, in module order, with or without running statistics.

    BatchNorm, InstanceNorm, GroupNorm, LayerNorm and RMSNorm of torch, and timm's variants of them.
    """
    found = {name: _norm_input(module) for name, module in model.named_modules()}
    return {name: layer for name, layer in found.items() if layer}


@torch.no_grad()
def layers_that_run(model: nn.Module, inputs: Inputs) -> dict[str, nn.Module]:
    """The normalisation layers that a pass over inputs (B, ...) goes through, by name, in module order."""
    layers, seen = {name: layer.module for name, layer in norm_inputs(model).items()}, set()
    with hooked(layer.register_forward_pre_hook(lambda module, _: seen.add(module)) for layer in layers.values()):
        run(model, inputs)
    return {name: layer for name, layer in layers.items() if layer in seen}


def across(features: torch.Tensor, axis: int) -> list[int]:
    """The shape in which numbers of channels (C,) meet features that have them in dimension ``axis``."""
    return [-1 if dim == axis else 1 for dim in range(features.dim())]


def unknown_norms(model: nn.Module) -> list[str]:
    """Names of layers whose class calls itself a normalisation and is none of those that ``norm_inputs`` knows.

    Weights that are normalised (``torch.nn.utils``) are no features, and what holds other modules is no layer.
    """
    known = norm_inputs(model)
    return [
        name
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and name not in known
        and not any(True for _ in module.children())
        and not type(module).__module__.startswith("torch.nn.utils.")
    ]


def _is_of_channels(module: nn.Module, name: str) -> bool:
    """Whether a module keeps a number for every channel under a name; who keeps one for all is no layer of features."""
    held = getattr(module, name, None)
    return isinstance(held, torch.Tensor) and held.dim() == 1


def _norm_input(module: nn.Module) -> NormInput | None:
    if _is_of_channels(module, "running_mean"):
        return NormInput(module, len(module.running_mean), 1)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return NormInput(module, module.num_features, 1)
    if isinstance(module, nn.GroupNorm):
        return NormInput(module, module.num_channels, 1)
    kinds = type(module).__mro__
    # of others that have a shape it is not known what it is of: some take their channels first
    known = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or any(kind.__module__.startswith("timm.") for kind in kinds)
    shape = getattr(module, "normalized_shape", None) if known else None
    if not shape:
        return None
    # LayerNorm and RMSNorm work on the last dimensions; timm and torchvision name those that take (B, C, H, W) ...2d
    channels_first = any("2d" in kind.__name__ for kind in kinds)
    return NormInput(module, shape[0], 1 if channels_first else -len(shape))
