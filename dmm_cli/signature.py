"""Which inputs a model has, as its ``example_inputs`` tell: names, shapes, and what each is.

A model that has none takes images alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from .errors import DmmError, blamed_on, capped, is_out_of_memory, listed, printable, summary
from .examples import IMAGES, Examples, forward, hooked, on_input
from .images import InputSpec, channel_counts
from .spaces import JointSpec, Spec, TokenSpec

ATTRIBUTE = "example_inputs"
TAKEN = {"targets", "teacher_id", "logits", "confidence", "bn_loss", "labels", "classes"}  # by other arrays of a file


def with_example_inputs(model: nn.Module, factory: str) -> nn.Module:
    """A model with the example inputs of its factory's module, unless it has its own or there are none."""
    given = getattr(importlib.import_module(factory.partition(":")[0]), ATTRIBUTE, None)
    if given is not None and not hasattr(model, ATTRIBUTE):
        setattr(model, ATTRIBUTE, given)
    return model


def examples_of(model: nn.Module) -> Examples | None:
    """The example inputs in the order of their names; None where a model takes images alone.

    Raises:
        DmmError: the example inputs are not tensors of numbers or tokens by name, or there is an error in them.
    """
    with blamed_on(f"{ATTRIBUTE} of {type(model).__name__}"):
        given = getattr(model, ATTRIBUTE, None)
    with blamed_on(f"{ATTRIBUTE} of {printable(str(getattr(given, '__module__', type(model).__name__)))}"):
        found = given() if callable(given) else given
    if found is None:
        return None
    if not isinstance(found, Mapping) or not found:
        raise DmmError(
            f"{ATTRIBUTE} of {type(model).__name__} are not tensors by name, but {type(found).__name__}",
            hint='let it be a dict, or return one: {"image": torch.zeros(2, 3, 32, 32), "vector": torch.zeros(2, 16)}',
        )
    problems = [problem for name, value in found.items() if (problem := _problem(name, value))]
    if problems:
        raise DmmError(f"cannot use {ATTRIBUTE} of {type(model).__name__}", evidence=capped(problems))
    return Examples({name: found[name].clone() for name in sorted(found)})  # one tensor may stand for several


def _problem(name: Any, value: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier() or name in TAKEN:
        return f"{printable(str(name))!r} cannot be the name of an input"
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return f"{name} is not a tensor with the examples in its first dimension and values in others"
    if name == IMAGES and value.dim() != 4:
        return f"{name} are {list(value.shape)}, not [N, C, H, W]"
    if not value.is_floating_point() and value.dtype not in (torch.int64, torch.int32):
        return f"{name} is {value.dtype}, neither numbers nor tokens (int64)"
    return ""


@torch.no_grad()
def vocabularies(model: nn.Module, examples: Examples) -> dict[str, int]:
    """How many tokens there are of every integer input, as the embedding layer tells that looks it up.

    Raises:
        DmmError: no embedding layer does.
    """
    tokens = {name: part for name, part in examples.parts.items() if not part.is_floating_point()}
    found: dict[str, int] = {}

    def look(layer: nn.Embedding, given: torch.Tensor) -> None:
        for name, part in tokens.items():
            if given.data_ptr() == part.data_ptr():
                found[name] = min(layer.num_embeddings, found.get(name, layer.num_embeddings))

    layers = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    try:
        with hooked(on_input(layer, partial(look, layer)) for layer in layers):
            if tokens and layers:
                forward(model, examples)
    except Exception as error:  # whatever it is, it is the network's
        if is_out_of_memory(error):
            raise
        raise DmmError(f"{type(model).__name__} does not take its {ATTRIBUTE}", evidence=[summary(error)]) from error
    if found.keys() != tokens.keys():
        raise DmmError(
            f"no nn.Embedding of {type(model).__name__} looks up {', '.join(sorted(tokens.keys() - found.keys()))}",
            hint="dmm inverts tokens through their embedding; give the network other integers as floats",
        )
    return found


def joint_spec(
    label: str,
    model: nn.Module,
    examples: Examples,
    known: Mapping[str, Any],
    mean: Iterable[float],
    std: Iterable[float],
) -> Spec:
    """The specs of all inputs; of ``IMAGES`` alone, that of images.

    Args:
        label: what the model is called in messages.
        known: mean and std by name, as ``dmm.input`` has them. mean, std: of all images, if not empty.

    Raises:
        DmmError: mean and std do not fit the number of channels, or there are no images that they are of, or no
            embedding looks up an integer input.
    """
    words = vocabularies(model, examples)
    mean, std = tuple(mean), tuple(std)
    if (mean or std) and all(part.dim() != 4 for part in examples.parts.values()):
        numbers = [name for name in examples.parts if name not in words]
        stated = f'state those of numbers in dmm.input: {{"{numbers[0]}": {{"mean": [0.5], "std": [2]}}}}'
        raise DmmError(
            f"--mean and --std are of images, and {label} takes none: {listed(examples.parts)}",
            hint=stated if numbers else None,
        )
    specs = []
    for name, part in examples.parts.items():
        size = tuple(part.shape[1:])
        said = {"mean": mean, "std": std} if len(size) == 3 else {}
        values = {"mean": (0.0,), "std": (1.0,)} | dict(known.get(name) or {})
        values |= {key: value for key, value in said.items() if value}
        numbers = name not in words
        specs.append(
            single_spec(label, size, values["mean"], values["std"]) if numbers else TokenSpec(size, words[name])
        )
    names = tuple(examples.parts)
    return specs[0] if names == (IMAGES,) else JointSpec(names, tuple(specs))


def single_spec(label: str, size: Iterable[int], mean: Iterable[float], std: Iterable[float]) -> InputSpec:
    """The spec of one input; one mean or deviation holds for all channels. See ``InputSpec``.

    Args:
        label: what the model is called in messages.

    Raises:
        DmmError: mean and std do not fit the number of channels.
    """
    size, mean, std = tuple(size), _floats(mean), _floats(std)
    counts, told = {len(mean), len(std)}, f"numbers of {list(size)}"
    if len(size) == 3:
        told = f"{size[0]} channels"
        mean, std = (values * size[0] if len(values) == 1 else values for values in (mean, std))
    if not counts <= channel_counts(size) or len(counts - {1}) > 1:
        raise DmmError(
            f"{label}: {len(mean)} means and {len(std)} deviations for {told}",
            hint="give one value per channel, or one for all, with --mean and --std, or in dmm.input those of numbers",
        )
    return InputSpec(size, mean, std)


def _floats(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
