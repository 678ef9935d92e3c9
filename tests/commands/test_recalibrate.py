"""``dmm merge --recalibrate``: statistics of the merged file, set right on its parents' pseudo-data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS, dmm
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmm_cli.architectures import build
from dmm_cli.images import InputSpec
from dmm_cli.inputs import resolve_source
from dmm_cli.loading import load_model
from dmm_cli.synthesis.pseudodata import PseudoData, TeacherRecord, save_pseudo_data

SITES = [DIGITS / f"site-{name}.safetensors" for name in "abd"]
CONVNEXT = "test_convnext,num_classes=4,in_chans=1"


def pseudo_data(path: Path, teachers: list[Path], size: int = 16, classes: int = 10, channels: int = 1) -> Path:
    """Noise of another brightness from every teacher, 90 images of class 0 and 10 of class 1."""
    draw = np.random.default_rng(0)
    count = 100 * len(teachers)
    level = np.repeat([40 * n + 60 for n in range(len(teachers))], 100)[:, None, None, None]
    targets = np.tile(np.repeat([0, 1], [90, 10]), len(teachers))
    images = level + 20 * targets[:, None, None, None] + draw.integers(0, 20, (count, channels, size, size))
    data = PseudoData(
        images=images.astype(np.uint8),
        targets=targets,
        teacher_id=np.repeat(np.arange(len(teachers)), 100).astype(np.int16),
        logits=np.zeros((count, classes), np.float16),
        confidence=np.ones(count, np.float16),
        bn_loss=np.zeros(1, np.float32),
        teachers=tuple(
            TeacherRecord(t.stem, resolve_source(str(t)).sha256, (1 / classes,) * classes) for t in teachers
        ),
        spec=InputSpec((channels, size, size), (0.3,) * channels, (0.4,) * channels),
    )
    save_pseudo_data(path, data, {})
    return path


def rewrite(path: Path, **arrays: np.ndarray) -> None:
    """Other arrays in a file of pseudo-data."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path) | {name: torch.from_numpy(array) for name, array in arrays.items()}, path, metadata)


def test_only_batchnorm_statistics_change_and_they_are_those_of_the_parents_images(tmp_path):
    data = pseudo_data(tmp_path / "pseudo.safetensors", SITES)
    plain, out = tmp_path / "plain.safetensors", tmp_path / "out.safetensors"
    pair = [*SITES[1::-1], "--weights", "1,3"]  # in another order than in the pseudo-data
    assert dmm("merge", *pair, "-o", plain).exit_code == 0
    result = dmm("merge", *pair, "-o", out, "--recalibrate", data, "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["recalibrated"] == {"group-0": "13 BatchNorm layers reset"}
    assert record["outputs"] == [str(out)]
    before, after = load_file(plain), load_file(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(("running_mean", "running_var"))}

    model, _ = load_model(resolve_source(str(plain)))
    first = model.bn1 if hasattr(model, "bn1") else model.stem.norm
    name = next(name for name, module in model.named_modules() if module is first)
    held = load_file(data)
    images = (held["images"][:200].float() / 255 - 0.3) / 0.4  # of the two parents, not of the third teacher
    images = torch.cat([*[images[:100]] * 3, images[100:]])  # by weight, in each one's own mix of classes
    seen = []
    first.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
    assert torch.allclose(after[f"{name}.running_mean"], seen[0].mean((0, 2, 3)), rtol=0.05, atol=0.02)
    assert torch.allclose(after[f"{name}.running_var"], seen[0].var((0, 2, 3)), rtol=0.15, atol=0.01)

    again = tmp_path / "again.safetensors"
    dmm("merge", *pair, "-o", again, "--recalibrate", data)
    assert again.read_bytes() == out.read_bytes()
    with safe_open(out, "np") as file:
        assert json.loads(file.metadata()["dmm.recalibrated"])["data"] == resolve_source(str(data)).sha256
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_models_without_batchnorm_are_repaired(tmp_path):
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = build(CONVNEXT)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        paths.append(tmp_path / f"convnext{seed}.safetensors")
        save_file(model.state_dict(), paths[-1], {"dmm.arch": CONVNEXT})
    data = pseudo_data(tmp_path / "pseudo.safetensors", paths, size=32, classes=4)
    out = tmp_path / "out.safetensors"
    result = dmm("merge", *paths, "-o", out, "--weights", "3,1", "--align", "never", "--recalibrate", data)
    assert "layers rescaled (REPAIR)" in result.stdout, result.stderr
    held = load_file(data)
    images = (held["images"].float() / 255 - 0.3) / 0.4
    images = torch.cat([*[images[:100]] * 3, images[100:]])  # by weight
    spread = []
    for path in (*paths, out):
        model, _ = load_model(resolve_source(str(path)))
        with torch.no_grad():
            spread.append(model.stem[0](images).std((0, 2, 3)))
    assert torch.allclose(spread[2], 0.75 * spread[0] + 0.25 * spread[1], rtol=0.15)
    plain = tmp_path / "plain.safetensors"
    dmm("merge", *paths, "-o", plain, "--weights", "3,1", "--align", "never")
    for name in ("head.fc.weight", "stages.0.blocks.0.norm.weight"):
        assert torch.equal(load_file(plain)[name], load_file(out)[name])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("teacher", "the pseudo-data hold nothing of teacher"),
        ("images", "the pseudo-data hold no image of"),
        ("kind", "not a pseudo-data file"),
        ("shards", "written by one process, to one file"),
        ("channels", "do not go through group-0"),
    ],
)
def test_mistakes_leave_nothing_behind(tmp_path, change, words):
    teachers = SITES[1:] if change == "teacher" else SITES
    data = pseudo_data(tmp_path / "pseudo.safetensors", teachers, channels=3 if change == "channels" else 1)
    if change == "images":
        rewrite(data, teacher_id=np.zeros(300, np.int16))
    data = SITES[0] if change == "kind" else data
    flags = ["--max-shard-size", "100KB"] if change == "shards" else []
    there = set(tmp_path.iterdir())
    result = dmm("merge", *SITES[:2], "-o", tmp_path / "out.safetensors", "--recalibrate", data, *flags)
    assert result.exit_code == 2 and words in result.stderr
    assert set(tmp_path.iterdir()) == there


def test_a_merge_whose_network_is_not_known_is_told_by_what_it_is_of(tmp_path, monkeypatch):
    monkeypatch.setattr("dmm_cli.architectures._families", lambda: ())  # to look through all takes a minute
    names = ("resnet18,num_classes=10", "resnet18.a1_in1k,num_classes=10,layers=(1,2,1,1)")
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path, site, name in zip(paths, SITES, names, strict=False):
        save_file(load_file(site), path, {"dmm.arch": name})
    data = pseudo_data(tmp_path / "pseudo.safetensors", paths)
    result = dmm("merge", *paths, "--align", "never", "-o", tmp_path / "out.safetensors", "--recalibrate", data)
    assert result.exit_code == 2 and "it is the merge of a, b, before it is set right" in result.stderr, result.stderr
