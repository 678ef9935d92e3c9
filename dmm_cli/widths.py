"""Networks wider than their architecture: layers take the widths of a checkpoint's tensors.

A partial merge keeps units of two networks side by side (``alignment.widen``). No timm name and arguments tell of such
widths, the tensors do. The metadata ``WIDTHS`` say that they are meant: JSON, for every set of units that was widened
how many there were, and how many there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import nn

from .errors import DmmError, printable
from .inputs import Source

WIDTHS = "dmm.widths"
OWN = "dmm.own"  # of two networks that are to be merged: by tensor, the rows that the first and the second alone has

Shapes = Mapping[str, tuple[int, ...]]


def own_rows(source: Source, name: str) -> list[list[int]]:
    """Rows of a tensor that the first, and the second, of two wide networks has alone; empty where there are none.

    Raises:
        DmmError: the metadata tell of no such rows.
    """
    try:
        rows = json.loads(source.metadata.get(OWN, "{}")).get(name, [])
        count = source.tensors[name].shape[0]
        fits = len(rows) <= 2 and all(_are_rows(told, count) for told in rows)
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError):  # no JSON, or of another kind
        fits = False
    if not fits:
        raise DmmError(
            f"{source.path}: {OWN} in the metadata is not rows of {printable(name)} by the network that has them alone",
            evidence=[printable(source.metadata[OWN])],
            hint="leave it out: dmm itself writes it to temporary files alone",
        )
    return rows


def _are_rows(told: object, count: int) -> bool:
    return isinstance(told, list) and all(type(row) is int and 0 <= row < count for row in told)


def is_resizable(module: nn.Module) -> bool:
    """Whether a layer can take another number of channels: its width is in its tensors, and few attributes know it."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return not module.transposed and module.groups in (1, module.in_channels)
    return isinstance(module, (nn.Linear, nn.modules.batchnorm._BatchNorm))


def resize(model: nn.Module, shapes: Shapes) -> None:
    """Give every layer tensors of the shapes named, zeros where they differ from its own, in place.

    Args:
        shapes: of the state dict, by name; tensors without one stay.

    Raises:
        DmmError: a layer of another kind is to change, or another axis than that of channels.
    """
    for path, module in model.named_modules():
        held = {**module._parameters, **module._buffers}
        held = {name: value for name, value in held.items() if value is not None}  # of a bias there may be none
        wanted = {name: shapes.get(f"{path}.{name}" if path else name) for name, value in held.items()}
        other = {name: shape for name, shape in wanted.items() if shape and shape != tuple(held[name].shape)}
        for name, shape in other.items():
            own = tuple(held[name].shape)
            if not is_resizable(module) or len(shape) != len(own) or shape[2:] != own[2:]:
                raise DmmError(
                    f"{printable(path)} ({type(module).__name__}) cannot be widened",
                    evidence=[f"{printable(name)} is {list(own)}, and the checkpoint has {list(shape)}"],
                    hint=f"of this architecture no widths can be changed, whatever the metadata {WIDTHS} say",
                )
            empty = held[name].new_zeros(shape)
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(empty, held[name].requires_grad)
            else:
                module._buffers[name] = empty
        if other:
            _note(module)


def _note(module: nn.Module) -> None:
    """Let the attributes of a layer say what its tensors are."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        outputs, inputs = module.weight.shape[:2]
        if module.groups > 1:  # depthwise
            inputs = outputs * module.in_channels // module.out_channels
            module.groups = inputs
        module.out_channels, module.in_channels = outputs, inputs
    else:
        module.num_features = len(next(t for t in (module.weight, module.running_mean) if t is not None))
