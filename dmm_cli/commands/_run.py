"""What turns errors and signals into messages and exit codes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer

from ..errors import DmmError, Terminated, capped, is_out_of_memory, printable
from ..ranks import process_count

if TYPE_CHECKING:
    from ..savepoint import Savepoint

INTERRUPTED, BROKEN_PIPE, TERMINATED, CRASHED = 130, 141, 143, 70

SMALLER = {  # what takes less memory, by the option that says so
    "--batch": "a smaller --batch, or --batch auto where it is offered",
    "--count": "a smaller --count",
}

EXIT_CODES = "Exit codes: 0 done; 1 a check you asked for failed; 2 could not run; 130 interrupted."


def standard_input() -> TextIO | None:
    """What a pipe gives; None where it is closed, or where several processes have it together."""
    return sys.stdin if process_count() == 1 else None


def epilog(*examples: str) -> str:
    """Help text below the options: examples, then the exit codes."""
    # \b keeps the lines as they are: a wrapped command cannot be pasted
    lines = "\n".join(["\b", "Examples:", *(f"  $ {example}" for example in examples)])
    return f"{lines}\n\n{EXIT_CODES}"


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Give every way to end a block its exit code and no traceback, unless DMM_DEBUG=1."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        drop(sys.stdout)
        raise typer.Exit(BROKEN_PIPE) from None
    except KeyboardInterrupt:
        _tell("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except Terminated:
        raise typer.Exit(TERMINATED) from None
    except DmmError as error:
        _show(error)
        raise typer.Exit(error.exit_code) from None
    except OSError as error:
        drop(sys.stdout)
        _show(DmmError(f"{error.strerror or error}: {error.filename or 'standard output'}"))
        raise typer.Exit(DmmError.exit_code) from None
    except Exception as error:
        if _is_typers_own(error):
            raise
        if is_out_of_memory(error):
            _show(out_of_memory(error, SMALLER))
            raise typer.Exit(DmmError.exit_code) from None
        _crash(error)
        raise typer.Exit(CRASHED) from None


def out_of_memory(error: Exception, options: Collection[str]) -> DmmError:
    """What to tell of a lack of memory, with a way out by those options that a command has."""
    ways = [*(words for option, words in SMALLER.items() if option in options), "a device with more memory"]
    return DmmError("out of memory", evidence=str(error).splitlines()[:1], hint=f"take {', or '.join(ways)}")


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """End a block on SIGTERM as on an exception."""
    previous = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, _terminate)
    except ValueError:  # not the main thread: signals are the caller's business
        previous = None
    try:
        yield
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def resumable(output: Path, **inputs: object) -> Iterator[Savepoint]:
    """The savepoint of a long computation; tells the user who interrupts it how to go on, see ``savepoint``."""
    from ..savepoint import savepoint

    states = None
    try:
        with savepoint(output, **inputs) as states:
            yield states
    finally:
        if states and states.is_kept:
            place = printable(str(states.directory), 2000)
            print(f"what is done is kept: the same command goes on from {place}", file=sys.stderr)


def drop(stream: TextIO) -> None:
    """Let Python's exit flush into nothing what a stream cannot take: its reader is gone, or the disk full."""
    with contextlib.suppress(OSError):  # a test's stream has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_typers_own(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] == "typer" or isinstance(error, (typer.Exit, typer.Abort))


def _terminate(*_: object) -> None:
    raise Terminated


def _show(error: DmmError) -> None:
    evidence = [f"  {printable(line, 2000)}" for line in capped(error.evidence, 11)]
    hint = [f"hint: {printable(error.hint, 2000)}"] if error.hint else []
    _tell(*_traceback(), f"error: {printable(error.what, 2000)}", *evidence, *hint)


def _crash(error: Exception) -> None:
    what = f"error: internal: {type(error).__name__}: {printable(str(error), 500)}"
    hint = "hint: this is a fault of dmm; run again with DMM_DEBUG=1 for the traceback"
    _tell(*_traceback(), what, hint)


def _traceback() -> list[str]:
    return traceback.format_exc().splitlines() if os.environ.get("DMM_DEBUG") == "1" else []


def _tell(*lines: str) -> None:
    """Say why a command ends; where stderr cannot take it, the exit code says it alone."""
    try:
        print(*lines, sep="\n", file=sys.stderr)
    except OSError:
        drop(sys.stderr)
