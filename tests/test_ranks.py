"""Processes that torchrun starts: what they are told, and what the others do when one of them fails."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import DIGITS, digits_as_pseudo_data, free_port, in_two_processes, small_net, start
from safetensors.numpy import save_file

from dmm_cli.errors import DmmError
from dmm_cli.ranks import joined

SITES = [DIGITS / f"site-{name}.safetensors" for name in "abc"]

# without torchrun, which ends all processes as soon as one fails
PROGRAM = """
import contextlib, json, os, resource, sys
from conftest import dmm
from dmm_cli import runtime
from dmm_cli.errors import DmmError

def threads():
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # one that has ended since
            yield open(f"/proc/self/task/{thread}/comm").read().strip()

def fail(self, stage, done, total, **numbers):
    raise DmmError("no further")

seen = []
for port, words, trouble in json.loads(sys.argv[1])[int(os.environ["RANK"])]:
    os.environ["MASTER_PORT"] = str(port)
    if trouble == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    if trouble == "step":
        runtime.Host.tell = fail
    result = dmm(*words)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    seen.append([result.exit_code, result.stderr, sorted(threads())])
print(json.dumps(seen))
"""


def in_turn(*commands: Sequence[Sequence[object]], trouble: Sequence[str | None] = ()) -> list[list[tuple]]:
    """Exit codes, messages and threads of two processes that run commands together, one after the other.

    Args:
        commands: each for the first process, and for the second. trouble: of the first, for every command.
    """
    ports = [free_port() for _ in commands]
    plans = []
    for rank in range(2):
        troubles = trouble if trouble and rank == 0 else [None] * len(commands)
        words = [[str(word) for word in command[rank]] for command in commands]
        plans.append(list(zip(ports, words, troubles, strict=True)))
    return [json.loads(printed.splitlines()[-1]) for printed in in_two_processes(PROGRAM, json.dumps(plans))]


@pytest.fixture
def pseudo(tmp_path: Path) -> Path:
    return digits_as_pseudo_data(tmp_path / "pseudo.safetensors", [(SITES[0], range(5)), (SITES[1], range(3, 8))])


def test_processes_that_were_told_different_things_are_refused(tmp_path, pseudo):
    out = tmp_path / "out.safetensors"
    for number, folder in enumerate(("here", "there")):
        (tmp_path / folder).mkdir()
        save_file(small_net(0) | {"fc.bias": np.full(10, number)}, tmp_path / folder / "net.safetensors")
    merge = ["merge", SITES[0], SITES[1], "-o", out]
    draw = ["synthesize", SITES[0], "--count", 8, "--steps", 2, "-o", out]
    teach = ["distill", SITES[2], *SITES[:2], "--data", pseudo, "--steps", 2, "-o", out]
    commands = [
        ([*merge, "--weights", "1,1"], [*merge, "--weights", "1,2"]),
        [["merge", tmp_path / folder / "net.safetensors", "-o", out] for folder in ("here", "there")],
        (merge, [*merge[:-1], tmp_path / "other.safetensors"]),
        ([*draw, "--batch", 8], [*draw, "--batch", "auto"]),
        (teach, [*teach, "--seed", 1]),
    ]
    differ = [
        "weights: [1.0, 1.0] in process 0, [1.0, 2.0] in process 1",
        'checkpoint 1: ["net"',
        "outputs: ",
        "batch: 8 in process 0, null in process 1",
        "seed: 0 in process 0, 1 in process 1",
    ]
    for process in in_turn(*commands):
        for (code, told, _), name in zip(process, differ, strict=True):
            lines = told.splitlines()
            assert code == 2 and lines[0].endswith("were given different inputs or parameters"), told
            assert len(lines) == 3 and lines[1].startswith(f"  {name}") and lines[2].startswith("hint: "), told
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob("other*"))


def test_a_process_whose_neighbour_fails_says_so(tmp_path, pseudo):
    """The one that cannot write its shard, or take a step, says why.

    Of what went well no thread of gloo stays: one that frees a tensor while the interpreter is torn down aborts it.
    """
    draw = ["synthesize", SITES[0], "--count", 8, "--steps", 2, "--batch", 8, "-o", tmp_path / "drawn.safetensors"]
    merge = ["merge", *SITES[:2], "--max-shard-size", "200KB", "-o", tmp_path / "merged.safetensors"]
    teach = ["distill", SITES[2], *SITES[:2], "--data", pseudo, "--steps", 40, "-o", tmp_path / "taught.safetensors"]
    first, second = in_turn([draw] * 2, [merge] * 2, [teach] * 2, trouble=[None, "disk", "step"])
    assert [code for code, _, _ in first + second] == [0, 2, 2] * 2
    assert not [name for _, _, threads in (first[0], second[0]) for name in threads if "gloo" in name]
    assert "cannot write" in first[1][1] and "no further" in first[2][1]
    for _, told, _ in second[1:]:
        assert told == "error: another process of torchrun failed\nhint: see its message\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn.safetensors", "pseudo.safetensors"]


def test_a_process_whose_neighbour_never_comes_can_be_ended(tmp_path):
    port = free_port()
    process = start(0, port, "-m", "dmm_cli", "merge", *SITES[:2], "-o", tmp_path / "out.safetensors")
    with socket.socket() as neighbour:
        while neighbour.connect_ex(("127.0.0.1", port)):  # until it listens, and waits
            assert process.poll() is None
            time.sleep(0.1)
    process.terminate()
    assert process.wait(20) == -signal.SIGTERM


def test_a_port_that_another_program_has_is_told(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        facts = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": other.getsockname()[1]}
        for name, value in facts.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(DmmError, match="do not find one another"), joined():
            raise AssertionError("it began")
    assert signal.getsignal(signal.SIGTERM) == before
