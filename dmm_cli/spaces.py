"""What a network takes of each of its inputs, and the way there from what files hold.

Legend: B examples, F numbers of a vector, V tokens of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .examples import Examples, Inputs, joined, named
from .images import InputSpec, PixelSpace, channel_counts
from .metadata import is_input


@dataclass(frozen=True)
class TokenSpec:
    """Tokens, integers below ``vocabulary``, in the shape ``size``; the network looks them up in an embedding."""

    size: tuple[int, ...]
    vocabulary: int

    is_image = False
    stored = "int64"

    @property
    def free(self) -> tuple[int, ...]:
        """Shape of the parameters that draw one example: a logit for every token there might be."""
        return (*self.size, self.vocabulary)


@dataclass(frozen=True)
class JointSpec:
    """The specs of several inputs, in the order of their names."""

    names: tuple[str, ...]
    specs: tuple[InputSpec | TokenSpec, ...]

    @property
    def parts(self) -> dict[str, InputSpec | TokenSpec]:
        """By name."""
        return dict(zip(self.names, self.specs, strict=True))


Spec = InputSpec | TokenSpec | JointSpec


def recorded(spec: Spec) -> dict[str, Any]:
    """A spec as files keep it, in JSON: several inputs by name."""
    if isinstance(spec, JointSpec):
        return {name: asdict(part) for name, part in spec.parts.items()}
    return asdict(spec)


def parsed(record: dict[str, Any]) -> Spec:
    """The inverse of ``recorded``.

    Raises:
        ValueError: it tells of no input, or mean and std do not fit it.
        KeyError, TypeError, AttributeError: it is damaged.
    """
    if isinstance(record.get("vocabulary"), int) or isinstance(record.get("size"), list):
        return _single(record)
    if not record:
        raise ValueError("no input")
    return JointSpec(tuple(record), tuple(map(_single, record.values())))


def _single(record: dict[str, Any]) -> InputSpec | TokenSpec:
    if isinstance(record.get("vocabulary"), int):
        return TokenSpec(tuple(record["size"]), record["vocabulary"])
    size, mean, std = (tuple(record[part]) for part in ("size", "mean", "std"))
    if not is_input({part: record[part] for part in ("size", "mean", "std")}):
        raise ValueError("size, mean and std are of no input")
    if not {len(mean), len(std)} <= channel_counts(size):
        raise ValueError("mean and std are of another number of channels than size")
    return InputSpec(size, mean, std)


def in_words(spec: Spec) -> str:
    """What a spec says, for messages."""
    if isinstance(spec, JointSpec):
        return "; ".join(f"{name}: {in_words(part)}" for name, part in spec.parts.items())
    if isinstance(spec, TokenSpec):
        return f"size {spec.size}, {spec.vocabulary} tokens"
    return f"size {spec.size}, mean {spec.mean}, std {spec.std}"


def example(spec: Spec, device: torch.device | str = "cpu") -> Inputs:
    """Two examples of nothing but zeros, as a network takes them, (2, ...)."""
    zeros = {}
    for name, part in named(spec).items():
        dtype = torch.int64 if isinstance(part, TokenSpec) else torch.float32
        zeros[name] = torch.zeros(2, *part.size, dtype=dtype, device=device)
    return joined(zeros)


def noise(spec: Spec, count: int, stream: torch.Generator) -> Inputs:
    """Free parameters of all inputs, standard normal numbers."""
    return joined({name: torch.randn(count, *part.free, generator=stream) for name, part in named(spec).items()})


def each_image(inputs: Inputs, spec: Spec, function: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    """A function of every input of pixels (B, C, H, W) apart; tokens that are drawn may have as many dimensions."""
    specs = named(spec)
    return joined({name: function(part) if specs[name].is_image else part for name, part in named(inputs).items()})


def pixels_of(inputs: Inputs, spec: Spec) -> Inputs:
    """The inputs of pixels (B, C, H, W), without the others."""
    specs = named(spec)
    return joined({name: part for name, part in named(inputs).items() if specs[name].is_image})


class VectorSpace:
    """Maps values of an input that is no image, (B, ...), to what the network takes, and back."""

    def __init__(self, spec: InputSpec, device: torch.device | str = "cpu") -> None:
        self._mean, self._std = (_along(torch.tensor(v, device=device), spec.size) for v in (spec.mean, spec.std))

    def draw(self, raw: torch.Tensor) -> torch.Tensor:
        """Free parameters to what the network takes: they are that."""
        return raw

    def from_bytes(self, values: torch.Tensor) -> torch.Tensor:
        """Values as files hold them to what the network takes, float32."""
        return (values.float() - self._mean) / self._std

    def to_bytes(self, seen: torch.Tensor) -> torch.Tensor:
        """What the network takes to values as files hold them, float32."""
        return seen * self._std + self._mean


def _along(values: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """One value, (1,), those of channels that come last, (F,), or of channels that come first, as (C, 1, ...)."""
    return values.view(-1, *[1] * (len(size) - 1)) if len(values) == size[0] else values


class TokenSpace:
    """Maps tokens (B, ...) to what the network takes, and back; while they are drawn, weights of all, (B, ..., V)."""

    def draw(self, raw: torch.Tensor) -> torch.Tensor:
        """Logits of all tokens to weights, by which an embedding mixes its rows (``synthesis.soft``).

        All weight is on the likeliest token, with the gradient of the softmax (straight-through, Bengio et al., 2013):
        statistics that mixtures match are not those of the tokens that are left in the end.
        """
        soft = raw.softmax(-1)
        hard = F.one_hot(soft.argmax(-1), soft.shape[-1])  # (B, ..., V)
        return hard + (soft - soft.detach())

    def from_bytes(self, values: torch.Tensor) -> torch.Tensor:
        """Tokens as files hold them."""
        return values.long()

    def to_bytes(self, seen: torch.Tensor) -> torch.Tensor:
        """The token of most weight."""
        return seen.argmax(-1)


class JointSpace:
    """The spaces of several inputs, as one."""

    def __init__(self, spec: JointSpec, device: torch.device | str = "cpu") -> None:
        self._parts = {name: space_of(part, device) for name, part in spec.parts.items()}

    def draw(self, raw: Examples) -> Examples:
        """Free parameters to what the network takes."""
        return Examples({name: space.draw(raw.parts[name]) for name, space in self._parts.items()})

    def from_bytes(self, values: Examples) -> Examples:
        """What files hold to what the network takes."""
        return Examples({name: space.from_bytes(values.parts[name]) for name, space in self._parts.items()})

    def to_bytes(self, seen: Examples) -> Examples:
        """What the network takes to what files hold."""
        return Examples({name: space.to_bytes(seen.parts[name]) for name, space in self._parts.items()})


Space = PixelSpace | VectorSpace | TokenSpace | JointSpace


def space_of(spec: Spec, device: torch.device | str = "cpu") -> Space:
    """The space that a spec describes."""
    if isinstance(spec, JointSpec):
        return JointSpace(spec, device)
    if isinstance(spec, TokenSpec):
        return TokenSpace()
    return (PixelSpace if spec.is_image else VectorSpace)(spec, device)
