"""Strict reading and canonical writing of the safetensors header, with the standard library alone.

The format: eight bytes little-endian length, a JSON header of that length, then the tensor bytes.
The reference reader accepts duplicate names and gives no path in its messages; this one does not
and does, so that every fault is found before any tensor is loaded.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from . import strictjson
from .errors import DmmError, capped, printable
from .registry import did_you_mean

MAX_HEADER = 100_000_000  # bytes, the limit of the reference implementation
ITEM_SIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})  # which networks are loaded from, and is not merged
UNOPENED = "dmm never opens pickles"
CONVERSION = "convert it once, on a machine that trusts it: safetensors.torch.save_file(torch.load(...), ...)"

ARRAYS = "save its arrays with safetensors.numpy.save_file"

Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor name to dtype and shape
Fingerprint = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it; ``start`` and ``end`` are offsets into the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS


@dataclass(frozen=True)
class Header:
    """A file's tensors and metadata, and what it looked like when they were read, to notice changes by."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    fingerprint: Fingerprint

    def check_unchanged(self) -> None:
        """Raise DmmError when the file is no longer the one whose header was read."""
        try:
            now = fingerprint(os.stat(self.path))[:-1]
        except OSError:
            now = None
        if now != self.fingerprint[:-1]:  # a new link or mode moves the last one, and is no matter
            raise DmmError(
                f"{self.path} changed while it was being read",
                hint="wait until its writer is done, then run the command again",
            )


