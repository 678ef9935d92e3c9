"""Networks that call layers by the names of arguments, and networks that have a weight under two names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import dmm
from networks import Called, Twice
from safetensors.torch import load_file, save_file, save_model

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


def test_every_stage_takes_files_that_hold_tied_weights_once(tmp_path):
    sites, arch, pseudo = (
        [tmp_path / f"{name}.safetensors" for name in "ab"],
        "networks:twice",
        tmp_path / "pseudo.safetensors",
    )
    for seed, path in enumerate(sites):
        torch.manual_seed(seed)
        model = Twice()
        for _ in range(10):
            model(torch.randn(16, 3, 12, 12))
        save_model(model, str(path))
    merging = ["merge", *sites, "--align", "never", "--recalibrate", pseudo]
    stages = {
        "pseudo": ["synthesize", *sites, *FEW, "--class-prior", "1,1,1,1"],
        "student": ["distill", sites[0], *sites, "--data", pseudo, "--steps", 4],
        "linear": merging,
        "regmean": [*merging, "--method", "regmean"],
        "pleas": [*merging, "--method", "pleas"],
    }
    for name, words in stages.items():
        result = dmm(*words, "--arch", arch, "-o", tmp_path / f"{name}.safetensors")
        assert result.exit_code == 0, result.stderr
    made = {name: load_file(tmp_path / f"{name}.safetensors") for name in stages}
    names, mean = load_file(sites[0]).keys(), made["linear"]["one.weight"]
    assert "two.weight" not in names and all(made[name].keys() == names for name in stages if name != "pseudo")
    for method in ("regmean", "pleas"):  # a solution for one of the two would not be the other's
        assert torch.equal(made[method]["one.weight"], mean)
        assert not torch.equal(made[method]["head.weight"], made["linear"]["head.weight"])
    assert not torch.equal(made["student"]["one.weight"], load_file(sites[0])["one.weight"])
