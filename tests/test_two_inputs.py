"""A classifier of an image and a vector, trained on real digits, through the whole pipeline."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import halves
import numpy as np
import pytest
import torch
from conftest import DIGITS, ROOT, dmm, in_two_processes, shell, two_generators
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from dmm_cli.architectures import input_spec
from dmm_cli.commands.synthesize import synthesize_sources
from dmm_cli.errors import DmmError
from dmm_cli.inputs import resolve_source, resolve_sources
from dmm_cli.loading import load_model
from dmm_cli.ranks import Ranks
from dmm_cli.synthesis.settings import Settings

FEW = ["--count", 128, "--steps", 60, "--batch", 32]


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """Checkpoints of two sites with digits of their own, and the digits of the test."""
    folder = tmp_path_factory.mktemp("halves")
    split, test = halves.digits()
    first = halves.train(halves.fresh(1), split["a"], 4, 1)
    second = halves.train(halves.fresh(2), split["c"], 4, 2)
    save_file({name: value.numpy() for name, value in test.items()}, folder / "test.safetensors")
    return halves.save(folder / "a.safetensors", first), halves.save(folder / "c.safetensors", second)


@pytest.fixture(scope="module", params=["generator", "pixels"])
def drawn(request, sites):
    """Pseudo-data of both sites by either engine."""
    path = sites[0].parent / f"{request.param}.safetensors"
    with two_generators():
        result = dmm("synthesize", *sites, "--engine", request.param, *FEW, "-o", path)
    assert result.exit_code == 0, result.stderr
    return path


def made(sites, engine: str, path: Path, ranks: Ranks = Ranks()) -> bytes:
    """Pseudo-data of few images."""
    settings = Settings(24, 6, 12, engine=engine)
    synthesize_sources(resolve_sources(list(map(str, sites))), path, settings, arch=None, device="cpu", ranks=ranks)
    return path.read_bytes()


SHARED = """
import sys
from pathlib import Path
from test_two_inputs import made
from dmm_cli.ranks import joined
*sites, folder = map(Path, sys.argv[1:])
with joined() as ranks:
    for engine in ("generator", "pixels"):
        made(sites, engine, folder / engine, ranks)
"""


def test_two_processes_make_the_pseudo_data_of_one(sites, tmp_path):
    in_two_processes(SHARED, *sites, tmp_path)
    for engine in ("generator", "pixels"):
        assert (tmp_path / engine).read_bytes() == made(sites, engine, tmp_path / "alone")
        (tmp_path / "alone").unlink()


KILLED = """
import os, signal
from dmm_cli import runtime, training
from dmm_cli.app import main

def tell(self, stage, done, total, **_):
    if done > 0.6 * total:
        os.kill(os.getpid(), signal.SIGKILL)

training.SAVE_EVERY = 0.0
runtime.Host.tell = tell
main()
"""


@pytest.mark.parametrize("engine", ["generator", "pixels"])
def test_after_a_kill_they_are_made_to_the_end(sites, engine, tmp_path):
    out = tmp_path / "pseudo.safetensors"
    command = ["synthesize", *sites, "--engine", engine, "--count", 24, "--steps", 6, "--batch", 12, "-o", out]
    killed = shell(*command, code=KILLED, env={"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))})
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    assert list((tmp_path / "pseudo.safetensors.partial").iterdir())
    assert dmm(*command).exit_code == 0
    assert out.read_bytes() == made(sites, engine, tmp_path / "whole.safetensors")


def test_inspect_lists_the_inputs(sites, tmp_path):
    told = dmm("inspect", sites[0]).stdout
    for line in (r"input image +mean 0.3; std 0.4\n", r"input vector +mean 5.0; std 5.0\n"):
        assert re.search(line, told), told
    assert json.loads(dmm("inspect", sites[0], "--json").stdout)["inputs"] == halves.INPUT
    stats = tmp_path / "stats.safetensors"
    assert dmm("record", sites[0], "--data", sites[0].parent / "test.safetensors", "-o", stats).exit_code == 0
    assert not dmm("inspect", stats, "-q").stderr
    alone = dmm("inspect", DIGITS / "site-a.safetensors")
    assert "input image" not in alone.stdout and "architecture" in alone.stdout


def gap(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far inputs are from the running statistics of every BatchNorm layer: mean Gaussian divergence."""
    found = {}

    def hook(name: str):
        def measure(layer: nn.Module, seen: tuple[torch.Tensor, ...]) -> None:
            features = seen[0].transpose(0, 1).flatten(1).double()  # (C, n)
            ratio = features.var(1, correction=0) / layer.running_var
            shift = (features.mean(1) - layer.running_mean).square() / layer.running_var
            found[name] = float((shift + ratio - 1 - ratio.log()).mean())

        return measure

    norms = [(n, layer) for n, layer in model.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in norms]
    with torch.no_grad():
        model(**inputs)
    for handle in hooks:
        handle.remove()
    return found


