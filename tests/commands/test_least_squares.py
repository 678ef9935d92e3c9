"""``dmm merge --method regmean`` and ``pleas``: merges solved on their parents' pseudo-data, from files to files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS, digits_as_pseudo_data, dmm
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dmm_cli.images import InputSpec
from dmm_cli.inputs import resolve_source
from dmm_cli.synthesis.pseudodata import PseudoData, TeacherRecord, save_pseudo_data
from dmm_cli.trust import grant

SITES = [DIGITS / f"site-{name}.safetensors" for name in "abc"]
REGMEAN = ("--method", "regmean")


@pytest.fixture(scope="module")
def pseudo(tmp_path_factory) -> Path:
    teachers = list(zip(SITES, (range(5), range(2, 6), (0, 4, 5, 6)), strict=True))
    return digits_as_pseudo_data(tmp_path_factory.mktemp("regmean") / "pseudo.safetensors", teachers)


def test_layers_are_solved_and_statistics_reset_and_nothing_else_differs_from_the_mean(pseudo, tmp_path):
    pair = SITES[:2]
    mean, out = tmp_path / "mean.safetensors", tmp_path / "solved"
    assert dmm("merge", *pair, "-o", mean).exit_code == 0
    result = dmm("merge", *pair, *REGMEAN, "--recalibrate", pseudo, "-o", out, "--param", "ridge=0.02")
    assert result.exit_code == 0, result.stderr
    before, after = load_file(mean), load_file(out / "group-0.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    weights = {name for name, value in before.items() if value.ndim > 1}
    assert changed == weights | {name for name in before if name.endswith(("running_mean", "running_var"))}

    record = json.loads((out / "merge.json").read_text())
    assert record["method"] == "regmean" and record["parameters"] == {"off_diagonal": 0.9, "ridge": 0.02}
    assert record["recalibrated"] == {"group-0": "14 layers solved (regmean), 13 BatchNorm layers reset"}
    assert all(item["before"] - item["after"] < 5 for item in record["retained"]["group-0"])
    parents = [load_file(site) for site in pair]
    for name in weights:
        ratio = after[name].norm() / np.mean([parent[name].norm() for parent in parents])
        assert record["norms"][0][name] == pytest.approx(float(ratio), rel=1e-5)
    with safe_open(out / "group-0.safetensors", "np") as file:
        assert file.metadata()["dmm.method"] == "regmean"

    again = tmp_path / "again.safetensors"
    dmm("merge", *pair, *REGMEAN, "--recalibrate", pseudo, "-o", again, "--param", "ridge=0.02")
    assert again.read_bytes() == (out / "group-0.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["linear", "slerp", "karcher", "regmean", "pleas"])
def test_a_base_changes_nothing_for_methods_that_merge_weights(pseudo, tmp_path, method):
    """It served to compare the checkpoints; with it none of them is aligned, which these need not be."""
    solved = ["--recalibrate", pseudo] if method in ("regmean", "pleas") else []
    words = ["merge", *SITES[:2], "--method", method, "--align", "never", *solved]
    merged = []
    for name, flags in (("without", []), ("with", ["--base", DIGITS / "base.safetensors"])):
        result = dmm(*words, *flags, "-o", tmp_path / f"{name}.safetensors")
        assert result.exit_code == 0, result.stderr
        merged.append(load_file(tmp_path / f"{name}.safetensors"))
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


def test_pleas_keeps_what_two_networks_of_different_starts_know(tmp_path):
    """Whose mean knows nothing, and whose layers say nothing to one another's inputs."""
    pair = [SITES[0], DIGITS / "site-d.safetensors"]
    data = digits_as_pseudo_data(tmp_path / "pseudo.safetensors", list(zip(pair, (range(5), (7, 8)), strict=True)))
    retained = {}
    for method in ("linear", "pleas"):
        out = tmp_path / f"{method}.safetensors"
        result = dmm("merge", *pair, "--method", method, "--align", "never", "--recalibrate", data, "-o", out, "--json")
        retained[method] = [item["after"] for item in json.loads(result.stdout)["retained"]["group-0"]]
    assert min(retained["pleas"]) > 90 and max(retained["linear"]) < 70


