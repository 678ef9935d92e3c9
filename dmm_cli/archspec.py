"""Architectures as text, ``resnet18,num_classes=10``: what ``--arch`` and ``dmm.arch`` say. Loads no array library."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from .errors import DmmError, printable

LOADS = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
}  # of timm's arguments
SHAPED = ("num_classes", "in_chans")  # arguments that tensors tell of


def parse_arch(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``resnet18,num_classes=10,layers=(1,1,1,1)`` into the name and its arguments.

    Raises:
        DmmError: an argument is not ``name=literal``, or has timm load weights, or the name points to a hub or a
            directory.
    """
    name, *arguments = _split(text)
    if name.startswith(("hf-hub:", "local-dir:", "hf_hub:")):
        raise DmmError(f"dmm does not fetch architectures: {printable(name)}", hint="use the plain timm name")
    values = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise DmmError(f"cannot read {printable(argument)!r} in {printable(text)}", hint="write name=value")
        values[key.strip()] = _literal(value.strip())
    loads = sorted(LOADS & values.keys()) if ":" not in name else []
    if loads:
        raise DmmError(f"an architecture has no weights to load: {loads[0]} in {printable(text)}", hint="leave it out")
    return name.strip(), values


def name_of(text: str) -> str:
    """The timm name or the factory that ``parse_arch`` finds, whatever its arguments."""
    return _split(text)[0].strip()


def stated_classes(text: str) -> int | None:
    """How many classes a timm name's arguments say there are; None where they do not, or it is a factory's."""
    name, arguments = parse_arch(text)
    count = arguments.get("num_classes")
    return count if isinstance(count, int) and ":" not in name else None


def network_of(text: str) -> str:
    """An architecture but for what does not tell networks of equal tensors apart, alike however it is written.

    That are the numbers of classes and channels, what is dropped in training, and the tag of timm's weights.
    """
    try:
        name, arguments = parse_arch(text)
    except DmmError:
        return text
    told = {key: arguments[key] for key in sorted(arguments) if key not in SHAPED and not key.startswith("drop")}
    return format_arch(name if ":" in name else name.partition(".")[0], told)


def _split(text: str) -> list[str]:
    """The parts between commas that stand in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote or character in "'\"":
            quote = "" if character == quote else quote or character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # a list as a key, or a deep nest
        return text


def format_arch(name: str, arguments: Mapping[str, Any]) -> str:
    """An architecture as ``--arch`` and ``dmm.arch`` take it, ``resnet18,num_classes=10``."""
    return ",".join([name, *(f"{key}={str(value).replace(' ', '')}" for key, value in arguments.items())])