def test_pseudo_data_hold_each_input_and_match_the_statistics(sites, drawn):
    held = load_file(drawn)
    assert held["image"].shape[1:] == (1, 8, 16) and held["image"].dtype == np.uint8
    assert held["vector"].shape[1:] == (16,) and held["vector"].dtype == np.float32
    assert set(held) == {"image", "vector", "targets", "teacher_id", "logits", "confidence", "bn_loss"}
    with safe_open(drawn, "np") as file:
        space = json.loads(file.metadata()["dmm.input"])
    assert space["vector"] == {"size": [16], "mean": [5.0], "std": [5.0]}
    for number, site in enumerate(sites):
        model, _ = load_model(resolve_source(str(site)))
        mine = held["teacher_id"] == number
        own = halves.taken({name: torch.from_numpy(held[name][mine]) for name in ("image", "vector")})
        with torch.no_grad():
            logits = model(**own)
        assert np.allclose(logits.numpy(), held["logits"][mine], atol=0.05), "files hold what the network was shown"
        assert (logits.argmax(1).numpy() == held["targets"][mine]).all()
        draw = torch.Generator().manual_seed(0)
        noise = {
            "image": (torch.rand(own["image"].shape, generator=draw) - 0.3) / 0.4,
            "vector": torch.randn(own["vector"].shape, generator=draw),
        }
        close, far = gap(model, own), gap(model, noise)
        assert any(isinstance(model.get_submodule(name), nn.BatchNorm1d) for name in close)
        assert all(close[name] < far[name] / 3 for name in ("look.0.1", "read.1", "both.1")), (close, far)


@pytest.mark.parametrize("engine", ["generator", "pixels"])
def test_tokens_are_drawn_through_their_embedding(engine, tmp_path):
    """What is kept are tokens that the network recognises as they are, and likelier than tokens at random."""
    torch.set_num_threads(1)
    data = halves.with_tokens(halves.digits()[0]["c"])
    torch.manual_seed(3)
    path = halves.save(tmp_path / "c.safetensors", halves.train(halves.TokenNet(), data, 4, 3))
    out = tmp_path / "pseudo.safetensors"
    with two_generators():
        assert dmm("synthesize", path, "--engine", engine, *FEW, "--steps", 40, "-o", out).exit_code == 0
    held = load_file(out)
    assert held["tokens"].dtype == np.int64 and held["tokens"].shape[1:] == (16,)
    assert set(np.unique(held["tokens"])) == set(range(halves.LEVELS))
    assert not dmm("inspect", out, "-q").stderr
    model, _ = load_model(resolve_source(str(path)))
    own = halves.taken({name: torch.from_numpy(held[name]) for name in ("image", "tokens")})
    with torch.no_grad():
        logits = model(**own)
    assert np.allclose(logits.numpy(), held["logits"], atol=0.05)
    assert (logits.argmax(1).numpy() == held["targets"]).all()
    noise = {**own, "tokens": torch.randint(halves.LEVELS, own["tokens"].shape)}
    assert gap(model, own)["read.1"] < gap(model, noise)["read.1"] / 5
    save_file({name: value.numpy() for name, value in data.items()}, tmp_path / "data.safetensors")
    judged = dmm("evaluate", path, "--data", tmp_path / "data.safetensors", "-q")
    assert float(judged.stdout) == pytest.approx(halves.accuracy(model, data), abs=1e-3)


def test_a_student_learns_from_both_inputs_together(sites, drawn, tmp_path):
    """It comes to know the other site's digits, and without either input it knows fewer."""
    out, test = tmp_path / "model.safetensors", sites[0].parent / "test.safetensors"
    result = dmm("distill", sites[0], *sites, "--data", drawn, "--steps", 300, "--batch", 64, "-o", out)
    assert result.exit_code == 0, result.stderr
    before, after = (json.loads(dmm("evaluate", path, "--data", test, "--json").stdout) for path in (sites[0], out))
    recall = [np.array(found["rows"][0]["recall"]) for found in (before, after)]
    assert recall[0][[7, 8, 9]].max() == 0 and recall[1][[7, 8, 9]].mean() > 35, recall
    assert recall[1][:4].mean() > 60, recall
    model, _ = load_model(resolve_source(str(out)))
    digits = {name: torch.from_numpy(array) for name, array in load_file(test).items()}
    whole = halves.accuracy(model, digits)
    assert after["rows"][0]["accuracy"] == pytest.approx(whole), "evaluate shows the network what it was trained on"
    assert max(halves.accuracy(model, digits, (name,)) for name in ("image", "vector")) < whole - 2


