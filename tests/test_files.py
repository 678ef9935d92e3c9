from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from dmm_cli import files
from dmm_cli.errors import DmmError
from dmm_cli.files import atomic_write, check_output, together, write_behind, write_bytes, write_text


def test_content_and_mode(tmp_path):
    path = tmp_path / "out"
    previous = os.umask(0o027)
    try:
        write_bytes(path, b"abc")
    finally:
        os.umask(previous)
    assert path.read_bytes() == b"abc"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_the_longest_file_name_works(tmp_path):
    path = tmp_path / ("n" * 255)
    write_text(path, "x")
    assert path.read_text() == "x"


@pytest.mark.parametrize("end", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_content_and_nothing_else(tmp_path, end):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(end), atomic_write(path) as file:
        file.write(b"new")
        raise end
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_outputs_take_their_places_together_or_not_at_all(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"old")

    def write(fails: bool) -> None:
        with together() as outputs:
            with atomic_write(first, force=True, outputs=outputs) as file:
                file.write(b"new")
            outputs.before(lambda: seen.append(first.read_bytes()))
            with atomic_write(second, outputs=outputs) as file:
                file.write(b"new")
            if fails:
                raise ValueError

    seen = []
    with pytest.raises(ValueError):
        write(fails=True)
    assert first.read_bytes() == b"old" and list(tmp_path.iterdir()) == [first] and not seen
    write(fails=False)
    assert first.read_bytes() == second.read_bytes() == b"new" and seen == [b"old"]
    assert sorted(tmp_path.iterdir()) == [first, second]


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("stage", ["sync", "after"])
def test_places_that_were_free_are_free_again_where_one_fails(tmp_path, monkeypatch, force, stage):
    first, second, calls = tmp_path / "first", tmp_path / "second", []

    def fail() -> None:
        calls.append(stage)
        if len(calls) == 2 or stage == "after":
            raise KeyboardInterrupt

    if stage == "sync":
        monkeypatch.setattr(files, "_sync_directory", lambda _: fail())
    with pytest.raises(KeyboardInterrupt), together() as outputs:
        for path in (first, second):
            with atomic_write(path, force=force, outputs=outputs) as file:
                file.write(b"new")
        if stage == "after":
            outputs.after(fail)
    assert calls and not list(tmp_path.iterdir())


@pytest.mark.parametrize("links", [True, False])
def test_what_appeared_meanwhile_stays_unless_forced(tmp_path, monkeypatch, links):
    if not links:  # as on FAT

        def refuse(*_):
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "out"
    with atomic_write(path) as file:
        file.write(b"first")
    assert path.read_bytes() == b"first" and path.stat().st_nlink == 1
    with pytest.raises(DmmError, match="the output exists") as refusal, atomic_write(path) as file:
        file.write(b"second")
    assert "--force" in refusal.value.hint and path.read_bytes() == b"first"
    with atomic_write(path, force=True) as file:
        file.write(b"third")
    assert path.read_bytes() == b"third" and list(tmp_path.iterdir()) == [path]


def test_outputs_that_are_refused(tmp_path):
    source = tmp_path / "in"
    source.write_text("x")
    alias = tmp_path / "alias"
    alias.symlink_to(source)
    (tmp_path / "loose").symlink_to("nowhere")
    refusals = {
        "exists": (lambda: check_output(source), "the output exists"),
        "link": (lambda: check_output(tmp_path / "loose"), "the output exists"),
        "input": (lambda: check_output(alias, inputs=[source], force=True), "one of the inputs"),
        "later": (
            lambda: check_output(tmp_path / "new", inputs=[tmp_path / "new"]),
            "read in place of one of the inputs",
        ),
        "directory": (lambda: check_output(tmp_path, force=True), "is a directory"),
        "device": (lambda: check_output(Path("/dev/null"), force=True), "not a regular file"),
        "parent": (lambda: check_output(tmp_path / "no" / "out"), "no such directory"),
        "mode": (lambda: check_output(Path("/proc/self/out")), "cannot write to the directory /proc/self"),
    }
    for call, words in refusals.values():
        with pytest.raises(DmmError, match=words):
            call()
    check_output(source, force=True)


def test_a_full_disk_names_the_output_and_keeps_the_old(tmp_path):
    """A file size limit makes the kernel refuse the write the way a full disk does."""
    path = tmp_path / "out"
    path.write_bytes(b"old")
    code = f"""
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from dmm_cli import files
from dmm_cli.errors import DmmError
from dmm_cli.files import write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes(Path({str(path)!r}), bytes(5000), force=True)
except DmmError as error:
    print(error.what)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"cannot write {path}: ")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_no_partial_file_and_blocks_no_rerun(tmp_path):
    path = tmp_path / "out"
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from dmm_cli.files import atomic_write
with atomic_write(Path({str(path)!r})) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert not path.exists()
    write_bytes(path, b"whole")
    assert path.read_bytes() == b"whole"


def test_text_is_utf8(tmp_path: Path):
    write_text(tmp_path / "t", "ü")
    assert (tmp_path / "t").read_bytes() == b"\xc3\xbc"


def test_what_is_written_behind_is_what_was_given(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "STRIDE", 1000)
    pieces = [bytes([number % 256]) * (number * 7) for number in range(200)]
    path = tmp_path / "x"
    with atomic_write(path) as file, write_behind(file) as write:
        for piece in pieces:
            write(piece)
    assert path.read_bytes() == b"".join(pieces)


def test_an_error_of_the_disk_behind_a_write_is_not_lost(monkeypatch):
    """A pipe takes bytes but cannot be synced."""
    monkeypatch.setattr(files, "STRIDE", 1)
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb"), os.fdopen(writer, "wb") as file, pytest.raises(OSError, match="Invalid argument"):
        with write_behind(file) as write:
            write(b"x")
