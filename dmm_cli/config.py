"""Defaults from ``dmm.toml``: one table per command, one key per option."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from .errors import DmmError, printable
from .inputs import read_text
from .registry import mistyped

DEFAULT = Path("dmm.toml")


def load_config(
    path: Path | None, options: Mapping[str, Mapping[str, Callable[[Any], None]]]
) -> dict[str, dict[str, Any]]:
    """Read defaults per command.

    Args:
        path: the file to read; None reads ``dmm.toml`` in the working directory when it is there.
        options: by command and by name, with underscores, what raises ValueError for a value that an option cannot
            have.

    Raises:
        DmmError: the file is missing or not TOML, or names an unknown command or option, or an option cannot have a
            value.
    """
    if path is None:
        if not DEFAULT.is_file():
            return {}
        path = DEFAULT
    import tomllib  # only where there is a file: help must start fast

    try:
        tables = tomllib.loads(read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:  # the latter: of what is nested a thousand deep
        raise DmmError(f"{path} is not valid TOML: {error}") from None
    defaults: dict[str, dict[str, Any]] = {}
    for command, table in tables.items():
        _require_known(path, "command", command, options)
        if not isinstance(table, dict):
            raise DmmError(f"{path}: {printable(command)} must be a table", hint=f"write [{printable(command)}]")
        settings: dict[str, Any] = {}
        for key, value in table.items():
            name = key.replace("-", "_")
            if name in settings:
                raise DmmError(f"{path}: {name} of {command} is there twice, with - and _", hint="leave one out")
            settings[name] = value
        for key, value in settings.items():
            _require_known(path, f"option of {command}", key, options[command])
            try:
                options[command][key](value)
            except ValueError as error:
                raise DmmError(f"{path}: {key} of {command} cannot be {printable(repr(value))}: {error}") from None
        defaults[command] = settings
    return defaults


def _require_known(path: Path, kind: str, word: str, known: Collection[str]) -> None:
    if word not in known:
        raise mistyped(f"{path}: unknown {kind}: {printable(word)}", word, known, listed=None)
