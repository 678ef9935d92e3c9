"""What a network is given: a tensor of images, or one tensor for each of its named inputs, handled as one.

Legend: B examples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from .errors import DmmError, blamed_on, printable

IMAGES = "images"  # what files call the input of a network that has one
ORIGIN = "dmm_origin"  # attribute of a network: what messages call it, its file
RULED_OUT = 30.0  # below the largest logit of a sample: a probability that float32 does not add to one


@dataclass(frozen=True)
class Examples:
    """Inputs by name, each (B, ...). Has of a tensor what batches need: rows, a device, parts.

    Attributes:
        parts: tensors, or arrays where they come from a file.
    """

    parts: dict[str, Any]

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, rows: Any) -> Examples:
        return each(self, lambda part: part[rows])

    @property
    def device(self) -> torch.device:
        """Of all inputs."""
        return next(iter(self.parts.values())).device

    def to(self, *where: Any, **options: Any) -> Examples:
        """All inputs on another device."""
        return each(self, lambda part: part.to(*where, **options))

    def clone(self) -> Examples:
        """A copy with memory of its own."""
        return each(self, torch.clone)

    def copy_(self, other: Examples) -> None:
        """Take the values of others of the same shapes."""
        for name, part in self.parts.items():
            part.copy_(other.parts[name])

    def split(self, sizes: int | Sequence[int]) -> Iterator[Examples]:
        """Consecutive batches, as a tensor is split."""
        pieces = [part.split(sizes) for part in self.parts.values()]
        return (Examples(dict(zip(self.parts, piece, strict=True))) for piece in zip(*pieces, strict=True))


Inputs = torch.Tensor | Examples


def forward(model: nn.Module, inputs: Inputs) -> Any:
    """Call a model: several inputs by their names, images alone by position.

    Raises:
        Exception: whatever the model raises; where it would end Python, a RuntimeError.
    """
    try:
        return model(**inputs.parts) if isinstance(inputs, Examples) else model(inputs)
    except SystemExit as error:
        raise RuntimeError(f"SystemExit: {error}") from error


def run(model: nn.Module, inputs: Inputs) -> Any:
    """The same of a model that is known to take such inputs: what it raises is told as its own.

    Raises:
        DmmError: it fails, but for lack of memory.
    """
    with blamed_on(f"forward of {called(model)}"):
        return forward(model, inputs)


def called(model: nn.Module) -> str:
    """What messages call a model."""
    return getattr(model, ORIGIN, type(model).__name__)


def answer(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Logits (B, K) of a model, which gives them alone or, among other things, under the name ``logits``.

    Raises:
        DmmError: it fails, or gives something else, as networks that are no classifiers do.
    """
    given = run(model, inputs)
    found = given.get("logits") if isinstance(given, Mapping) else getattr(given, "logits", given)
    if not isinstance(found, torch.Tensor):
        raise DmmError(
            f"{called(model)} answers with {printable(type(given).__name__)}, not with logits",
            hint="let its forward return logits (N, K), or a dict that has them under the name logits",
        )
    if found.layout != torch.strided:
        raise DmmError(
            f"{called(model)} answers with a sparse tensor ({found.layout}), not with logits (N, K)",
            hint="let its forward return them dense: logits.to_dense()",
        )
    if not found.is_floating_point():  # of others there is no softmax, or no gradient
        kind = str(found.dtype).removeprefix("torch.")
        raise DmmError(
            f"{called(model)} answers with {kind}, not with logits (N, K)",
            hint="let its forward return logits as it computes them, in float32 or another float",
        )
    if found.dim() != 2 or len(found) != len(inputs) or found.shape[1] < 2:
        raise DmmError(
            f"{called(model)} answers {len(inputs)} samples with {list(found.shape)}, not with logits (N, K)",
            hint="dmm is for classifiers: a logit for each of two classes or more, and of a yes or no for both",
        )
    return found


def in_trees(given: Any) -> Any:
    """What a model gives, in the lists and dicts that torch knows: of an object it does not know, the logits."""
    return tree_map(lambda leaf: getattr(leaf, "logits", leaf), given)


def require_finite(model: nn.Module, logits: torch.Tensor) -> None:
    """Raise DmmError where the largest of a model's logits (B, K) is NaN or infinite, and so names no class.

    Minus infinity among others is no fault: networks rule classes out by it.
    """
    lost = int((~logits.amax(1).isfinite()).sum())
    if lost:
        raise DmmError(
            f"{called(model)} answers with NaN or infinity on {lost} of {len(logits)} samples",
            hint="its weights are finite: look for an overflow or a division by zero in its forward",
        )


def floored(logits: torch.Tensor) -> torch.Tensor:
    """Logits (B, K), those of minus infinity ``RULED_OUT`` below the largest of their row: numbers to reckon with."""
    return torch.where(logits.isneginf(), logits.detach().amax(1, keepdim=True) - RULED_OUT, logits)


def percentage(hits: Any) -> float:
    """How many of ``hits`` (N,), bool, are true, in per cent; rounded once, so that 58 of 100 are 58."""
    return 100.0 * int(hits.sum()) / len(hits)


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """While these hooks are on a model; they are taken off again, whatever happens."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def on_input(layer: nn.Module, look: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """Show what a layer is called with, by position or by name, in every pass: the first of several."""

    def show(_: nn.Module, given: tuple[Any, ...], by_name: dict[str, Any]) -> None:
        look(given[0] if given else next(iter(by_name.values())))

    return layer.register_forward_pre_hook(show, with_kwargs=True)


def named(value: Any) -> dict[str, Any]:
    """Inputs, or what is known of them, by name; where there is one it is called ``IMAGES``."""
    return getattr(value, "parts", {IMAGES: value})


def joined(parts: Mapping[str, Any]) -> Any:
    """The inverse of ``named``, for tensors and arrays."""
    return parts[IMAGES] if parts.keys() == {IMAGES} else Examples(dict(parts))


def each(inputs: Any, function: Callable[[Any], Any]) -> Any:
    """A function of every input apart."""
    return joined({name: function(part) for name, part in named(inputs).items()})


def cat(batches: Sequence[Inputs]) -> Inputs:
    """Batches one after the other."""
    return joined({name: torch.cat([named(batch)[name] for batch in batches]) for name in named(batches[0])})
