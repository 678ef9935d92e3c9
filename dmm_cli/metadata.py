"""What a checkpoint tells of itself in its metadata: its classes, how often it saw them, its input.

Loads no array library. What is damaged is refused, with the names of the file and of the entry.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from .errors import DmmError, printable
from .inputs import Source

MOST = 10**12  # values of an input: more than a memory holds, few enough to count a batch of them in 64 bits
NORMALISATION = ("mean", "std")
PARTS = {  # of an input
    "size": "a JSON list of positive integers like [3, 32, 32]",
    "mean": "a JSON list of numbers like [0.5]",
    "std": "a JSON list of numbers above zero like [0.25]",
}


def class_names(source: Source) -> tuple[str, ...] | None:
    """The classes that ``dmm.classes`` names, None where there is none.

    Raises:
        DmmError: it is not a list of different names.
    """
    names = _stated(source, "dmm.classes", _is_list_of_names, "a JSON list of different names")
    return None if names is None else tuple(map(class_name, names))


def class_name(value: object) -> str:
    """A class's name in one spelling: an accent may be a letter of its own, as macOS has it in names of folders."""
    return unicodedata.normalize("NFC", str(value))


def class_counts(source: Source) -> list[float] | None:
    """Training samples per class by ``dmm.class_counts``, None where there is none.

    Raises:
        DmmError: it is not a list of such numbers.
    """
    return _stated(source, "dmm.class_counts", _is_list_of_counts, "a JSON list of numbers, none negative")


def require_names_of_all(source: Source, classes: int) -> None:
    """Raise DmmError where ``dmm.classes`` does not name as many classes as a network has."""
    names = class_names(source)
    if names and len(names) != classes:
        configured = source.is_configured("dmm.classes")
        where = source.origin_of("dmm.classes") if configured else "dmm.classes in its metadata"
        raise DmmError(
            f"{source.path} has {classes} classes, but {where} names {len(names)}",
            hint="let it name every class, or leave it out",
        )


def without_statistics(label: str) -> DmmError:
    """The error that a checkpoint stores no statistics to invert."""
    return DmmError(
        f"{label} has 0 BatchNorm layers, so it stores no statistics to invert",
        hint="if it has other normalisation layers, whoever has its data can record some: "
        f"dmm record {label} --data DATA -o stats.safetensors; then add --statistics stats.safetensors",
    )


def require_class_mix(counts: Sequence[float], classes: int | None, label: str) -> None:
    """Raise DmmError for counts that are no mix of classes.

    Args:
        classes: how many there are, None where that is not known yet. label: whose counts they are.
    """
    if len(counts) != (classes or len(counts)) or min(counts) < 0 or sum(counts) <= 0:
        raise DmmError(
            f"class counts of {label} do not describe a class mix",
            evidence=[f"{len(counts)} counts{f' for {classes} classes' if classes else ''}: {counts}"],
            hint="give one count of zero or more per class, at least one above zero",
        )


def stated_input(source: Source) -> dict[str, Any]:
    """``size``, ``mean`` and ``std``, as far as ``dmm.input`` tells them, or the last two by the name of each input.

    Raises:
        DmmError: it tells something else.
    """
    if source.is_configured("dmm.input"):
        _require_parts(source)
    words = 'a JSON object like {"size": [3, 32, 32], "mean": [0.5], "std": [0.25]}, or one such by name'
    return _stated(source, "dmm.input", is_input, words) or {}


def _require_parts(source: Source) -> None:
    """Raise DmmError for the first key of a ``config.json`` that tells of no input."""
    for part, value in json.loads(source.metadata["dmm.input"]).items():
        if not isinstance(value, list) or not is_input({part: value}):
            raise DmmError(
                f"{source.origin_of('dmm.input', part)} is not {PARTS[part]}: {printable(json.dumps(value))}",
                hint="correct it there, or leave it out",
            )


def is_by_name(inputs: dict[str, Any]) -> bool:
    """Whether what ``stated_input`` gives tells of each input by its name, and not of one."""
    return all(isinstance(part, dict) for part in inputs.values())


def _stated(source: Source, key: str, fits: Callable[[Any], bool], words: str) -> Any:
    text = source.metadata.get(key)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not fits(value):
        raise DmmError(f"{source.path}: {key} is not {words}: {printable(text)}")
    return value


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and len(set(map(class_name, value))) == len(value)


def _is_list_of_counts(value: Any) -> bool:
    return _is_list_of_numbers(value) and min(value) >= 0


def is_input(value: Any) -> bool:
    """Whether a value of JSON tells of an input, or of several by name, what ``dmm.input`` may tell."""
    if not isinstance(value, dict):
        return False
    if value and is_by_name(value):
        return all(map(_is_normalisation, value.values()))
    size = value.get("size", [1])
    return _is_normalisation(value) and _is_list_of_numbers(size) and is_input_size(size)


def is_input_size(size: Sequence[float]) -> bool:
    """Whether numbers are the lengths of the axes of an input that can be held."""
    return all(type(length) is int and length > 0 for length in size) and prod(size) <= MOST


def _is_normalisation(value: dict[str, Any]) -> bool:
    return (
        value.keys() <= {"size", *NORMALISATION}
        and all(_is_list_of_numbers(value[key]) for key in NORMALISATION if key in value)
        and min(value.get("std", [1])) > 0
    )


def _is_list_of_numbers(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(number) in (int, float) and abs(number) <= sys.float_info.max for number in value)  # NaN is not
    )
