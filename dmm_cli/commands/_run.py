"""The one wrapper that turns errors and signals into messages and exit codes."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer

from ..errors import DmmError, capped, printable
from ..ranks import process_count

if TYPE_CHECKING:
    from ..savepoint import Savepoint

INTERRUPTED, BROKEN_PIPE, TERMINATED, CRASHED = 130, 141, 143, 70

SMALLER = "take a smaller --batch, or --batch auto where it is offered, a smaller --count, or a device with more memory"

EXIT_CODES = "Exit codes: 0 done; 1 a check you asked for failed; 2 could not run; 130 interrupted."


def standard_input() -> TextIO | None:
    """What a pipe gives; None where it is closed, or where several processes have it together."""
    return sys.stdin if process_count() == 1 else None


def epilog(*examples: str) -> str:
    """Help text below the options: examples, then the exit codes."""
    # \b keeps the lines as they are: a wrapped command cannot be pasted
    lines = "\n".join(["\b", "Examples:", *(f"  $ {example}" for example in examples)])
    return f"{lines}\n\n{EXIT_CODES}"


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Run a command so that every way to end has its exit code and no traceback, unless DMM_DEBUG=1."""

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        previous = signal.getsignal(signal.SIGTERM)
        try:
            signal.signal(signal.SIGTERM, _terminate)
        except ValueError:  # not the main thread: signals are the caller's business
            previous = None
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            _drop_stdout()
            raise typer.Exit(BROKEN_PIPE) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except DmmError as error:
            _show(error)
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            _drop_stdout()
            _show(DmmError(f"{error.strerror or error}: {error.filename or 'standard output'}"))
            raise typer.Exit(DmmError.exit_code) from None
        except Exception as error:
            if _is_typers_own(error):
                raise
            if _is_out_of_memory(error):
                _show(DmmError("out of memory", evidence=str(error).splitlines()[:1], hint=SMALLER))
                raise typer.Exit(DmmError.exit_code) from None
            _crash(error)
            raise typer.Exit(CRASHED) from None
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)

    return run


@contextlib.contextmanager
def resumable(output: Path, **inputs: object) -> Iterator[Savepoint]:
    """The savepoint of a long computation; tells the user who interrupts it how to go on, see ``savepoint``."""
    from ..savepoint import savepoint

    place = None
    try:
        with savepoint(output, **inputs) as states:
            place = states.directory
            yield states
    finally:
        if place and place.exists():
            print(f"what is done is kept: the same command goes on from {printable(str(place), 2000)}", file=sys.stderr)


def _drop_stdout() -> None:
    """Give Python's exit something to flush into, where stdout cannot take it: its reader is gone, or the disk full."""
    with contextlib.suppress(OSError):  # a test's stdout has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_typers_own(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] == "typer" or isinstance(error, (typer.Exit, typer.Abort))


def _is_out_of_memory(error: Exception) -> bool:
    """Python's and numpy's own, torch's on a GPU, and torch's on the CPU, which has no type."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def _terminate(*_: object) -> None:
    raise SystemExit(TERMINATED)


def _show(error: DmmError) -> None:
    if os.environ.get("DMM_DEBUG") == "1":
        traceback.print_exc()
    print(f"error: {printable(error.what, 2000)}", file=sys.stderr)
    for line in capped(error.evidence, 11):
        print(f"  {printable(line, 2000)}", file=sys.stderr)
    if error.hint:
        print(f"hint: {printable(error.hint, 2000)}", file=sys.stderr)


def _crash(error: Exception) -> None:
    if os.environ.get("DMM_DEBUG") == "1":
        traceback.print_exc()
    kind = type(error).__name__
    print(f"error: internal: {kind}: {printable(str(error), 500)}", file=sys.stderr)
    print("hint: this is a fault of dmm; run again with DMM_DEBUG=1 for the traceback", file=sys.stderr)
