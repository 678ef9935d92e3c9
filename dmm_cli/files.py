"""Outputs that appear whole or not at all."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import DmmError, printable

STRIDE = 32 << 20  # bytes handed to the disk at a time: enough to keep it busy, little enough to begin early
LONGEST = 255  # bytes of a file name
TEMPORARY = ".dmm-*.tmp"  # names of what is not whole yet
Buffer = bytes | memoryview


def check_output(path: Path, *, inputs: Iterable[Path] = (), force: bool = False) -> None:
    """Refuse an output that cannot or must not be written.

    Raises:
        DmmError: the path is one of the inputs, is a directory or a device, exists without ``force``, or lies in
            a directory that does not exist or cannot be written to.
    """
    refuse_inputs(path, inputs)
    if path.is_dir():
        raise DmmError(f"the output is a directory: {path}", hint="name a file in it")
    if path.exists() and not path.is_file():
        raise DmmError(
            f"the output is not a regular file: {path}",
            hint="name a file; what is told where -o may be left out goes to standard output then",
        )
    if os.path.lexists(path) and not force:
        raise _taken(path) from FileExistsError()  # a cause that may go: what was computed until then is kept
    above = next(filter(os.path.lexists, path.parents))
    if not above.is_dir():
        raise DmmError(f"not a directory: {above}", hint="name a place in one")
    if not path.parent.is_dir():
        raise DmmError(f"no such directory: {path.parent}", hint=f"mkdir -p {shlex.quote(str(path.parent))}")
    require_writable(path.parent)


def _taken(path: Path) -> DmmError:
    return DmmError(f"the output exists: {path}", hint="replace it with --force, or name another")


def require_writable(directory: Path) -> None:
    """Raise DmmError where no file can be made in a directory; to be called before the work, not after it."""
    if not os.access(directory, os.W_OK | os.X_OK):
        raise DmmError(f"cannot write to the directory {directory}", hint="name another, or change its mode")


def refuse_dangling(directory: Path) -> None:
    """Raise DmmError where a directory is to be made whose name a link to nothing has."""
    if directory.is_symlink() and not directory.exists():
        raise DmmError(
            f"the output is a link to nothing: {directory}",
            evidence=[f"it points to {printable(os.readlink(directory))}, which is not there"],
            hint="make the directory that it points to, or name another with -o",
        )


def refuse_inputs(path: Path, inputs: Iterable[Path]) -> None:
    """Raise DmmError when a path to write to is one of the inputs, by whatever name, or one that is not there yet."""
    for source in inputs:
        there = path.exists() and source.exists()
        if os.path.samefile(path, source) if there else os.path.realpath(path) == os.path.realpath(source):
            what = "is" if there else "would be read in place of"
            raise DmmError(f"the output {what} one of the inputs: {path}", hint="name another file")


class Outputs:
    """Files that take their places together, see ``together``."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Path, Path, bool]] = []  # temporary file, place, force
        self._first: list[Callable[[], None]] = []
        self._last: list[Callable[[], None]] = []
        self._new: list[tuple[Path, os.stat_result]] = []  # places that were free, and the files that go there

    def before(self, action: Callable[[], None]) -> None:
        """Something to do when all files are complete, and none is in its place yet."""
        self._first.append(action)

    def after(self, action: Callable[[], None]) -> None:
        """Something to do when all are in their places; where it fails, those that were free are free again."""
        self._last.append(action)

    def add(self, temporary: Path, path: Path, force: bool) -> None:
        """A complete file, and where it goes; see ``atomic_write``."""
        self._waiting.append((temporary, path, force))

    def place(self) -> None:
        """Give every file its place."""
        for action in self._first:
            action()
        for temporary, path, force in self._waiting:
            if not os.path.lexists(path):
                self._new.append((path, temporary.stat()))
            with _told(path):
                _place(temporary, path, force)
        for action in self._last:
            action()

    def undo(self) -> None:
        """Free the places that were free, unless the file there is another's."""
        for path, own in self._new:
            with suppress(OSError):
                if os.path.samestat(own, path.lstat()):
                    path.unlink()

    def clear(self) -> None:
        """Remove temporary files."""
        for temporary, *_rest in self._waiting:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def together() -> Iterator[Outputs]:
    """Outputs that take their places one after the other at the end of the block, or, if it fails, not at all.

    All of them have been written and synced by then. Where one place is refused, places that were free stay so.
    """
    outputs = Outputs()
    try:
        yield outputs
        outputs.place()
    except BaseException:
        outputs.undo()
        raise
    finally:
        outputs.clear()


