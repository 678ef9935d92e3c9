"""JSON as its standard has it: no name twice in an object, and no number that is none."""

from __future__ import annotations

import json
from typing import Any

from .errors import printable


class Repeated(ValueError):
    """An object holds a name twice; of readers that take one of the two each may take another."""


def parse(text: str) -> Any:
    """The value of a text.

    Raises:
        Repeated: see there. ValueError: it is not JSON. RecursionError: of what is nested a thousand deep.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(names) < 2000 else ["a name"]
        raise Repeated(f"holds {', '.join(map(printable, twice[:3]))} twice")
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