grant([__name__])


class Line(nn.Module):
    """One linear layer on images of 2 x 3 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4, bias=False)
        self.fc = nn.Linear(4, 4, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.first(images.flatten(1)))


@pytest.mark.parametrize(
    ("method", "exact"),
    [("regmean", ["--param", "off_diagonal=1", "--param", "ridge=0"]), ("pleas", ["--param", "ridge=0"])],
)
def test_two_linear_networks_that_see_different_pixels_are_both_reproduced(method, exact, tmp_path):
    """No image of one lights a pixel of the other; the mean knows half of each, the solution all of both."""
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(4, 4, generator=draw)
    paths, images, answers = [], [], []
    for number in range(2):
        model = Line()
        model.load_state_dict({"first.weight": torch.randn(4, 6, generator=draw), "fc.weight": shared})
        paths.append(tmp_path / f"line{number}.safetensors")
        save_file(model.state_dict(), paths[-1], {"dmm.arch": f"{__name__}:Line"})
        own = torch.zeros(60, 1, 2, 3, dtype=torch.uint8)
        own[:, :, number] = torch.randint(1, 256, (60, 1, 3), generator=draw, dtype=torch.uint8)
        images.append(own)
        answers.append(model(own.float() / 255).detach())
    logits = torch.cat(answers).numpy()
    data = PseudoData(
        images=torch.cat(images).numpy(),
        targets=logits.argmax(1),
        teacher_id=np.repeat([0, 1], 60).astype(np.int16),
        logits=logits.astype(np.float16),
        confidence=np.ones(120, np.float16),
        bn_loss=np.zeros(1, np.float32),
        teachers=tuple(TeacherRecord(p.stem, resolve_source(str(p)).sha256, (0.25,) * 4) for p in paths),
        spec=InputSpec((1, 2, 3), (0.0,), (1.0,)),
    )
    pseudo, out = tmp_path / "pseudo.safetensors", tmp_path / "out.safetensors"
    save_pseudo_data(pseudo, data, {})
    flags = ["--method", method, *exact, "--align", "never"]
    result = dmm("merge", *paths, *flags, "--recalibrate", pseudo, "-o", out, "--json")
    record = json.loads(result.stdout)
    assert record["recalibrated"] == {"group-0": f"2 layers solved ({method})"}, "no REPAIR after that"
    assert [item["after"] for item in record["retained"]["group-0"]] == [100.0, 100.0]
    merged = Line()
    merged.load_state_dict(load_file(out))
    mean = Line()
    mean.load_state_dict({"first.weight": sum(load_file(p)["first.weight"] for p in paths) / 2, "fc.weight": shared})
    for own, answer in zip(images, answers, strict=True):
        assert torch.allclose(merged(own.float() / 255), answer, atol=1e-3)
        assert (mean(own.float() / 255) - answer).abs().mean() > 0.3


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("regmean needs pseudo-data of the checkpoints", ["merge", *SITES, *REGMEAN]),
        ("regmean needs pseudo-data of the checkpoints", ["merge", *SITES, *REGMEAN, "--dry-run"]),
        ("off_diagonal must lie between 0 and 1", ["merge", *SITES, *REGMEAN, "--param", "off_diagonal=2"]),
        ("--calibrate svc works on task vectors", ["merge", *SITES, *REGMEAN, "--calibrate", "svc"]),
        ("regmean needs pseudo-data, which run makes after", ["run", *SITES, *REGMEAN]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(words, arguments, pseudo, tmp_path):
    data = ["--recalibrate", pseudo] if {"--param", "--calibrate"} & set(arguments) else []
    result = dmm(*arguments, *data, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2 and words in result.stderr
    assert "hint: " in result.stderr or data
    assert list(tmp_path.iterdir()) == []
