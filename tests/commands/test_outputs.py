"""What a command must not write over, and finds out before it computes."""

from __future__ import annotations

import resource
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import DIGITS, dmm, shell
from safetensors.numpy import save_file

from dmm_cli.report import console

SITES = [DIGITS / f"site-{name}.safetensors" for name in "abc"]
TEST = DIGITS / "test.safetensors"


@pytest.mark.parametrize(
    ("command", "clashes"),
    [
        (["similarity", "a", "b", "-o"], ["a", "b"]),
        (["similarity", "a", "b", "--dry-run", "-o"], ["a"]),
        (["similarity", "a", "--against", "b", "-o"], ["b"]),
        (["similarity", "@list.txt", "b", "-o"], ["list.txt"]),
        (["evaluate", "a", "--data", "t", "-o"], ["a", "t"]),
        (["inspect", "a", "-o"], ["a"]),
        (["synthesize", "a", "-o"], ["a"]),
        (["run", "out/model.safetensors", "b", "-o"], ["out"]),
        (["run", "out/merged/group-0.safetensors", "b", "--dry-run", "-o"], ["out"]),
        (["merge", "a", "b", "--recalibrate", "c", "-o"], ["c.safetensors"]),
    ],
)
def test_no_command_writes_over_its_inputs(tmp_path, monkeypatch, command, clashes):
    monkeypatch.chdir(tmp_path)
    Path("out/merged").mkdir(parents=True)
    names = {"a": SITES[0], "b": SITES[1], "c.safetensors": SITES[2], "t": TEST}
    for name, path in {**names, "out/model.safetensors": SITES[0], "out/merged/group-0.safetensors": SITES[0]}.items():
        Path(name).write_bytes(path.read_bytes())
    Path("c").symlink_to("c.safetensors")
    Path("list.txt").write_text("a\n")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    for clash in clashes:
        result = dmm(*command, clash, "--force")
        assert result.exit_code == 2 and "one of the inputs" in result.stderr, result.stderr
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("there", [False, True])
def test_names_that_no_file_can_have_are_refused_before_anything_is_computed(tmp_path, there):
    model, owner, out = tmp_path / f"{'m' * 200}.safetensors", tmp_path / f"{'o' * 200}.safetensors", tmp_path / "out"
    for path, site in ((model, SITES[0]), (owner, SITES[1])):
        path.symlink_to(site)
    if there:
        out.mkdir()
    result = dmm("record", model, "--owner", owner, "--data", TEST, "-o", out, "--dry-run")
    assert result.exit_code == 2 and "the name of an output is too long" in result.stderr, result.stderr
    assert out.exists() == there


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["similarity", *SITES[:2]], "-o"),
        (["similarity", *SITES[:2], "-o", "new.txt"], "--figure"),
        (["evaluate", SITES[0], "--data", TEST], "-o"),
        (["inspect", SITES[0]], "-o"),
        (["synthesize", SITES[0], "--steps", 9999, "-o", "new.safetensors"], "--grid"),
    ],
)
def test_outputs_are_checked_before_anything_is_computed(tmp_path, monkeypatch, command, option):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "PATIENCE", -1.0)
    Path("old.png").write_text("mine")
    for path, words in (("old.png", "the output exists"), ("no/such/x.png", "no such directory")):
        result = dmm(*command, option, path)
        assert result.exit_code == 2 and result.stderr.startswith(f"error: {words}"), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"] and Path("old.png").read_text() == "mine"


@pytest.mark.parametrize("command", ["run", "merge", "align"])
def test_a_directory_whose_name_a_link_to_nothing_has_is_told(tmp_path, command):
    link = tmp_path / "out"
    link.symlink_to("gone")
    for flags in ([], ["--force"]):
        result = dmm(command, *SITES[:2], "-o", link, *flags)
        assert result.exit_code == 2 and f"error: the output is a link to nothing: {link}" in result.stderr
        assert "it points to gone" in result.stderr and list(tmp_path.iterdir()) == [link]


def test_statistics_of_two_networks_are_two_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/b-c", "a-b/c", "x/c"):
        Path(name).parent.mkdir()
        Path(f"{name}.safetensors").write_bytes(SITES[0].read_bytes())
    names = ["a/b-c.safetensors", "a-b/c.safetensors", "x/c.safetensors"]
    result = dmm("record", *names, "--owner", SITES[1], "--data", TEST, "-o", "stats", "--force", "--dry-run")
    assert result.exit_code == 2 and "2 outputs for one file: stats/site-b-in-a-b-c.safetensors" in result.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["similarity", *SITES[:2], "-o", "l"], "the output exists: l"),
        (["similarity", *SITES[:2], "-o", "r.txt", "--figure", "l.png"], "the output exists: l.png"),
        (["merge", *SITES[:2], "-o", "l.safetensors"], "the output exists: l.safetensors"),
        (["evaluate", SITES[0], "--data", "l", "-o", "o.json"], "cannot read l: Too many levels of symbolic links"),
    ],
)
def test_links_that_lead_in_circles_are_no_files(tmp_path, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    for name in ("l", "l.png", "l.safetensors"):
        Path(name).symlink_to(name)
    result = dmm(*command)
    assert result.exit_code == 2 and f"error: {words}\n" in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("file.png", "the output exists: file.png\nhint: replace it with --force, or name another\n"),
        ("file.png/x.png", "not a directory: file.png\nhint: name a place in one\n"),
        ("file.png/y/x.png", "not a directory: file.png\n"),
        ("y/x.png", "no such directory: y\nhint: mkdir -p y\n"),
    ],
)
def test_hints_about_outputs_can_be_followed(tmp_path, monkeypatch, output, words):
    monkeypatch.chdir(tmp_path)
    Path("file.png").touch()
    result = dmm("similarity", *SITES[:2], "--figure", output)
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {words}"), result.stderr


