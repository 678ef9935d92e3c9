"""Lazy tensors from checked files, and the canonical, atomic writer.

Reads go through ``pread``: a memory map dies with SIGBUS when the file shrinks underneath it.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .errors import DmmError, printable
from .files import Outputs, atomic_write, check_output, write_behind
from .header import FLOATS, ITEM_SIZE, Layout, TensorInfo, encode_header, file_order
from .inputs import Source

Chunks = Callable[[str], Iterable[np.ndarray | bytes]]
OnRead = Callable[[Path, int, memoryview], None]

NUMPY = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16, "F16": np.float16,
    "I32": np.int32, "U32": np.uint32, "F32": np.float32, "I64": np.int64, "U64": np.uint64, "F64": np.float64,
}  # fmt: skip
WRITABLE = FLOATS | frozenset(NUMPY)  # F8 is read alone
RANGES = {  # the least magnitude that is rounded to infinity (bfloat16: by way of float32), the name, what holds more
    "F16": ((2 - 2**-11) * 2.0**15, "float16", "bfloat16 or float32"),
    "BF16": ((2 - 2**-8 - 2**-24) * 2.0**127, "bfloat16", "float32 or float64"),
    "F32": ((2 - 2**-24) * 2.0**127, "float32", "float64"),
    "F64": (math.inf, "float64", ""),
}
COPIED = 1 << 20  # elements copied at once
TAGS = {np.dtype(dtype): tag for tag, dtype in NUMPY.items()}


class Checkpoint:
    """Random access to the tensors of one source; safe to use from several threads.

    Use as a context manager. On leaving, the files are checked to be the ones whose headers were read: whoever writes
    what was read opens the output first, so that it takes its place after that.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._descriptors: dict[Path, int] = {}
        self._on_read: OnRead | None = None

    def __enter__(self) -> Checkpoint:
        try:
            for path in self.source.files:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._close()
            raise DmmError(f"cannot read {error.filename}: {error.strerror}") from error
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._close()
        if kind is None:
            self.source.check_unchanged()

    def _close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def telling(self, on_read: OnRead) -> Checkpoint:
        """This checkpoint, with every read told: the file, the position in it, and the bytes."""
        view = copy.copy(self)
        view._on_read = on_read
        return view

    def is_ordered(self, names: Sequence[str]) -> bool:
        """Whether this is one file that holds these tensors and no others, in this order."""
        tensors = self.source.tensors
        return len(self.source.headers) == 1 and list(names) == sorted(tensors, key=lambda name: tensors[name].start)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Bytes of elements [start, stop) of a tensor, uint8.

        Raises:
            DmmError: the file is shorter than its header says.
        """
        info = self.source.tensors[name]
        stop = info.numel if stop is None else stop
        buffer = np.empty((stop - start) * ITEM_SIZE[info.dtype], dtype=np.uint8)
        self._fill(info, start, buffer)
        return buffer

    def floats(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements [start, stop) of a floating tensor, flat; float64 for F64, else float32."""
        info = self.source.tensors[name]
        stop = info.numel if stop is None else stop
        values = np.empty(stop - start, np.float64 if info.dtype == "F64" else np.float32)
        self.read_floats(name, start, values)
        return values

    def read_floats(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill ``out``, float32 or float64 (n,), with the elements from ``start`` on of a floating tensor."""
        info = self.source.tensors[name]
        own = NUMPY.get(info.dtype)  # of BF16 numpy has none, and takes None for float64 when it compares
        if own is not None and own == out.dtype:
            self._fill(info, start, out.view(np.uint8))
        elif info.dtype == "BF16":
            bits = self.raw(name, start, start + len(out)).view(np.uint16)
            wide = out if out.dtype == np.float32 else np.empty(len(out), np.float32)
            wide.view(np.uint32)[:] = bits
            np.left_shift(wide.view(np.uint32), 16, out=wide.view(np.uint32))
            if wide is not out:
                out[:] = wide
        elif info.dtype in FLOATS:
            out[:] = self.raw(name, start, start + len(out)).view(NUMPY[info.dtype])
        else:
            raise DmmError(f"{info.dtype} tensor {printable(name)} of {self.source.path} is not a float tensor")

    def _fill(self, info: TensorInfo, start: int, buffer: np.ndarray) -> None:
        header = self.source.header_of(info.name)
        first = header.data_start + info.start + start * ITEM_SIZE[info.dtype]
        view, offset = memoryview(buffer), first
        while view:
            try:
                count = os.preadv(self._descriptors[header.path], [view], offset)
            except OSError as error:  # here, where it is known which file it is of
                raise DmmError(f"cannot read {header.path}: {error.strerror}") from error
            if count == 0:
                raise DmmError(f"{header.path} was truncated while tensor {printable(info.name)} was read")
            view, offset = view[count:], offset + count
        if self._on_read:
            self._on_read(header.path, first, memoryview(buffer))

    def array(self, name: str) -> np.ndarray:
        """A whole tensor in its own dtype and shape; BF16, which numpy lacks, as float32.

        Raises:
            DmmError: the file is shorter than its header says, or numpy has no such dtype or shape.
        """
        info = self.source.tensors[name]
        if info.dtype != "BF16" and info.dtype not in NUMPY:
            raise DmmError(f"{self.source.path}: dmm does not compute with {info.dtype} ({printable(name)})")
        flat = self.floats(name) if info.dtype == "BF16" else self.raw(name).view(NUMPY[info.dtype])
        try:
            return flat.reshape(info.shape)
        except ValueError as error:  # more axes than numpy has, or, where another is empty, one without end
            what = f"{self.source.path}: no array has the shape of {printable(name)}"
            raise DmmError(what, evidence=[printable(str(error))]) from None


def encode_floats(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """The values (n,) of a tensor as the bytes of F16, BF16, F32 or F64, rounded to nearest, ties to even; uint8.

    Raises:
        DmmError: a value is NaN or infinite, or would be in that dtype.
    """
    _require_range(values, dtype, name)
    if dtype != "BF16":
        return np.ascontiguousarray(values, dtype=NUMPY[dtype]).reshape(-1).view(np.uint8)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16).view(np.uint8)


def _require_range(values: np.ndarray, dtype: str, name: str) -> None:
    limit, told, wider = RANGES[dtype]
    with np.errstate(over="ignore", invalid="ignore"):
        if float(np.dot(values, values)) < limit**2:  # as a rule, and without a copy: no value is larger than the norm
            return
    largest = float(np.abs(values).max(initial=0.0))
    if largest < limit:
        return
    if not np.isfinite(largest):
        raise DmmError(f"tensor {printable(name)} would hold NaN or infinity")
    raise DmmError(f"tensor {printable(name)} has values beyond the range of {told}", hint=f"store them as {wider}")


def write_checkpoint(file: BinaryIO, layout: Layout, chunks: Chunks, metadata: Mapping[str, str]) -> None:
    """Stream a checkpoint to an open file; equal content gives equal bytes.

    Args:
        layout: tensor name to (dtype tag, shape).
        chunks: gives the bytes of one tensor, in pieces; called once per tensor, in ``file_order``.
    """
    with write_behind(file) as write:
        write(encode_header(layout, metadata))
        for name in file_order(layout):
            for chunk in chunks(name):
                write(memoryview(chunk))


def replace_metadata(file: BinaryIO, layout: Layout, old: Mapping[str, str], new: Mapping[str, str]) -> None:
    """Write other metadata of the same length over those of a file that ``write_checkpoint`` wrote.

    Raises:
        ValueError: they do not have the same length.
    """
    header = encode_header(layout, new)
    if len(header) != len(encode_header(layout, old)):
        raise ValueError("the new metadata do not fit in the place of the old")
    file.seek(0)
    file.write(header)


def save_checkpoint(
    path: Path,
    layout: Layout,
    chunks: Chunks,
    metadata: Mapping[str, str],
    *,
    reading: Checkpoint | None = None,
    inputs: Iterable[Path] = (),
    force: bool = False,
    outputs: Outputs | None = None,
) -> None:
    """Write a checkpoint, see ``write_checkpoint``; it appears whole or not at all.

    Args:
        reading: what the chunks are read from, to be opened for it.
        inputs: files the output must not replace.
        outputs: others that it takes its place with.

    Raises:
        DmmError: the output is refused or cannot be written, or what is read changes meanwhile.
    """
    check_output(path, inputs=inputs, force=force)
    with atomic_write(path, force=force, outputs=outputs) as file, reading or nullcontext():
        write_checkpoint(file, layout, chunks, metadata)


def save_arrays(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
    outputs: Outputs | None = None,
) -> None:
    """Write arrays held in memory, see ``save_checkpoint``."""
    layout = {name: (TAGS[array.dtype], array.shape) for name, array in arrays.items()}

    def chunks(name: str) -> list[np.ndarray]:
        return [np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)]

    save_checkpoint(path, layout, chunks, metadata, inputs=inputs, force=force, outputs=outputs)


def save_like(
    path: Path,
    source: Source,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
    outputs: Outputs | None = None,
) -> None:
    """Write another checkpoint with some of its tensors replaced, in its dtypes, see ``save_checkpoint``."""
    layout = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
    file = Checkpoint(source)

    def chunks(name: str) -> Iterator[np.ndarray]:
        info = source.tensors[name]
        if name not in arrays:
            for start in range(0, info.numel, COPIED):
                yield file.raw(name, start, min(start + COPIED, info.numel))
        elif info.is_float:
            yield encode_floats(arrays[name].reshape(-1), info.dtype, name)
        else:
            yield np.ascontiguousarray(arrays[name], dtype=NUMPY[info.dtype]).reshape(-1).view(np.uint8)

    save_checkpoint(path, layout, chunks, metadata, reading=file, inputs=inputs, force=force, outputs=outputs)


def require_finite(source: Source, name: str, values: np.ndarray) -> float:
    """The sum of squares of a block (n,) of a tensor.

    Raises:
        DmmError: the block holds NaN or infinity.
    """
    squares = squared_length(values)  # one read of the block; NaN and infinity go through the sum
    if not np.isfinite(squares):
        bad = int(np.count_nonzero(~np.isfinite(values)))
        if bad:
            raise DmmError(
                f"NaN or infinity in tensor {printable(name)} of {source.path}",
                evidence=[f"{bad} of the {values.size} values read so far"],
                hint="this checkpoint diverged or was damaged; leave it out",
            )
    return squares


def squared_length(values: np.ndarray) -> float:
    """The sum of squares of a block (n,), in float64 where it is too large for the block's dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = float(np.dot(values, values))
        return squares if np.isfinite(squares) else float(np.dot(wide := values.astype(np.float64), wide))


def require_variances(source: Source, name: str, values: np.ndarray) -> None:
    """Check a block (n,) of running variances.

    Raises:
        DmmError: one is negative.
    """
    if values.size and values.min() < 0:
        raise DmmError(
            f"negative running variance in {printable(name)} of {source.path}",
            hint="this checkpoint was damaged, or merged as if statistics were weights; leave it out",
        )
