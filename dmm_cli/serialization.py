"""Frozen dataclasses with a JSON form."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, ClassVar, Self

from .errors import DmmError, printable

SCALARS: dict[Any, Any] = {float: (int, float, type(None)), int: int, str: str, bool: bool}  # null may be NaN


class Record:
    """A frozen dataclass with a JSON form; ``SCHEMA`` names it and its version."""

    SCHEMA: ClassVar[str] = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; NaN and infinity become null."""
        body = {item.name: _plain(getattr(self, item.name)) for item in dataclasses.fields(self)}
        return {"schema": self.SCHEMA, **body} if self.SCHEMA else body

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """The record a JSON object describes.

        Raises:
            DmmError: another schema, or a required field is missing or of another type.
        """
        if not isinstance(record, dict):
            raise DmmError(f"not a {cls.SCHEMA or cls.__name__} record: {_shown(record)}")
        if cls.SCHEMA and record.get("schema") != cls.SCHEMA:
            raise DmmError(f"expected a {cls.SCHEMA} record, got {record.get('schema', 'none')}")
        hints = typing.get_type_hints(cls)
        known = {item.name for item in dataclasses.fields(cls)}
        try:
            return cls(**{name: _typed(hints[name], value) for name, value in record.items() if name in known})
        except TypeError as error:
            raise DmmError(f"incomplete or damaged {cls.SCHEMA or cls.__name__} record: {error}") from None


def dump(record: Record) -> str:
    """The record as indented JSON text."""
    return json.dumps(record.to_json(), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _typed(hint: Any, value: Any) -> Any:
    if isinstance(hint, types.UnionType):
        inner = [option for option in hint.__args__ if option is not type(None)]
        return None if value is None else _typed(inner[0], value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        _require(list, value)
        return tuple(_typed(arguments[0], item) for item in value)
    if origin is dict:
        _require(dict, value)
        return {key: _typed(arguments[1], item) for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_json(value)
    _require(SCALARS.get(hint, object), value)
    return value


def _require(kind: type | tuple[type, ...], value: Any) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"not what belongs there: {_shown(value)}")


def _shown(value: Any) -> str:
    return printable(json.dumps(value), 60)
