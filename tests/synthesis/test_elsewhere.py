"""What a teacher's data look like in the networks of other teachers, and images that look so there too."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import DIGITS, Watcher, divergence, dmm, two_generators
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dmm_cli.commands._statistics import statistics_of
from dmm_cli.commands.synthesize import load_teachers, synthesize_sources
from dmm_cli.images import PixelSpace
from dmm_cli.inputs import resolve_source, resolve_sources
from dmm_cli.loading import load_model
from dmm_cli.manifest import SynthesisManifest
from dmm_cli.report.tables import render, teacher_table
from dmm_cli.synthesis import ENGINES
from dmm_cli.synthesis.settings import Settings

CPU = torch.device("cpu")
KNOWN = {"c": (4, 5, 6), "d": (7, 8), "e": (9,)}  # digits of each site
SITES = {name: DIGITS / f"site-{name}.safetensors" for name in KNOWN}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Digits of every site, and what each of them looks like in the networks of the other two."""
    folder = tmp_path_factory.mktemp("elsewhere")
    test = load_file(DIGITS / "test.safetensors")
    for owner, digits in KNOWN.items():
        own = np.isin(test["labels"], digits)
        save_file({"images": test["images"][own]}, folder / f"data-{owner}.safetensors")
        save_file({key: value[own] for key, value in test.items()}, folder / f"labelled-{owner}.safetensors")
        record(folder, owner, "".join(name for name in KNOWN if name != owner))
    return folder


def record(folder, owner: str, models: str, data: str = "data", out: str = "in"):
    """``dmm record`` of a site's digits in the networks of others; gives the files."""
    words = ["--data", folder / f"{data}-{owner}.safetensors", "--owner", SITES[owner], "-o", folder / out, "--json"]
    result = dmm("record", *(SITES[name] for name in models), *words)
    assert result.exit_code == 0, result.output
    manifest = json.loads(result.stdout)
    assert manifest["owner"]["sha256"] == resolve_source(str(SITES[owner])).sha256
    files = [folder / out / f"site-{owner}-in-site-{model}.safetensors" for model in models]
    assert [network["output"] for network in manifest["networks"]] == list(map(str, files))
    told = [network["source"]["sha256"] for network in manifest["networks"]]
    assert told == [resolve_source(str(SITES[name])).sha256 for name in models]
    return files


def teachers(recorded, names: str):
    sources = resolve_sources([str(SITES[name]) for name in names])
    files = [str(recorded / "in" / f"site-{a}-in-site-{b}.safetensors") for a in names for b in names if a != b]
    return load_teachers(sources, None, CPU, recorded=statistics_of(files, sources))


def test_other_networks_see_a_teachers_images_in_turn(recorded):
    """The loss is that of an independent sum, and no two teachers have one witness in the same turn."""
    from dmm_cli.synthesis.losses.cross_norm import cross_norm

    owners, spec = teachers(recorded, "cde")
    images, targets = torch.randn(16, *spec.size, generator=torch.Generator().manual_seed(0)), torch.zeros(16).long()
    models = {name: load_model(resolve_source(str(SITES[name])), None)[0].eval() for name in KNOWN}
    for turn in range(3):
        seen_by = []
        for place, owner in enumerate(owners):
            witness = "cde"[(place + 1 + turn % 2) % 3]
            seen_by.append(witness)
            stored = load_file(recorded / "in" / f"site-{'cde'[place]}-in-site-{witness}.safetensors")
            for view in (owner, owner.view()):
                loss = float(cross_norm(view.observe(images, targets, turn=turn)))
                assert loss == pytest.approx(divergence(models[witness], images, stored, 1e-5), rel=1e-3)
        assert sorted(seen_by) == ["c", "d", "e"]


@pytest.mark.parametrize("engine", ENGINES.names())
def test_images_look_in_other_networks_as_the_data_do(recorded, tmp_path, engine):
    """Of site e, which has one class and has hardly learned to see, in the network of site c."""
    file = recorded / "in" / "site-e-in-site-c.safetensors"
    steps = ["--engine", engine, "--steps", 24, "--count", 32, "--batch", 16]
    found, spec = {}, teachers(recorded, "ce")[1]
    for name, flags in {"without": [], "with": ["--statistics", file]}.items():
        out = tmp_path / f"{name}.safetensors"
        with two_generators():
            result = dmm("synthesize", SITES["e"], SITES["c"], *steps, *flags, "-o", out, "--json")
        assert result.exit_code == 0, result.output
        data, manifest = load_file(out), json.loads(result.stdout)
        assert manifest["teachers"][0]["elsewhere"] == [str(file)] * len(flags[1:])
        assert manifest["teachers"][1]["elsewhere"] == []
        assert ("cross_norm" in manifest["parameters"]["weights"]) == bool(flags)
        table = render([teacher_table(SynthesisManifest.from_json(manifest))], "table")
        assert ("witnesses" in table) == bool(flags)
        shown = PixelSpace(spec).from_bytes(torch.from_numpy(data["images"][data["teacher_id"] == 0]))
        model = load_model(resolve_source(str(SITES["c"])), None)[0].eval()
        found[name] = divergence(model, shown, load_file(file), 1e-5)
    assert found["with"] < 0.5 * found["without"], found


def test_labels_of_a_recording_tell_the_mix_of_the_owners_classes(recorded):
    (file,) = record(recorded, "d", "e", "labelled", "counted")
    sources = resolve_sources([str(SITES[name]) for name in "de"])
    both, alone = load_teachers(sources, None, CPU, recorded=statistics_of([str(file)], sources))[0]
    assert both.prior.tolist() == [0.0] * 7 + [0.5, 0.5, 0.0] and both.prior_from == "dmm.class_counts"
    assert alone.prior is None and both.statistics == "" and both.witnesses[0].statistics == str(file)


