"""What dmm inspect lists of a checkpoint's tensors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import DIGITS, digits_as_pseudo_data, dmm
from safetensors.numpy import save_file

from dmm_cli.inputs import resolve_source

SITE = DIGITS / "site-a.safetensors"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--format", "table"], "conv1.weight "),
        (["--format", "md"], "| conv1.weight | F32 | 64x1x7x7 |"),
        (["--format", "tsv"], "conv1.weight\tF32\t64x1x7x7"),
        (["-q"], "conv1.weight"),
    ],
)
def test_every_tensor_is_listed_on_request(flags, line):
    names = list(resolve_source(str(SITE)).tensors)
    plain, listed = dmm("inspect", SITE, *flags).stdout, dmm("inspect", SITE, *flags, "--tensors").stdout
    assert line not in plain and any(row.startswith(line) for row in listed.splitlines())
    assert all(name in listed for name in names) and (flags != ["-q"] or listed.split() == names)


def test_json_lists_tensors_on_request_with_shapes_as_numbers():
    record = json.loads(dmm("inspect", SITE, "--tensors", "--json").stdout)
    held = {tensor["name"]: tensor for tensor in record["tensors"]}
    assert held["conv1.weight"] == {"name": "conv1.weight", "dtype": "F32", "shape": [64, 1, 7, 7]}
    assert held["bn1.num_batches_tracked"]["shape"] == []
    assert list(held) == list(resolve_source(str(SITE)).tensors)
    assert json.loads(dmm("inspect", SITE, "--json").stdout)["tensors"] == []


def test_hints_name_the_command_that_lists_tensors(write, tmp_path):
    paths = [write(name, w=np.ones((2, size), np.float32)) for name, size in (("a", 2), ("b", 3))]
    result = dmm("merge", *paths, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2 and "hint: dmm inspect --tensors lists those of one" in result.stderr
    other = ["merge", paths[0], paths[0], "--param", "zz*:weights=1,2", "-o", tmp_path / "out.safetensors"]
    assert f"hint: dmm inspect --tensors {paths[0]} lists the tensors" in dmm(*other).stderr


def test_damaged_metadata_are_warned_of(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": np.ones((2, 2), np.float32)}, path, {"dmm.classes": "[1,", "dmm.arch": ""})
    result = dmm("inspect", path, "--json")
    assert result.exit_code == 0 and f"warning: {path}: dmm.classes is not" in result.stderr, result.stderr
    record = json.loads(result.stdout)
    assert record["warnings"] and record["architecture"]["spec"] is None
    assert record["architecture"]["evidence"] == f"dmm.arch in the metadata of {path} is empty"
    assert record["provenance"]["dmm.classes"] == "[1,"
    assert not json.loads(dmm("inspect", SITE, "--json").stdout)["warnings"]


@pytest.mark.parametrize("kind", ["dmm.statistics/1", "dmm.pseudo-data/1"])
def test_an_input_in_a_form_of_its_own_is_no_damage(tmp_path, kind):
    path = tmp_path / "held.safetensors"
    for text, warns in (('{"names": ["a"], "specs": []}', False), ("{", True)):
        save_file({"a": np.zeros(1)}, path, {"dmm.kind": kind, "dmm.input": text})
        warnings = json.loads(dmm("inspect", path, "--json").stdout)["warnings"]
        assert bool(warnings) == warns and all("dmm.input is not" in line for line in warnings)


def test_what_is_no_checkpoint_has_no_parameters_and_no_architecture(tmp_path, monkeypatch):
    monkeypatch.setattr("dmm_cli.architectures.detect", lambda source: pytest.fail("looked for"))
    pseudo = digits_as_pseudo_data(tmp_path / "pseudo.safetensors", [(SITE, [0])])
    statistics = tmp_path / "statistics.safetensors"
    assert dmm("record", SITE, "--data", DIGITS / "test.safetensors", "-o", statistics).exit_code == 0
    for path, kind in ((pseudo, "dmm.pseudo-data/1"), (statistics, "dmm.statistics/1")):
        record = json.loads(dmm("inspect", path, "--json").stdout)
        assert record["parameters"] == 0
        assert record["architecture"] == {"spec": None, "evidence": f"no checkpoint, but {kind}"}


def test_a_grid_is_drawn_with_the_report_or_not_at_all(tmp_path):
    pseudo = digits_as_pseudo_data(tmp_path / "pseudo.safetensors", [(SITE, [0])])
    result = dmm("inspect", pseudo, "--grid", tmp_path / "g.png", "--arch", "nope")
    assert result.exit_code == 2 and "nope" in result.stderr and list(tmp_path.iterdir()) == [pseudo]


def test_quiet_names_are_whole(tmp_path):
    path, name = tmp_path / "long.safetensors", "block." * 50 + "weight"
    save_file({name: np.ones((2, 2), np.float32)}, path, {"dmm.arch": f"resnet18,x={'1' * 300}"})
    assert dmm("inspect", path, "-q", "--tensors").stdout == f"{name}\n"
