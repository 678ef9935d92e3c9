"""Statistics in front of normalisation layers, measured on data, as arrays of a file and back.

BatchNorm stores such statistics by itself; with these, models of LayerNorm, GroupNorm or RMSNorm can be inverted too.

Legend: B images, C channels of a layer, n values of a channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..errors import DmmError, capped, printable
from ..examples import Inputs, hooked, on_input, run
from ..inputs import Source
from ..norms import NormInput
from ..runtime import deterministic
from .statistics import NormLayer

PARTS = ("mean", "var", "count")


@dataclass
class Moments:
    """Mean and variance of every channel over all values seen so far, in float64.

    Batches are merged by their counts, means and sums of squared deviations (Chan, Golub and LeVeque, 1979).

    Attributes:
        count: values per channel. mean, squares: (C,), the latter the sum of squared deviations from the mean.
    """

    count: int
    mean: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor, axis: int) -> Moments:
        """Of the input of a layer, with its channels in one of the dimensions."""
        values = features.detach().double().movedim(axis, -1).flatten(0, -2)  # (n, C)
        mean = values.mean(0)  # (C,)
        return cls(len(values), mean, (values - mean).square().sum(0))

    def merge(self, other: Moments) -> Moments:
        """Of both together."""
        count, shift = self.count + other.count, other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = shift.square() * (self.count * other.count / count)
        return Moments(count, mean, self.squares + other.squares + between)

    @property
    def variance(self) -> torch.Tensor:
        """Over the values seen, not an estimate of others', (C,)."""
        return self.squares / self.count


@torch.no_grad()
def measure(
    model: nn.Module, layers: Mapping[str, NormInput], batches: Iterable[Inputs], device: torch.device
) -> dict[str, Moments]:
    """The moments in front of normalisation layers, in one pass over inputs (B, ...), as the model takes them.

    Of a layer that is used several times in a pass, the last use counts; one that is not used is left out.

    Raises:
        DmmError: a layer's input does not have its channels where they should be, or holds NaN or infinity.
    """
    model = model.to(device).eval()
    last: dict[str, Moments] = {}
    total: dict[str, Moments] = {}

    def hook(name: str, layer: NormInput):
        def see(features: torch.Tensor) -> None:
            last[name] = _moments(name, layer, features)

        return see

    handles = (on_input(layer.module, hook(name, layer)) for name, layer in layers.items())
    with hooked(handles), deterministic(device):
        for images in batches:
            run(model, images.to(device))
            total |= {name: total[name].merge(new) if name in total else new for name, new in last.items()}
            last.clear()
    return {name: total[name] for name in layers if name in total}


def _moments(name: str, layer: NormInput, features: torch.Tensor) -> Moments:
    kind = type(layer.module).__name__
    if features.shape[layer.axis] != layer.channels:
        raise DmmError(
            f"cannot tell the channels in front of {printable(name)} ({kind})",
            evidence=[f"its input is {list(features.shape)}, with {layer.channels} channels in dimension {layer.axis}"],
        )
    moments = Moments.of(features, layer.axis)
    if not torch.isfinite(moments.squares).all():
        raise DmmError(
            f"NaN or infinity in front of {printable(name)} ({kind})", hint="does the model work on these data?"
        )
    return moments


def to_arrays(found: Mapping[str, Moments]) -> dict[str, np.ndarray]:
    """``NAME.mean`` and ``NAME.var``, float32 (C,), and ``NAME.count``, int64, of every layer."""
    arrays = {}
    for name, moments in found.items():
        arrays[f"{name}.mean"] = moments.mean.float().cpu().numpy()
        arrays[f"{name}.var"] = moments.variance.float().cpu().numpy()
        arrays[f"{name}.count"] = np.array(moments.count, np.int64)
    return arrays


def load_recorded(source: Source, layers: Mapping[str, NormInput], device: torch.device) -> dict[str, NormLayer]:
    """The normalisation layers that statistics were recorded of, with them, on a device.

    Raises:
        DmmError: the file lacks a part of a layer, holds values that no statistics have, or does not fit the model.
    """
    names = {name: name.rpartition(".")[0] for name in source.tensors}
    recorded = dict.fromkeys(filter(None, names.values()))
    problems = [
        f"{printable(name)} is not of a layer's statistics"
        for name, layer in names.items()
        if not layer or name.rpartition(".")[2] not in PARTS
    ]
    problems += [] if recorded else ["it holds none"]
    for name in recorded:
        problems += _misfits(source, name, layers.get(name))
    _refuse(source, problems, "record the statistics again, of this checkpoint: dmm record MODEL --data DATA")
    found = {}
    with Checkpoint(source) as file:
        for name in recorded:
            mean, variance = (torch.from_numpy(file.floats(f"{name}.{part}")).float() for part in ("mean", "var"))
            if not (mean.isfinite().all() and variance.isfinite().all() and (variance >= 0).all()):
                problems.append(f"{printable(name)}: NaN, infinity or a negative variance")
            found[name] = NormLayer(layers[name].module, mean.to(device), variance.to(device), layers[name].axis)
    _refuse(source, problems, "the file was damaged, or not written by dmm record")
    return found


def _misfits(source: Source, name: str, layer: NormInput | None) -> list[str]:
    """Why the statistics of one layer cannot be the model's."""
    if layer is None:
        return [f"the model has no normalisation layer {printable(name)}"]
    problems = []
    for part in ("mean", "var"):
        info = source.tensors.get(f"{name}.{part}")
        if info is None or not info.is_float:
            problems.append(f"{printable(name)}.{part} is missing" if info is None else f"{info.name} is not float")
        elif info.shape != (layer.channels,):
            problems.append(f"{printable(info.name)} is {list(info.shape)}, the layer has {layer.channels} channels")
    return problems


def _refuse(source: Source, problems: list[str], hint: str) -> None:
    if problems:
        raise DmmError(f"statistics {source.path} do not fit the model", evidence=capped(problems), hint=hint)
