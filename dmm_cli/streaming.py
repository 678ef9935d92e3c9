"""Several checkpoints read side by side, block by block, by threads.

Legend: N checkpoints, n elements of a block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from .checkpoint import Checkpoint, require_finite
from .header import TensorInfo

SMALLEST = 1e-24  # squared norm of a block: what 65536 float32 products lose to underflow is less than 1e-9 of it

Job = TypeVar("Job")
Result = TypeVar("Result")


class Piece(NamedTuple):
    """Elements [start, stop) of a tensor."""

    name: str
    start: int
    stop: int


def pieces(info: TensorInfo, block: int) -> Iterator[Piece]:
    """A tensor in pieces of at most ``block`` elements."""
    return split(Piece(info.name, 0, info.numel), block)


def split(piece: Piece, block: int) -> Iterator[Piece]:
    """A piece in smaller ones of at most ``block`` elements."""
    for start in range(piece.start, piece.stop, block):
        yield Piece(piece.name, start, min(start + block, piece.stop))


def one_blas_thread() -> AbstractContextManager[object]:
    """One thread for every product of numpy arrays: our own threads take the cores.

    How BLAS splits a product among threads decides the order of its sums, and with it the last bits.
    """
    return threadpool_limits(1, "blas")


def fit_float32(squares: np.ndarray) -> bool:
    """Whether rows of these squared lengths have float32 products that neither overflow nor are lost to underflow."""
    return bool(((squares > SMALLEST) & (squares < np.inf)).all())


class Until(NamedTuple):
    """Among jobs: the next one is begun when this is true of the results that have been taken."""

    ready: Callable[[], bool]


@contextmanager
def in_order(work: Callable[[Job], Result], jobs: Iterable[Job | Until], threads: int) -> Iterator[Iterator[Result]]:
    """Results of jobs in the order of the jobs; a few are worked on ahead, so that memory stays bounded.

    The threads end with the block: a generator that is left half read would end them whenever, and in whichever
    thread, it is collected as garbage.
    """
    with ThreadPoolExecutor(threads) as pool:
        window: deque[Future] = deque()
        try:
            yield _results(pool, work, jobs, window, 2 * threads)
        finally:
            for future in window:
                future.cancel()


def _results(pool: Executor, work: Callable, jobs: Iterable, window: deque[Future], ahead: int) -> Iterator:
    for job in jobs:
        if isinstance(job, Until):
            while not job.ready():
                yield window.popleft().result()
            continue
        window.append(pool.submit(work, job))
        if len(window) > ahead:
            yield window.popleft().result()
    while window:
        yield window.popleft().result()


def width_of(files: Sequence[Checkpoint], name: str) -> np.dtype:
    """The dtype to compute a tensor in: float64 where one of the checkpoints stores that, else float32."""
    wide = any(file.source.tensors[name].dtype == "F64" for file in files)
    return np.dtype(np.float64 if wide else np.float32)


def read_rows(
    files: Sequence[Checkpoint], piece: Piece, *, out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The same piece of every checkpoint, (N, n), and its sums of squares, (N,).

    Args:
        out: rows to fill.

    Raises:
        DmmError: a value is NaN or infinite.
    """
    rows = np.empty((len(files), piece.stop - piece.start), width_of(files, piece.name)) if out is None else out
    squares = np.empty(len(files))
    for n, file in enumerate(files):
        file.read_floats(piece.name, piece.start, rows[n])
        squares[n] = require_finite(file.source, piece.name, rows[n])
    return rows, squares
