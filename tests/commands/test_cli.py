"""The interface rules: streams, exit codes, formats, defaults, outputs that are refused."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from conftest import DIGITS, digits_as_pseudo_data, dmm, shell
from safetensors.numpy import load_file, save_file

from dmm_cli import __version__
from dmm_cli.report import console

SITES = [DIGITS / f"site-{name}.safetensors" for name in "abcde"]


def test_version_and_help():
    assert dmm("--version").stdout == f"dmm {__version__}\n"
    assert dmm("--help").exit_code == 0 and "Usage" in dmm().stdout + dmm().stderr


def test_however_it_is_started_it_is_called_dmm():
    assert shell("inspect").stderr.startswith("Usage: dmm inspect ")
    told = {"_DMM_COMPLETE": "complete_bash", "COMP_WORDS": "dmm ins", "COMP_CWORD": "1"}
    assert shell(env=told).stdout.split() == ["inspect"]


def test_a_number_that_would_be_refused_does_not_end_completion():
    told = {"_DMM_COMPLETE": "complete_bash", "COMP_WORDS": f"dmm synthesize --seed {10**20} --co", "COMP_CWORD": "4"}
    assert shell(env=told).stdout.split() == ["--count", "--coarse"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (["evaluate", SITES[0], "--data", ""], "--data"),
        (["evaluate", SITES[0], "--data="], "--data"),
        (["evaluate", SITES[0], "", "--data", DIGITS / "test.safetensors"], "the path of a checkpoint"),
        (["evaluate", "@", "--data", DIGITS / "test.safetensors"], "the path of a list of checkpoints"),
        (["similarity", *SITES[:2], "--base", ""], "--base"),
        (["similarity", *SITES[:2], "--against", ""], "--against"),
        (["similarity", *SITES[:2], "--data", ""], "--data"),
        (["merge", *SITES[:2], "--base", "", "-o", "out.safetensors"], "--base"),
        (["merge", *SITES[:2], "--recalibrate", "", "-o", "out.safetensors"], "--recalibrate"),
        (["record", SITES[0], "--data", "", "-o", "out.safetensors"], "--data"),
        (
            ["record", SITES[0], "--data", DIGITS / "test.safetensors", "--owner", "", "-o", "out.safetensors"],
            "--owner",
        ),
        (["synthesize", SITES[0], "--statistics", "", "-o", "out.safetensors"], "--statistics"),
        (["synthesize", SITES[0], "--student", "", "-o", "out.safetensors"], "--student"),
        (["distill", *SITES[:2], "--data", "", "-o", "out.safetensors"], "--data"),
        (["run", *SITES[:2], "--statistics", "", "-o", "out"], "--statistics"),
        (["run", *SITES[:2], "--data", "", "-o", "out"], "--data"),
        (["merge", *SITES[:2], "-o", ""], "-o"),
        (["merge", *SITES[:2], "--output="], "--output"),
        (["merge", *SITES[:2], "-qo", ""], "-o"),
        (["align", *SITES[:2], "-o", ""], "-o"),
        (["record", SITES[0], "--data", DIGITS / "test.safetensors", "-o", ""], "-o"),
        (["run", *SITES[:2], "-o", ""], "-o"),
        (["similarity", *SITES[:2], "--figure", ""], "--figure"),
        (["inspect", SITES[0], "--grid", ""], "--grid"),
    ],
)
def test_an_empty_path_is_not_the_current_directory(tmp_path, monkeypatch, line, what):
    monkeypatch.chdir(tmp_path)
    result = dmm(*line)
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {what} is empty\nhint: name a file"), (
        result.stderr
    )
    assert not list(tmp_path.iterdir())


def test_an_empty_path_in_dmm_toml_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dmm.toml").write_text('[evaluate]\ndata = ""\n')
    result = dmm("evaluate", SITES[0])
    assert result.exit_code == 2 and "data of evaluate cannot be '': it is the path of an input" in result.stderr
    (tmp_path / "dmm.toml").write_text('[merge]\noutput = ""\n')
    result = dmm("merge", *SITES[:2])
    assert result.exit_code == 2 and "output of merge cannot be '': it is the path of an output" in result.stderr


def test_merge_writes_one_file_or_a_directory(tmp_path):
    one = dmm("merge", *SITES[:2], "-o", tmp_path / "one.safetensors", "-q")
    assert one.exit_code == 0 and one.stdout == f"{tmp_path}/one.safetensors\n"
    many = dmm("merge", *SITES, "--group", "auto", "-o", tmp_path / "many", "--json")
    record = json.loads(many.stdout)
    assert record["outputs"] == [f"{tmp_path}/many/group-{number}.safetensors" for number in range(3)]
    assert record == json.loads((tmp_path / "many" / "merge.json").read_text())
    alone = load_file(tmp_path / "many" / "group-1.safetensors")
    assert all((alone[name] == value).all() for name, value in load_file(SITES[3]).items())
    refused = dmm("merge", *SITES, "--group", "auto", "-o", tmp_path / "x.safetensors")
    assert refused.exit_code == 2 and "3 groups do not fit in one file" in refused.stderr


def test_merge_takes_groups_from_a_file_and_parameters(tmp_path):
    (tmp_path / "g.json").write_text('{"groups": [["site-a", "site-d"], ["site-b"]]}')
    result = dmm("merge", SITES[0], SITES[1], SITES[3], "--group", tmp_path / "g.json", "-o", tmp_path / "out", "-q")
    assert result.exit_code == 0 and len(result.stdout.split()) == 2
    base = DIGITS / "base.safetensors"
    options = ["--method", "task_arithmetic", "--base", base, "--param", "scale=1"]
    assert dmm("merge", SITES[0], *options, "-o", tmp_path / "t.safetensors").exit_code == 0
    got, site = load_file(tmp_path / "t.safetensors"), load_file(SITES[0])
    assert np.allclose(got["conv1.weight"], site["conv1.weight"], atol=1e-6)


def test_the_same_file_twice_is_warned_about(tmp_path):
    result = dmm("merge", SITES[0], SITES[0], "-o", tmp_path / "m.safetensors")
    assert result.exit_code == 0 and "has the same bytes as" in result.stderr
    got = load_file(tmp_path / "m.safetensors")
    assert all(got[name].tobytes() == value.tobytes() for name, value in load_file(SITES[0]).items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["similarity", SITES[0]], "2 checkpoints or more, got 1"),
        (["similarity", *SITES[:2], "--format", "jsn"], "did you mean json?"),
        (["similarity", *SITES[:2], "--measure", "cosin"], "did you mean cosine?"),
        (["merge", *SITES[:2]], "name a file or a directory with -o"),
        (["merge", "-o", "x.safetensors"], "no checkpoints given"),
        (["merge", *SITES[:2], "-o", "x.safetensors", "--group", "2"], "a cosine between -1 and 1"),
        (["merge", *SITES[:2], "-o", "x.safetensors", "--weights", "1,a"], "takes numbers separated by commas"),
        (["merge", *SITES[:2], "-o", "x.safetensors", "--weights", ""], "separated by commas, not nothing"),
        (["similarity", *SITES[:2], "--data", SITES[0], "--measure", "sign"], "--data is for the measure cka"),
        (["merge", *SITES[:2], "-o", "x.safetensors", "--param", "scale"], "takes name=value"),
        (["merge", *SITES[:2], "-o", "no/such/dir/x.safetensors"], "no such directory"),
        (["synthesize", SITES[0]], "name a file with -o"),
        (["synthesize", SITES[0], "-o", "x.safetensors", "--engine", "pixel"], "did you mean pixels?"),
        (["synthesize", SITES[0], "-o", "x.safetensors", "--loss", "bn=1"], "unknown inversion loss: bn"),
        (["synthesize", SITES[0], "-o", "x.safetensors", "--device", "cuda:9"], "no such device: cuda:9"),
        (["synthesize", SITES[0], "-o", "x.safetensors", "--class-prior", "1,2"], "2 counts for 10 classes"),
        (["synthesize", SITES[0], "-o", "x.safetensors", "--input-size", "3,32"], "channels,height,width"),
        (["synthesize", SITES[0], "-o", "x.safetensors", "--input-size", f"1,{10**21},16"], "channels,height,width"),
        (["distill", *SITES[:2], "--data", SITES[0], "-o", "x.safetensors"], "not a pseudo-data file"),
        (["distill", *SITES[:2], "--data", SITES[0]], "name a file with -o"),
        (["evaluate", SITES[0], "--data", SITES[0]], "no array named images"),
        (["evaluate", SITES[0], "--data", DIGITS / "test.safetensors", "--std", "0"], "above zero"),
        (["evaluate", SITES[0], "--data", DIGITS / "test.safetensors", "--mean", "nan"], "--mean takes finite numbers"),
        (["synthesize", SITES[0], "-o", "x.safetensors", "--input-size", "inf,1,1"], "--input-size takes finite"),
        (["synthesize", SITES[0], "-o", "x.safetensors", "--loss", "norm=inf"], "--loss norm takes finite numbers"),
        (["synthesize", SITES[0], "-o", "x.safetensors", "--class-prior", "1,nan"], "--class-prior takes finite"),
        (["run", *SITES], "name a directory with -o"),
        (["run", *SITES, "-o", "out", "--data", "nothing"], "no such file: nothing"),
        (["inspect", "nothing.safetensors"], "no such file: nothing.safetensors"),
    ],
)
def test_mistakes_exit_2_with_one_message_and_write_nothing(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = dmm(*arguments)
    assert result.exit_code == 2 and words in result.stderr
    assert result.stderr.count("error:") == 1 and result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--learning-rate", "inf", "inf is not a finite number"),
        ("--temperature", "nan", "nan is not a finite number"),
        ("--fail-under", "nan", "nan is not a finite number"),
        ("--fail-under", 200, "200 is not in the range 0<=x<=100"),
        ("--seed", 10**20, "is larger than 9007199254740992"),
    ],
)
def test_options_that_are_no_number_to_compute_with_are_refused(tmp_path, option, value, words):
    out = tmp_path / "x.safetensors"
    result = dmm("distill", *SITES[:2], "--data", SITES[0], "-o", out, option, value)
    assert result.exit_code == 2 and option in result.stderr and words in result.stderr
    assert not out.exists()


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "lfs": lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
    "pickle": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "fifo": os.mkfifo,
    "truncated": lambda path: path.write_bytes(SITES[0].read_bytes()[:-100]),
    "other keys": lambda path: save_file({"w": np.ones((2, 2), np.float32)}, path),
    "nan": lambda path: save_file({**load_file(SITES[0]), "fc.weight": np.full((10, 64), np.nan, np.float32)}, path),
    "other shapes": lambda path: save_file({**load_file(SITES[0]), "fc.bias": np.ones(3, np.float32)}, path),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_checkpoints_are_named_by_merge(tmp_path, kind):
    path = tmp_path / "bad.safetensors"
    BROKEN[kind](path)
    result = dmm("merge", SITES[0], path, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2, result.output
    assert str(path) in result.stderr
    if kind in ("nan", "other shapes"):
        assert "fc." in result.stderr
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("command", "bound", "words"),
    [
        (["evaluate", SITES[0], "--data", DIGITS / "test.safetensors"], -1, "-1 is not in the range 0<=x<=100"),
        (["evaluate", SITES[0], "--data", DIGITS / "test.safetensors"], 100.5, "100.5 is not in the range 0<=x<=100"),
        (["evaluate", SITES[0], "--data", DIGITS / "test.safetensors"], "nan", "nan is not a finite number"),
        (["similarity", *SITES[:2]], -1.5, "-1.5 is not in the range -1<=x<=1"),
        (["similarity", *SITES[:2]], "nan", "nan is not a finite number"),
    ],
)
def test_nothing_is_asked_for_that_cannot_be(command, bound, words):
    result = dmm(*command, "--fail-under", bound)
    assert result.exit_code == 2 and f"Invalid value for '--fail-under': {words}" in result.stderr


def test_a_gate_does_not_let_damaged_weights_pass(tmp_path):
    arrays, path = load_file(SITES[0]), tmp_path / "nan.safetensors"
    arrays["bn1.weight"][0] = np.nan
    save_file(arrays, path)
    result = dmm("similarity", SITES[0], path, "--fail-under", 0.9)
    assert result.exit_code == 2 and f"NaN or infinity in tensor bn1.weight of {path}" in result.stderr


def test_teachers_that_cannot_teach(tmp_path, write):
    out = tmp_path / "out.safetensors"
    unknown = dmm("synthesize", write("odd", strange__weight=np.ones(3, np.float32)), "-o", out)
    assert unknown.exit_code == 2 and "cannot tell the architecture" in unknown.stderr
    import torch
    from safetensors.torch import save_file as save_torch

    from dmm_cli.architectures import build

    torch.manual_seed(0)
    vit = "vit_tiny_patch16_224,num_classes=3,img_size=32,patch_size=16,depth=1"
    save_torch(build(vit).state_dict(), tmp_path / "vit.safetensors", {"dmm.arch": vit})
    result = dmm("synthesize", tmp_path / "vit.safetensors", "-o", out)
    assert result.exit_code == 2 and "0 BatchNorm layers" in result.stderr
    assert not out.exists()


def test_outputs_in_the_way(tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    refused = dmm("merge", *SITES[:2], "-o", out)
    assert refused.exit_code == 2 and "--force" in refused.stderr and out.read_text() == "mine"
    assert dmm("merge", *SITES[:2], "-o", out, "--force").exit_code == 0
    before = SITES[0].read_bytes()
    clash = dmm("merge", *SITES[:2], "-o", SITES[0], "--force")
    assert clash.exit_code == 2 and "one of the inputs" in clash.stderr and SITES[0].read_bytes() == before


def test_inspect_tells_what_is_there():
    result = dmm("inspect", SITES[3], "--json")
    record = json.loads(result.stdout)
    assert record["architecture"]["evidence"] == "dmm.arch in the file's metadata"
    assert record["parameters"] == 167018 and record["norm_layers"] == 13
    assert record["dtypes"] == {"F32": 67, "I64": 13} and record["classes"] == list("0123456789")
    assert dmm("inspect", SITES[3], "-q").stdout.startswith("resnet18,num_classes=10")
    assert "BatchNorm layers" in dmm("inspect", SITES[3]).stdout
    assert dmm("inspect", SITES[3], "--arch", "resnet18,num_classes=10").exit_code == 2  # which it is not


def test_evaluate_scores_models_and_their_ensembles():
    command = ["evaluate", *SITES[:2], "--data", DIGITS / "test.safetensors", "--ensemble"]
    record = json.loads(dmm(*command, "--json").stdout)
    assert [row["label"] for row in record["rows"]] == ["site-a", "site-b", "ensemble", "ensemble of logits"]
    assert json.loads(dmm(*command, "--json", "-q").stdout) == record
    values = [float(line) for line in dmm(*command, "-q").stdout.split()]
    assert values == pytest.approx([row["accuracy"] for row in record["rows"]], abs=1e-4)
    failed = dmm(*command, "--fail-under", 60)
    told = failed.stderr.splitlines()
    assert failed.exit_code == 1 and told[0] == "error: accuracy below 60.0 %" and len(told) == 3
    assert all(line.startswith("  ") and line.endswith(" %") for line in told[1:])


def test_quiet_tells_no_progress(monkeypatch):
    monkeypatch.setattr(console, "PATIENCE", -1.0)
    command = ["evaluate", *SITES[:3], "--data", DIGITS / "test.safetensors"]
    assert "evaluate 100%" in dmm(*command).stderr
    assert dmm(*command, "-q").stderr == ""


def test_names_from_outside_cannot_speak_to_the_terminal(tmp_path):
    path = tmp_path / "a\x1b[31m.safetensors"
    save_file({"w\x1b[2J": np.ones(2, np.float32)}, path)
    result = dmm("merge", SITES[0], path, "-o", tmp_path / "o.safetensors")
    assert result.exit_code == 2 and "\x1b" not in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["similarity", SITES[0], SITES[1]],
        ["align", SITES[0], SITES[1], "-o", "out.safetensors"],
        ["merge", SITES[0], SITES[1], "-o", "out.safetensors"],
        ["record", SITES[0], "--data", DIGITS / "test.safetensors", "-o", "out.safetensors"],
        ["synthesize", SITES[0], SITES[1], "-o", "out.safetensors"],
        ["distill", SITES[0], SITES[1], "--data", "pseudo.safetensors", "-o", "out.safetensors"],
        ["run", SITES[0], SITES[1], "-o", "out"],
    ],
    ids=lambda words: words[0],
)
def test_a_dry_run_tells_its_plan_as_json_too(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    digits_as_pseudo_data(tmp_path / "pseudo.safetensors", [(SITES[1], range(5))])
    plain, result = dmm(*words, "--dry-run"), dmm(*words, "--dry-run", "--json")
    assert plain.exit_code == result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"schema": "dmm.plan/1", "plan": plain.stdout.rstrip("\n")}
    assert [path.name for path in tmp_path.iterdir()] == ["pseudo.safetensors"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["inspect", SITES[0]], "inspect is not shared among the processes of torchrun"),
        (["run", SITES[0], SITES[1], "-o", "out"], "run is not shared"),
        (["merge", "-", "-o", "out.safetensors"], "standard input cannot be read"),
        (["merge", *SITES[:2], "--recalibrate", SITES[2], "-o", "out.safetensors"], "written by one process"),
        (["merge", "--group", "-", "-o", "out.safetensors"], "standard input cannot be read"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = dmm(*words, text="{}")
    assert result.exit_code == 2 and told in result.stderr and "hint: " in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_one_standard_input_is_not_two_arguments(tmp_path):
    out = ["-o", tmp_path / "out.safetensors"]
    both = dmm("merge", "-", "--group", "-", *out, text=f"{SITES[0]}\n{SITES[1]}\n")
    assert both.exit_code == 2 and both.stderr.startswith("error: standard input is read once"), both.stderr
    for command in (["distill", "-", SITES[1], "--data", SITES[0]], ["synthesize", SITES[0], "--statistics", "-"]):
        result = dmm(*command, *out, text=f"{SITES[0]}\n")
        assert result.exit_code == 2 and "or not for this argument\n" in result.stderr, result.stderr


def test_run_does_not_offer_groups_from_a_record(tmp_path):
    for group in ("g.json", "-"):
        result = dmm("run", *SITES[:2], "-o", tmp_path / "out", "--group", group)
        assert result.exit_code == 2 and "--group takes auto, all, or a cosine between -1 and 1\n" in result.stderr


@pytest.mark.parametrize("command", ["merge", "align", "record", "synthesize", "distill", "run", "similarity"])
def test_help_speaks_of_a_format_only_where_there_is_one(command):
    shown = dmm(command, "--help").stdout
    assert ("Short for --format json." in shown) == ("  --format " in shown)