def test_several_networks_are_recorded_as_one_by_one(recorded, tmp_path):
    """The owner's own among them; a line a file is what a pipe is given."""
    words = ["--data", recorded / "data-d.safetensors", "--owner", SITES["d"]]
    for name in KNOWN:
        assert dmm("record", SITES[name], *words, "-o", tmp_path / f"{name}.safetensors").exit_code == 0
    result = dmm("record", *SITES.values(), *words, "-o", tmp_path / "all", "-q")
    files = [tmp_path / "all" / f"site-d-in-site-{name}.safetensors" for name in KNOWN]
    assert result.exit_code == 0 and result.stdout.split() == list(map(str, files))
    for name, file in zip(KNOWN, files, strict=True):
        assert file.read_bytes() == (tmp_path / f"{name}.safetensors").read_bytes()
    again = dmm("record", *SITES.values(), *words, "-o", tmp_path / "all")
    assert again.exit_code == 2 and "the output exists" in again.stderr
    table = dmm("record", *SITES.values(), *words, "-o", tmp_path / "all", "--force").stdout
    assert all(f"site-{name} " in table for name in KNOWN)


def test_an_interrupted_synthesis_with_witnesses_goes_on_to_the_same_bytes(recorded, tmp_path):
    sources = resolve_sources([str(SITES[name]) for name in "cde"])
    files = statistics_of([str(recorded / "in" / "*.safetensors")], sources)
    assert len(files) == 6

    def made(name: str, watcher: Watcher) -> bytes:
        path = tmp_path / f"{name}.safetensors"
        how = {"arch": None, "device": "cpu", "recorded": files, "on_progress": watcher}
        synthesize_sources(sources, path, Settings(12, 9, 4), **how)
        return path.read_bytes()

    with two_generators():
        whole = made("whole", Watcher())
        with pytest.raises(KeyboardInterrupt):
            made("parts", Watcher(0.6))
        assert made("parts", Watcher()) == whole
    with safe_open(tmp_path / "whole.safetensors", "np") as file:
        assert sorted(json.loads(file.metadata()["dmm.statistics"])) == sorted(f.sha256 for f in files.values())


def test_what_does_not_fit_is_refused(recorded, tmp_path):
    file, out = recorded / "in" / "site-d-in-site-e.safetensors", tmp_path / "p.safetensors"
    given, labels = ["--statistics", file], np.array([7, 7, 7, 8])
    doubled = tmp_path / "doubled.safetensors"
    doubled.write_bytes(file.read_bytes())
    images = load_file(recorded / "data-d.safetensors")["images"][:4]
    save_file({"images": images, "labels": labels}, recorded / "few-d.safetensors")
    lists = [*record(recorded, "d", "e", "labelled", "all"), *record(recorded, "d", "c", "few", "few")]
    for arguments, words in (
        ([SITES["e"], *given], "they are of site-d"),
        ([SITES["d"], *given], "they are of site-e"),
        ([SITES["d"], SITES["e"], *given, "--statistics", doubled], "two files hold statistics of one checkpoint"),
        ([SITES["d"], SITES["e"], "--loss", "cross_norm=1"], "dmm record OTHER"),
        ([*SITES.values(), "--statistics", lists[0], "--statistics", lists[1]], "other class counts"),
    ):
        result = dmm("synthesize", *arguments, "-o", out)
        assert result.exit_code == 2 and words in result.stderr, result.stderr
        assert result.stderr.count("error:") == 1 and not out.exists()
    words = ["record", SITES["e"], "--data", recorded / "data-d.safetensors", "--owner", SITES["d"], "-o", out]
    assert "the data of site-d" in dmm(*words, "--dry-run").stdout and not out.exists()
    folder, own = tmp_path / "folder", ["--data", recorded / "data-d.safetensors"]
    colour = tmp_path / "colour.safetensors"
    with safe_open(SITES["c"], "np") as known:
        tensors, metadata = load_file(SITES["c"]), known.metadata()
    kernels = np.repeat(tensors["conv1.weight"], 3, 1)
    arch, size = metadata["dmm.arch"].replace("in_chans=1", "in_chans=3"), json.dumps({"size": [3, 16, 16]})
    save_file({**tensors, "conv1.weight": kernels}, colour, {**metadata, "dmm.arch": arch, "dmm.input": size})
    for arguments, words in (
        ([SITES["e"], *own, "--owner", tmp_path / "no", "-o", out], "no"),
        ([SITES["c"], SITES["e"], *own, "-o", folder], "name the one trained on them with --owner"),
        ([SITES["c"], SITES["e"], *own, "--owner", SITES["d"], "-o", out], "name a directory"),
        ([SITES["c"], colour, *own, "--owner", SITES["d"], "-o", folder], "1 channels, the model takes 3"),
    ):
        result = dmm("record", *arguments)
        assert result.exit_code == 2 and words in result.stderr, result.stderr
        assert not out.exists() and not folder.exists()


def test_networks_in_files_of_one_name_are_told_apart_by_their_folder(tmp_path):
    paths = [tmp_path / name / "model.safetensors" for name in KNOWN]
    for path, site in zip(paths, SITES.values(), strict=True):
        path.parent.mkdir()
        path.write_bytes(site.read_bytes())
    words = ["--data", DIGITS / "test.safetensors", "--owner", SITES["c"], "-o", tmp_path / "stats"]
    assert dmm("record", *paths, *words).exit_code == 0
    written = sorted(path.name for path in (tmp_path / "stats").iterdir())
    assert written == [f"site-c-in-{name}-model.safetensors" for name in KNOWN]
