from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dmm_cli.checkpoint import Checkpoint
from dmm_cli.errors import DmmError
from dmm_cli.header import TensorInfo
from dmm_cli.inputs import resolve_source
from dmm_cli.streaming import Piece, in_order, pieces, read_rows, split, width_of

THREADS = 3


def every(work, jobs, threads: int) -> list:
    with in_order(work, jobs, threads) as results:
        return list(results)


def test_results_come_in_the_order_of_the_jobs_whichever_ends_first():
    """The first job cannot end before the second has."""
    second = threading.Event()

    def work(job: int) -> int:
        if job == 0:
            assert second.wait(timeout=30)
        elif job == 1:
            second.set()
        return job * job

    assert every(work, range(50), THREADS) == [job * job for job in range(50)]


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_every_job_is_done_once(threads):
    done: list[int] = []
    assert every(lambda job: done.append(job) or job, range(100), threads) == list(range(100))
    assert sorted(done) == list(range(100))
    assert every(str, [], threads) == []


class Counted:
    """Jobs that count how many were asked for."""

    def __init__(self, count: int) -> None:
        self.count, self.taken = count, 0

    def __iter__(self) -> Iterator[int]:
        for job in range(self.count):
            self.taken += 1
            yield job


def test_jobs_are_not_begun_far_ahead_of_the_reader():
    jobs = Counted(1000)
    with in_order(lambda job: job, jobs, THREADS) as results:
        for read, _ in enumerate(results, 1):
            assert jobs.taken <= read + 2 * THREADS


def test_an_error_comes_at_its_place_and_ends_the_work():
    jobs, got = Counted(1000), []

    def work(job: int) -> int:
        if job == 7:
            raise ValueError("job 7")
        return job

    with pytest.raises(ValueError, match="job 7"):
        with in_order(work, jobs, THREADS) as results:
            for result in results:
                got.append(result)
    assert got == list(range(7))
    assert jobs.taken <= 8 + 2 * THREADS


def test_a_reader_that_stops_leaves_no_thread_behind():
    before = threading.active_count()
    with in_order(lambda job: job, range(1000), THREADS) as results:
        assert next(results) == 0
    assert threading.active_count() == before
    with pytest.raises(KeyError), in_order(lambda job: job, range(1000), THREADS) as results:
        raise KeyError(next(results))
    assert threading.active_count() == before


@pytest.mark.parametrize("block", [1, 3, 4, 12, 100])
def test_pieces_cover_a_tensor_once_and_in_order(block):
    parts = list(pieces(TensorInfo("w", "F32", (3, 4), 0, 48), block))
    assert [n for part in parts for n in range(part.start, part.stop)] == list(range(12))
    assert all(0 < part.stop - part.start <= block and part.name == "w" for part in parts)
    assert len(parts) == -(-12 // block)


def test_pieces_of_a_number_and_of_an_empty_tensor():
    assert list(pieces(TensorInfo("s", "F32", (), 0, 4), 10)) == [Piece("s", 0, 1)]
    assert list(pieces(TensorInfo("e", "F32", (0, 3), 0, 0), 10)) == []


def test_a_piece_is_split_where_it_lies():
    assert list(split(Piece("w", 5, 12), 3)) == [Piece("w", 5, 8), Piece("w", 8, 11), Piece("w", 11, 12)]


@pytest.fixture
def files(tmp_path):
    """The same numbers in three dtypes."""
    values = torch.linspace(-4, 4, 65).round(decimals=1)
    opened = []
    for name, dtype in {"half": torch.float16, "brain": torch.bfloat16, "single": torch.float32}.items():
        save_file({"w": values.to(dtype), "d": values.double() if name == "single" else values}, tmp_path / name)
        opened.append(Checkpoint(resolve_source(str(tmp_path / name))).__enter__())
    yield opened
    for file in opened:
        file.__exit__(None, None, None)


@pytest.mark.parametrize("given", [False, True])
def test_rows_of_files_of_unlike_dtypes(files, given):
    exact = torch.linspace(-4, 4, 65).round(decimals=1)
    expected = [exact.to(t).float().numpy()[10:50] for t in (torch.float16, torch.bfloat16, torch.float32)]
    out = np.full((3, 40), np.nan, np.float32) if given else None
    rows, squares = read_rows(files, Piece("w", 10, 50), out=out)
    assert rows.dtype == np.float32 and np.array_equal(rows, expected)
    assert (rows is out) == given
    assert np.allclose(squares, [np.sum(row.astype(np.float64) ** 2) for row in expected], rtol=1e-6)


def test_one_file_in_float64_makes_all_of_it_float64(files):
    assert width_of(files, "w") == np.float32 and width_of(files, "d") == np.float64
    rows, _ = read_rows(files, Piece("d", 0, 65))
    assert rows.dtype == np.float64 and (rows == torch.linspace(-4, 4, 65).round(decimals=1).numpy()).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_names_the_file(write, bad):
    values = np.ones(9, np.float32)
    values[5] = bad
    with Checkpoint(resolve_source(str(write("good", w=np.ones(9, np.float32))))) as good:
        with Checkpoint(resolve_source(str(write("bad", w=values)))) as damaged:
            read_rows([good, damaged], Piece("w", 0, 5))
            with pytest.raises(DmmError, match=r"NaN or infinity in tensor w of .*bad\.safetensors"):
                read_rows([good, damaged], Piece("w", 3, 9))
