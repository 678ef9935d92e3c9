"""The whole pipeline on the digits fixture, in short form."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS, dmm, shell, two_generators
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmm_cli.architectures import build
from dmm_cli.distillation.settings import Settings

SITES = [DIGITS / f"site-{name}.safetensors" for name in "abcde"]
STEPS, DISTILL, COUNT = 6, 16, 32
SHORT = ["--synthesize-steps", STEPS, "--distill-steps", DISTILL, "--count", COUNT]
DATA = DIGITS / "test.safetensors"


def accuracies(out) -> dict[str, float]:
    return {row["label"]: row["accuracy"] for row in json.loads((out / "evaluation.json").read_text())["rows"]}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    result = dmm("run", *SITES, "-o", out, *SHORT, "--data", DATA)
    assert result.exit_code == 0, result.stderr
    return out, result


def test_the_accuracy_table_is_printed(done):
    out, result = done
    printed = result.stdout.splitlines()
    assert printed[0].startswith("targets that a start names")
    assert [line.split()[0::2] for line in printed[2:5]] == [["group-0", "yes"], ["group-1"], ["group-2"]]
    lines = printed[5:]
    assert lines[0] == f"accuracy on 450 samples of {DATA}, %"
    names = [line.split("  ")[0] for line in lines[2:12]]
    together = ["ensemble", "ensemble of logits", "linear merge of all", "linear merge of group-0", "dmm run"]
    assert names == [*(f"site-{name}" for name in "abcde"), *together]
    assert lines[-1] == str(out / "model.safetensors")
    alone = dmm("evaluate", out / "model.safetensors", "--data", DATA, "--json")
    assert json.loads(alone.stdout)["rows"][0]["accuracy"] == accuracies(out)["dmm run"]


def test_the_report_is_one_file_with_everything(done):
    page = (done[0] / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    for words in ("Accuracy", "different starts", "class prior", "agreement with each teacher", "site-e"):
        assert words in page
    assert "http" not in page and "<script" not in page
    for row in (["merge", "method", "linear"], ["synthesize", "count", COUNT], ["distill", "steps", DISTILL]):
        assert "".join(f"<td>{cell}</td>" for cell in row) in page


def test_json_tells_what_the_result_is_worth(done):
    out, _ = done
    result = dmm("run", *SITES, "-o", out, *SHORT, "--data", DATA, "--json", "-q")
    told = json.loads(result.stdout)
    assert told.pop("evaluation") == json.loads((out / "evaluation.json").read_text())
    assert told == json.loads((out / "distill.json").read_text())


def test_a_second_run_skips_everything(done):
    out, first = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    result = dmm("run", *SITES, "-o", out, *SHORT, "--data", DATA)
    assert result.stdout == first.stdout
    assert result.stderr.count("up to date") == 5
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def test_what_changed_is_done_again_and_what_was_damaged_too(done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    model = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(b"damaged")
    result = dmm("run", *SITES, "-o", out, *SHORT)
    assert result.exit_code == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if line.endswith("up to date")] == [
        "similarity: up to date",
        "merge: up to date",
        "synthesize: up to date",
    ]
    assert (out / "model.safetensors").read_bytes() == model
    changed = dmm("run", *SITES, "-o", out, *SHORT[:2], "--distill-steps", 5, "--count", COUNT)
    assert changed.stderr.count("up to date") == 3
    assert (out / "model.safetensors").read_bytes() != model
    assert not (out / "evaluation.json").exists()  # it was of the model before


def test_a_result_of_other_checkpoints_stays_unless_forced(done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    command = ["run", *SITES[:2], "-o", out, *SHORT]
    for last in ([], ["--dry-run"]):
        result = dmm(*command, *last)
        assert result.exit_code == 2 and "holds a run of other checkpoints" in result.stderr
        assert "of site-e" in result.stderr and "--force" in result.stderr
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with two_generators():
        forced = dmm(*command, "--force")
        assert forced.exit_code == 0, forced.stderr
        assert not (out / "evaluation.json").exists() and not (out / "linear-merge-of-all.safetensors").exists()
        assert dmm("run", *reversed(SITES[:2]), "-o", out, *SHORT).exit_code == 0


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((2, 1, 8, 8), np.uint8)}, "has no array named labels"),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8), "labels": np.zeros(2, int)}, "3 channels, the model takes 1"),
        ({"images": np.zeros((2, 1, 8, 8), np.uint8), "labels": np.array([0, 10])}, "classes that site-a cannot name"),
    ],
)
def test_data_that_cannot_judge_are_refused_before_anything_is_computed(tmp_path, arrays, words):
    np.savez(tmp_path / "data.npz", **arrays)
    for last in ([], ["--dry-run"]):
        result = dmm("run", *SITES, "-o", tmp_path / "out", "--data", tmp_path / "data.npz", *last)
        assert result.exit_code == 2 and words in result.stderr
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_judge_all_checkpoints_together_are_refused_before_anything_is_computed(tmp_path):
    """One that names no classes takes those of the data in order, another by name."""
    silent = tmp_path / "silent.safetensors"
    with safe_open(SITES[1], "np") as file:
        metadata = {name: text for name, text in file.metadata().items() if name != "dmm.classes"}
    save_file(load_file(SITES[1]), silent, metadata)
    labels = np.arange(10)
    data = {"images": np.zeros((10, 1, 8, 8), np.uint8), "labels": labels, "classes": labels[::-1].astype("U1")}
    np.savez(tmp_path / "data.npz", **data)
    for last in ([], ["--dry-run"]):
        result = dmm("run", SITES[0], silent, "-o", tmp_path / "out", "--data", tmp_path / "data.npz", *last)
        assert result.exit_code == 2 and "do not have the same classes in the same order" in result.stderr
        assert "silent: no names" in result.stderr and not (tmp_path / "out").exists()


def test_stage_by_stage_gives_the_same_bytes(done, tmp_path, monkeypatch):
    out, _ = done
    monkeypatch.chdir(tmp_path)
    record = dmm("similarity", *SITES, "--json", "-o", "similarity.json")
    assert record.exit_code == 0
    assert (tmp_path / "similarity.json").read_bytes() == (out / "similarity.json").read_bytes()
    piped = dmm("merge", "--group", "-", "-o", "merged", text=(tmp_path / "similarity.json").read_text())
    assert piped.exit_code == 0, piped.stderr
    made = dmm("synthesize", "merged/merge.json", "-o", "pseudo.safetensors", "--steps", STEPS, "--count", COUNT)
    assert made.exit_code == 0, made.stderr
    command = ["distill", "merged/group-*.safetensors", "merged/merge.json", "--data", "pseudo.safetensors"]
    assert dmm(*command, "--steps", DISTILL, "-o", "model.safetensors").exit_code == 0
    for name in ("merged/group-0.safetensors", "merged/group-2.safetensors", "pseudo.safetensors", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name


def test_with_a_base_it_merges_what_the_commands_do(tmp_path):
    """A linear merge has no use for the base, which served to compare the checkpoints; its counters may be others."""
    tensors = load_file(DIGITS / "base.safetensors")
    counters = {name: value.int() for name, value in tensors.items() if name.endswith("num_batches_tracked")}
    save_file({**tensors, **counters}, tmp_path / "base.safetensors")
    out, base = tmp_path / "out", ["--base", tmp_path / "base.safetensors"]
    refused = dmm("run", *SITES[:2], *base, "--method", "ties", "-o", out, "--dry-run")
    assert refused.exit_code == 2 and "num_batches_tracked is I64" in refused.stderr
    short = ["--synthesize-steps", 2, "--distill-steps", 0, "--count", 8]
    assert dmm("run", *SITES[:2], *base, "-o", out, *short).exit_code == 0
    alone = tmp_path / "alone.safetensors"
    assert dmm("merge", *SITES[:2], *base, "-o", alone).exit_code == 0
    assert (out / "merged" / "group-0.safetensors").read_bytes() == alone.read_bytes()
    assert hashlib.sha256((tmp_path / "base.safetensors").read_bytes()).hexdigest() in (out / "report.html").read_text()


def twin(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """A checkpoint like site a in everything but the tensors that are changed."""
    tensors = load_file(SITES[0])
    with safe_open(SITES[0], "pt") as file:
        save_file({**tensors, **change(tensors)}, path, file.metadata())
    return path


def test_without_a_divergent_site_only_batchnorm_is_reset(tmp_path):
    """Of images of so many steps the merge recognises 95 % and more; of half of them 88 to 98, and 90 are wanted."""
    out = tmp_path / "out"
    command = ["run", *SITES[:2], "-o", out, "--synthesize-steps", 160, "--count", 64]

    def changed() -> set[str]:
        merged = load_file(out / "merged" / "group-0.safetensors")
        tensors = load_file(out / "model.safetensors")
        return {name for name, tensor in tensors.items() if not tensor.equal(merged[name])}

    with two_generators():
        assert dmm(*command).exit_code == 0
    assert changed() == {name for name in load_file(SITES[0]) if name.endswith(("running_mean", "running_var"))}
    assert "No step of distillation" in (out / "report.html").read_text()
    assert dmm(*command, "--distill-steps", 2).exit_code == 0
    assert "fc.weight" in changed()


def test_another_seed_drops_others_at_random(tmp_path):
    short = ["--synthesize-steps", 2, "--distill-steps", 0, "--count", 8]
    command = ["run", *SITES[:2], "--base", DIGITS / "base.safetensors", "--method", "dare_linear", *short]
    merged = []
    for out, seed in (("one", 0), ("one", 1), ("two", 1)):
        with two_generators():
            result = dmm(*command, "-o", tmp_path / out, "--seed", seed)
        assert result.exit_code == 0, result.stderr
        merged.append((tmp_path / out / "merged" / "group-0.safetensors").read_bytes())
    assert merged[0] != merged[1] == merged[2]


def test_where_a_merge_of_one_group_forgets_it_is_distilled(tmp_path, monkeypatch):
    """A twin of site a for negatives: its first layer is negated, and the mean of the two sees nothing."""
    monkeypatch.setattr("dmm_cli.commands.run.DistillSettings", partial(Settings, steps=20))
    out = tmp_path / "out"
    negative = twin(tmp_path / "negatives.safetensors", lambda tensors: {"conv1.weight": -tensors["conv1.weight"]})
    with two_generators():
        result = dmm("run", SITES[0], negative, "-o", out, "--synthesize-steps", 12, "--count", 64)
    assert result.exit_code == 0, result.stderr
    assert [path.name for path in (out / "merged").glob("*.safetensors")] == ["group-0.safetensors"]
    assert re.search(r"the merge recognises \d+\.\d % of the pseudo-images of \S+: it has to learn", result.stderr)
    made = json.loads((out / "distill.json").read_text())
    assert made["parameters"]["steps"] == 20 and len(made["history"]["step"]) > 1


def test_a_run_stopped_in_its_first_stage_goes_on_and_is_not_taken_for_another(tmp_path):
    """A file size limit takes similarity.json and refuses the figure, the way a full disk does."""
    out = tmp_path / "out"
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (16_000, 16_000))
    stopped = shell("run", *SITES[:2], "-o", out, preexec_fn=full)
    assert stopped.returncode == 2 and "cannot write" in stopped.stderr and "similarity.svg" in stopped.stderr
    assert (out / "similarity.json").exists()
    assert dmm("run", *SITES[:2], "-o", out, "--dry-run").exit_code == 0
    other = dmm("run", *SITES[1:3], "-o", out, "--dry-run")
    assert other.exit_code == 2 and "holds a run of other checkpoints" in other.stderr


@pytest.mark.parametrize("there", [False, True])
def test_a_first_stage_that_fails_leaves_nothing_in_the_way(tmp_path, there):
    wrong, out = tmp_path / "wrong.safetensors", tmp_path / "out"
    tensors = load_file(SITES[0])
    tensors["fc.weight"][0, 0] = float("nan")
    with safe_open(SITES[0], "pt") as file:
        save_file(tensors, wrong, file.metadata())
    if there:
        out.mkdir()
    result = dmm("run", wrong, SITES[1], "-o", out)
    assert result.exit_code == 2 and "NaN" in result.stderr, result.stderr
    assert list(out.iterdir()) == [] if there else not out.exists()
    assert dmm("run", *SITES[:2], "-o", out, "--dry-run").exit_code == 0


def test_a_run_whose_record_is_damaged_is_done_again_if_forced(tmp_path):
    command = ["run", *SITES[:2], "-o", tmp_path, "--synthesize-steps", 2, "--distill-steps", 0, "--count", 8]
    (tmp_path / "run.json").write_text("{")
    refused = dmm(*command)
    assert refused.exit_code == 2 and "run.json is not valid JSON" in refused.stderr and "--force" in refused.stderr
    with two_generators():
        forced = dmm(*command, "--force")
    assert forced.exit_code == 0 and (tmp_path / "model.safetensors").exists(), forced.stderr
    assert dmm(*command, "--dry-run").exit_code == 0


def test_directories_that_are_not_ours(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    result = dmm("run", *SITES, "-o", tmp_path)
    assert result.exit_code == 2 and "not empty and not of an earlier run" in result.stderr
    result = dmm("run", *SITES, "-o", tmp_path / "note.txt")
    assert result.exit_code == 2 and "not a directory" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "gpu"], "unknown device: gpu"),
        (["--method", "regmean"], "regmean needs pseudo-data, which run makes after it has merged"),
        (["--data", "nowhere.npz"], "no such file: nowhere.npz"),
        (["--method", "ties"], "ties needs the common start"),
    ],
)
def test_mistakes_are_found_before_anything_is_computed(tmp_path, flags, words):
    for last in ([], ["--dry-run"]):
        result = dmm("run", *SITES, "-o", tmp_path / "out", *flags, *last)
        assert result.exit_code == 2 and words in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_is_found_before_anything_is_computed(tmp_path):
    result = dmm("run", *SITES[:2], "-o", tmp_path / "out", "--device", "cuda:99")
    assert result.exit_code == 2 and "no such device: cuda:99" in result.stderr
    assert not (tmp_path / "out").exists()


def test_teachers_without_statistics_are_found_before_anything_is_computed(tmp_path):
    vit, out = "vit_tiny_patch16_224,num_classes=3,img_size=32,patch_size=16,depth=1", tmp_path / "out"
    paths = [tmp_path / f"vit-{number}.safetensors" for number in range(2)]
    for path in paths:
        save_file(build(vit).state_dict(), path, {"dmm.arch": vit})
    for last in ([], ["--dry-run"]):
        for command in ("run", "synthesize"):
            result = dmm(command, *paths, "-o", out if command == "run" else tmp_path / "p.safetensors", *last)
            assert result.exit_code == 2 and "0 BatchNorm layers" in result.stderr, result.stderr
            assert "dmm record" in result.stderr
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize("place", ["run", "more/run"])
def test_a_directory_that_cannot_be_made_is_found_before_anything_is_computed(place):
    for last in ([], ["--dry-run"]):
        result = dmm("run", *SITES, "-o", Path("/proc/self") / place, *last)
        assert result.exit_code == 2 and "cannot write to the directory /proc/self" in result.stderr, result.stderr


def test_rare_knowledge_survives(tmp_path):
    """An eighth of the default effort must already beat the ensemble, and know the digits of the lone sites."""
    out = tmp_path / "out"
    effort = ["--synthesize-steps", 80, "--distill-steps", 300, "--count", 128]
    with two_generators():
        result = dmm("run", *SITES, "-o", out, "--data", DATA, *effort)
    assert result.exit_code == 0, result.stderr
    rows = accuracies(out)
    assert rows["dmm run"] > rows["ensemble"] + 15 and rows["dmm run"] > rows["linear merge of all"] + 40
    result = json.loads((out / "evaluation.json").read_text())["rows"][-1]
    assert min(result["recall"][7:]) > 40