def test_a_device_in_place_of_an_output_is_not_told_to_be_left_out(tmp_path):
    result = dmm("synthesize", SITES[0], "-o", "/dev/null")
    assert result.exit_code == 2 and "hint: name a file; what is told where -o may be left out" in result.stderr


def test_a_report_and_its_figure_are_two_files(tmp_path):
    result = dmm("similarity", *SITES[:2], "-o", tmp_path / "x.png", "--figure", tmp_path / "x.png")
    assert result.exit_code == 2 and "two outputs for one file" in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("room", [3000, 12_000])
def test_without_room_for_a_report_or_its_figure_neither_is_written(tmp_path, room):
    """A file size limit refuses both, or the larger figure alone, the way a full disk does."""
    report, figure = tmp_path / "i.json", tmp_path / "f.png"
    report.write_text("of before")
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, room))
    command = ["similarity", *SITES[:2], "-o", report, "--figure", figure, "--json"]
    result = shell(*command, "--force", preexec_fn=full)
    assert result.returncode == 2 and f"cannot write {figure}" in result.stderr, result.stderr
    assert list(tmp_path.iterdir()) == [report] and report.read_text() == "of before"
    assert dmm(*command, "--force").exit_code == 0 and report.stat().st_size < 12_000 < figure.stat().st_size


def test_where_one_group_cannot_be_written_none_is(tmp_path):
    sound, broken, groups = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "groups.json"
    save_file({"w": np.ones((4, 2), np.float32)}, sound)
    save_file({"w": np.full((4, 2), np.nan, np.float32)}, broken)
    groups.write_text('{"groups": [["a"], ["b"]]}')
    command, out = ["merge", sound, broken, "--group", groups, "-o", tmp_path / "out"], tmp_path / "out"
    for flags in ([], ["--force"]):
        refused = dmm(*command, *flags)
        assert refused.exit_code == 2 and "NaN" in refused.stderr and not (out.exists() and list(out.iterdir()))
    save_file({"w": np.zeros((4, 2), np.float32)}, broken)
    assert dmm(*command).exit_code == 0 and len(list(out.iterdir())) == 3
    there = sorted(out.iterdir())
    save_file({"w": np.full((4, 2), np.nan, np.float32)}, broken)
    assert dmm(*command, "--force").exit_code == 2 and sorted(out.iterdir()) == there
    assert dmm(*command, "--force", "--max-shard-size", "16B").exit_code == 2 and sorted(out.iterdir()) == there


def test_pseudo_data_whose_grid_cannot_be_written_are_kept_and_can_be_drawn(tmp_path):
    pseudo, folder, again = tmp_path / "p.safetensors", tmp_path / "grids", tmp_path / "again.png"
    command = ["synthesize", SITES[0], "--engine", "pixels", "--count", 8, "--steps", 2, "-o", pseudo, "--grid"]
    assert dmm(*command, tmp_path / "g.png").exit_code == 0
    pseudo.unlink()
    folder.mkdir()

    def remove_folder() -> None:
        end = time.monotonic() + 60
        while not pseudo.with_name("p.safetensors.partial").exists() and time.monotonic() < end:
            time.sleep(0.001)
        folder.rmdir()

    remover = threading.Thread(target=remove_folder)
    remover.start()
    result = dmm(*command, folder / "g.png")
    remover.join()
    assert result.exit_code == 2 and f"the pseudo-data are written: {pseudo}" in result.stderr, result.stderr
    assert f"dmm inspect {pseudo} --grid" in result.stderr
    assert dmm("inspect", pseudo, "--grid", again).exit_code == 0
    assert again.read_bytes() == (tmp_path / "g.png").read_bytes()
    other = dmm("inspect", SITES[0], "--grid", tmp_path / "other.png")
    assert other.exit_code == 2 and "not a pseudo-data file" in other.stderr and not (tmp_path / "other.png").exists()


def test_an_index_of_shards_is_an_input_too(tmp_path):
    folder, shards = tmp_path / "m", ["--max-shard-size", "400KB"]
    folder.mkdir()
    assert dmm("merge", SITES[0], "-o", folder / "model.safetensors", *shards).exit_code == 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    other = ["merge", folder, SITES[1], "--max-shard-size", "100KB", "-o", folder / "model.safetensors"]
    text = ["similarity", folder, SITES[1], "-o", folder / "model.safetensors.index.json"]
    for command in (other, text):
        result = dmm(*command, "--force")
        assert result.exit_code == 2 and "one of the inputs" in result.stderr
    whole = dmm("merge", folder, SITES[1], "-o", folder / "model.safetensors")
    assert whole.exit_code == 2 and "would be read in place of one of the inputs" in whole.stderr
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
