"""Networks that call their layers by the names of their arguments give what those give that call by position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import dmm
from networks import Called
from safetensors.torch import load_file, save_file

INPUT = ["--input-size", "3,12,12", "--mean", "0.5", "--std", "0.25"]
FEW = ["--count", 16, "--batch", 8, "--steps", 8, *INPUT]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("called")
    torch.manual_seed(0)
    for name in "ab":
        model = Called()
        for _ in range(20):
            model(torch.randn(16, 3, 12, 12))
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (24, 3, 12, 12), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images)
    return folder


def test_every_stage_sees_what_layers_are_given(work):
    teachers, found = [work / "a.safetensors", work / "b.safetensors"], {}
    for way in ("False", "True"):
        out = work / way
        out.mkdir()
        files = {name: out / f"{name}.safetensors" for name in ("pixels", "pseudo", "student", "merged", "told")}
        pseudo, merging = files["pseudo"], ["--align", "never", "--method", "regmean"]
        stages = {
            "pixels": ["synthesize", *teachers, "--engine", "pixels", *FEW],
            "pseudo": ["synthesize", *teachers, *FEW],
            "student": ["distill", teachers[0], *teachers, "--data", pseudo, "--steps", 4],
            "merged": ["merge", *teachers, *merging, "--recalibrate", pseudo],
            "told": ["record", teachers[0], "--data", work / "images.npz", *INPUT],
        }
        for name, words in stages.items():
            result = dmm(*words, "--arch", f"networks:called,by_name={way}", "-o", files[name])
            assert result.exit_code == 0, result.stderr
        found[way] = {name: load_file(path) for name, path in files.items()}
    for name, tensors in found["False"].items():
        assert tensors.keys() == found["True"][name].keys()
        for key, value in tensors.items():
            assert torch.equal(value, found["True"][name][key]), (name, key)
