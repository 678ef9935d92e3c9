"""What a network takes of each of its inputs, and the way there from what files hold.

Legend: B examples, F numbers of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .examples import Examples
from .images import InputSpec, PixelSpace


@dataclass(frozen=True)
class JointSpec:
    """The specs of several inputs, in the order of their names."""

    names: tuple[str, ...]
    specs: tuple[InputSpec, ...]

    @property
    def parts(self) -> dict[str, InputSpec]:
        """By name."""
        return dict(zip(self.names, self.specs, strict=True))


Spec = InputSpec | JointSpec


class VectorSpace:
    """Maps values of an input that is no image, (B, ..., F), to what the network takes, and back."""

    def __init__(self, spec: InputSpec, device: torch.device | str = "cpu") -> None:
        self._mean, self._std = (torch.tensor(v, device=device) for v in (spec.mean, spec.std))

    def draw(self, raw: torch.Tensor) -> torch.Tensor:
        """Free parameters to what the network takes: they are that."""
        return raw

    def from_bytes(self, values: torch.Tensor) -> torch.Tensor:
        """Values as files hold them to what the network takes, float32."""
        return (values.float() - self._mean) / self._std

    def to_bytes(self, seen: torch.Tensor) -> torch.Tensor:
        """What the network takes to values as files hold them, float32."""
        return seen * self._std + self._mean


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


Space = PixelSpace | VectorSpace | JointSpace


def space_of(spec: Spec, device: torch.device | str = "cpu") -> Space:
    """The space that a spec describes."""
    if isinstance(spec, JointSpec):
        return JointSpace(spec, device)
    return (PixelSpace if spec.is_image else VectorSpace)(spec, device)
