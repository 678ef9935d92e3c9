"""A table of interchangeable pieces, loaded when they are used."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from .errors import DmmError, printable


def did_you_mean(word: str, options: Iterable[str]) -> str | None:
    """The option closest to a mistyped word, or None when nothing is near."""
    near = difflib.get_close_matches(word, list(options), n=1, cutoff=0.54)  # of fp16 and float16 it is 6 / 11
    return near[0] if near else None


def mistyped(what: str, word: str, options: Collection[str], *, listed: str | None = "known") -> DmmError:
    """The error about a word that is none of the options: it lists them, and suggests the nearest.

    Args:
        what: the problem, naming the word.
        listed: what to call the options; None leaves the list out.
    """
    near = did_you_mean(word, options)
    return DmmError(
        what,
        evidence=[f"{listed}: {', '.join(options) or 'none'}"] if listed else [],
        hint=f"did you mean {near}?" if near else None,
    )


class Registry:
    """Names, one-line summaries and lazy targets of one kind of piece.

    Args:
        kind: what the pieces are, in the singular ("merge method"); used in messages.
        entries: name to ("package.module:attribute", summary, trait, ...). Traits are facts about a piece
            that are needed before it is worth importing.
    """

    def __init__(self, kind: str, entries: Mapping[str, tuple[str, ...]]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """All names, in table order."""
        return list(self._entries)

    def summary(self, name: str) -> str:
        """One line on what the piece does."""
        return self._entries[self.check(name)][1]

    def traits(self, name: str) -> tuple[str, ...]:
        """What the table states about the piece beside its summary."""
        return self._entries[self.check(name)][2:]

    def check(self, name: str) -> str:
        """The name itself.

        Raises:
            DmmError: it is not in the table; the message suggests the nearest name.
        """
        if name in self._entries:
            return name
        raise mistyped(f"unknown {self.kind}: {printable(name)}", name, self._entries)

    def load(self, name: str) -> Any:
        """Import and return the piece.

        Raises:
            DmmError: the name is not in the table.
        """
        module, _, attribute = self._entries[self.check(name)][0].partition(":")
        return getattr(importlib.import_module(module), attribute)
