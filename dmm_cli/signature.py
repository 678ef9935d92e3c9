"""Which inputs a model has, as its ``example_inputs`` tell: names, shapes, and what each is.

A model that has none takes images alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .errors import DmmError, capped, printable
from .images import InputSpec
from .spaces import JointSpec

ATTRIBUTE = "example_inputs"
TAKEN = {"targets", "teacher_id", "logits", "confidence", "bn_loss", "labels", "classes"}  # by other arrays of a file
Shapes = dict[str, tuple[int, ...]]


def with_example_inputs(model: nn.Module, factory: str) -> nn.Module:
    """A model with the example inputs of its factory's module, unless it has its own or there are none."""
    given = getattr(importlib.import_module(factory.partition(":")[0]), ATTRIBUTE, None)
    if given is not None and not hasattr(model, ATTRIBUTE):
        setattr(model, ATTRIBUTE, given)
    return model


def example_shapes(model: nn.Module) -> Shapes:
    """Shapes of one example of every input, in the order of their names; none where a model takes images alone.

    Raises:
        DmmError: the example inputs are not float tensors by name.
    """
    given = getattr(model, ATTRIBUTE, None)
    examples = given() if callable(given) else given
    if examples is None:
        return {}
    if not isinstance(examples, Mapping) or not examples:
        raise DmmError(
            f"{ATTRIBUTE} of {type(model).__name__} are not tensors by name, but {type(examples).__name__}",
            hint='let it be a dict, or return one: {"image": torch.zeros(2, 3, 32, 32), "vector": torch.zeros(2, 16)}',
        )
    problems = [problem for name, value in examples.items() if (problem := _problem(name, value))]
    if problems:
        raise DmmError(f"cannot use {ATTRIBUTE} of {type(model).__name__}", evidence=capped(problems))
    return {name: tuple(examples[name].shape[1:]) for name in sorted(examples)}


def _problem(name: Any, value: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier() or name in TAKEN:
        return f"{printable(str(name))!r} cannot be the name of an input"
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return f"{name} is not a tensor with the examples in its first dimension and values in others"
    if not value.is_floating_point():
        return f"{name} is {value.dtype}: dmm inverts floating-point inputs alone, so give the model embeddings instead"
    return ""


def joint_spec(shapes: Shapes, known: Mapping[str, Any], mean: Iterable[float], std: Iterable[float]) -> JointSpec:
    """The specs of several inputs.

    Args:
        known: mean and std by name, as ``dmm.input`` has them. mean, std: of all images, if not empty.

    Raises:
        DmmError: mean and std do not fit the number of channels.
    """
    specs = []
    for name, size in shapes.items():
        own = known.get(name) or {}
        said = {"mean": mean, "std": std} if len(size) == 3 else {}
        values = {"mean": (0.0,), "std": (1.0,)} | own | {key: value for key, value in said.items() if value}
        specs.append(single_spec(size, values["mean"], values["std"]))
    return JointSpec(tuple(shapes), tuple(specs))


def single_spec(size: Iterable[int], mean: Iterable[float], std: Iterable[float]) -> InputSpec:
    """The spec of one input; one mean or deviation holds for all channels.

    Raises:
        DmmError: mean and std do not fit the number of channels.
    """
    size = tuple(size)
    channels = size[0] if len(size) == 3 else size[-1]
    mean, std = _per_channel(mean, channels), _per_channel(std, channels)
    if len(mean) != channels or len(std) != channels:
        raise DmmError(
            f"{len(mean)} means and {len(std)} deviations for {channels} channels",
            hint="give one value per channel, or one for all, with --mean and --std",
        )
    return InputSpec(size, mean, std)


def _per_channel(values: Iterable[float], channels: int) -> tuple[float, ...]:
    values = tuple(float(value) for value in values)
    return values * channels if len(values) == 1 else values
