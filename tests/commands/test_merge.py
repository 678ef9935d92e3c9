"""What ``dmm merge`` adds to the engine: warnings, records, shards, processes, classes, overrides from dmm.toml."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from conftest import DIGITS, digits_as_pseudo_data, dmm, small_net, under_torchrun
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from dmm_cli.inputs import resolve_source

SITES = [DIGITS / f"site-{name}.safetensors" for name in "abc"]
BASE = DIGITS / "base.safetensors"


def metadata(path) -> dict[str, str]:
    with safe_open(path, "numpy") as file:
        return file.metadata()


def test_float8_is_passed_on_and_not_merged(tmp_path):
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for number, path in zip((1, 2, 1), paths, strict=True):
        save_torch({"w": torch.full((2, 3), float(number)).to(torch.float8_e4m3fn)}, path)
    refused = dmm("merge", *paths[:2], "-o", tmp_path / "m.safetensors")
    assert refused.exit_code == 2 and "float8 is not merged: convert" in refused.stderr
    assert dmm("merge", paths[0], paths[2], "-o", tmp_path / "m.safetensors").exit_code == 0
    assert json.loads(dmm("inspect", tmp_path / "m.safetensors", "--json").stdout)["parameters"] == 6


def test_the_same_file_twice_is_told(tmp_path, three):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(three[0].read_bytes())
    result = dmm("merge", three[0], copy, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 0
    assert f"warning: {copy} has the same bytes as {three[0]}: it counts twice" in result.stderr


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv"])
def test_tasks_that_drown_in_rounding_are_told(tmp_path, method):
    """Two checkpoints in bfloat16, of which ``lost`` differs from the float32 base by that alone, ``kept`` by more."""
    random, paths = torch.Generator().manual_seed(0), [tmp_path / f"m{number}.safetensors" for number in range(3)]
    base = {name: torch.randn(48, 64, generator=random) for name in ("kept.weight", "lost.weight")}
    save_torch(base, paths[0])
    changed = {**base, "kept.weight": base["kept.weight"] + torch.outer(torch.arange(48.0), torch.arange(64.0))}
    for path in paths[1:]:
        save_torch({name: tensor.bfloat16() for name, tensor in changed.items()}, path)
    out = tmp_path / "out.safetensors"
    result = dmm("merge", *paths[1:], "--base", paths[0], "--method", method, "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    told = f"{out}: 1 of 2 weights stay as in the base, lost.weight among them"
    assert told in result.stderr and any(told in line for line in json.loads(result.stdout)["warnings"])
    merged = load_torch(out)
    assert torch.equal(merged["lost.weight"], base["lost.weight"].bfloat16())
    assert not torch.equal(merged["kept.weight"], base["kept.weight"].bfloat16())
    for flags in (["--method", "task_arithmetic"], ["--method", method, "--param", "scale=0"]):
        other = dmm("merge", *paths[1:], "--base", paths[0], *flags, "-o", out, "--force")
        assert other.exit_code == 0 and "stay as in the base" not in other.stderr


def test_counts_of_a_checkpoint_without_weight_count_where_nobody_else_knows_a_class(write, tmp_path):
    """The README's recipe for one order of classes: ``--weights 0,1`` is the second, with the first one's order."""
    paths = []
    for number, classes in enumerate((["cat", "dog"], ["dog", "cat"], ["dog", "owl"])):
        told = {"dmm.classes": json.dumps(classes), "dmm.class_counts": json.dumps([100 + number, 7 * number])}
        net = small_net(number) | {"fc.weight": np.ones((2, 4), np.float32), "fc.bias": np.ones(2, np.float32)}
        paths.append(write(f"m{number}", told, **net))
    for others, expected in (([1], [7, 101]), ([2], [100, 102, 14])):
        out = tmp_path / f"{others}.safetensors"
        result = dmm("merge", paths[0], paths[others[0]], "--weights", "0,1", "--align", "never", "-o", out)
        assert result.exit_code == 0, result.stderr
        assert json.loads(metadata(out)["dmm.class_counts"]) == expected


def test_weights_that_are_all_zero_in_a_group_are_told(tmp_path):
    sites = [DIGITS / f"site-{name}.safetensors" for name in "abcde"]
    result = dmm("merge", *sites, "--group", "auto", "--weights", "0,0,0,1,1", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "the weights of a group are all 0: site-a, site-b, site-c" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_merge_of_strangers_is_told_and_recorded_layer_by_layer(tmp_path):
    strangers = [DIGITS / "site-a.safetensors", DIGITS / "site-d.safetensors"]
    result = dmm("merge", *strangers, "--align", "never", "-o", tmp_path / "out.safetensors", "--json")
    record = json.loads(result.stdout)
    a, d = (load_file(path)["fc.weight"].astype(np.float64) for path in strangers)
    ratio = np.linalg.norm((a + d) / 2) / (np.linalg.norm(a) + np.linalg.norm(d)) * 2
    assert record["norms"][0]["fc.weight"] == pytest.approx(ratio, rel=1e-5) and ratio < 0.8
    assert "weights come out far from their parents' norm" in result.stderr
    alike = dmm("merge", *SITES, "-o", tmp_path / "alike.safetensors")
    assert "warning" not in alike.stderr


def test_what_made_a_file_is_in_its_metadata(tmp_path):
    out = tmp_path / "out.safetensors"
    flags = ["--method", "dare_ties", "--param", "density=0.5", "--param", "fc.*:scale=0", "--seed", 3]
    assert dmm("merge", *SITES, "--base", BASE, *flags, "-o", out, "--calibrate", "svc").exit_code == 0
    told = metadata(out)
    assert told["dmm.method"] == "dare_ties" and told["dmm.seed"] == "3"
    assert json.loads(told["dmm.parameters"]) == {"density": 0.5, "scale": 0.3}
    assert json.loads(told["dmm.overrides"]) == [["fc.*", {"scale": 0.0}, []]]
    assert json.loads(told["dmm.calibrate"]) == {"method": "svc", "alpha": 1.0}
    assert json.loads(told["dmm.base"])[0]["sha256"] == resolve_source(str(BASE)).sha256
    assert load_file(out)["fc.weight"].tobytes() == load_file(BASE)["fc.weight"].tobytes()


def test_a_merge_of_hub_directories_tells_what_their_config_told(tmp_path):
    folders = [tmp_path / site.stem for site in SITES]
    shape = {"in_chans": 1, "layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64]}
    config = {
        "architecture": "resnet18",
        "num_classes": 10,
        "model_args": shape,
        "pretrained_cfg": {"input_size": [1, 16, 16], "mean": [0.3], "std": [0.38]},
        "label_names": list("0123456789"),
    }
    for folder, site in zip(folders, SITES, strict=True):
        folder.mkdir()
        save_file(load_file(site), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
    out, like = tmp_path / "out.safetensors", tmp_path / "like.safetensors"
    assert dmm("merge", *folders, "-o", out).exit_code == 0
    assert dmm("merge", *SITES, "-o", like).exit_code == 0
    judge = ["--data", DIGITS / "test.safetensors", "-q"]
    assert dmm("evaluate", out, *judge).stdout == dmm("evaluate", like, *judge).stdout
    assert metadata(out)["dmm.arch"] == "resnet18,in_chans=1,layers=[1,1,1,1],channels=[16,32,64,64],num_classes=10"
    assert json.loads(metadata(out)["dmm.classes"]) == list("0123456789")


def test_metadata_that_all_parents_agree_on_are_kept(write, tmp_path):
    told = [{"format": "tf", "licence": "MIT", "run": str(number), "dmm.note": "no"} for number in range(2)]
    paths = [write(f"m{number}", metadata, **small_net(number)) for number, metadata in enumerate(told)]
    assert dmm("merge", *paths, "--align", "never", "-o", tmp_path / "out.safetensors").exit_code == 0
    got = metadata(tmp_path / "out.safetensors")
    assert got["licence"] == "MIT" and got["format"] == "pt" and not {"run", "dmm.note"} & got.keys()


def test_parameters_of_some_tensors_come_from_dmm_toml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = 'method = "task_arithmetic"\nparam = ["scale=1", "fc.*:scale=0", "conv1.*:weights=1,0"]\n'
    (tmp_path / "dmm.toml").write_text(f"[merge]\n{settings}")
    assert dmm("merge", *SITES[:2], "--base", BASE, "-o", "out.safetensors").exit_code == 0
    got, start, a, b = (load_file(path) for path in ("out.safetensors", BASE, *SITES[:2]))
    assert got["fc.weight"].tobytes() == start["fc.weight"].tobytes()
    assert np.allclose(got["conv1.weight"], a["conv1.weight"], atol=1e-6)
    name = "layer1.0.conv1.weight"
    assert np.allclose(got[name], a[name] + b[name] - start[name], atol=1e-6)


def test_a_similarity_report_groups_the_same_checkpoints_in_any_order(tmp_path):
    sites = [DIGITS / f"site-{name}.safetensors" for name in "abcde"]
    (tmp_path / "s.json").write_text(dmm("similarity", *sites, "--json").stdout)
    merged = []
    for number, order in enumerate((sites, sites[::-1])):
        flags = ["--group", tmp_path / "s.json", "--align", "never", "-o", tmp_path / str(number), "--json"]
        record = json.loads(dmm("merge", *order, *flags).stdout)
        labels = record["grouping"]["labels"]
        for group in record["grouping"]["groups"]:
            parents = json.loads(metadata(tmp_path / str(number) / f"{group['name']}.safetensors")["dmm.sources"])
            assert {parent["label"] for parent in parents} == {labels[i] for i in group["members"]}
        merged.append([load_file(path)["fc.weight"] for path in record["outputs"]])
    assert all(np.allclose(one, other, atol=1e-6) for one, other in zip(*merged, strict=True))
    assert len(merged[0]) == 3


@pytest.mark.parametrize("text", ['{"groups": [3]}', '{"groups": [{"members": [9]}]}', '{"grouping": 3}', "[]", "{"])
def test_group_files_that_hold_no_groups(tmp_path, text):
    result = dmm("merge", *SITES, "--group", "-", "-o", tmp_path / "out", text=text)
    assert result.exit_code == 2 and result.stderr.startswith("error: standard input "), result.stderr
    assert not list(tmp_path.iterdir())


TIES, WUDI = (["--method", name, "--base", BASE] for name in ("ties", "wudi"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([*TIES, "--param", "scael=1"], "hint: did you mean scale?"),
        ([*TIES, "--param", "fc.*:densty=0.1"], "hint: did you mean density?"),
        ([*TIES, "--param", "density=1.5"], "density must lie between 0 and 1, not 1.5"),
        ([*TIES, "--param", "fc.*:density=-1"], "density must lie between 0 and 1, not -1"),
        ([*TIES, "--param", "scale=much"], "parameter scale of ties is a number, not much"),
        ([*TIES, "--param", "nothing.*:scale=1"], "no tensor matches nothing.*"),
        ([*WUDI, "--param", "steps=2.5"], "steps must be a whole number, not 2.5"),
        ([*WUDI, "--param", "ridge=-1"], "ridge must not be negative: -1"),
        ([*WUDI, "--calibrate", "svc", "--param", "svc.alhpa=1"], "hint: did you mean alpha?"),
        ([*WUDI, "--calibrate", "svc", "--param", "svc.alpha=-2"], "alpha must not be negative: -2"),
        ([*WUDI, "--calibrate", "svc", "--param", "svc.alpha=inf"], "--param alpha takes finite numbers, not inf"),
        ([*WUDI, "--calibrate", "scv"], "did you mean svc?"),
        (["--param", "scale=1"], "linear has no parameter scale"),
        (["--method", "ties"], "hint: name it with --base"),
        (["--calibrate", "svc"], "works on task vectors, which linear has none of"),
        (["--dtype", "float8"], "unknown dtype: float8"),
        (["--dtype", "fp16"], "hint: did you mean float16?"),
        (["--head", "unoin"], "hint: did you mean union?"),
        (["--group", "atuo"], "hint: did you mean auto?"),
        (["--param", "layr1.*:weights=1,2,3"], "hint: did you mean layer1.*? dmm inspect --tensors"),
        (["--param", "layer1.9.*:weights=1,2,3"], "hint: did you mean layer1.0.*? dmm inspect --tensors"),
        (["--head", "last"], "unknown head policy: last"),
        (["--max-shard-size", "many"], "not a size: many"),
        (["--device", "gpu"], "unknown device: gpu"),
    ],
)
def test_mistakes_exit_2_write_nothing_and_are_found_by_a_dry_run(tmp_path, flags, words):
    command = ["merge", *SITES, *flags, "-o", tmp_path / "out.safetensors"]
    result, dry = dmm(*command), dmm(*command, "--dry-run")
    assert result.exit_code == 2 and words in result.stderr, result.stderr
    assert dry.exit_code == 2 and dry.stderr == result.stderr and dry.stdout == ""
    assert list(tmp_path.iterdir()) == []


D = DIGITS / "site-d.safetensors"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-o", "old.safetensors"], "the output exists: old.safetensors"),
        (["-o", "no/such/out.safetensors"], "no such directory: no/such"),
        (["-o", "no/such/out"], "cannot make the directory no/such/out\nhint: mkdir -p no/such\n"),
        (["-o", "out.pt"], "not the name of a .safetensors file: out.pt"),
        (["-o", "old"], "the output exists: old/merge.json"),
        (["-o", "out", "--group", "unknown.json"], "groups in unknown.json do not fit"),
        (["-o", "out", "--group", "other.json"], "other.json compares other checkpoints"),
        (["-o", "out.safetensors", "--group", "two.json"], "2 groups do not fit in one file"),
        (["-o", "out", "--group", "two.json", "--method", "slerp"], ""),
        (["-o", "out", "--group", "mixed.json", "w.safetensors"], "do not have the same tensors"),
        (["-o", "out.safetensors", "--group", "0", "w.safetensors"], "2 groups do not fit in one file"),
        (["-o", "out.safetensors", "--recalibrate", "w.safetensors", "--max-shard-size", "1KB"], "to one file"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(tmp_path, monkeypatch, write, flags, words):
    monkeypatch.chdir(tmp_path)
    write("old", w=np.ones(2, np.float32))
    write("w", w=np.ones((2, 2), np.float32))
    (tmp_path / "old").mkdir()
    for name, groups in {"unknown": [["site-z"]], "two": [["site-a", "site-c"]], "mixed": [["site-a", "w"]]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"groups": groups}))
    (tmp_path / "other.json").write_text(dmm("similarity", D, SITES[0], "--json").stdout)
    (tmp_path / "old" / "merge.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    command = ["merge", *SITES, *flags, "--align", "never"]
    dry = dmm(*command, "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before
    result = dmm(*command)
    assert dry.exit_code == result.exit_code == (2 if words else 0), (dry.output, result.output)
    assert words in dry.stderr and dry.stderr == result.stderr
    assert not words or sorted(tmp_path.rglob("*")) == before


def test_a_method_of_two_takes_more_where_groups_are_found_to_hold_two(tmp_path):
    command = ["merge", SITES[0], SITES[1], D, "--group", "auto", "--method", "slerp", "-o", tmp_path / "out"]
    assert dmm(*command, "--dry-run").exit_code == 0
    assert dmm(*command).exit_code == 0
    assert len(list((tmp_path / "out").glob("group-*.safetensors"))) == 2
    result = dmm(*command[:3], *command[4:], SITES[2], "--force")
    assert result.exit_code == 2 and "slerp merges two checkpoints, not 3" in result.stderr


@pytest.mark.parametrize("rule", ["0", "-1"])
def test_checkpoints_of_two_architectures_are_two_groups_whatever_the_threshold(write, tmp_path, rule):
    draw = np.random.default_rng(0)
    shapes = {"a": (4, 4), "b": (4, 4), "c": (5, 4)}
    paths = [write(name, w=draw.normal(1, 0.1, shape).astype(np.float32)) for name, shape in shapes.items()]
    result = dmm("merge", *paths, "--group", rule, "--align", "never", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    grouping = json.loads(result.stdout)["grouping"]
    assert [group["members"] for group in grouping["groups"]][-1] == [2] and grouping["pairs"][0]["together"] is True


def test_a_directory_in_which_nothing_came_to_stand_goes_again(write, tmp_path):
    paths = [write(name, w=np.full((2, 2), value, np.float32)) for name, value in (("a", 1.0), ("b", np.nan))]
    result = dmm("merge", *paths, "--align", "never", "-o", tmp_path / "out")
    assert result.exit_code == 2 and "NaN or infinity" in result.stderr and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert dmm("merge", *paths, "--align", "never", "-o", tmp_path / "out").exit_code == 2
    assert list((tmp_path / "out").iterdir()) == []


def test_a_gpu_that_is_not_there_is_an_error(tmp_path):
    result = dmm("merge", *SITES, *WUDI, "--device", "cuda:99", "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2 and "no such device: cuda:99" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_heads_of_different_classes_are_joined_by_name_and_the_file_says_so(write, tmp_path):
    paths = []
    for number, classes in enumerate((["cat", "dog"], ["dog", "owl", "elk"])):
        net = small_net(number) | {"fc.weight": np.full((len(classes), 4), number + 1.0, np.float32)}
        told = {"dmm.classes": json.dumps(classes), "dmm.arch": f"resnet18,num_classes={len(classes)}"}
        paths.append(write(f"m{number}", told | {"dmm.class_counts": json.dumps([5] * len(classes))}, **net))
    out = tmp_path / "out.safetensors"
    assert dmm("merge", *paths, "-o", out).exit_code == 0
    assert load_file(out)["fc.weight"][:, 0].tolist() == [1.0, 1.5, 2.0, 2.0]
    told = metadata(out)
    assert json.loads(told["dmm.classes"]) == ["cat", "dog", "owl", "elk"]
    assert told["dmm.arch"] == "resnet18,num_classes=4" and json.loads(told["dmm.class_counts"]) == [5, 10, 5, 5]
    assert dmm("merge", *paths, "-o", out, "--force", "--head", "first").exit_code == 0
    assert load_file(out)["fc.weight"].shape == (2, 4)
    assert json.loads(metadata(out)["dmm.classes"]) == ["cat", "dog"]


def test_checkpoints_that_name_different_architectures_are_merged_with_a_warning(write, tmp_path):
    archs = [
        "vit,num_heads=2, num_classes=3",
        "vit,num_classes=4,num_heads=2",
        "vit,num_heads=4",
        "vit.in1k,drop_rate=.1,in_chans=3,num_heads=2",
    ]
    paths = [write(f"m{n}", {"dmm.arch": arch}, **small_net(n)) for n, arch in enumerate(archs)]
    words = "m0 is vit,num_heads=2, num_classes=3, m2 is vit,num_heads=4)"
    told = dmm("merge", *paths, "-o", tmp_path / "all.safetensors")
    assert told.exit_code == 0 and "group-0: its checkpoints have the same tensors, but name different" in told.stderr
    assert words in told.stderr
    for number, more in enumerate([paths[:2], [paths[1], paths[3]], [*paths, "--arch", "vit"]]):
        quiet = dmm("merge", *more, "-o", tmp_path / f"{number}.safetensors")
        assert quiet.exit_code == 0 and "architectures" not in quiet.stderr


def test_the_first_head_brings_its_classes_where_others_have_as_many(write, tmp_path):
    paths = [
        write(f"m{number}", {"dmm.classes": json.dumps(classes), "dmm.class_counts": "[3, 4]"}, **small_net(number))
        for number, classes in enumerate((["cat", "dog"], ["owl", "elk"]))
    ]
    out = tmp_path / "out.safetensors"
    assert dmm("merge", *paths, "-o", out, "--head", "first", "--align", "never").exit_code == 0
    assert (load_file(out)["fc.weight"] == small_net(0)["fc.weight"]).all()
    assert metadata(out)["dmm.classes"] == '["cat", "dog"]' and metadata(out)["dmm.class_counts"] == "[3, 4]"


def test_eight_files_are_merged_on_one_core(write, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    paths = [write(f"m{i}", w=np.full((500, 700), i, np.float32)) for i in range(1, 9)]
    assert dmm("merge", *paths, "-o", tmp_path / "out.safetensors").exit_code == 0
    assert (load_file(tmp_path / "out.safetensors")["w"] == 4.5).all()


@pytest.mark.parametrize(
    ("sources", "flags", "output", "files"),
    [
        # of two starts: aligned; five shards, their index and merge.json
        ([SITES[0], DIGITS / "site-d.safetensors"], ["--max-shard-size", "200KB"], "model", 7),
        (SITES, ["--method", "tsv", "--base", str(BASE)], "model.safetensors", 1),
    ],
)
def test_two_processes_write_the_bytes_of_one(tmp_path, monkeypatch, sources, flags, output, files):
    arguments = ["merge", *map(str, sources), *flags, "-o", output]
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    shown = under_torchrun(*arguments, cwd=folders[1])
    monkeypatch.chdir(folders[0])
    assert dmm(*arguments).exit_code == 0
    assert shown.count("written") == 1
    one, two = ({path.name: path.read_bytes() for path in folder.rglob("*.*")} for folder in folders)
    assert one == two and len(one) == files
    merged = metadata(next(folders[0].rglob("*.safetensors")))
    assert ("dmm.aligned" in merged) == ("--max-shard-size" in flags)


def test_statistics_go_with_the_filters_before_them(three, tmp_path):
    """Whoever takes a layer from one checkpoint has its statistics; they can still be given weights of their own."""
    out, parents = tmp_path / "out.safetensors", [load_file(path) for path in three]
    assert dmm("merge", *three, "--param", "conv1.*:weights=0,1,0", "-o", out).exit_code == 0
    got = load_file(out)
    for name in ("conv1.weight", "bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"):
        assert (got[name] == parents[1][name]).all()
    mean = sum(parent["fc.weight"] for parent in parents) / 3
    assert np.allclose(got["fc.weight"], mean, atol=1e-6)
    flags = ["--param", "conv1.*:weights=0,1,0", "--param", "bn1.running_*:weights=1,1,1"]
    assert dmm("merge", *three, *flags, "-o", out, "--force").exit_code == 0
    mean = sum(parent["bn1.running_mean"] for parent in parents) / 3
    assert np.allclose(load_file(out)["bn1.running_mean"], mean, atol=1e-6)
    flags = ["--param", "*1.*:weights=1,0,0", "--param", "conv1.*:weights=0,1,0"]  # of several the last counts
    assert dmm("merge", *three, *flags, "-o", out, "--force").exit_code == 0
    got = load_file(out)
    assert all((got[name] == parents[1][name]).all() for name in ("conv1.weight", "bn1.running_mean"))
    assert (got["bn1.weight"] == parents[0]["bn1.weight"]).all()


def test_integer_filters_in_front_of_a_normalisation_stay(write, tmp_path):
    paths = [write(f"m{seed}", **small_net(seed) | {"conv1.weight": np.ones((4, 3, 3, 3), np.int8)}) for seed in (0, 1)]
    out = tmp_path / "out.safetensors"
    assert dmm("merge", *paths, "-o", out).exit_code == 0
    deviations = [np.sqrt(small_net(seed)["bn1.running_var"]) for seed in (0, 1)]
    assert np.allclose(load_file(out)["bn1.running_var"], np.square(np.mean(deviations, 0)), rtol=1e-5)


def test_a_recalibration_of_nothing_is_told(tmp_path):
    pseudo = digits_as_pseudo_data(tmp_path / "pseudo.safetensors", [(SITES[0], range(5))])
    result = dmm("merge", SITES[0], "--recalibrate", pseudo, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 0 and "no group has two checkpoints" in result.stderr


@pytest.mark.parametrize("method", ["linear", "karcher"])  # the latter measures first, which is when hashes are taken
def test_integers_are_compared_in_pieces(write, tmp_path, method):
    values = np.arange(3 * 2**18 + 5).astype(np.int16)
    nets = [small_net(seed) for seed in range(2)]
    paths = [write(f"m{seed}", **net | {"table": values}) for seed, net in enumerate(nets)]
    out = tmp_path / "out.safetensors"
    assert dmm("merge", *paths, "--method", method, "-o", out).exit_code == 0
    assert (load_file(out)["table"] == values).all()
    told = json.loads(metadata(out)["dmm.sources"])
    assert [entry["sha256"] for entry in told] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    values[-1] += 1
    other = write("other", **nets[1] | {"table": values})
    result = dmm("merge", paths[0], other, "--method", method, "-o", tmp_path / "no.safetensors")
    assert result.exit_code == 2 and "I16 tensor table differs" in result.stderr
    assert not (tmp_path / "no.safetensors").exists()
