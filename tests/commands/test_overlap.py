"""``dmm merge --overlap``: units of two networks side by side, from files to files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import DIGITS, digits_as_pseudo_data, dmm, two_generators
from networks import lively
from safetensors.torch import load_file, save_file

from dmm_cli.inputs import resolve_source
from dmm_cli.loading import load_model

A, B, D, E = (DIGITS / f"site-{name}.safetensors" for name in "abde")
WEIGHTS = 167018  # of every site


@pytest.fixture(scope="module")
def pseudo(tmp_path_factory) -> Path:
    teachers = [(A, range(5)), (D, (7, 8))]
    return digits_as_pseudo_data(tmp_path_factory.mktemp("overlap") / "pseudo.safetensors", teachers)


def answers(path: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_model(resolve_source(str(path)))[0](images)


def pair_of(tmp_path: Path, arch: str) -> list[Path]:
    """Two small networks of different starts."""
    pair = []
    for seed in range(2):
        pair.append(tmp_path / f"{seed}.safetensors")
        facts = {"dmm.arch": arch, "dmm.input": '{"size": [3, 8, 8], "mean": [0.5], "std": [0.5]}'}
        save_file(lively(arch, seed).state_dict(), pair[-1], facts)
    return pair


def test_all_units_merged_is_what_a_merge_gives_without_being_asked(tmp_path):
    pair = pair_of(tmp_path, "networks:flattened")
    outs = [tmp_path / f"{name}.safetensors" for name in ("asked", "default", "half")]
    assert dmm("merge", *pair, "-o", outs[0], "--overlap", 1, "-q").exit_code == 0
    record = json.loads(dmm("merge", *pair, "-o", outs[1], "--json").stdout)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert record["widened"] is None and record["aligned"][0]["moved"] > 0

    halved = dmm("merge", *pair, "-o", outs[2], "--overlap", 0.5)
    lines = [" ".join(line.split()) for line in halved.stdout.splitlines()]
    assert "0.weight[0] 10 0 10 cannot be widened, all merged" in lines  # GroupNorm
    assert "5.weight[0] 16 8 24" in lines


def test_no_unit_merged_is_the_mean_of_both_networks_logits(tmp_path):
    out, pair = tmp_path / "out.safetensors", pair_of(tmp_path, "networks:separable")
    record = json.loads(dmm("merge", *pair, "-o", out, "--overlap", 0, "--weights", "3,1", "--json").stdout)
    images = torch.randn(16, 3, 8, 8)
    first, second = (answers(path, images) for path in pair)
    assert torch.allclose(answers(out, images), 0.75 * first + 0.25 * second, atol=1e-5)
    assert (first - second).abs().max() > 0.01
    widened = record["widened"]
    assert [group["units"] for group in widened["groups"]] == [8, 6]
    assert all(group["apart"] == group["units"] and group["may_widen"] for group in widened["groups"])
    assert widened["overlap"] == 0 and widened["difference"] < 1e-12 and record["warnings"] == []


def test_every_network_answers_for_the_classes_that_it_alone_knows(tmp_path):
    parts = {A: [0, 1, 2, 3, 4], D: [7, 8]}
    paths = []
    for source, classes in parts.items():
        state, told = load_file(source), resolve_source(str(source)).metadata
        state |= {name: state[name][classes] for name in ("fc.weight", "fc.bias")}
        arch = told["dmm.arch"].replace("num_classes=10", f"num_classes={len(classes)}")
        paths.append(tmp_path / source.name)
        save_file(state, paths[-1], {**told, "dmm.arch": arch, "dmm.classes": json.dumps([str(c) for c in classes])})
    out = tmp_path / "out.safetensors"
    assert dmm("merge", *paths, "-o", out, "--overlap", 0).exit_code == 0
    images = torch.randn(16, 1, 16, 16)
    known = [answers(source, images)[:, classes] for source, classes in parts.items()]
    assert torch.allclose(answers(out, images), torch.cat(known, 1), atol=1e-4)


def test_every_stage_builds_the_wider_network(pseudo, tmp_path):
    out, data = tmp_path / "out.safetensors", ["--data", DIGITS / "test.safetensors"]
    told = dmm("merge", A, D, "-o", out, "--overlap", 0.75, "--method", "pleas", "--recalibrate", pseudo)
    assert told.exit_code == 0, told.stderr
    assert f"side by side: {WEIGHTS} parameters become 259410" in told.stdout  # counted by hand from the widths
    held = load_file(out)
    assert held["layer2.0.conv2.weight"].shape == (40, 40, 3, 3) and held["fc.weight"].shape == (10, 80)
    record = json.loads(dmm("inspect", out, "--json").stdout)
    assert record["parameters"] == 259410 and record["architecture"]["spec"].startswith("resnet18,")
    widths = json.loads(record["provenance"]["dmm.widths"])
    assert len(widths) == 9 and widths["layer1.0.conv1.weight[0]"] == [16, 20]
    assert json.loads(record["provenance"]["dmm.aligned"]) == ["site-d"]

    drawn, model = tmp_path / "pseudo.safetensors", tmp_path / "model.safetensors"
    brief = ["--count", 32, "--steps", 2, "-q"]
    with two_generators():
        assert dmm("synthesize", out, "-o", drawn, *brief).exit_code == 0
    distilled = dmm("distill", out, A, D, "--data", pseudo, "--steps", 2, "-o", model)
    assert distilled.exit_code == 0, distilled.stderr
    assert load_file(model)["fc.weight"].shape == (10, 80)
    mean = tmp_path / "mean.safetensors"
    assert dmm("merge", out, model, "-o", mean).exit_code == 0
    assert dmm("evaluate", mean, model, *data).exit_code == 0


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([A, D, "--overlap", "1.5"], "--overlap must lie between 0 and 1"),
        ([A, D, "--overlap", "nan"], "nan is not a finite number"),
        ([A, D, E, "--overlap", "0.5"], "--overlap merges two checkpoints, not 3"),
        ([A, D, "--overlap", "0.5", "--align", "never"], "leave out --align never"),
        (
            [A, D, "--overlap", "0.5", "--base", DIGITS / "base.safetensors", "--method", "ties"],
            "--base names a common one",
        ),
    ],
)
def test_what_headers_tell_is_refused_before_anything_is_read(arguments, words, dry, tmp_path):
    result = dmm("merge", *arguments, *dry, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2 and words in result.stderr, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_shows_only_later_is_refused_too_and_nothing_stays(tmp_path):
    out = tmp_path / "out.safetensors"
    one_start = dmm("merge", A, B, "--overlap", 0.5, "-o", out)
    assert one_start.exit_code == 2 and "site-a and site-b have one start" in one_start.stderr
    assert "hint: leave out --overlap" in one_start.stderr
    parted = dmm("merge", A, D, "--overlap", 0.5, "--group", "auto", "-o", tmp_path / "out")
    assert parted.exit_code == 2 and "--group all" in parted.stderr
    bare = []
    for source in (A, D):
        bare.append(tmp_path / source.name)
        save_file(load_file(source), bare[-1], {"dmm.arch": "networks:branching"})
    unknown = dmm("merge", *bare, "--overlap", 0.5, "-o", out)
    assert unknown.exit_code == 2 and "does not fit networks:branching" in unknown.stderr
    assert {path.name for path in tmp_path.iterdir()} == {source.name for source in bare}


def test_the_plan_tells_of_the_wider_network(tmp_path):
    plan = dmm("merge", A, D, "--overlap", 0.75, "--dry-run", "-o", tmp_path / "out.safetensors").stdout
    assert "25 % of the units side by side" in plan
