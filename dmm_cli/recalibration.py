"""Activation statistics of a model, set right on pseudo-data.

Averaged weights shrink the variance of activations, most of all between models of different starts. Where
BatchNorm follows, its running statistics are estimated again; where nothing standardises a layer's output,
REPAIR rescales the layer itself.

Legend: N images, B images of a batch, C channels, K classes, U uses of a layer in a pass.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .examples import Inputs, forward, hooked
from .norms import across

BATCHES, BATCH = 8, 256
MOST = 1 << 18  # values of a channel that torch adds up on a CPU, channels last, to 1e-4 of their deviation
SMALLEST = 1e-6  # deviation of a channel that is switched off


def balanced_weights(targets: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Sampling weights (N,) under which every class present is equally likely."""
    counts = torch.bincount(targets, minlength=num_classes).clamp_min(1)
    return 1.0 / counts[targets].float()


def owner_weights(owners: torch.Tensor, shares: Sequence[float]) -> torch.Tensor:
    """Sampling weights (N,) under which owner n has its share of the images, and each of its own is equally likely.

    Images that were drawn together reproduce their teacher's statistics together; in another mix of classes, such as
    a balanced one, they do not.

    Args:
        owners: (N,), numbers of shares.
    """
    counts = torch.bincount(owners, minlength=len(shares)).clamp_min(1)
    return (torch.tensor(shares, dtype=torch.float64) / counts)[owners].float()


def drawn_rows(weights: torch.Tensor, stream: torch.Generator) -> Sequence[torch.Tensor]:
    """``BATCHES`` batches of rows (B,) drawn with weights (N,)."""
    return torch.multinomial(weights, BATCHES * BATCH, replacement=True, generator=stream).split(BATCH)


def is_batchnorm(layer: nn.Module) -> bool:
    """Whether a layer normalises by statistics of a batch, and not of every image."""
    return isinstance(layer, nn.modules.batchnorm._BatchNorm)


@torch.no_grad()
def reset_statistics(model: nn.Module, layers: Sequence[nn.Module], batches: Iterable[Inputs]) -> None:
    """Replace running means and variances by their average over batches of inputs (B, ...), in place.

    ``num_batches_tracked`` and everything else stay as they are, layers that are no BatchNorm or are not used as well;
    the model is left in eval mode, which all other layers are in meanwhile: the statistics are those of the network
    that is evaluated, without dropout.
    """
    layers = list(filter(is_batchnorm, layers))
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    before = [{name: value.clone() for name, value in layer.named_buffers(recurse=False)} for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.training = True  # not by train(), which would reach layers inside, as timm's have
    with hooked(layer.register_forward_pre_hook(_laid_out, with_kwargs=True) for layer in layers):
        for batch in batches:
            forward(model, batch)
    model.eval()
    for layer, momentum, held in zip(layers, momenta, before, strict=True):
        layer.momentum = momentum
        used = bool(layer.num_batches_tracked)
        for name in ("num_batches_tracked",) if used else held:
            layer.get_buffer(name).copy_(held[name])


def _laid_out(_: nn.Module, inputs: tuple[Any, ...], more: dict[str, Any]) -> tuple[Any, Any]:
    """Features (B, C, ...) of more values than ``MOST`` contiguous, as which torch adds them up to rounding.

    Channels last it adds them one by one: of 256 images of 224 x 224 pixels variances came out 3 % wrong.
    """

    def lay_out(value: Any) -> Any:
        large = isinstance(value, torch.Tensor) and value.dim() > 2 and value.numel() > MOST * value.shape[1]
        return value.contiguous() if large and not value.is_cuda else value

    return tuple(map(lay_out, inputs)), {name: lay_out(value) for name, value in more.items()}


@torch.no_grad()
def repair(
    model: nn.Module,
    parents: Iterable[nn.Module],
    shares: Sequence[float],
    batches: Sequence[Inputs],
    *,
    skip: Iterable[str] = (),
) -> list[str]:
    """Give every channel of a layer's output the weighted mean and deviation it has in the parents, in place.

    ``W' = (t / s) W`` and ``b' = (t / s) (b - m) + u``: m and s are the channel's mean and deviation in the
    model, once all layers before are set right, u and t the weighted means of the parents' (REPAIR, Jordan et
    al., ICLR 2023). Channels correspond to one another across parents. Of a layer without a bias the mean is scaled
    along. Of one that a pass uses several times, m, s, u and t are means over its uses. Layers with tied weights stay
    as they are, and so do those whose output does not scale with their weights, since they standardise these.

    Args:
        parents: modules of the same architecture, in eval mode; used one at a time.
        shares: their weights, summing to 1.
        batches: normalised images, each (B, C, H, W), or all inputs.
        skip: names of layers to leave alone.

    Returns:
        The names of the layers that were rescaled.
    """
    left_out = {*skip, *tied_layers(model)}
    names = [name for name, layer in model.named_modules() if _is_affine(layer) and name not in left_out]
    names = _scaling(model, names, batches[0])
    targets: dict[str, torch.Tensor | float] = dict.fromkeys(names, 0.0)
    for parent, share in zip(parents, shares, strict=True):
        for name, moments in _measure(parent, names, batches).items():
            targets[name] = targets[name] + share * moments
    found = _measure(model, names, batches, targets)
    modules = dict(model.named_modules())
    for name, moments in found.items():
        _rescale(modules[name], moments.mean(0), targets[name].mean(0))
    return list(found)


def tied_layers(model: nn.Module) -> set[str]:
    """Names of the layers that have a parameter which another has too: what is right for one is not for the other."""
    own = {name: list(map(id, layer.parameters(recurse=False))) for name, layer in model.named_modules()}
    used = Counter(number for numbers in own.values() for number in numbers)
    return {name for name, numbers in own.items() if any(used[number] > 1 for number in numbers)}


def _is_affine(layer: nn.Module) -> bool:
    """Whether a layer looks like one, with a weight that is stored as it is, and not computed from others."""
    kind = isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))
    kind = kind and not isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return kind and isinstance(layer._parameters.get("weight"), nn.Parameter)


