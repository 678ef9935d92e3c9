"""What only a GPU can show: the same results as on the CPU within its rounding, and the same bytes every time."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import DIGITS, dmm
from safetensors.torch import load_file

from dmm_cli import training
from dmm_cli.commands._statistics import statistics_of
from dmm_cli.commands.synthesize import synthesize_sources
from dmm_cli.inputs import resolve_source, resolve_sources
from dmm_cli.synthesis.pseudodata import load_pseudo_data
from dmm_cli.synthesis.settings import Settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")

SITES = [str(DIGITS / f"site-{name}.safetensors") for name in "abcde"]
TEST = DIGITS / "test.safetensors"
SHORT = {
    "generator": Settings(count=12, steps=64, batch=16),
    "pixels": Settings(count=12, steps=64, batch=16, engine="pixels"),
    "generator with all options": Settings(
        count=16, steps=64, batch=16, jitter=1, flip=True, plateau=0.9, norm_average=0.8
    ),
    "pixels with all options": Settings(
        count=16, steps=64, batch=16, engine="pixels", jitter=1, flip=True, keep_best=True, plateau=0.9
    ),
}


def made(path, settings, device="cuda", prior=(), on_progress=None, sites=SITES[3:], recorded=None) -> None:
    student = resolve_source(SITES[1]) if settings.plateau else None
    options = {"arch": None, "device": device, "prior": prior, "student": student, "on_progress": on_progress}
    synthesize_sources(resolve_sources(sites), path, settings, recorded=recorded, **options)


def require_same(path, whole) -> None:
    """What differs between two files by name: of bytes, a failure would tell nothing."""
    found, expected = load_file(path), load_file(whole)
    apart = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not apart and found.keys() == expected.keys()
    assert path.read_bytes() == whole.read_bytes(), "metadata differ"


def run(*words: object) -> str:
    result = dmm(*words)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", SHORT)
def test_synthesis_gives_the_same_bytes_again_and_after_a_kill(tmp_path, monkeypatch, name):
    settings = SHORT[name]
    whole, again, out = (tmp_path / f"{name}.safetensors" for name in ("whole", "again", "killed"))
    made(whole, settings)
    made(again, settings)
    require_same(again, whole)
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)

    def kill(stage, done, total, **numbers):
        if done > 0.6 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(out, settings, on_progress=kill)
    made(out, settings)
    require_same(out, whole)


@pytest.mark.parametrize("engine", ["generator", "pixels"])
def test_in_float32_the_losses_are_those_of_the_cpu(tmp_path, engine):
    curves, evenly = [], (0.1,) * 10  # to estimate a prior takes steps of its own
    for device in ("cpu", "cuda"):
        path = tmp_path / f"{device}.safetensors"
        made(path, Settings(count=12, steps=64, batch=32, engine=engine, precision="float32"), device, evenly)
        curves.append(load_pseudo_data(resolve_source(str(path))).bn_loss)
    assert curves[1][:5] == pytest.approx(curves[0][:5], rel=0.02)  # convolutions there round to 10 bits
    # paths fork: of two on the CPU whose first weights differ in the sixth digit, later losses differ by a third
    assert all(curve[-1] < 0.2 * curve[0] for curve in curves)


@pytest.mark.parametrize("engine", ["generator", "pixels"])
def test_witnesses_take_turns_in_graphs_that_share_memory(tmp_path, engine):
    """Statistics of all test digits in each network, told as those of another site's data."""
    for owner in SITES[2:]:
        others = [site for site in SITES[2:] if site != owner]
        run("record", *others, "--data", TEST, "--owner", owner, "-o", tmp_path / "statistics")
    recorded = statistics_of([str(tmp_path / "statistics" / "*.safetensors")], resolve_sources(SITES[2:]))
    settings, evenly = Settings(count=12, steps=64, batch=32, engine=engine, precision="float32"), (0.1,) * 10
    files = {name: tmp_path / f"{name}.safetensors" for name in ("cpu", "cuda", "again")}
    for name, path in files.items():
        made(path, settings, name.replace("again", "cuda"), evenly, sites=SITES[2:], recorded=recorded)
    require_same(files["again"], files["cuda"])
    expected, curve = (load_pseudo_data(resolve_source(str(files[name]))).bn_loss for name in ("cpu", "cuda"))
    assert curve[:5] == pytest.approx(expected[:5], rel=0.02) and curve[-1] < 0.5 * curve[0]


def test_in_bfloat16_the_losses_come_down_as_in_float32(tmp_path):
    curves = []
    for precision in ("float32", "bfloat16"):
        path = tmp_path / f"{precision}.safetensors"
        made(path, Settings(count=150, steps=64, batch=64, engine="pixels", precision=precision))
        curves.append(load_pseudo_data(resolve_source(str(path))).bn_loss)
    assert curves[0][-1] < 0.2 * curves[0][0]
    assert curves[1][-1] == pytest.approx(curves[0][-1], rel=0.1)


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts", "wudi"])
def test_merges_of_matrices_agree_with_the_cpu(tmp_path, method):
    merged = []
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.safetensors"
        base = DIGITS / "base.safetensors"
        run("merge", *SITES[:3], "--base", base, "--method", method, "--device", device, "-o", out)
        merged.append(load_file(out))
    for name, expected in merged[0].items():
        difference = (merged[1][name].double() - expected.double()).norm()
        assert difference <= 1e-3 * expected.double().norm(), name


def test_the_pipeline_reads_digits_and_distillation_gives_the_same_bytes(tmp_path):
    out = tmp_path / "run"
    run("run", *SITES, "-o", out, "--data", TEST, "--device", "cuda")
    rows = json.loads((out / "evaluation.json").read_text())["rows"]
    accuracy = {row["label"]: row["accuracy"] for row in rows}
    assert accuracy["dmm run"] > 90 > accuracy["ensemble"]
    words = ["distill", out / "merged" / "group-0.safetensors", *SITES, "--data", out / "pseudo.safetensors"]
    for name in ("one", "two"):
        run(*words, "--device", "cuda", "--steps", 40, "-o", tmp_path / f"{name}.safetensors")
    require_same(tmp_path / "two.safetensors", tmp_path / "one.safetensors")


def test_the_batch_fits_the_memory_of_the_gpu(tmp_path):
    words = ["--batch", "auto", "--count", 64, "--steps", 2, "-o", tmp_path / "p.safetensors", "--json"]
    manifest = json.loads(run("synthesize", *SITES[3:], *words, "--device", "cuda"))
    assert manifest["device"].startswith("cuda") and manifest["parameters"]["batch"] == 64
