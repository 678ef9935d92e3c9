"""dmm align and merge --align: files, records, messages."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import DIGITS, dmm
from networks import arrays, lively
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dmm_cli.alignment.apply import permute, random_image
from dmm_cli.alignment.trace import trace
from dmm_cli.errors import DmmError
from dmm_cli.inputs import Source, resolve_source

A, B, D, E = (DIGITS / f"site-{name}.safetensors" for name in "abde")


def metadata(path) -> dict[str, str]:
    with safe_open(path, "numpy") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def scrambled(tmp_path_factory):
    """Site a with its units in another order, and metadata of its own."""
    from dmm_cli.loading import load_model

    model, _ = load_model(resolve_source(str(A)))
    spec = trace(model, (1, 16, 16))
    path = tmp_path_factory.mktemp("scrambled") / "b.safetensors"
    save_file(permute(load_file(A), spec, random_image(spec, np.random.default_rng(0))), path, metadata(A))
    return path


def test_a_permuted_copy_comes_back_and_the_file_says_from_what(scrambled, tmp_path):
    out = tmp_path / "out.safetensors"
    before = scrambled.read_bytes()
    record = json.loads(dmm("align", A, scrambled, "-o", out, "--json", "--seed", 3).stdout)
    assert record["schema"] == "dmm.align/1" and record["outputs"] == [str(out)]
    got, wanted = load_file(out), load_file(A)
    assert all(got[name].tobytes() == value.tobytes() for name, value in wanted.items())
    assert scrambled.read_bytes() == before
    (aligned,) = record["aligned"]
    # hand count: 64 stem channels and streams of 16, 32, 64, 64 with one block of as many inner channels each
    assert aligned["units"] == 64 + 16 + 16 + 32 + 32 + 64 + 64 + 64 + 64
    assert aligned["units"] == sum(group["units"] for group in aligned["groups"])
    assert aligned["moved"] == sum(group["moved"] for group in aligned["groups"]) > 390
    assert aligned["covered"] == pytest.approx(1 - 10 / 167018)  # all but the biases of the classes
    assert aligned["cosine_before"] < 0.3 and aligned["cosine_after"] == pytest.approx(1)
    assert aligned["objective_after"] == pytest.approx(
        sum(
            float((v.astype(float) ** 2).sum())
            for n, v in wanted.items()
            if v.dtype.kind == "f" and "running" not in n and n != "fc.bias"
        ),
        rel=1e-5,
    )
    told = metadata(out)
    assert told["dmm.command"] == "align" and told["dmm.seed"] == "3" and told["dmm.arch"] == metadata(A)["dmm.arch"]
    assert json.loads(told["dmm.reference"])[0]["sha256"] == resolve_source(str(A)).sha256
    assert json.loads(told["dmm.sources"])[0]["sha256"] == resolve_source(str(scrambled)).sha256


def test_means_that_fit_no_channels_do_not_matter(tmp_path):
    odd, out = tmp_path / "odd.safetensors", tmp_path / "out.safetensors"
    told = metadata(B) | {"dmm.input": '{"size": [1, 16, 16], "mean": [0, 0], "std": [1, 1]}'}
    save_file(load_file(B), odd, told)
    result = dmm("align", A, odd, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert metadata(out)["dmm.input"] == told["dmm.input"]


def test_the_same_bytes_twice(tmp_path):
    outs = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for out in outs:
        assert dmm("align", A, D, "-o", out, "-q").stdout == f"{out}\n"
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_several_go_to_a_directory_in_the_order_of_likeness(tmp_path):
    result = dmm("align", A, D, E, B, "-o", tmp_path / "out", "--groups")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [rows[2][0], rows[2][4]] == ["site-b", "0"]  # of the reference's start: nothing moved
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"site-{n}.safetensors" for n in "bde"]
    assert sum(row[:1] == ["layer4.0.conv2.weight[0]"] for row in rows) == 3
    assert load_file(tmp_path / "out" / "site-b.safetensors").keys() == load_file(B).keys()


def test_several_take_their_places_together(scrambled, tmp_path, monkeypatch):
    out, check = tmp_path / "out", Source.check_unchanged
    out.mkdir()
    (out / "site-b.safetensors").write_text("of before")

    def changed(source):
        check(source)
        if source.label == scrambled.stem and (out / "site-b.safetensors").exists() and list(out.glob(".dmm-*")):
            raise DmmError("it changed")

    monkeypatch.setattr(Source, "check_unchanged", changed)
    refused = dmm("align", A, B, scrambled, "-o", out, "--force")
    assert refused.exit_code == 2 and "it changed" in refused.stderr
    assert {path.name: path.read_text() for path in out.iterdir()} == {"site-b.safetensors": "of before"}


def test_files_of_one_name_keep_their_directories(scrambled, tmp_path):
    paths = [tmp_path / name / "model.safetensors" for name in ("one", "two", "three")]
    for path, source in zip(paths, (A, scrambled, B), strict=True):
        path.parent.mkdir()
        path.write_bytes(source.read_bytes())
    assert dmm("align", *paths, "-o", tmp_path / "out").exit_code == 0
    out = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.safetensors"))
    assert out == ["three/model.safetensors", "two/model.safetensors"]
    assert (load_file(tmp_path / "out" / out[1])["conv1.weight"] == load_file(A)["conv1.weight"]).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([A], "2 checkpoints or more, got 1"),
        ([A, B], "name a file with -o"),
        ([A, B, D, "-o", "x.safetensors"], "2 checkpoints do not fit in one file"),
        ([A, B, "-o", "no/such/x.safetensors"], "no such directory"),
        ([A, B, "-o", "no/such"], "cannot make the directory"),
        ([A, B, "-o", A, "--force"], "the output is one of the inputs"),
        ([A, B, "-o", "x.safetensors", "--format", "jsn"], "did you mean json?"),
        ([A, B, "-o", "x.safetensors", "--arch", "resnet19"], "timm has no model resnet19"),
        ([A, B, "-o", "x.safetensors", "--arch", "resnet34"], "does not fit resnet34"),
        ([A, DIGITS / "test.safetensors", "-o", "x.safetensors"], "do not have the same tensors"),
        ([A, B, "-o", "x.safetensors", "--input-size", "1,16"], "channels,height,width"),
        ([A, B, "-o", "x.safetensors", "--input-size", "2,16,16"], "torch.export cannot trace ResNet"),
    ],
)
def test_mistakes_exit_2_and_write_nothing(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = dmm("align", *arguments)
    assert result.exit_code == 2 and words in result.stderr, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_cannot_be_traced(tmp_path):
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(paths):
        facts = {"dmm.arch": "networks:branching", "dmm.input": '{"size": [6], "mean": [0], "std": [1]}'}
        save_file(arrays(lively("networks:branching", seed)), path, facts)
    out = tmp_path / "out.safetensors"
    refused = dmm("align", *paths, "-o", out)
    assert refused.exit_code == 2 and "torch.export cannot trace Branching" in refused.stderr and not out.exists()
    assert "data-dependent" in refused.stderr
    always = dmm("merge", *paths, "-o", out, "--align", "always")
    assert always.exit_code == 2 and "cannot trace" in always.stderr and not out.exists()
    auto = dmm("merge", *paths, "-o", out)
    assert auto.exit_code == 0 and "2 starts were merged without aligning: torch.export cannot trace" in auto.stderr
    first, second = (load_file(path)["first.weight"] for path in paths)
    assert np.allclose(load_file(out)["first.weight"], (first + second) / 2)


def test_merge_aligns_different_starts_and_says_so(scrambled, tmp_path):
    out, plain = tmp_path / "out.safetensors", tmp_path / "plain.safetensors"
    record = json.loads(dmm("merge", A, scrambled, "-o", out, "--json").stdout)
    got, wanted = load_file(out), load_file(A)
    assert all(np.allclose(got[name], value, rtol=1e-5, atol=1e-7) for name, value in wanted.items())
    assert [item["label"] for item in record["aligned"]] == ["b"] and record["aligned"][0]["moved"] > 390
    assert record["warnings"] == []
    assert json.loads(metadata(out)["dmm.aligned"]) == ["b"]
    hashes = [entry["sha256"] for entry in json.loads(metadata(out)["dmm.sources"])]
    assert hashes == [resolve_source(str(path)).sha256 for path in (A, scrambled)]
    assert [entry["path"] for entry in record["sources"]] == [str(A), str(scrambled)]
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]
    assert json.loads(dmm("merge", A, scrambled, "-o", plain, "--align", "never", "--json").stdout)["aligned"] == []
    assert not np.allclose(load_file(plain)["conv1.weight"], wanted["conv1.weight"], atol=1e-2)


def test_networks_that_nothing_knows_are_merged_as_they_are(write, tmp_path, monkeypatch):
    monkeypatch.setattr("dmm_cli.architectures._families", lambda: (("resnet18",),))  # of all it takes ten seconds
    nets = [{"w": np.random.default_rng(seed).normal(size=(30, 40)).astype(np.float32)} for seed in (0, 1)]
    out = tmp_path / "out.safetensors"
    merged = dmm("merge", *(write(f"n{number}", **net) for number, net in enumerate(nets)), "-o", out)
    assert merged.exit_code == 0, merged.stderr
    assert "2 starts were merged without aligning: cannot tell the architecture" in merged.stderr
    assert np.allclose(load_file(out)["w"], (nets[0]["w"] + nets[1]["w"]) / 2, atol=1e-7)


def test_merge_leaves_one_start_as_it_is(tmp_path):
    outs = [tmp_path / f"{policy}.safetensors" for policy in ("auto", "never")]
    for out in outs:
        assert dmm("merge", A, B, "-o", out, "--align", out.stem).exit_code == 0
    assert outs[0].read_bytes() == outs[1].read_bytes() and "dmm.aligned" not in metadata(outs[0])


def test_a_base_says_that_there_is_one_start(tmp_path):
    base = ["--base", DIGITS / "base.safetensors", "--method", "task_arithmetic"]
    record = json.loads(dmm("merge", A, D, *base, "-o", tmp_path / "out.safetensors", "--json").stdout)
    assert record["aligned"] == []
    always = dmm("merge", A, D, *base, "-o", tmp_path / "x.safetensors", "--align", "always")
    assert always.exit_code == 2 and "common start" in always.stderr
    mistyped = dmm("merge", A, D, "-o", tmp_path / "x.safetensors", "--align", "alwas")
    assert mistyped.exit_code == 2 and "did you mean always?" in mistyped.stderr


def test_groups_are_aligned_each_on_its_own(scrambled, tmp_path):
    groups = tmp_path / "groups.json"
    groups.write_text('{"groups": [["site-a", "b"], ["site-d"]]}')
    result = dmm("merge", A, scrambled, D, "--group", groups, "-o", tmp_path / "out")
    assert result.exit_code == 0 and "aligned" in result.stdout
    got = load_file(tmp_path / "out" / "group-0.safetensors")
    assert np.allclose(got["conv1.weight"], load_file(A)["conv1.weight"], atol=1e-6)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "group-0.safetensors", "group-1.safetensors", "merge.json",
    ]  # fmt: skip


def test_a_head_for_training_alone_is_left_as_it_is_and_told(tmp_path):
    model = lively("networks:auxiliary")
    first, other = arrays(model), arrays(lively("networks:auxiliary", 1))
    spec = trace(model, (1, 6, 6))
    other = {**permute(first, spec, random_image(spec, np.random.default_rng(1))), **{n: other[n] for n in spec.unread}}
    told = {"dmm.arch": "networks:auxiliary", "dmm.input": '{"size": [1, 6, 6], "mean": [0], "std": [1]}'}
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, tensors in zip(paths, (first, other), strict=True):
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, told)
    aligned = dmm("--trust", "networks", "align", *paths, "-o", tmp_path / "out.safetensors", "--json")
    assert aligned.exit_code == 0, aligned.stderr
    record, got = json.loads(aligned.stdout), load_file(tmp_path / "out.safetensors")
    assert [group["units"] for group in record["aligned"][0]["groups"]] == [8]
    assert all((got[name] == (other if name in spec.unread else first)[name]).all() for name in got)
    words = "b does not use training_conv.weight, training_conv.bias, training_fc.weight, training_fc.bias, ... and 2"
    assert words in aligned.stderr and words in record["warnings"][0]
    merged = dmm(
        "--trust", "networks", "merge", *paths, "--align", "always", "-o", tmp_path / "m.safetensors", "--json"
    )
    assert merged.exit_code == 0 and any(words in text for text in json.loads(merged.stdout)["warnings"])
