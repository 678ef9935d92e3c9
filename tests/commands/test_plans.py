"""A dry run refuses what the headers tell that the run would refuse, in the same words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from conftest import DIGITS, digits_as_pseudo_data, dmm
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

SITES = [DIGITS / f"site-{name}.safetensors" for name in "ab"]


@pytest.fixture
def telling(tmp_path, monkeypatch):
    """The file of a site in the working directory, with another entry of metadata."""
    monkeypatch.chdir(tmp_path)

    def make(key: str, text: str) -> str:
        with safe_open(SITES[0], "np") as file:
            save_file(load_file(SITES[0]), "x.safetensors", {**file.metadata(), key: text})
        return "x.safetensors"

    return make


def refused_by_both(*command: object) -> str:
    """What a command and its dry run say, which is the same."""
    dry, result = dmm(*command, "--dry-run"), dmm(*command)
    assert dry.exit_code == result.exit_code == 2 and dry.stderr == result.stderr and not dry.stdout, dry.output
    return dry.stderr


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("dmm.input", "xx", "x.safetensors: dmm.input is not a JSON object"),
        ("dmm.input", "[]", "x.safetensors: dmm.input is not a JSON object"),
        ("dmm.class_counts", "[1,-2]", "x.safetensors: dmm.class_counts is not a JSON list of numbers"),
        ("dmm.class_counts", "xx", "x.safetensors: dmm.class_counts is not a JSON list of numbers"),
        ("dmm.class_counts", "[NaN]", "x.safetensors: dmm.class_counts is not a JSON list of numbers"),
        ("dmm.class_counts", "[0,0,0,0,0,0,0,0,0,0]", "class counts of x do not describe a class mix"),
        ("dmm.class_counts", "[1,2]", "2 counts for 10 classes"),
        ("dmm.classes", '["cat"]', "x.safetensors has 10 classes, but dmm.classes in its metadata names 1"),
        ("dmm.arch", "nosuch.module:net", "x.safetensors asks for code to be run"),
        ("dmm.arch", "hf-hub:timm/resnet18", "dmm does not fetch architectures"),
        ("dmm.arch", "resnet18,10", "cannot read '10' in resnet18,10\n  it is dmm.arch of x.safetensors"),
        ("dmm.arch", "resnet18,pretrained=True", "an architecture has no weights to load"),
    ],
)
def test_metadata_that_no_network_can_have_are_refused(telling, key, text, words):
    path = telling(key, text)
    assert words in refused_by_both("synthesize", path, "-o", "out.safetensors")
    assert words in refused_by_both("synthesize", SITES[1], "--student", path, "-o", "out.safetensors")


@pytest.mark.parametrize(("key", "text"), [("dmm.input", "xx"), ("dmm.class_counts", "[1,-2]")])
def test_record_and_run_refuse_damaged_metadata_too(telling, key, text):
    path = telling(key, text)
    words = f"error: x.safetensors: {key} is not a JSON"
    assert refused_by_both("run", path, SITES[1], "-o", "out").startswith(words)
    data = ["--data", DIGITS / "test.safetensors"]
    assert refused_by_both("record", path, *data, "-o", "out.safetensors").startswith(words)


def test_a_class_prior_that_does_not_fit_is_refused(tmp_path):
    command = ["synthesize", SITES[0], "--class-prior", "1,2", "-o", tmp_path / "out.safetensors"]
    assert "2 counts for 10 classes" in refused_by_both(*command)


def test_counts_that_do_not_fit_are_told_with_the_file_that_holds_them(tmp_path):
    stats = tmp_path / "stats.safetensors"
    assert dmm("record", SITES[0], "--data", DIGITS / "test.safetensors", "-o", stats).exit_code == 0
    with safe_open(stats, "np") as file:
        metadata = file.metadata() | {"dmm.class_counts": "[1, 2]"}
    save_file(load_file(stats), stats, metadata)
    said = refused_by_both("synthesize", SITES[0], "--statistics", stats, "-o", tmp_path / "out.safetensors")
    assert said.startswith(f"error: class counts of {stats} do not describe") and "2 counts for 10 classes" in said


@pytest.mark.parametrize("command", [["synthesize", SITES[0]], ["distill", *SITES, "--data", SITES[0]]])
def test_what_is_no_device_is_refused(tmp_path, command):
    assert "unknown device: tpu" in refused_by_both(*command, "--device", "tpu", "-o", tmp_path / "out.safetensors")


@pytest.mark.parametrize("command", [["distill", *SITES], ["similarity", *SITES], ["merge", *SITES]])
def test_a_checkpoint_in_place_of_pseudo_data_is_refused(tmp_path, command):
    flag = "--recalibrate" if command[0] == "merge" else "--data"
    words = refused_by_both(*command, flag, SITES[0], "-o", tmp_path / "out.safetensors")
    assert words.startswith(f"error: not a pseudo-data file: {SITES[0]}")


@pytest.fixture
def of_one(tmp_path):
    """Pseudo-data of the first site."""
    return digits_as_pseudo_data(tmp_path / "pseudo.safetensors", [(SITES[0], range(5))])


@pytest.mark.parametrize("command", [["distill", SITES[0], *SITES], ["similarity", *SITES], ["merge", *SITES]])
def test_a_checkpoint_that_no_pseudo_data_were_made_from_is_refused(tmp_path, of_one, command):
    flag = "--recalibrate" if command[0] == "merge" else "--data"
    words = refused_by_both(*command, flag, of_one, "-o", tmp_path / "out.safetensors")
    assert words.startswith(f"error: the pseudo-data hold nothing of teacher {SITES[1]} (sha256 ")
    assert "it was made from site-a (sha256 " in words


def test_groups_of_one_need_no_pseudo_data(tmp_path, of_one):
    command = ["merge", *SITES, "--recalibrate", of_one, "-o", tmp_path / "out", "--group", "-", "--dry-run"]
    assert dmm(*command, text=json.dumps({"groups": [["site-a"], ["site-b"]]})).exit_code == 0
    assert "hold nothing of" in dmm(*command, text=json.dumps({"groups": [["site-a", "site-b"]]})).stderr


def test_a_teacher_named_twice_is_refused(tmp_path, of_one):
    command = ["distill", SITES[1], SITES[0], SITES[0], "--data", of_one, "-o", tmp_path / "out.safetensors"]
    assert refused_by_both(*command).startswith(f"error: {SITES[0]} is among the teachers twice")


def test_teachers_and_students_that_name_other_classes_are_refused(telling, tmp_path):
    names = telling("dmm.classes", '["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]')
    pseudo = digits_as_pseudo_data(tmp_path / "pseudo.safetensors", [(SITES[0], range(5))])
    command = ["distill", names, SITES[0], "--data", pseudo, "-o", "out.safetensors"]
    assert "the checkpoints name different classes" in refused_by_both(*command)


def test_of_several_processes_the_first_tells_the_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        result = dmm("merge", *SITES, "-o", tmp_path / "x.safetensors", "--dry-run", "--json")
        assert result.exit_code == 0, result.stderr
        told.append(result.stdout)
    monkeypatch.delenv("RANK")
    assert dmm("merge", *SITES, "-o", tmp_path / "x.safetensors", "--dry-run", "--json").stdout == told[0]
    assert json.loads(told[0])["schema"] == "dmm.plan/1" and not told[1]


def test_the_plan_of_stated_groups_tells_their_sizes(tmp_path):
    command = ["merge", *SITES, "-o", tmp_path / "out", "--dry-run", "--group", "-"]
    names = [path.stem for path in SITES]
    split = dmm(*command, text=json.dumps({"groups": [names[:-1]]}))
    assert split.exit_code == 0 and f"in groups of {len(names) - 1}, 1" in split.stdout + split.stderr
    whole = dmm(*command, text=json.dumps({"groups": [names]}))
    assert whole.exit_code == 0 and "in groups" not in whole.stdout + whole.stderr
    twice = dmm(*command, text='{"groups": [["a"]], "groups": [["b"]]}')
    assert twice.exit_code == 2 and "standard input holds groups twice" in twice.stderr
    nothing = dmm(*command, text='{"groups": NaN}')
    assert nothing.exit_code == 2 and "NaN is not JSON" in nothing.stderr


@pytest.mark.parametrize("flags", [[], ["--dtype", "bfloat16"], ["--max-shard-size", "100KB", "--dtype", "bfloat16"]])
def test_a_plan_of_a_merge_tells_the_files_and_bytes_that_are_written(tmp_path, flags):
    words = ["merge", *SITES, "-o", tmp_path / "out.safetensors", *flags]
    plan = dmm(*words, "--dry-run").stdout
    assert dmm(*words).exit_code == 0
    files = sorted(tmp_path.glob("*.safetensors"))
    tensors = [array for file in files for array in safetensors.torch.load_file(file).values()]
    assert f", {len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors)} bytes a group" in plan
    assert ("index" in plan) == (len(files) > 1)
    assert len(files) == 1 or f" in {len(files)} files and an index -> " in plan


def test_a_plan_of_a_wider_merge_tells_the_least_it_writes(tmp_path):
    words = ["merge", SITES[0], DIGITS / "site-d.safetensors", "--overlap", 0.5, "--max-shard-size", "100KB"]
    plan = dmm(*words, "-o", tmp_path / "out.safetensors", "--dry-run").stdout
    assert ", more than 672912 bytes a group, 50 % of the units side by side in more -> " in plan


def test_a_plan_of_groups_with_unlike_classes_tells_the_bytes_of_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, classes in {"a": "xy", "b": "xy", "c": "yz"}.items():
        save_file({"fc.weight": np.zeros((2, 4), np.float32)}, name, {"dmm.classes": json.dumps(list(classes))})
    for members, told in (([[0, 1], [2]], "32 bytes"), ([[0], [1, 2]], "32 to 48 bytes")):
        groups = [{"name": f"group-{n}", "members": part, "reason": ""} for n, part in enumerate(members)]
        Path("g.json").write_text(json.dumps({"schema": "dmm.grouping/1", "labels": list("abc"), "groups": groups}))
        result = dmm("merge", "a", "b", "c", "--group", "g.json", "-o", "out", "--dry-run")
        assert f", 1 tensors, {told} a group -> out" in result.stdout, result.stderr
