from __future__ import annotations

import threading
import time

import pytest
import torch

from dmm_cli.errors import DmmError
from dmm_cli.runtime import (
    Host,
    describe_device,
    generator,
    mixed_precision,
    parallel,
    resolve_device,
    resolve_precision,
    seeded,
)

CPU = torch.device("cpu")


def test_devices():
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name, words in (("cuda:99", "no such device: cuda:99"), ("meta", "cpu or cuda"), ("gpu", "unknown device")):
        with pytest.raises(DmmError, match=words):
            resolve_device(name)
    assert describe_device(CPU).startswith("cpu (")


def test_streams_depend_on_seed_and_salt_alone():
    def draw(*salt):
        return torch.rand(4, generator=generator(*salt)).tolist()

    assert draw(0, "a", 1) == draw(0, "a", 1)
    assert len({tuple(draw(*salt)) for salt in ((0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2))}) == 4
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with seeded(0, "x"):
        first = torch.rand(3)
    assert torch.equal(torch.random.get_rng_state(), before)
    with seeded(0, "x"):
        assert torch.equal(torch.rand(3), first)


def test_the_stream_of_a_gpu_is_restored_too(monkeypatch):
    """By a number in its place."""
    state = [5]
    for name, stand_in in {
        "is_initialized": lambda: True,
        "current_device": lambda: 0,
        "get_rng_state": lambda device: list(state),
        "set_rng_state": lambda held, device: state.__setitem__(0, held[0]),
        "manual_seed_all": lambda seed: state.__setitem__(0, seed),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with seeded(0, "x"):
        assert state != [5], "dropout on it depends on the seed"
    assert state == [5]


def test_parallel_jobs_run_on_one_thread_each_and_leave_the_rest_alone():
    seen = []
    threads = torch.get_num_threads()
    parallel([lambda stop: seen.append((torch.get_num_threads(), threading.get_ident()))] * 4, Host(CPU))
    assert [count for count, _ in seen] == [1] * 4
    assert threading.get_ident() not in {thread for _, thread in seen}
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("fails_first", [True, False])
def test_a_failing_job_stops_the_others(monkeypatch, fails_first):
    monkeypatch.setattr("dmm_cli.runtime.cores", lambda: 2)
    until = time.monotonic() + 2

    def fail(stop):
        raise ValueError("inside")

    def wait(stop):
        while not stop():
            assert time.monotonic() < until
            time.sleep(0.01)

    with pytest.raises(ValueError, match="inside"):
        parallel([fail, wait] if fails_first else [wait, fail], Host(CPU))


def test_products_are_taken_in_the_precision_that_was_asked_for():
    left = torch.tensor([[1.0 + 2.0**-9]])  # bfloat16 has 8 bits
    for name, wanted in (("auto", 1.0 + 2.0**-9), ("float32", 1.0 + 2.0**-9), ("bfloat16", 1.0)):
        with mixed_precision(CPU, resolve_precision(name, CPU)):
            assert (left @ torch.eye(1)).item() == wanted
    with pytest.raises(DmmError, match="unknown precision: half"):
        resolve_precision("half", CPU)