@contextmanager
def atomic_write(path: Path, *, force: bool = False, outputs: Outputs | None = None) -> Iterator[BinaryIO]:
    """A binary file that takes its place at ``path`` when the block ends without an exception.

    The bytes go to a temporary file in the same directory, which is synced and renamed, and the
    directory is synced. On any exception, KeyboardInterrupt and SystemExit included, the temporary
    file is removed and what was at ``path`` stays.

    Args:
        outputs: others that it takes its place with, when their block ends; not yet then.

    Raises:
        DmmError: the file system refused the write, or there is something at ``path`` by then and no ``force``;
            the message names the output.
    """
    temporary = path.parent / TEMPORARY.replace("*", os.urandom(8).hex())
    with _told(path):
        try:  # from before the file is there: an interrupt may come as soon as it is
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            outputs.add(temporary, path, force) if outputs else _place(temporary, path, force)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the file system refuses, as an error that names the output."""
    try:
        yield
    except FileExistsError as error:
        raise _taken(path) from error
    except OSError as error:
        raise DmmError(f"cannot write {path}: {error.strerror or error}") from error


def _place(temporary: Path, path: Path, force: bool) -> None:
    """Give a complete file the name ``path``, and have the disk keep that."""
    os.replace(temporary, path) if force else _claim(path, temporary)
    _sync_directory(path.parent)


def _claim(path: Path, temporary: Path) -> None:
    """Give a file the name ``path``, unless that is taken: of several processes that write one output one is first."""
    try:
        os.link(temporary, path)
    except OSError:  # it is taken, or this file system has no links: there an empty file takes it first
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.replace(temporary, path)
    else:
        temporary.unlink()


def remove(path: Path) -> None:
    """Remove a file, if it is there, before anything else happens in its directory.

    Raises:
        DmmError: the file system refused.
    """
    try:
        path.unlink(missing_ok=True)
        _sync_directory(path.parent)
    except OSError as error:
        raise DmmError(f"cannot remove {path}: {error.strerror or error}") from error


@contextmanager
def write_behind(file: BinaryIO) -> Iterator[Callable[[Buffer], None]]:
    """A function that writes, while a thread has the disk store what was written before: the last sync is short.

    An error of the disk is raised by a later write, or at the end of the block.
    """
    store = getattr(os, "fdatasync", os.fsync)  # which macOS lacks
    stored: Future | None = None
    waiting = 0

    def write(data: Buffer) -> None:
        nonlocal stored, waiting
        waiting += file.write(data)
        if waiting >= STRIDE and (stored is None or stored.done()):
            if stored:
                stored.result()
            file.flush()
            stored, waiting = pool.submit(store, file.fileno()), 0

    with ThreadPoolExecutor(1) as pool:
        yield write
        if stored:
            stored.result()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_files(contents: Mapping[Path, bytes], *, force: bool = False) -> None:
    """Check the outputs and write them atomically; none takes its place before the disk had room for all.

    Raises:
        DmmError: see ``check_output`` and ``atomic_write``.
    """
    for path in contents:
        check_output(path, force=force)
    with together() as outputs:
        for path, content in contents.items():
            with atomic_write(path, force=force, outputs=outputs) as file:
                file.write(content)


def write_bytes(path: Path, content: bytes, *, force: bool = False) -> None:
    """Write one file, see ``write_files``."""
    write_files({path: content}, force=force)


def write_text(path: Path, text: str, *, force: bool = False) -> None:
    """Write text as UTF-8, see ``write_files``."""
    write_files({path: text.encode()}, force=force)
