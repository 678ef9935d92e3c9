"""What an earlier merge to the same place leaves behind is not taken for the new one's."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import dmm
from safetensors.numpy import load_file, save_file

from dmm_cli.checkpoint import Checkpoint
from dmm_cli.inputs import Source, resolve_source


@pytest.fixture
def nets(write) -> dict[str, Path]:
    """Four of one start, and one of another."""
    start = np.random.default_rng(0).normal(size=(4, 4, 4)).astype(np.float32)
    values = {name: start + np.float32(0.01 * number) for number, name in enumerate("wxyz")}
    values["q"] = np.random.default_rng(1).normal(size=(4, 4, 4)).astype(np.float32)
    return {name: write(name, **{f"l{i}.weight": own[i] for i in range(4)}) for name, own in values.items()}


def merge(*arguments, code: int = 0):
    result = dmm("merge", *arguments, "--align", "never")
    assert result.exit_code == code, result.output
    return result


def mean(*paths: Path) -> np.ndarray:
    return np.mean([load_file(path)["l3.weight"] for path in paths], axis=0)


def held(path: Path) -> np.ndarray:
    """What a later command reads."""
    with Checkpoint(resolve_source(str(path))) as file:
        return file.array("l3.weight")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("first", "second"), [(None, 70), (70, 140), (140, 70), (70, None)])
def test_a_merge_replaces_all_of_an_earlier_one(nets, tmp_path, first, second):
    out = tmp_path / "m"
    out.mkdir()
    before, after = (["-o", out / "model.safetensors", *(["--max-shard-size", size] if size else [])]
                     for size in (first, second))  # fmt: skip
    merge(nets["x"], nets["y"], *before)
    old = {path: path.read_bytes() for path in out.iterdir()}
    refused = merge(nets["x"], nets["z"], *after, code=2)
    assert "the output exists" in refused.stderr and "--force" in refused.stderr
    assert merge(nets["x"], nets["z"], *after, "--dry-run", code=2).stderr == refused.stderr
    merge(nets["x"], nets["z"], *after, "--force", "--dry-run")
    assert {path: path.read_bytes() for path in out.iterdir()} == old
    merge(nets["x"], nets["z"], *after, "--force")
    assert np.allclose(held(out), mean(nets["x"], nets["z"]))
    shards = {None: 0, 70: 4, 140: 2}[second]
    assert len(names(out)) == (shards + 1 if shards else 1)
    assert sum(path.suffix == ".safetensors" for path in out.iterdir()) == max(shards, 1)


def test_groups_of_an_earlier_merge_go(nets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    five = [nets[name] for name in "wxyzq"]
    Path("g.json").write_text(json.dumps({"groups": [["w", "x"], ["y", "z"]]}))
    merge(*five, "--group", "g.json", "--max-shard-size", 140, "-o", "out")
    save_file(load_file(nets["w"]), "out/group-9.safetensors")
    Path("out/notes.txt").write_text("mine")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")  # merge.json keeps paths as they were typed
    merge(*five[:2], "-o", "../out", code=2)
    merge(*five[:2], "-o", "../out", "--force")
    assert names(tmp_path / "out") == {"group-0.safetensors", "merge.json", "group-9.safetensors", "notes.txt"}
    assert np.allclose(held(tmp_path / "out" / "group-0.safetensors"), mean(*five[:2]))


def test_nothing_is_removed_when_the_merge_fails(nets, tmp_path):
    out = tmp_path / "out"
    merge(nets["x"], nets["q"], "--group", "auto", "-o", out)
    old = {path: path.read_bytes() for path in out.iterdir()}
    assert len(old) == 3
    broken = load_file(nets["x"])
    broken["l3.weight"][0, 0] = np.nan
    save_file(broken, tmp_path / "nan.safetensors")
    merge(nets["y"], tmp_path / "nan.safetensors", "-o", out, "--force", code=2)
    assert {path: path.read_bytes() for path in out.iterdir()} == old


def test_what_no_merge_wrote_stays(nets, tmp_path):
    """Shards and an index of another program, and what a merge.json of other origin tells of."""
    out = tmp_path / "m"
    out.mkdir()
    arrays = load_file(nets["q"])
    home = {name: f"model-{number:05}-of-00004.safetensors" for number, name in enumerate(arrays, 1)}
    for name, file in home.items():
        save_file({name: arrays[name]}, out / file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    foreign = names(out)
    merge(nets["x"], nets["y"], "-o", out / "model.safetensors", "--force")
    assert names(out) == foreign | {"model.safetensors"} and np.allclose(held(out), mean(nets["x"], nets["y"]))
    merge(nets["x"], "-o", tmp_path / "other")
    record = json.loads((tmp_path / "other" / "merge.json").read_text())
    record["outputs"] = [str(nets["x"]), "../x.safetensors", "model.safetensors"]
    (out / "merge.json").write_text(json.dumps(record))
    merge(nets["x"], nets["y"], "-o", out, "--force")
    assert names(out) == foreign | {"model.safetensors", "merge.json", "group-0.safetensors"} and nets["x"].exists()


def test_what_would_be_removed_must_not_be_an_input(nets, tmp_path):
    out = tmp_path / "out"
    merge(nets["x"], nets["q"], "--group", "auto", "-o", out)
    old = {path: path.read_bytes() for path in out.iterdir()}
    result = merge(out / "group-1.safetensors", nets["y"], "-o", out, "--force", code=2)
    assert "one of the inputs" in result.stderr
    shards = tmp_path / "s"
    shards.mkdir()
    merge(nets["x"], "-o", shards / "model.safetensors", "--max-shard-size", 70)
    result = merge(shards, nets["y"], "-o", shards / "model.safetensors", "--force", code=2)
    assert "one of the inputs" in result.stderr and np.allclose(held(shards), mean(nets["x"]))
    assert {path: path.read_bytes() for path in out.iterdir()} == old


@pytest.mark.parametrize(("fails_at", "kept"), [(0, True), (1, False)])
def test_a_merge_that_is_stopped_leaves_no_index_of_a_mixture(nets, tmp_path, monkeypatch, fails_at, kept):
    """Before the first new shard takes its place the old files stay; after it nothing names what lies there."""
    out = tmp_path / "out.safetensors"
    merge(nets["x"], nets["y"], "--max-shard-size", 70, "-o", out)
    before = {path: path.read_bytes() for path in tmp_path.glob("out*")}
    index, replace, calls = out.with_name("out.safetensors.index.json"), os.replace, []

    def stop(source, target):
        calls.extend([target] if Path(target).parent == tmp_path else [])  # not what is remembered elsewhere
        if len(calls) > fails_at:
            raise KeyboardInterrupt
        replace(source, target)

    if kept:
        monkeypatch.setattr(Source, "check_unchanged", lambda _: stop(out, out))
    else:
        monkeypatch.setattr(os, "replace", stop)
    merge(nets["x"], nets["z"], "--max-shard-size", 70, "-o", out, "--force", code=130)
    monkeypatch.undo()
    assert index.exists() == kept and not list(tmp_path.glob(".dmm*"))
    if kept:
        assert before == {path: path.read_bytes() for path in tmp_path.glob("out*")}
    merge(nets["x"], nets["z"], "--max-shard-size", 70, "-o", out, "--force")
    whole = tmp_path / "whole.safetensors"
    merge(nets["x"], nets["z"], "-o", whole)
    with Checkpoint(resolve_source(str(index))) as file:
        assert all((file.array(name) == value).all() for name, value in load_file(whole).items())


def two_groups(nets, first: str, second: str, *flags, code: int = 0):
    groups = nets["x"].with_name("groups.json")
    groups.write_text(json.dumps({"groups": [[first], [second]]}))
    return merge(nets[first], nets[second], "--group", groups, "-o", nets["x"].with_name("out"), *flags, code=code)


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_groups_stay_until_all_are_complete_and_no_record_tells_of_a_mixture(nets, tmp_path, monkeypatch, fails_at):
    """From then on, if only the process is ended in between, each is the old or the new one, and merge.json is gone."""
    two_groups(nets, "x", "q")
    out, replace, calls = tmp_path / "out", os.replace, []
    groups = [out / f"group-{number}.safetensors" for number in range(2)]
    before = {path: path.read_bytes() for path in out.iterdir()}

    def stop(source, target):
        calls.extend([target] if Path(target).parent == out else [])
        if len(calls) > fails_at - 1:
            raise KeyboardInterrupt
        replace(source, target)

    if fails_at:
        monkeypatch.setattr(os, "replace", stop)
    else:
        monkeypatch.setattr(Source, "check_unchanged", lambda source: stop(out, out) if source.label == "z" else None)
    two_groups(nets, "y", "z", "--force", code=130)
    monkeypatch.undo()
    assert names(out) == {path.name for path in groups} | ({"merge.json"} if fails_at == 0 else set())
    assert [before[path] == path.read_bytes() for path in groups] == [fails_at < 2, True]


def test_a_group_whose_place_another_merge_takes_meanwhile_goes_with_the_others(nets, tmp_path, monkeypatch):
    out, check = tmp_path / "out", Source.check_unchanged

    def taken(source):
        check(source)
        if source.label == "q":
            (out / "group-1.safetensors").write_bytes(b"of another")

    monkeypatch.setattr(Source, "check_unchanged", taken)
    refused = two_groups(nets, "x", "q", code=2)
    assert "the output exists" in refused.stderr and "group-1" in refused.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {"group-1.safetensors": b"of another"}


def test_groups_whose_index_cannot_be_written_go(nets, tmp_path, monkeypatch):
    def refusing(call, place):
        def wrapped(*arguments, **options):
            if str(arguments[place]).endswith("group-1.safetensors.index.json"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*arguments, **options)

        return wrapped

    monkeypatch.setattr(os, "link", refusing(os.link, 1))
    monkeypatch.setattr(os, "open", refusing(os.open, 0))
    refused = two_groups(nets, "x", "q", "--max-shard-size", 70, code=2)
    assert "group-1.safetensors.index.json: No space left" in refused.stderr and not (tmp_path / "out").exists()
