from __future__ import annotations

import numpy as np
import pytest
from conftest import small_net
from safetensors.numpy import load_file

from dmm_cli.errors import DmmError
from dmm_cli.inputs import resolve_source, resolve_sources
from dmm_cli.merging import METHODS, engine
from dmm_cli.merging.recipe import Recipe

W = np.ones((2, 2), np.float32)


def run(paths, output, recipe=Recipe()):
    found = engine.merge(resolve_sources([str(path) for path in paths]), output, recipe, {"format": "pt"})
    return load_file(output), found


def test_every_kind_of_tensor(three, tmp_path):
    got, found = run(three[:2], tmp_path / "out.safetensors", Recipe(weights=(3.0, 1.0)))
    a, b = small_net(0), small_net(1)
    for name in ("conv1.weight", "fc.weight", "bn1.running_mean"):
        assert np.allclose(got[name], 0.75 * a[name] + 0.25 * b[name], atol=1e-7), name
    assert got["bn1.num_batches_tracked"] == 20 and got["bn1.num_batches_tracked"].dtype == np.int64
    assert found == {"paired": 1, "unpaired": 0}
    for channel in range(4):
        f, g = a["conv1.weight"][channel].ravel(), b["conv1.weight"][channel].ravel()
        rho = float(f @ g) / np.sqrt(float(f @ f) * float(g @ g))
        s, t = np.sqrt(a["bn1.running_var"][channel]), np.sqrt(b["bn1.running_var"][channel])
        expected = (0.75 * s) ** 2 + (0.25 * t) ** 2 + 2 * 0.75 * 0.25 * rho * s * t
        assert got["bn1.running_var"][channel] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", METHODS.names())
def test_identical_checkpoints_come_back_unchanged(write, tmp_path, method):
    net = small_net(0)
    paths = [write(name, **net) for name in "ab"]
    base = resolve_source(str(write("base", **net))) if "base" in METHODS.traits(method) else None
    got, _ = run(paths, tmp_path / "out.safetensors", Recipe(method, base=base))
    assert all(got[name].tobytes() == value.tobytes() for name, value in net.items())


def test_the_same_inputs_give_the_same_bytes(three, tmp_path):
    outputs = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for output in outputs:
        run(three, output)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_large_tensors_are_merged_block_by_block(write, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "BLOCK", 7)
    draw = np.random.default_rng(0)
    values = [draw.normal(size=(5, 11)).astype(np.float32) for _ in range(2)]
    paths = [write(f"m{i}", w=value) for i, value in enumerate(values)]
    got, _ = run(paths, tmp_path / "out.safetensors", Recipe("slerp"))
    a, b = (value.astype(np.float64).ravel() for value in values)
    angle = np.arccos(a @ b / np.sqrt((a @ a) * (b @ b)))
    expected = np.sin(angle / 2) / np.sin(angle) * (a + b)
    assert np.allclose(got["w"].ravel(), expected, atol=1e-6)


def test_what_cannot_be_merged(write, tmp_path):
    nan = W.copy()
    nan[0, 0] = np.nan
    table = np.array([1, 2])
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
        ({"running_var": -W[0]}, {"running_var": W[0]}, Recipe(), "negative running variance"),
    ]
    output = tmp_path / "out.safetensors"
    for a, b, recipe, words in cases:
        paths = [write("a", **a), write("b", **b)]
        with pytest.raises(DmmError, match=words):
            run(paths, output, recipe)
        assert not output.exists()


def test_slerp_takes_two(three, tmp_path):
    with pytest.raises(DmmError, match="slerp merges two checkpoints, not 3"):
        run(three, tmp_path / "out.safetensors", Recipe("slerp"))
