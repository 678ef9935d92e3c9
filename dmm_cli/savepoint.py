"""What a long computation has reached, kept beside its output: a killed one goes on, to the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from . import __version__
from .checkpoint import Checkpoint, save_arrays
from .errors import DmmError
from .files import LONGEST, TEMPORARY
from .header import read_header
from .inputs import resolve_source

SUFFIX = ".partial"


class State(NamedTuple):
    """What one part of a computation has reached: arrays, and whatever JSON holds."""

    arrays: dict[str, np.ndarray]
    notes: dict[str, Any]


class Savepoint:
    """Named states in a directory, or in memory where there is none.

    Args:
        key: of the inputs and the parameters; a state that was saved under another one is not found.
    """

    def __init__(self, directory: Path | None = None, key: str = "") -> None:
        self.directory, self._key = directory, key
        self._held: dict[str, State] = {}

    def load(self, name: str) -> State | None:
        """The state last saved under a name, None where there is none that counts."""
        if self.directory is None:
            return self._held.get(name)
        path = self._path(name)
        with suppress(DmmError):  # damaged, or not ours: as good as not there
            if path.is_file():
                source = resolve_source(str(path))
                if source.metadata.get("dmm.key") == self._key:
                    with Checkpoint(source) as file:
                        arrays = {tensor: file.array(tensor) for tensor in source.tensors}
                    notes = source.metadata.get("dmm.notes", "")
                    if source.metadata.get("dmm.digest") == _digest(arrays, notes):
                        return State(arrays, json.loads(notes))
        return None

    def save(self, name: str, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any] | None = None) -> None:
        """Keep a state in place of an earlier one of that name."""
        if self.directory is None:
            self._held[name] = State(dict(arrays), dict(notes or {}))
            return
        self.directory.mkdir(exist_ok=True)
        told = json.dumps(notes or {}, sort_keys=True)
        metadata = {"dmm.key": self._key, "dmm.notes": told, "dmm.digest": _digest(arrays, told)}
        save_arrays(self._path(name), arrays, metadata, force=True)

    @property
    def is_kept(self) -> bool:
        """Whether the directory holds a state that the same computation would go on from."""
        for path in self.directory.glob("*.safetensors") if self.directory else ():
            with suppress(DmmError):  # damaged, or removed meanwhile
                if read_header(path).metadata.get("dmm.key") == self._key:
                    return True
        return False

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"


def _digest(arrays: Mapping[str, np.ndarray], notes: str) -> str:
    """SHA-256 of a state: whoever goes on from bits that a disk has lost would never know."""
    digest = hashlib.sha256(notes.encode())
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]))
    return digest.hexdigest()


@contextmanager
def savepoint(output: Path, **inputs: Any) -> Iterator[Savepoint]:
    """The states of a computation that will write ``output``, in ``<output>.partial``.

    The directory stays when the block is interrupted, fails, or finds no room on the disk; it is removed when the
    block ends well, or in an error that would only come again.

    Args:
        inputs: everything, as JSON, that the bytes of the output depend on.
    """
    versions = [__version__, torch.__version__]
    key = hashlib.sha256(json.dumps([versions, inputs], sort_keys=True, default=str).encode()).hexdigest()
    name = output.name + SUFFIX
    if len(os.fsencode(name)) > LONGEST:
        name = hashlib.sha256(os.fsencode(output.name)).hexdigest() + SUFFIX
    directory = output.with_name(name)
    if os.path.lexists(directory) and not directory.is_dir():
        raise DmmError(f"{directory} is in the way of what is kept to go on from", hint="move it, or name another -o")
    try:
        yield Savepoint(directory, key)
    except BaseException as error:
        if isinstance(error, DmmError) and error.__cause__ is None:
            _clear(directory)
        with suppress(OSError):
            directory.rmdir()  # nothing was saved in it
        raise
    _clear(directory)


def _clear(directory: Path) -> None:
    """Remove the states, and the directory unless somebody keeps files of their own in it."""
    with suppress(FileNotFoundError):  # other processes of torchrun clear it at the same time
        for path in map(directory.joinpath, os.listdir(directory)):
            if path.match(TEMPORARY) or (path.match("*.safetensors") and _is_state(path)):
                path.unlink(missing_ok=True)
    with suppress(OSError):
        directory.rmdir()


def _is_state(path: Path) -> bool:
    try:
        return "dmm.key" in read_header(path).metadata
    except DmmError:  # damaged
        return True
