"""dmm distill, as users call it."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import DIGITS, dmm

from dmm_cli.architectures import build
from dmm_cli.checkpoint import save_arrays

INPUT = json.dumps({"size": [1, 16, 16], "mean": [0.3], "std": [0.38]})
NARROW = "resnet18,in_chans=1,layers=(1,1,1,1),channels=(8,16,32,32)"  # the sites have (16,32,64,64)
SITES = [DIGITS / "site-a.safetensors", DIGITS / "site-d.safetensors"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Pseudo-data of two sites."""
    path = tmp_path_factory.mktemp("drawn") / "pseudo.safetensors"
    result = dmm("synthesize", *SITES, "--count", 192, "--steps", 60, "--batch", 32, "-o", path)
    assert result.exit_code == 0, result.stderr
    return path


def fresh(path, arch):
    """A checkpoint of random weights."""
    torch.manual_seed(0)
    arrays = {name: value.numpy() for name, value in build(arch).state_dict().items()}
    save_arrays(path, arrays, {"dmm.arch": arch, "dmm.input": INPUT})
    return path


def test_a_student_of_another_architecture_learns_from_all(drawn, tmp_path):
    student = fresh(tmp_path / "s.safetensors", f"{NARROW},num_classes=10")
    out = tmp_path / "out.safetensors"
    result = dmm("distill", student, *SITES, "--data", drawn, "--steps", 250, "--batch", 64, "-o", out)
    assert result.exit_code == 0, result.stderr
    before, after = (
        float(dmm("evaluate", path, "--data", DIGITS / "test.safetensors", "-q").stdout) for path in (student, out)
    )
    assert before < 20 and after > 40


def test_teachers_of_other_classes_are_refused(drawn, tmp_path):
    student = fresh(tmp_path / "s.safetensors", f"{NARROW},num_classes=7")
    result = dmm("distill", student, *SITES, "--data", drawn, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2 and "7 classes" in result.stderr and not (tmp_path / "out.safetensors").exists()
