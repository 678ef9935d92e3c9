"""The errors a user sees, and how untrusted text is shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class DmmError(Exception):
    """The work could not be done; exit code 2.

    Args:
        what: the problem in the user's own names.
        evidence: facts that show it, one a line.
        hint: the command or flag that fixes it.
    """

    exit_code = 2

    def __init__(self, what: str, *, evidence: Sequence[str] = (), hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.evidence = tuple(evidence)
        self.hint = hint


class EmptyPath(DmmError):
    """A path of no letters, which Python would take for the current directory.

    Args:
        what: it is the path of, in the user's own names.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is empty", hint="name a file; a shell variable that is not set may stand there")


class CheckFailed(DmmError):
    """The work was done, but a check the user asked for failed; exit code 1."""

    exit_code = 1


class Terminated(BaseException):
    """SIGTERM; no ``SystemExit``, which other people's code raises too."""


@contextmanager
def blamed_on(what: str) -> Iterator[None]:
    """Tell what code that is not ours raises, be it to end Python, as a DmmError that ``what`` fails.

    What we raise ourselves passes, and so does a lack of memory.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, DmmError) or is_out_of_memory(error):
            raise
        raise DmmError(f"{what} fails: {summary(error)}", hint="DMM_DEBUG=1 shows its traceback") from error


def summary(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, on one line."""
    first = (str(error).splitlines() or [""])[0]
    return printable(f"{type(error).__name__}: {first}" if first else type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Python's and numpy's own, torch's on a GPU, and torch's on the CPU, which has no type."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


@contextmanager
def told_by(fact: str) -> Iterator[None]:
    """Add a fact to the evidence of what is refused inside."""
    try:
        yield
    except DmmError as error:
        error.evidence = (*error.evidence, fact)
        raise


def capped(items: Iterable[str], limit: int = 10) -> list[str]:
    """The first ``limit`` items, then a line that counts the rest."""
    items = list(items)
    if len(items) <= limit:
        return items
    return [*items[:limit], f"... and {len(items) - limit} more"]


def listed(names: Iterable[str], limit: int = 10) -> str:
    """Names from files in one line, safe for a terminal; beyond ``limit`` they are counted."""
    return ", ".join(capped(map(printable, names), limit))


def printable(text: str, limit: int | None = 200) -> str:
    """Untrusted text made safe for a terminal: control, format and bidi characters escaped, length capped."""
    safe = "".join(map(_escape, text[:limit]))
    return safe if limit is None or len(text) <= limit else safe[:limit] + "..."


def _escape(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        code = ord(character)
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    return character