def test_a_merge_is_recalibrated_and_measured_on_them(sites, drawn, tmp_path):
    out, data = tmp_path / "merged.safetensors", drawn
    together = ["merge", *sites, "--align", "never", "-o", out, "--group", "all"]
    assert dmm(*together, "--recalibrate", data).exit_code == 0
    model, _ = load_model(resolve_source(str(out)))
    held = load_file(data)
    rows = np.concatenate([np.flatnonzero(held["targets"] == c)[:12] for c in range(10)])
    shown = halves.taken({name: torch.from_numpy(held[name][rows]) for name in ("image", "vector")})
    after = gap(model, shown)
    assert dmm(*together, "--force").exit_code == 0
    assert max(after.values()) < 0.3 < max(gap(load_model(resolve_source(str(out)))[0], shown).values())
    report = json.loads(dmm("similarity", *sites, "--measure", "cka", "--data", data, "--json").stdout)
    assert 0 < report["measures"]["cka"][0][1] < 0.95
    refused = dmm("align", *sites, "-o", tmp_path / "aligned.safetensors")
    assert refused.exit_code == 2 and "takes several inputs (image, vector)" in refused.stderr


def test_example_inputs_tell_what_a_network_takes(sites):
    source = resolve_source(str(sites[0]))
    model, _ = load_model(source)
    spec = input_spec(source, model, mean=(0.5,))
    assert spec.names == ("image", "vector") and [part.size for part in spec.specs] == [(1, 8, 16), (16,)]
    assert [part.mean for part in spec.specs] == [(0.5,), (5.0,)]
    model.example_inputs = {"image": torch.zeros(2, 1, 4, 4), "vector": torch.zeros(2, 16)}
    assert input_spec(replace(source), model).parts["image"].size == (1, 4, 4)
    for wrong, words in {
        "bytes": ({"x": torch.zeros(2, 5, dtype=torch.uint8)}, "neither numbers nor tokens"),
        "no embedding": (
            {**halves.example_inputs(), "vector": torch.zeros(2, 16, dtype=torch.int64)},
            "looks up vector",
        ),
        "no name": ({"a b": torch.zeros(2, 3)}, "cannot be the name"),
        "taken": ({"targets": torch.zeros(2, 3)}, "cannot be the name"),
        "no rows": ({"x": torch.zeros(3)}, "its first dimension"),
        "no dict": (torch.zeros(2, 3), "not tensors by name"),
    }.values():
        model.example_inputs = wrong
        with pytest.raises(DmmError) as caught:
            input_spec(source, model)
        assert words in " ".join([caught.value.what, *caught.value.evidence])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vector": None}, "no array named vector"),
        ({"image": np.zeros((450, 2, 8, 16), np.uint8)}, "the data have 2 channels, the model takes 1"),
        ({"image": np.zeros((450, 8), np.float32)}, "image of the data must be images"),
        ({"vector": np.zeros((450, 3), np.float32)}, r"vector of the data are [3], of the model [16]"),
        ({"vector": np.zeros((9, 16), np.float32)}, "vector of"),
        ({"vector": np.full((450, 16), np.nan, np.float32)}, "hold NaN"),
        ({"vector": np.zeros((450, 16), np.int64)}, "vector of the data must be numbers"),
        ({"vector": np.zeros((450, 16), np.uint8)}, "vector of the data must be numbers, float, not torch.uint8 [16]"),
        ({"vector": np.zeros((450, 16), np.int32)}, "hint: store them as floats: array.astype('float32')"),
        ({"image": np.zeros((450, 1), np.uint8)}, "image of the data must be images, uint8 [N, C, H, W], not torch"),
    ],
)
def test_data_that_are_not_the_networks(sites, tmp_path, change, words):
    held = {**load_file(sites[0].parent / "test.safetensors"), **change}
    save_file({name: array for name, array in held.items() if array is not None}, tmp_path / "data.safetensors")
    result = dmm("evaluate", sites[0], "--data", tmp_path / "data.safetensors")
    assert result.exit_code == 2 and words in result.stderr, result.stderr
