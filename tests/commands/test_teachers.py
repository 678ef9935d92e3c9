"""Teachers that cannot go together are refused before the first step."""

from __future__ import annotations

import json

import pytest
from conftest import DIGITS, dmm
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

SITE = DIGITS / "site-a.safetensors"


def changed(path, classes: int, names: list[str] | None):
    """A site whose classifier is cut to some classes, which may be named."""
    with safe_open(SITE, "np") as file:
        metadata = file.metadata()
    arrays = load_file(SITE)
    arrays |= {name: arrays[name][:classes].copy() for name in ("fc.weight", "fc.bias")}
    metadata["dmm.arch"] = metadata["dmm.arch"].replace("num_classes=10", f"num_classes={classes}")
    del metadata["dmm.classes"]
    metadata.pop("dmm.class_counts", None)
    save_file(arrays, path, metadata | ({"dmm.classes": json.dumps(names)} if names else {}))
    return path


def test_teachers_with_fewer_classes_are_refused_before_the_first_step(tmp_path):
    seven, out = changed(tmp_path / "seven.safetensors", 7, None), tmp_path / "out.safetensors"
    result = dmm("synthesize", SITE, seven, "--count", 8, "--steps", 2, "--batch", 8, "-o", out)
    assert result.exit_code == 2 and "different numbers of classes" in result.stderr
    assert f"{seven}: 7" in result.stderr and not out.exists()


@pytest.mark.parametrize("command", ["synthesize", "run"])
def test_teachers_that_name_other_classes_are_refused_by_their_headers(tmp_path, command):
    other, out = changed(tmp_path / "other.safetensors", 10, [*"9876543210"]), tmp_path / "out.safetensors"
    result = dmm(command, SITE, other, "--dry-run", "-o", out)
    assert result.exit_code == 2 and "classes in another order" in result.stderr and str(other) in result.stderr
    assert not result.stdout and not out.exists()
    strange = changed(tmp_path / "strange.safetensors", 10, [*"abcdefghij"])
    result = dmm(command, SITE, strange, "--dry-run", "-o", out)
    assert result.exit_code == 2 and "name different classes" in result.stderr


def test_what_is_said_to_bring_classes_into_one_order_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = changed(tmp_path / "other.safetensors", 10, [*"9876543210"])
    hint = dmm("synthesize", SITE, other, "--dry-run", "-o", "out.safetensors").stderr.partition("dmm merge ")[2]
    assert dmm("merge", *hint.split()).exit_code == 0
    ordered, given = load_file(tmp_path / "in-order.safetensors"), load_file(other)
    heads = {"fc.weight", "fc.bias"}
    assert all((ordered[name] == given[name][::-1]).all() for name in heads)
    assert all((ordered[name] == given[name]).all() for name in given.keys() - heads)
    assert dmm("synthesize", SITE, "in-order.safetensors", "--dry-run", "-o", "out.safetensors").exit_code == 0


@pytest.mark.parametrize("command", ["synthesize", "run"])
@pytest.mark.parametrize("kind", ["copy", "link", "same path"])
def test_a_teacher_named_twice_is_refused_before_anything_is_computed(tmp_path, command, kind):
    again, out = tmp_path / "again.safetensors", tmp_path / "out.safetensors"
    if kind == "copy":
        again.write_bytes(SITE.read_bytes())
    elif kind == "link":
        again.symlink_to(SITE)
    else:
        again = SITE
    for last in ([], ["--dry-run"]):
        result = dmm(command, SITE, DIGITS / "site-b.safetensors", again, "-o", out, *last)
        assert result.exit_code == 2 and f"{again} is the same checkpoint as {SITE}" in result.stderr
        assert result.stderr.endswith("hint: leave one of them out\n") and not result.stdout and not out.exists()
