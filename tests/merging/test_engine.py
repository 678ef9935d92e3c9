"""Merges from files to files: the rule of every kind of tensor, streaming, shards, dtypes, refusals."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_net
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from dmm_cli.architectures import build
from dmm_cli.digest import hashing
from dmm_cli.errors import DmmError
from dmm_cli.inputs import resolve_source, resolve_sources
from dmm_cli.merging import METHODS, engine, tensors
from dmm_cli.merging.engine import Outcome
from dmm_cli.merging.recipe import Override, Recipe

W = np.ones((2, 2), np.float32)
HUGE = np.full((2, 2), 1e300)


def merge(paths, output, recipe=Recipe(), **options) -> Outcome:
    return engine.merge(resolve_sources([str(path) for path in paths]), output, recipe, {"format": "pt"}, **options)


def run(paths, output, recipe=Recipe()) -> tuple[dict[str, np.ndarray], Outcome]:
    found = merge(paths, output, recipe)
    return load_file(output), found


def recipe_for(method: str, base: Path, **details) -> Recipe:
    """A recipe with all that the method needs, from one file: for a draft, pseudo-data are only asked for."""
    traits, source = METHODS.traits(method), resolve_source(str(base))
    needs = {"base": source if "base" in traits else None, "features": source if "features" in traits else None}
    return Recipe(method, **needs, **details)


def number_for(method: str) -> int:
    return 2 if "pair" in METHODS.traits(method) else 3


def test_every_kind_of_tensor(three, tmp_path):
    got, found = run(three[:2], tmp_path / "out.safetensors", Recipe(weights=(3.0, 1.0)))
    a, b = small_net(0), small_net(1)
    for name in ("conv1.weight", "fc.weight", "bn1.running_mean"):
        assert np.allclose(got[name], 0.75 * a[name] + 0.25 * b[name], atol=1e-7), name
    assert got["bn1.num_batches_tracked"] == 20 and got["bn1.num_batches_tracked"].dtype == np.int64
    assert (found.paired, found.unpaired, found.index) == (1, 0, None)
    for channel in range(4):
        f, g = a["conv1.weight"][channel].ravel(), b["conv1.weight"][channel].ravel()
        rho = float(f @ g) / np.sqrt(float(f @ f) * float(g @ g))
        s, t = np.sqrt(a["bn1.running_var"][channel]), np.sqrt(b["bn1.running_var"][channel])
        expected = (0.75 * s) ** 2 + (0.25 * t) ** 2 + 2 * 0.75 * 0.25 * rho * s * t
        assert got["bn1.running_var"][channel] == pytest.approx(expected, rel=1e-5)


def test_the_norm_of_every_matrix_is_told_next_to_its_parents(three, tmp_path):
    got, found = run(three[:2], tmp_path / "out.safetensors", Recipe(weights=(3.0, 1.0)))
    assert set(found.lengths) == {"conv1.weight", "fc.weight"}
    for name, ratio in found.lengths.items():
        parents = [np.linalg.norm(small_net(seed)[name].ravel().astype(np.float64)) for seed in (0, 1)]
        assert ratio == pytest.approx(np.linalg.norm(got[name]) / np.average(parents, weights=[3, 1]), rel=1e-5)


@pytest.mark.parametrize("method", METHODS.names())
def test_identical_checkpoints_come_back_unchanged(write, tmp_path, method):
    net = small_net(0)
    paths = [write(name, **net) for name in "ab"]
    got, _ = run(paths, tmp_path / "out.safetensors", recipe_for(method, write("base", **net)))
    assert all(got[name].tobytes() == value.tobytes() for name, value in net.items())


@pytest.mark.parametrize("method", METHODS.names())
def test_the_same_bytes_on_one_core_and_on_many(write, tmp_path, monkeypatch, method):
    draw = np.random.default_rng(0)
    paths = [write(f"m{i}", w=draw.normal(size=(300, 1000)), v=draw.normal(size=999), **small_net(i)) for i in range(4)]
    base, *paths = paths[: number_for(method) + 1]
    outputs = [tmp_path / "1.safetensors", tmp_path / "8.safetensors"]
    for cores, output in zip((1, 8), outputs, strict=True):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        run(paths, output, recipe_for(method, base))
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


@pytest.mark.parametrize("method", [name for name in METHODS if "random" not in METHODS.traits(name)])
def test_the_cut_into_blocks_changes_no_more_than_rounding(write, tmp_path, monkeypatch, method):
    draw = np.random.default_rng(0)
    shapes = {"a": (5, 11), "b": (3,), "c": (40,), "d": (2, 3, 3, 3), "z": ()}
    paths = [write(f"m{i}", **{n: draw.normal(size=s).astype(np.float32) for n, s in shapes.items()}) for i in range(4)]
    base, *paths = paths[: number_for(method) + 1]
    whole, _ = run(paths, tmp_path / "whole.safetensors", recipe_for(method, base))
    monkeypatch.setattr(tensors, "BLOCK", 7)
    blocks, _ = run(paths, tmp_path / "blocks.safetensors", recipe_for(method, base))
    assert all(np.allclose(blocks[name], whole[name], rtol=1e-5, atol=1e-6) for name in shapes)


def test_slerp_over_blocks_is_that_of_the_whole_tensor(write, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK", 7)
    draw = np.random.default_rng(0)
    values = [draw.normal(size=(5, 11)).astype(np.float32) for _ in range(2)]
    got, _ = run([write(f"m{i}", w=v) for i, v in enumerate(values)], tmp_path / "out.safetensors", Recipe("slerp"))
    a, b = (value.astype(np.float64).ravel() for value in values)
    angle = np.arccos(a @ b / np.sqrt((a @ a) * (b @ b)))
    assert np.allclose(got["w"].ravel(), np.sin(angle / 2) / np.sin(angle) * (a + b), atol=1e-6)


@pytest.mark.parametrize("method", METHODS.names())
def test_numbers_and_empty_tensors_are_merged_too(write, tmp_path, method):
    values = [{"n": np.array(v, np.float32), "e": np.zeros((0, 3), np.float32)} for v in (1.0, 2.0, 2.0, 2.0)]
    base, *paths = [write(f"m{number}", **arrays) for number, arrays in enumerate(values)]
    got, _ = run(paths[: number_for(method)], tmp_path / "out.safetensors", recipe_for(method, base))
    assert got["n"].shape == () and got["e"].shape == (0, 3)
    if "random" not in METHODS.traits(method):
        expected = (
            1.9 if method == "task_arithmetic" else 2.0
        )  # 1 + 0.3 * 3 steps of 1; all the others go the whole way
        assert got["n"] == pytest.approx(expected, rel=1e-6)


LARGE = 600_000  # elements; the few larger tensors are of kinds that smaller ones are of too
REAL = {
    "resnet50": "resnet50,num_classes=10,channels=(8,16,32,64)",
    "vgg11_bn": "vgg11_bn,num_classes=10",
    "mobilenetv3": "mobilenetv3_small_050,num_classes=10",
    "convnext": "convnext_atto,num_classes=10,dims=(16,32,64,128)",
    "vit": "vit_tiny_patch16_224,num_classes=10,depth=2",
    "swin": "swin_tiny_patch4_window7_224,num_classes=10,embed_dim=24,num_heads=(1,2,4,8),depths=(1,1,2,1)",
    "levit": "levit_128s,num_classes=10,embed_dim=(32,64,96),num_heads=(2,3,4),key_dim=8,depth=(1,1,1)",
}


def real_checkpoints(spec: str, folder: Path, count: int) -> list[Path]:
    """A random start and fine-tunings of it, with the names, shapes and dtypes of a timm model."""
    with torch.device("meta"):
        start = build(spec).state_dict()
    start = {name: value for name, value in start.items() if value.numel() <= LARGE}
    draw = torch.Generator().manual_seed(0)
    base = {name: _random(name, value, draw) for name, value in start.items()}
    paths = []
    for number in range(count):
        moved = {
            name: value * (1 + 0.1 * torch.rand(value.shape, generator=draw)) if value.is_floating_point() else value
            for name, value in base.items()
        }
        save_torch(moved if number else base, folder / f"{number}.safetensors")
        paths.append(folder / f"{number}.safetensors")
    return paths


def _random(name: str, like: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    if not like.is_floating_point():
        return torch.full(like.shape, 7, dtype=like.dtype)
    if name.endswith("running_var"):
        return torch.rand(like.shape, generator=draw) + 0.5
    return torch.randn(like.shape, generator=draw) * 0.05


@pytest.mark.parametrize("family", REAL)
def test_every_method_merges_real_state_dicts(family, tmp_path):
    base, *paths = real_checkpoints(REAL[family], tmp_path, 4)
    start = load_torch(base)
    for method in METHODS:
        output = tmp_path / "out.safetensors"
        found = merge(paths[: number_for(method)], output, recipe_for(method, base), force=True)
        got = load_torch(output)
        assert got.keys() == start.keys()
        for name, value in got.items():
            assert value.shape == start[name].shape and value.dtype == start[name].dtype, name
            assert torch.isfinite(value.float()).all(), (method, name)
            if not value.is_floating_point():
                assert torch.equal(value, start[name]), name
            if name.endswith("running_var"):
                assert (value > 0).all(), (method, name)
        ratios = np.array(list(found.lengths.values()))
        assert 0.9 < np.median(ratios) < 1.3 and ratios.min() > 0.5 and ratios.max() < 3, method


TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


MIXED = [("F16", "F32", "BF16"), ("F32", "F64", "F16"), ("BF16", "F64", "BF16"), ("F64", "BF16", "F64")]


@pytest.mark.parametrize("tags", [("F16",) * 3, ("BF16",) * 3, ("F64",) * 3, *MIXED])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "tsv"])
def test_any_float_dtype_is_merged_in_float32_or_better(tmp_path, tags, method):
    """Every value is within half a unit in the last place of what float64 gives."""
    draw = torch.Generator().manual_seed(1)
    values = [torch.randn(40, 30, generator=draw, dtype=torch.float64).to(TORCH[tag]) for tag in tags]
    narrow, exact = ([tmp_path / f"{kind}{i}.safetensors" for i in range(3)] for kind in "ne")
    for value, path, other in zip(values, narrow, exact, strict=True):
        save_torch({"w": value}, path)
        save_torch({"w": value.double()}, other)
    outputs = [tmp_path / "n.safetensors", tmp_path / "e.safetensors"]
    for (first, *rest), output in zip((narrow, exact), outputs, strict=True):
        merge([*rest, first] if method == "linear" else rest, output, recipe_for(method, first))
    got, expected = (load_torch(output)["w"] for output in outputs)
    kept = tags[1]
    assert got.dtype == TORCH[kept]
    unit = max(torch.finfo(TORCH[kept]).eps, torch.finfo(torch.float32).eps)
    scale = expected.abs().clamp_min(expected.abs().mean())
    assert ((got.double() - expected).abs() <= 10 * unit * scale).all()


@pytest.mark.parametrize(
    ("dtype", "tag"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32"), ("float64", "F64")]
)
def test_a_wanted_dtype_is_that_of_every_float_tensor(three, tmp_path, dtype, tag):
    output = tmp_path / "out.safetensors"
    merge(three, output, Recipe(dtype=dtype))
    with safe_open(output, "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in load_file(three[0])}
    assert kinds.pop("bn1.num_batches_tracked") == "I64" and set(kinds.values()) == {tag}


def test_shards_hold_what_one_file_holds(three, tmp_path):
    one, _ = run(three, tmp_path / "one.safetensors")
    (tmp_path / "many").mkdir()
    found = merge(three, tmp_path / "many" / "model.safetensors", max_shard=250)
    index = json.loads(found.index)
    assert found.path == tmp_path / "many" / "model.safetensors.index.json"
    files = sorted(path.name for path in (tmp_path / "many").iterdir())
    assert len(files) > 1 and set(index["weight_map"].values()) == set(files)
    shards = {name: load_file(tmp_path / "many" / name) for name in files}
    assert index["metadata"]["total_size"] == sum(v.nbytes for shard in shards.values() for v in shard.values())
    for name, value in one.items():
        assert shards[index["weight_map"][name]][name].tobytes() == value.tobytes()
    found.path.write_text(found.index)
    again, _ = run([found.path, found.path], tmp_path / "again.safetensors")
    assert all(again[name].tobytes() == value.tobytes() for name, value in one.items())


def test_weights_and_parameters_of_some_tensors(three, tmp_path):
    overrides = (Override("fc.*", weights=(0.0, 1.0)), Override("conv*", {"scale": 0.0}))
    base, a, b = three
    recipe = recipe_for("task_arithmetic", base, parameters={"scale": 0.5}, overrides=overrides)
    got, _ = run([a, b], tmp_path / "out.safetensors", recipe)
    start, second = small_net(0), small_net(2)
    assert got["conv1.weight"].tobytes() == start["conv1.weight"].tobytes(), "an explicit 0 is 0"
    expected = start["fc.weight"] + 0.5 * (second["fc.weight"] - start["fc.weight"])
    assert np.allclose(got["fc.weight"], expected, atol=1e-6)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS.names())
def test_a_weight_of_zero_leaves_a_checkpoint_out(write, tmp_path, method, place):
    """To the bit, whatever it holds: NaN, other integers, a larger step counter."""
    count = number_for(method)
    place = min(place, count - 1)
    base, *alone = [write(f"m{i}", table=np.arange(3), **small_net(i)) for i in range(count)]
    left_out = {name: value * np.nan for name, value in small_net(9).items()}
    left_out["bn1.num_batches_tracked"] = np.array(10**6)
    paths = [*alone[:place], write("left out", table=np.arange(3) + 1, **left_out), *alone[place:]]
    weights = [1.0] * count
    weights[place] = 0.0
    given = {"calibrate": "svc"} if "base" in METHODS.traits(method) else {}
    got, found = run(paths, tmp_path / "z.safetensors", recipe_for(method, base, weights=tuple(weights), **given))
    wanted, expected = run(alone, tmp_path / "w.safetensors", recipe_for(method, base, **given))
    assert {name: value.tobytes() for name, value in got.items()} == {n: v.tobytes() for n, v in wanted.items()}
    assert found.lengths == expected.lengths


def test_a_checkpoint_that_alone_counts_comes_back_to_the_bit(write, tmp_path):
    values = [np.array([1e8, 1.0, 0.0], np.float32), np.array([1.2345, 1e8, -0.0], np.float32)]
    paths = [write(f"m{i}", w=value, bn__running_mean=value, bn__running_var=value) for i, value in enumerate(values)]
    for weights, value in zip([(1.0, 0.0), (0.0, 1.0)], values, strict=True):
        got, _ = run(paths, tmp_path / "out.safetensors", Recipe(weights=weights))
        (tmp_path / "out.safetensors").unlink()
        assert {array.tobytes() for array in got.values()} == {value.tobytes()}


def test_a_weight_of_zero_in_some_tensors_leaves_a_checkpoint_out_of_those(three, tmp_path):
    """Its hash is taken all the same."""
    sources = resolve_sources([str(path) for path in three])
    recipe = Recipe(overrides=(Override("bn1.*", weights=(0.0, 1.0, 0.0)), Override("fc*", weights=(1.0, 0.0, 0.0))))
    with hashing(sources) as hashes:
        engine.merge(sources, tmp_path / "out.safetensors", recipe, {}, hashes=hashes)
        hashes.wait(sources)
    nets, got = [small_net(i) for i in range(3)], load_file(tmp_path / "out.safetensors")
    assert all(got[name].tobytes() == value.tobytes() for name, value in nets[1].items() if name.startswith("bn1."))
    assert got["fc.weight"].tobytes() == nets[0]["fc.weight"].tobytes()
    assert np.allclose(got["conv1.weight"], np.mean([net["conv1.weight"] for net in nets], axis=0), atol=1e-7)
    assert [source.sha256 for source in sources] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in three]


def test_calibration_works_on_any_task_vector_and_on_matrices_alone(three, tmp_path):
    base, *paths = three
    plain, _ = run(paths, tmp_path / "plain.safetensors", recipe_for("ties", base))
    recipe = recipe_for("ties", base, calibrate="svc")
    calibrated, _ = run(paths, tmp_path / "calibrated.safetensors", recipe)
    start, tasks = small_net(0), [small_net(i)["fc.weight"] - small_net(0)["fc.weight"] for i in (1, 2)]
    left, values, right = np.linalg.svd(plain["fc.weight"] - start["fc.weight"], full_matrices=False)
    factors = []
    for direction, value, answer in zip(left.T, values, right, strict=True):
        own = [direction @ task for task in tasks]
        shares = [max(1.0, value * answer @ projection / (projection @ projection)) for projection in own]
        factors.append(2 / sum(shares))
    expected = start["fc.weight"] + (left * (values * factors)) @ right
    assert np.allclose(calibrated["fc.weight"], expected, atol=2e-5)
    assert calibrated["bn1.weight"].tobytes() == plain["bn1.weight"].tobytes()


def test_what_cannot_be_merged(write, tmp_path):
    nan = W.copy()
    nan[0, 0] = np.nan
    table = np.array([1, 2])
    huge = np.full((2, 2), 3e38, np.float32)
    most = np.full((2, 2), np.finfo(np.float32).max)
    start = resolve_source(str(write("start", w=-huge)))
    cases = [
        ({"w": W}, {"w": nan}, Recipe(), r"tensor w of .*b\.safetensors"),
        ({"w": W, "t": table}, {"w": W, "t": table + 1}, Recipe(), "I64 tensor t differs"),
        ({"w": W}, {"w": table}, Recipe(), "do not have the same tensors"),
        ({"t": table}, {"t": table.astype(np.int32)}, Recipe(), "tensor t is I64 in .* and I32"),
        ({"w": W}, {"w": W}, Recipe("task_arithmetic"), "needs the common start"),
        ({"w": W}, {"w": W}, Recipe("mean"), "unknown merge method: mean"),
        ({"w": W}, {"w": W}, Recipe(weights=(1.0,)), "1 weights for 2 checkpoints"),
        ({"w": W}, {"w": W}, Recipe(weights=(1.0, -1.0)), "zero or more"),
        ({"w": W}, {"w": W}, Recipe(weights=(0.0, 0.0)), "positive sum"),
        ({"w": W}, {"w": W}, Recipe(weights=(1e308, 1e308)), "positive sum"),
        ({"w": W}, {"w": W}, Recipe(weights=(1e-46, 1e-46)), "positive sum"),
        ({"w": W}, {"w": W}, Recipe(weights=(float("nan"), 1.0)), "positive sum"),
        ({"running_var": -W[0]}, {"running_var": W[0]}, Recipe(), r"negative running variance.*a\.safetensors"),
        ({"w": 1e5 * W}, {"w": 1e5 * W}, Recipe(dtype="float16"), "tensor w has values beyond the range of float16"),
        ({"w": most}, {"w": most}, Recipe(dtype="bfloat16"), "tensor w has values beyond the range of bfloat16"),
        ({"w": HUGE}, {"w": HUGE}, Recipe(dtype="bfloat16"), "tensor w has values beyond the range"),
        ({"w": HUGE}, {"w": HUGE}, Recipe(dtype="float32"), "tensor w has values beyond the range of float32"),
        ({"running_var": HUGE[0]}, {"running_var": HUGE[0]}, Recipe(dtype="float32"), "tensor running_var has values"),
        ({"w": W}, {"w": W}, Recipe("task_arithmetic", base=start, parameters={"scale": 9.0}), "merging tensor w over"),
        ({"w": W}, {"w": W}, Recipe(parameters={"scale": 1.0}), "linear has no parameter scale"),
    ]
    output, threads = tmp_path / "out.safetensors", threading.active_count()
    for a, b, recipe, words in cases:
        paths = [write("a", **a), write("b", **b)]
        with pytest.raises(DmmError, match=words):
            run(paths, output, recipe)
        assert not output.exists() and threading.active_count() == threads


def test_statistics_that_are_numbers_are_merged_too(write, tmp_path):
    nets = [{"bn.running_var": np.array(v, np.float32), "bn.running_mean": np.array(v, np.float32)} for v in (4, 16)]
    paths = [write(name, **net, **{"conv.weight": W}) for name, net in zip("ab", nets, strict=True)]
    got, found = run(paths, tmp_path / "out.safetensors")
    assert got["bn.running_var"] == 9.0 and got["bn.running_mean"] == 10.0, "the squared mean of the deviations"
    assert (found.paired, found.unpaired) == (0, 0)


@pytest.mark.parametrize("method", METHODS.names())
def test_counters_that_were_cast_to_floats_are_no_weights(write, tmp_path, method):
    counts = [np.array(count, np.float32) for count in (1200, 1300, 1250)[: number_for(method)]]
    paths = [write(f"m{n}", conv__weight=(n + 1) * W, bn__num_batches_tracked=c) for n, c in enumerate(counts)]
    base = write("base", conv__weight=0 * W, bn__num_batches_tracked=np.array(1000, np.float32))
    got, _ = run(paths, tmp_path / "out.safetensors", recipe_for(method, base))
    assert got["bn.num_batches_tracked"] == 1300 and got["bn.num_batches_tracked"].dtype == np.float32


def test_means_do_not_overflow_on_the_way(write, tmp_path):
    for dtype in (np.float32, np.float64):
        most = np.finfo(dtype).max
        means = [np.array([most, most, 1.0], dtype), np.array([-most, most, 3.0], dtype)]
        paths = [write(name, bn__running_mean=mean) for name, mean in zip("ab", means, strict=True)]
        got, _ = run(paths, tmp_path / f"{np.dtype(dtype)}.safetensors")
        assert got["bn.running_mean"].tolist() == [0.0, most, 2.0]


@pytest.mark.parametrize("max_shard", [None, 250])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_an_input_that_changes_during_the_merge_leaves_the_output_as_it_was(three, tmp_path, changed, max_shard):
    def touch(stage: str, done: int, total: int) -> None:
        if done == total:
            os.utime(three[changed])

    base, *paths = three
    output = tmp_path / "out" / "model.safetensors"
    output.parent.mkdir()
    for content in (None, b"an older one"):
        if content:
            output.write_bytes(content)
        with pytest.raises(DmmError, match=rf"m{changed}\.safetensors changed while"):
            recipe = recipe_for("task_arithmetic", base)
            merge(paths, output, recipe, max_shard=max_shard, force=True, on_progress=touch)
        assert [path.read_bytes() for path in output.parent.iterdir()] == ([content] if content else [])


@pytest.mark.parametrize("other", ["model.safetensors", "model.safetensors.index.json"])
def test_an_output_of_another_merge_that_was_faster_stays(three, tmp_path, other):
    output = tmp_path / "out" / "model.safetensors"
    output.parent.mkdir()

    def be_faster(stage: str, done: int, total: int) -> None:
        (output.parent / other).write_bytes(b"the first")

    max_shard = 250 if other.endswith("json") else None
    with pytest.raises(DmmError, match="the output exists"):
        merge(three, output, max_shard=max_shard, on_progress=be_faster)
    assert [(path.name, path.read_bytes()) for path in output.parent.iterdir()] == [(other, b"the first")]


def test_slerp_takes_two(three, tmp_path):
    with pytest.raises(DmmError, match="slerp merges two checkpoints, not 3"):
        run(three, tmp_path / "out.safetensors", Recipe("slerp"))
