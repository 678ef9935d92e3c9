"""How a command ends: exit codes and words, and what is left, where it is killed or its streams are gone."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import DIGITS, ROOT, dmm, shell
from safetensors.numpy import save_file

from dmm_cli.commands._run import resumable
from dmm_cli.errors import DmmError
from dmm_cli.inputs import resolve_source

SITES = [DIGITS / f"site-{name}.safetensors" for name in "abcde"]


def test_a_crash_is_neither_1_nor_a_traceback(monkeypatch):
    import dmm_cli.similarity.engine as engine

    monkeypatch.setattr(engine, "compute_similarity", lambda *_, **__: 1 / 0)
    result = dmm("similarity", *SITES[:2])
    assert result.exit_code == 70 and "internal: ZeroDivisionError" in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("DMM_DEBUG", "1")
    assert "Traceback" in dmm("similarity", *SITES[:2]).stderr


COMPARE = ["similarity", SITES[0], SITES[1]]


def redirected(arguments, into: str) -> subprocess.CompletedProcess[str]:
    """The command line with its streams as told, and the exit code of the first process of a pipe."""
    line = f"{shlex.join(map(str, [sys.executable, '-m', 'dmm_cli', *arguments]))} {into}; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("arguments", [[*COMPARE, "--json"], ["--help"], ["--version"], ["merge", "-h"]])
def test_a_closed_pipe_is_silent(arguments):
    result = redirected(arguments, "| true")
    assert result.returncode == 141 and result.stderr == ""


@pytest.mark.parametrize("arguments", [COMPARE, ["--help"], ["--version"], ["merge", "-h"]])
def test_a_full_disk_behind_stdout_is_an_error(arguments):
    result = redirected(arguments, "> /dev/full")
    assert result.returncode == 2
    assert result.stderr == "error: No space left on device: standard output\n"


@pytest.mark.parametrize("arguments", [["inspect", "nothere"], ["inspect", "--no-such-option"], ["no-such-command"]])
@pytest.mark.parametrize("into", ["2> /dev/full", "2>&1 | true"])
def test_a_mistake_that_nobody_can_be_told_exits_2(arguments, into):
    assert redirected(arguments, into).returncode == 2


def test_an_interrupt_while_dmm_is_imported_is_told_as_any_other():
    code = """
import os, runpy, signal, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupt())
runpy.run_module("dmm_cli", run_name="__main__")
"""
    result = shell(code=code)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_an_interrupted_synthesis_ends_at_once_and_keeps_what_is_done(tmp_path):
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "dmm_cli", "synthesize", str(SITES[3]), "-o", str(out), "--steps", "100000"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline().startswith("synthesize")
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=20)
    assert process.returncode == 130 and "interrupted\n" in rest
    assert f"the same command goes on from {out}.partial" in rest
    assert list(tmp_path.iterdir()) == [tmp_path / "out.safetensors.partial"]


def test_nothing_is_told_to_be_kept_where_only_files_of_others_are_left(tmp_path, capsys):
    (tmp_path / "out.safetensors.partial").mkdir()
    (tmp_path / "out.safetensors.partial" / "notes.txt").write_text("mine")
    with resumable(tmp_path / "out.safetensors") as states:
        states.save("part", {"x": np.ones(1)})
    with pytest.raises(DmmError), resumable(tmp_path / "out.safetensors"):
        raise DmmError("it failed")
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> list[Path]:
    """Two files that take a moment to merge."""
    paths = [tmp_path_factory.mktemp("big") / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(paths):
        draw = np.random.default_rng(seed)
        save_file({f"w{i}": draw.standard_normal((1000, 1000), dtype=np.float32) for i in range(60)}, path)
    return paths


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_killed_merge_leaves_no_partial_file(tmp_path, big, number, code):
    out = tmp_path / "out.safetensors"
    arguments = ["merge", *map(str, big), "--align", "never", "-o", str(out)]
    command = [sys.executable, "-m", "dmm_cli", *arguments]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".dmm-*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == code
    assert not out.exists()
    left = list(tmp_path.glob(".dmm-*"))
    assert number == signal.SIGKILL or left == []
    assert shell(*arguments).returncode == 0 and out.exists()


def test_sigterm_ends_a_command_wherever_it_is(tmp_path, monkeypatch):
    (tmp_path / "slow_net.py").write_text("import os, signal\ndef net(): os.kill(os.getpid(), signal.SIGTERM)\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = dmm("evaluate", SITES[0], "--data", DIGITS / "test.safetensors", "--arch", "slow_net:net")
    assert result.exit_code == 143 and result.output == ""


@pytest.mark.parametrize(
    ("closed", "flags", "code", "told"),
    [
        (">&-", ["--force"], 0, ""),
        ("2>&-", ["--force", "--json"], 0, ""),
        ("2>&-", [], 2, ""),
        ("<&-", ["--force", "--group", "-"], 2, "standard input cannot be read"),
    ],
)
def test_streams_that_are_closed(tmp_path, closed, flags, code, told):
    out = tmp_path / "out.safetensors"
    out.touch()
    command = [sys.executable, "-m", "dmm_cli", "merge", SITES[0], SITES[1], "-o", out, *flags]
    line = f"{shlex.join(map(str, command))} {closed}"
    result = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL)
    assert result.returncode == code and told in result.stderr
    assert resolve_source(str(out)).tensors if code == 0 else out.stat().st_size == 0
    if "--json" in flags:
        assert json.loads(result.stdout)["outputs"] == [str(out)]


@pytest.mark.parametrize(
    ("text", "told"),
    [(b"\xff", "cannot read standard input: 'utf-8' codec"), (None, "cannot read standard input: [Errno")],
)
def test_standard_input_that_cannot_be_read_is_told(tmp_path, text, told):
    """Bytes that are no text, and what is open to be written to."""
    (tmp_path / "bytes").write_bytes(text or b"")
    descriptor = os.open(tmp_path / "bytes", os.O_RDONLY if text else os.O_WRONLY)
    result = shell("similarity", "-", "-q", env={"PYTHONIOENCODING": "utf-8:strict"}, stdin=descriptor)
    os.close(descriptor)
    assert result.returncode == 2 and f"error: {told}" in result.stderr, result.stderr


def test_a_process_that_torchrun_did_not_start_says_so(monkeypatch, tmp_path):
    """As where a variable of before is left over."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = dmm("merge", *SITES[:2], "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2 and "the environment is not as torchrun makes it" in result.stderr, result.stderr
    assert "RANK" in result.stderr and "hint: unset WORLD_SIZE" in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "code"), [("", 0), ("two", 2), ("0", 2)])
def test_a_number_of_processes_that_is_none(monkeypatch, size, code):
    monkeypatch.setenv("WORLD_SIZE", size)
    result = dmm("inspect", SITES[0], "-q")
    assert result.exit_code == code and result.stderr.startswith("error: WORLD_SIZE is not" if code else ""), (
        result.stderr
    )
