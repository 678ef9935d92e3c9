"""Lazy tensors from checked files, and the canonical, atomic writer.

Reads go through ``pread``: a memory map dies with SIGBUS when the file shrinks underneath it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from .errors import DmmError, printable
from .files import atomic_write, check_output
from .header import ITEM_SIZE, encode_header
from .inputs import Source

Layout = Mapping[str, tuple[str, tuple[int, ...]]]

NUMPY = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16, "F16": np.float16,
    "I32": np.int32, "U32": np.uint32, "F32": np.float32, "I64": np.int64, "U64": np.uint64, "F64": np.float64,
}  # fmt: skip
TAGS = {np.dtype(dtype): tag for tag, dtype in NUMPY.items()}


class Checkpoint:
    """Random access to the tensors of one source; safe to use from several threads.

    Use as a context manager. On leaving, the files are checked to be the ones that were opened.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> Checkpoint:
        for path in self.source.files:
            self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        if kind is None:
            self.source.check_unchanged()

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Bytes of elements [start, stop) of a tensor, uint8.

        Raises:
            DmmError: the file is shorter than its header says.
        """
        info, header = self.source.tensors[name], self.source.header_of(name)
        size = ITEM_SIZE[info.dtype]
        stop = info.numel if stop is None else stop
        buffer = np.empty((stop - start) * size, dtype=np.uint8)
        view, offset = memoryview(buffer), header.data_start + info.start + start * size
        while view:
            count = os.preadv(self._descriptors[header.path], [view], offset)
            if count == 0:
                raise DmmError(f"{header.path} was truncated while tensor {printable(name)} was read")
            view, offset = view[count:], offset + count
        return buffer

    def floats(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements [start, stop) of a floating tensor, flat; float64 for F64, else float32."""
        info = self.source.tensors[name]
        values = self.raw(name, start, stop)
        if info.dtype == "BF16":
            return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if info.dtype not in ("F16", "F32", "F64"):
            raise DmmError(f"{info.dtype} tensor {printable(name)} of {self.source.path} is not a float tensor")
        native = values.view(NUMPY[info.dtype])
        return native.astype(np.float32) if info.dtype == "F16" else native

    def array(self, name: str) -> np.ndarray:
        """A whole tensor in its own dtype and shape; BF16, which numpy lacks, as float32."""
        info = self.source.tensors[name]
        if info.dtype == "BF16":
            return self.floats(name).reshape(info.shape)
        if info.dtype not in NUMPY:
            raise DmmError(f"{self.source.path}: dmm does not compute with {info.dtype} ({printable(name)})")
        return self.raw(name).view(NUMPY[info.dtype]).reshape(info.shape)


def encode_floats(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float values as the bytes of F16, BF16, F32 or F64, rounded to nearest, ties to even; uint8.

    Raises:
        DmmError: a finite value does not fit the dtype.
    """
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
        return rounded.astype(np.uint16).view(np.uint8)
    with np.errstate(over="ignore"):
        encoded = np.ascontiguousarray(values, dtype=NUMPY[dtype])
    if dtype == "F16" and not np.isfinite(encoded).all():
        raise DmmError("values beyond the range of float16", hint="store the inputs as bfloat16 or float32")
    return encoded.reshape(-1).view(np.uint8)


def save_checkpoint(
    path: Path,
    layout: Layout,
    chunks: Callable[[str], Iterable[np.ndarray | bytes]],
    metadata: Mapping[str, str],
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
) -> None:
    """Stream a checkpoint to disk; it appears whole or not at all, and equal content gives equal bytes.

    Args:
        layout: tensor name to (dtype tag, shape).
        chunks: gives the bytes of one tensor, in pieces; called once per tensor, in file order.
        inputs: files the output must not replace.

    Raises:
        DmmError: the output is refused or cannot be written.
    """
    check_output(path, inputs=inputs, force=force)
    header, order = encode_header(layout, metadata)
    with atomic_write(path) as file:
        file.write(header)
        for name in order:
            for chunk in chunks(name):
                file.write(memoryview(chunk))


def save_arrays(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
) -> None:
    """Write arrays held in memory, see ``save_checkpoint``."""
    layout = {name: (TAGS[array.dtype], array.shape) for name, array in arrays.items()}

    def chunks(name: str) -> list[np.ndarray]:
        return [np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)]

    save_checkpoint(path, layout, chunks, metadata, inputs=inputs, force=force)


def save_like(
    path: Path,
    source: Source,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
) -> None:
    """Write arrays under the names, shapes and dtypes of another checkpoint, see ``save_checkpoint``."""
    layout = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}

    def chunks(name: str) -> list[np.ndarray]:
        info = source.tensors[name]
        if info.is_float:
            return [encode_floats(arrays[name].reshape(-1), info.dtype)]
        return [np.ascontiguousarray(arrays[name], dtype=NUMPY[info.dtype]).reshape(-1).view(np.uint8)]

    save_checkpoint(path, layout, chunks, metadata, inputs=inputs, force=force)


def require_finite(source: Source, name: str, values: np.ndarray) -> None:
    """Raise DmmError when a block of a tensor holds NaN or infinity."""
    # one reduction instead of a mask: the sum of finite float32 in float64 cannot overflow
    if not np.isfinite(np.sum(values, dtype=np.float64)):
        bad = int(np.count_nonzero(~np.isfinite(values)))
        if bad:
            raise DmmError(
                f"NaN or infinity in tensor {printable(name)} of {source.path}",
                evidence=[f"{bad} of the {values.size} values read so far"],
                hint="this checkpoint diverged or was damaged; leave it out",
            )