def _scaling(model: nn.Module, names: Sequence[str], batch: Inputs) -> list[str]:
    """Those of the layers that a pass uses, and whose output, but for the bias, doubles with their weights."""
    doubles: dict[str, bool] = {}
    modules = dict(model.named_modules())

    def hook(name: str):
        def double(layer: nn.Module, given: tuple, by_name: dict, output: torch.Tensor) -> None:
            if not output.numel():
                return
            held = layer.weight
            layer.weight = nn.Parameter(2.0 * held, requires_grad=False)  # a new one, of which autocast has no copy
            try:
                twice = layer.forward(*given, **by_name)
            finally:
                layer.weight = held
            bias = 0.0 if layer.bias is None else layer.bias.view(_along_channels(layer, output))
            without, doubled = output.float() - bias, twice.float() - bias
            rounding = 4.0 * torch.finfo(output.dtype).eps
            near = max(1e-3, rounding) * without.abs().max() + rounding * output.abs().max()
            doubles[name] = doubles.get(name, True) and bool((doubled - 2.0 * without).abs().max() <= near)

        return double

    with hooked(modules[name].register_forward_hook(hook(name), with_kwargs=True) for name in names):
        forward(model, batch)
    return [name for name in names if doubles.get(name)]


def _along_channels(layer: nn.Module, output: torch.Tensor) -> list[int]:
    """The shape in which numbers of channels (C,) meet the output of a layer."""
    return across(output, output.ndim - 1 if isinstance(layer, nn.Linear) else 1)


def _measure(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Inputs],
    targets: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Mean and deviation (U, 2, C) of the outputs of layers, of means and variances averaged over batches.

    With targets (U, 2, C) every layer hands on its output as these would have it, so that the layers after it are
    measured on what they are going to see. Layers that are not used are left out.
    """
    totals: dict[str, torch.Tensor] = {}
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)  # in one pass, use by use
    modules = dict(model.named_modules())

    def hook(name: str):
        def measure(layer: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor | None:
            shape = _along_channels(layer, output)
            variance, mean = torch.var_mean(output, [dim for dim, size in enumerate(shape) if size == 1], correction=0)
            seen[name].append(torch.stack([mean, variance]))
            if targets is None:
                return None
            moments, wanted = torch.stack([mean, variance.sqrt()]), targets[name][len(seen[name]) - 1]
            scale, shift = _change(layer, moments, wanted)
            return output * scale.view(shape) + shift.view(shape)

        return measure

    with hooked(modules[name].register_forward_hook(hook(name)) for name in names):
        for batch in batches:
            seen.clear()
            forward(model, batch)
            for name, uses in seen.items():
                totals[name] = totals.get(name, 0) + torch.stack(uses) / len(batches)
    return {name: torch.stack([total[:, 0], total[:, 1].sqrt()], 1) for name, total in totals.items()}


def _change(layer: nn.Module, moments: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift (C,) of a layer's output from and to (2, C); a channel that is switched off is only shifted."""
    scale = torch.where(moments[1] > SMALLEST, wanted[1] / moments[1].clamp_min(SMALLEST), 1.0)
    shift = torch.zeros_like(scale) if layer.bias is None else wanted[0] - scale * moments[0]
    return scale, shift


def _rescale(layer: nn.Module, moments: torch.Tensor, wanted: torch.Tensor) -> None:
    scale, shift = _change(layer, moments, wanted)
    layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.mul_(scale).add_(shift)
