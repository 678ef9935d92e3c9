"""The two streams: the result on stdout, everything else on stderr."""

from __future__ import annotations

import codecs
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import TextIO

from ..errors import printable
from ..files import write_files
from ..ranks import speaks_for_all

INTERVAL = 30.0  # seconds between progress lines off a terminal
PATIENCE = 0.5  # seconds
HELD = "dmm.held"  # how letters are written that an encoding lacks

_stdout: ContextVar[TextIO] = ContextVar("stdout")  # where results go while nothing else does


@contextmanager
def results_alone() -> Iterator[None]:
    """Leave stdout to ``emit``: what others print meanwhile, as factories and networks may, goes to stderr."""
    token = _stdout.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout.reset(token)


def status(text: str, *, quiet: bool = False) -> None:
    """One line about what is going on."""
    if not quiet:
        print(printable(text, 2000), file=sys.stderr)


def emit(
    text: str, output: Path | None = None, *, beside: Mapping[Path, bytes] = MappingProxyType({}), force: bool = False
) -> None:
    """The result: to a file when one is named, else to stdout.

    Args:
        beside: other files, which are written with it or not at all.
    """
    text = text if text.endswith("\n") else text + "\n"
    write_files({**beside, **({output: text.encode()} if output else {})}, force=force)
    if output is None:
        _write(text, _stdout.get(sys.stdout))


def _write(text: str, stream: TextIO) -> None:
    """Text whose names of files are not in the stream's encoding as their bytes, other letters it lacks escaped."""
    try:
        stream.write(text)
    except UnicodeEncodeError:
        stream.reconfigure(errors=HELD)
        stream.write(text)


def _held(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error(HELD, _held)


def emit_plan(words: str, *, as_json: bool) -> None:
    """What a dry run tells; of several processes the first does."""
    if speaks_for_all():
        emit(json.dumps({"schema": "dmm.plan/1", "plan": words}) if as_json else printable(words, None))


class Progress:
    """Progress callback for the library.

    On a terminal a line that rewrites itself; else a plain line at the start, every 10 % or 30 s, and at
    the end. A stage that is over within ``PATIENCE`` seconds is not worth a line.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._begun: dict[str, float] = {}
        self._next: dict[str, tuple[float, float]] = {}

    def __call__(self, stage: str, done: int, total: int, **numbers: float) -> None:
        now = time.monotonic()
        begun = self._begun.setdefault(stage, now)
        finished, fraction = done >= total, done / total if total else 1.0
        if not self._quiet and now - begun >= PATIENCE and (finished or self._is_due(stage, fraction, now)):
            step, interval = (0.01, 0.2) if self._live else (0.1, INTERVAL)
            self._next[stage] = (fraction + step, now + interval)
            self._show(f"{stage} {fraction:4.0%}", now - begun, finished, numbers)
        if finished:
            self._begun.pop(stage)
            self._next.pop(stage, None)

    def _is_due(self, stage: str, fraction: float, now: float) -> bool:
        share, due = self._next.get(stage, (0.0, 0.0))
        return fraction >= share or now >= due

    def _show(self, text: str, seconds: float, finished: bool, numbers: dict[str, float]) -> None:
        text = printable(text, None)
        text += "".join(f"  {name} {value:.4g}" for name, value in numbers.items()) + f"  {seconds:.0f} s"
        if self._live:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be rewritten
            sys.stderr.write("\r\x1b[2K" + text[:width] + ("\n" if finished else ""))
            sys.stderr.flush()
        else:
            print(text, file=sys.stderr)
