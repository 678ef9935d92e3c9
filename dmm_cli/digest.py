"""SHA-256 of files: in threads of its own, or from the reads of a merge, so that no file is read twice."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .devices import cores
from .errors import DmmError
from .inputs import Source

GLANCE = 1 << 12  # bytes
CHUNK = 1 << 22  # bytes read and hashed at a time: each time a thread waits for Python to let it go on


class _File:
    """How far one file is hashed."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, path.stat().st_size
        self.position = 0
        self.own = self.size  # how far threads of this module hash it; the rest is fed
        self.busy = False
        self.hash = hashlib.sha256()

    @property
    def done(self) -> bool:
        return self.position >= self.size

    def read(self, count: int) -> bytes:
        with open(self.path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), count, self.position)


class Hashes:
    """Hashes of sources in the making.

    Threads hash the files one after the other. Files that ``feed`` is going to give are left to it from then on; what
    never came is read by whoever waits.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = [source for source in sources if not source.is_hashed]
        self._files = {path: _File(path) for source in self._sources for path in source.files}
        self._turn = threading.Condition()
        self._stopped = False
        self._error: Exception | None = None
        count = min(len(self._files), max(cores() - 1, 1))
        every = list(self._files.values())
        self._threads = [threading.Thread(target=self._work, args=(every,), daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def expect(self, path: Path, start: int) -> None:
        """Tell that a file will be given to ``feed``, from byte ``start`` at the latest to its end."""
        with self._turn:
            if path in self._files:
                self._files[path].own = start

    def feed(self, path: Path, position: int, data: memoryview) -> None:
        """Hash bytes of a file when all before them are hashed; until then the thread waits.

        Calls may come from several threads, in the order of the positions.
        """
        file = self._files.get(path)
        if file is None:
            return
        with self._turn:
            self._turn.wait_for(lambda: self._stopped or (file.position >= position and not file.busy))
            fresh = data[file.position - position :]
            if self._stopped or not fresh:
                return
            file.busy = True
        self._hash(file, fresh)

    def wait(self, sources: Collection[Source]) -> None:
        """Wait until these sources know their hashes; to be called when ``feed`` has given what it is going to give.

        Raises:
            DmmError: a file could not be read, or was cut short.
        """
        wanted = [source for source in self._sources if any(source is other for other in sources)]
        files = [self._files[path] for source in wanted for path in source.files]
        with self._turn:
            for file in files:
                file.own = file.size  # what was promised and did not come is read here: nobody else is going to
        self._work(files)
        if self._error:
            raise self._error
        for source in wanted:
            files = {path: self._files[path] for path in source.files}
            if all(file.done for file in files.values()):  # else it was stopped, and whoever asks reads again
                source.know_files({path: file.hash.hexdigest() for path, file in files.items()})

    def stop(self) -> None:
        """End all waiting and all threads."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()

    def _work(self, files: Sequence[_File]) -> None:
        """Hash files as far as threads of this module do, together with others that are at it."""
        try:
            while file := self._next(files):
                data = file.read(min(CHUNK, max(file.own - file.position, 1)))
                if not data:
                    raise DmmError(f"{file.path} was truncated while it was read")
                self._hash(file, data)
        except (OSError, DmmError) as error:  # raised again where it is waited for
            cut = isinstance(error, DmmError)
            self._error = error if cut else DmmError(f"cannot read {error.filename}: {error.strerror}")
            self.stop()

    def _next(self, files: Sequence[_File]) -> _File | None:
        """The next file to hash a piece of, as soon as one is free; None when nothing is left of any."""
        with self._turn:
            while left := [file for file in files if file.position < file.own and not self._stopped]:
                for file in left:
                    if not file.busy:
                        file.busy = True
                        return file
                self._turn.wait()
        return None

    def _hash(self, file: _File, data: bytes | memoryview) -> None:
        file.hash.update(data)
        with self._turn:
            file.position += len(data)
            file.busy = False
            self._turn.notify_all()


def glance(source: Source) -> str:
    """A hash of the headers and of the middle of every tensor: little is read, and hardly any training leaves it."""
    digest = hashlib.sha256(repr(source.config).encode())
    for header in source.headers:
        digest.update(repr((header.tensors, header.metadata)).encode())
        with open(header.path, "rb", buffering=0) as file:
            for info in header.tensors.values():
                size = min(info.nbytes, GLANCE)
                start = header.data_start + info.start + (info.nbytes - size) // 2
                digest.update(os.pread(file.fileno(), size, start))
    return digest.hexdigest()


@contextmanager
def hashing(sources: Sequence[Source]) -> Iterator[Hashes]:
    """Hash sources in threads, which end with the block at the latest."""
    hashes = Hashes(sources)
    try:
        yield hashes
    finally:
        hashes.stop()
