"""Where a network runs, and how its features lie in memory there.

Channels last is what convolutions are fastest in: a forward pass of a small ResNet takes little more than half the time
on a CPU. Not every network stands it.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import nn

from .errors import DmmError, is_out_of_memory, printable, summary
from .examples import Examples, Inputs, each, forward, named

INPUT_HINT = "say what it takes with --input-size, or by dmm.input in its metadata"
BLOCK = 16  # channels that oneDNN works on at once: 16 with AVX-512, 8 without


def place(model: nn.Module, device: torch.device, example: Inputs) -> torch.memory_format:
    """Move a network to a device, channels last if it runs so, and contiguous if it does not; tells which it is.

    Networks that ask for a ``view`` of their features, as many do in front of the classifier, need contiguous ones:
    their inputs are then made so, and what follows from contiguous inputs and weights is contiguous.

    Args:
        example: inputs (B, ...) as the network takes them.
    """
    model.to(device)
    if not _is_narrow(model):
        _lay_out(model, torch.channels_last)
        if _runs(model, example):
            return torch.channels_last
        _lay_out(model, torch.contiguous_format)
    model.register_forward_pre_hook(_make_contiguous, with_kwargs=True)
    return torch.contiguous_format


def _lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    """Weights and buffers of four dimensions in a layout; ``Module.to`` fails where others have five, as in Conv3d."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=layout)


@torch.no_grad()
def require_fit(label: str, model: nn.Module, example: Inputs, hint: str = INPUT_HINT) -> None:
    """Raise DmmError for a network that does not take such inputs (B, ...)."""
    try:
        forward(model, example)
    except Exception as error:  # whatever it is, it is the network's
        if is_out_of_memory(error):
            raise
        sizes = " and ".join(str(list(part.shape[1:])) for part in named(example).values())
        raise DmmError(
            f"{label} does not take inputs of {sizes}",
            evidence=[summary(error)],
            hint=hint if isinstance(example, Examples) else _hint_of_several(model) or hint,
        ) from error


def _hint_of_several(model: nn.Module) -> str:
    """What to do with a network that wants more than images, and does not tell; empty for others."""
    taken = signature(model.forward).parameters.values()
    wanted = [x.name for x in taken if x.default is x.empty and x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)]
    if len(wanted) < 2:
        return ""
    names = ", ".join(map(printable, wanted))
    return f"it takes {names}: let it, or its factory's module, have example_inputs, a dict of a tensor for each"


def _is_narrow(model: nn.Module) -> bool:
    """Whether torch may write where it must not: in the weight gradient of strided 1 x 1 convolutions of few channels.

    Channels last, on the CPU; the fault is oneDNN's (its issue 6035), in torch 2.13 still.
    """
    layers = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    return any(set(x.kernel_size) == {1} and max(x.stride) > 1 and x.in_channels < BLOCK for x in layers)


@torch.no_grad()
def _runs(model: nn.Module, example: Inputs) -> bool:
    try:
        forward(model, each(example, channels_last))
    except Exception:  # what fails either way is told by whoever runs it in earnest
        return False
    return True


def channels_last(value: torch.Tensor) -> torch.Tensor:
    """Images or features (B, C, H, W) in that layout, anything else as it is."""
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def _make_contiguous(_: nn.Module, inputs: tuple[Any, ...], more: dict[str, Any]) -> tuple[Any, Any]:
    return tuple(map(_contiguous, inputs)), {name: _contiguous(value) for name, value in more.items()}


def _contiguous(value: Any) -> Any:
    """A copy: of one channel, channels last is contiguous too by name, but not to convolutions."""
    return value.clone(memory_format=torch.contiguous_format) if isinstance(value, torch.Tensor) else value
