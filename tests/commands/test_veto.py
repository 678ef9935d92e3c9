"""``dmm merge --group auto --recalibrate``: a group is parted when its merge makes a member forget."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import DIGITS, digits_as_pseudo_data, dmm
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dmm_cli.alignment.apply import permute, random_image
from dmm_cli.alignment.trace import trace
from dmm_cli.inputs import resolve_source
from dmm_cli.loading import load_model
from dmm_cli.manifest import Retention

SITES = [DIGITS / f"site-{name}.safetensors" for name in "ab"]


@pytest.fixture(scope="module")
def liar(tmp_path_factory) -> Path:
    """site-a with other names for its classes: as similar to site-a as can be, and in contradiction to it."""
    tensors = load_file(SITES[0])
    for name in ("fc.weight", "fc.bias"):
        tensors[name] = tensors[name][[1, 2, 3, 4, 0, 5, 6, 7, 8, 9]]
    with safe_open(SITES[0], "numpy") as file:
        metadata = file.metadata()
    path = tmp_path_factory.mktemp("veto") / "liar.safetensors"
    save_file(tensors, path, metadata)
    return path


@pytest.fixture(scope="module")
def pseudo(liar) -> Path:
    teachers = [(SITES[0], range(5)), (SITES[1], range(2, 6)), (liar, range(5))]
    return digits_as_pseudo_data(liar.with_name("pseudo.safetensors"), teachers)


def test_contradictory_checkpoints_are_parted_whatever_their_order(liar, pseudo, tmp_path):
    found = []
    for number, order in enumerate(([*SITES, liar], [liar, *SITES[::-1]])):
        out = tmp_path / str(number)
        result = dmm("merge", *order, "--group", "auto", "--recalibrate", pseudo, "-o", out)
        assert result.exit_code == 0, result.stderr
        record = json.loads((out / "merge.json").read_text())
        labels = record["grouping"]["labels"]
        found.append([sorted(labels[i] for i in group["members"]) for group in record["grouping"]["groups"]])
        parted = {
            frozenset((labels[pair["a"]], labels[pair["b"]])): pair["reason"]
            for pair in record["grouping"]["pairs"]
            if not pair["together"]
        }
        assert all("vetoed: merged, " in reason for reason in parted.values())
        assert "vetoed: merged, " in result.stdout
        assert [labels[i] for i in record["grouping"]["divergent"]] == ["liar"]
        assert sorted(path.name for path in out.iterdir()) == [
            "group-0.safetensors",
            "group-1.safetensors",
            "merge.json",
        ]
        assert all(item["before"] - item["after"] <= 10 for item in record["retained"]["group-0"])
    assert found[0] == found[1] == [["site-a", "site-b"], ["liar"]]


def test_those_who_leave_a_group_are_tried_together(liar, pseudo, tmp_path):
    """Two pairs, each in contradiction to the other."""
    twins = [tmp_path / "twin.safetensors", tmp_path / "other-liar.safetensors"]
    for twin, original in zip(twins, (SITES[0], liar), strict=True):
        twin.write_bytes(original.read_bytes())
    out = tmp_path / "out"
    dmm("merge", SITES[0], twins[0], liar, twins[1], "--group", "auto", "--recalibrate", pseudo, "-o", out)
    record = json.loads((out / "merge.json").read_text())
    labels = record["grouping"]["labels"]
    groups = [sorted(labels[i] for i in group["members"]) for group in record["grouping"]["groups"]]
    assert sorted(groups) == [["liar", "other-liar"], ["site-a", "twin"]]


def test_a_copy_in_another_order_is_aligned_before_it_is_judged(tmp_path):
    model, _ = load_model(resolve_source(str(SITES[0])))
    spec = trace(model, (1, 16, 16))
    held = {name: value.numpy() for name, value in model.state_dict().items()}
    floats = {name: value for name, value in held.items() if value.dtype == np.float32}
    moved = permute(floats, spec, random_image(spec, np.random.default_rng(0)))
    copy = tmp_path / "copy.safetensors"
    with safe_open(SITES[0], "numpy") as file:
        metadata = file.metadata()
    save_file({name: np.array(moved.get(name, value), order="C") for name, value in held.items()}, copy, metadata)
    data = digits_as_pseudo_data(tmp_path / "pseudo.safetensors", [(SITES[0], range(5)), (copy, range(5))])
    flags = ["--group", "auto", "--align", "always", "--recalibrate", data]
    result = dmm("merge", SITES[0], copy, *flags, "-o", tmp_path / "out.safetensors", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert len(record["grouping"]["groups"]) == 1
    assert min(item["after"] for item in record["retained"]["group-0"]) > 90


def test_without_pseudo_data_or_where_groups_are_given_there_is_no_veto(liar, pseudo, tmp_path):
    blind = dmm("merge", SITES[0], liar, "--group", "auto", "-o", tmp_path / "blind.safetensors")
    assert blind.exit_code == 0 and "vetoed" not in blind.stdout
    given = dmm("merge", SITES[0], liar, "--recalibrate", pseudo, "-o", tmp_path / "all.safetensors", "--json")
    retained = json.loads(given.stdout)["retained"]["group-0"]
    assert given.exit_code == 0 and min(item["after"] for item in retained) < 80


@pytest.mark.parametrize(("after", "groups"), [(17, 1), (16, 2)])
def test_a_loss_of_ten_points_is_no_veto(pseudo, tmp_path, monkeypatch, after, groups):
    """Of 20 in 30 and 17 in 30 the difference is more by its rounding."""
    retained = [Retention(path.stem, 30, 100.0 * 20 / 30, 100.0 * after / 30) for path in SITES]
    monkeypatch.setattr("dmm_cli.commands._recalibrate.retention", lambda *_: tuple(retained))
    out = tmp_path / "out"
    assert dmm("merge", *SITES, "--group", "auto", "--recalibrate", pseudo, "-o", out).exit_code == 0
    assert len(json.loads((out / "merge.json").read_text())["grouping"]["groups"]) == groups


def test_a_vetoed_group_does_not_go_to_one_file(liar, pseudo, tmp_path):
    out = tmp_path / "one.safetensors"
    result = dmm("merge", SITES[0], liar, "--group", "auto", "--recalibrate", pseudo, "-o", out)
    assert result.exit_code == 2 and "2 groups do not fit in one file" in result.stderr
    assert list(tmp_path.iterdir()) == []