def read_header(path: Path) -> Header:
    """Read and check a safetensors header.

    Raises:
        DmmError: the path is missing or not a regular file, or the header breaks the format; the
            message names the file and, where there is one, the tensor.
    """
    descriptor, status = _open_regular(path)
    try:
        head = os.pread(descriptor, 8, 0)
        if len(head) < 8:
            raise _broken(path, "the file is empty" if not head else f"it has only {len(head)} bytes")
        (length,) = struct.unpack("<Q", head)
        if length > min(status.st_size - 8, MAX_HEADER) or length < 2:
            raise _not_safetensors(path, os.pread(descriptor, 512, 0), length, status.st_size)
        text = _read_exactly(descriptor, length, 8)
    except OSError as error:
        raise DmmError(f"cannot read {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)
    record = _parse_json(path, text)
    metadata = _metadata(path, record.pop("__metadata__", {}))
    _require_text(path, [*record, *metadata, *metadata.values()])
    tensors = {name: _tensor(path, name, entry) for name, entry in record.items()}
    _check_coverage(path, tensors, status.st_size - 8 - length)
    return Header(path, tensors, metadata, 8 + length, fingerprint(status))


def file_order(layout: Layout) -> list[str]:
    """The order tensors are written in: wider items first, then by name, so that every tensor is aligned."""
    return sorted(layout, key=lambda name: (-ITEM_SIZE[layout[name][0]], name))


def encode_header(layout: Layout, metadata: Mapping[str, str]) -> bytes:
    """Canonical header bytes; metadata keys are sorted and the JSON is padded with spaces to eight bytes."""
    record: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in file_order(layout):
        dtype, shape = layout[name]
        end = offset + prod(shape) * ITEM_SIZE[dtype]
        record[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def no_such_file(path: Path) -> DmmError:
    """The error that a file is not there, with the name in its directory that is most like it, or a link's target."""
    if path.is_symlink():
        return DmmError(
            f"a link to nothing: {path}",
            evidence=[f"it points to {printable(os.readlink(path))}, which is not there"],
            hint="download or restore what it points to, or name the file itself",
        )
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = did_you_mean(path.name, siblings)
    return DmmError(f"no such file: {path}", hint=f"did you mean {path.parent / near}?" if near else None)


def require_regular(path: Path) -> None:
    """Raise DmmError for a file that is missing, or one that reading might never come to the end of."""
    os.close(_open_regular(path)[0])


def _open_regular(path: Path) -> tuple[int, os.stat_result]:
    try:
        # O_NONBLOCK: opening a FIFO must fail below, not wait for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise no_such_file(path) from None
    except OSError as error:
        raise DmmError(f"cannot read {path}: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise DmmError(f"a directory, not a file: {path}")
        raise DmmError(
            f"not a regular file: {path}",
            evidence=["pipes, devices and sockets cannot be read twice"],
            hint="save it to a file first",
        )
    return descriptor, status


def _read_exactly(descriptor: int, length: int, offset: int) -> bytes:
    chunks = []
    while length > 0:
        chunk = os.pread(descriptor, length, offset)
        if not chunk:
            break
        chunks.append(chunk)
        length, offset = length - len(chunk), offset + len(chunk)
    return b"".join(chunks)


def _broken(path: Path, fact: str, hint: str = "copy or download the file again") -> DmmError:
    return DmmError(f"not a valid safetensors file: {path}", evidence=[fact], hint=hint)


def _not_safetensors(path: Path, start: bytes, length: int, size: int) -> DmmError:
    if start.startswith(b"version https://git-lfs"):
        return _broken(path, "it is a Git LFS pointer, not the file itself", "run: git lfs pull")
    if start.startswith(b"PK\x03\x04") and _first_entry(start).endswith(b".npy"):
        return _broken(path, "it is an .npz archive of numpy", ARRAYS)
    if start.startswith(b"PK\x03\x04") or start[:1] == b"\x80":
        return _broken(path, f"it is a pickle (a torch.save file); {UNOPENED}", CONVERSION)
    if start.startswith(b"GGUF"):
        return _broken(path, "it is a GGUF file", "dmm reads safetensors: take the checkpoint that it was made from")
    if start.lstrip()[:1] == b"<":
        return _broken(path, "it is an HTML or XML page, likely a failed download")
    return _broken(path, f"it announces a header of {length} bytes, the file has {size}: truncated or another format")


def _first_entry(start: bytes) -> bytes:
    """The name of the first file in a zip archive."""
    return start[30 : 30 + int.from_bytes(start[26:28], "little")]


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    if text[:1] != b"{":
        raise _broken(path, "its header does not start with '{'")

    try:
        record = strictjson.parse(text.decode())
    except strictjson.Repeated as error:
        raise _broken(path, f"its header {error}") from None
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not valid JSON: {printable(str(error))}") from None
    return record


def _metadata(path: Path, entry: Any) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise _broken(path, "its __metadata__ is not a map from text to text")
    return entry


def _require_text(path: Path, texts: Iterable[str]) -> None:
    """Refuse half a surrogate pair, which JSON can hold and UTF-8, to write it again, cannot."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _broken(path, f"its header holds what is not Unicode text: {printable(text)}") from None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor(path: Path, name: str, entry: Any) -> TensorInfo:
    shown = printable(name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"tensor {shown} lacks dtype, shape or data_offsets, or has more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise DmmError(
            f"{path}: tensor {shown} has a dtype dmm does not read: {printable(str(dtype))}",
            evidence=[f"known: {', '.join(ITEM_SIZE)}"],
        )
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise _broken(path, f"tensor {shown} has no valid shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _broken(path, f"tensor {shown} has no valid data_offsets")
    if offsets[1] - offsets[0] != prod(shape) * ITEM_SIZE[dtype]:
        raise _broken(path, f"tensor {shown}: shape {shape} of {dtype} does not fit data_offsets {offsets}")
    return TensorInfo(name, dtype, tuple(shape), offsets[0], offsets[1])


def _check_coverage(path: Path, tensors: dict[str, TensorInfo], size: int) -> None:
    position = 0
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):
        if info.start != position:
            kind = "a gap" if info.start > position else "an overlap"
            raise _broken(path, f"{kind} in the data before tensor {printable(info.name)}")
        position = info.end
    if position != size:
        beyond = [printable(info.name) for info in tensors.values() if info.end > size]
        fact = f"its header describes {position} bytes of tensors, the file holds {size}"
        raise DmmError(
            f"not a valid safetensors file: {path}",
            evidence=[fact + (": truncated" if position > size else ""), *capped(beyond, 3)],
            hint="copy or download the file again",
        )


def fingerprint(status: os.stat_result) -> Fingerprint:
    """Of a file: device, inode, size, and the times of its last modification and change in ns."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
