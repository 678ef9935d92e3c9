"""Numbers that float32 holds badly, and memory that merges hold, from files to files."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dmm_cli.inputs import resolve_sources
from dmm_cli.merging import engine, tensors
from dmm_cli.merging.engine import Outcome
from dmm_cli.merging.recipe import Recipe


def run(paths: list[Path], output: Path, recipe: Recipe) -> tuple[dict[str, np.ndarray], Outcome]:
    found = engine.merge(resolve_sources([str(path) for path in paths]), output, recipe, {"format": "pt"})
    return load_file(output), found


@pytest.mark.parametrize("method", ["slerp", "karcher"])
@pytest.mark.parametrize("ratio", [1e4, 1e-4])
def test_a_long_checkpoint_drowns_no_other(write, tmp_path, method, ratio):
    """In float64 the merge is that of float32 but for its rounding, whichever comes first."""
    draw = np.random.default_rng(0)
    pair = [draw.normal(size=(64, 64)), ratio * draw.normal(size=(64, 64))]
    merged = {}
    for dtype in (np.float32, np.float64):
        rounded = [values.astype(np.float32).astype(dtype) for values in pair]
        paths = [write(f"{np.dtype(dtype)}-{n}", w=values) for n, values in enumerate(rounded)]
        merged[dtype] = run(paths, tmp_path / f"{np.dtype(dtype)}.safetensors", Recipe(method))[0]["w"]
    error = np.linalg.norm(merged[np.float32] - merged[np.float64]) / np.linalg.norm(merged[np.float64])
    assert error < 3e-7


def test_numbers_of_opposite_sign_have_a_linear_mean(write, tmp_path):
    """Their mean on the sphere is nowhere, however their cosine was rounded."""
    draw = np.random.default_rng(0)
    pair = [{f"w{n}": sign * draw.uniform(0.05, 0.5, 1).astype(np.float32) for n in range(50)} for sign in (1, -1)]
    paths = [write(f"m{n}", **numbers) for n, numbers in enumerate(pair)]
    for method in ("slerp", "karcher"):
        got, _ = run(paths, tmp_path / f"{method}.safetensors", Recipe(method))
        for name, value in got.items():
            assert value == pytest.approx((pair[0][name] + pair[1][name]) / 2, abs=1e-7), (method, name)


@pytest.mark.parametrize("method", ["linear", "slerp", "karcher"])
@pytest.mark.parametrize("size", [np.finfo(np.float32).min, 1e-30])
def test_squares_that_float32_cannot_hold_are_taken_in_float64(write, tmp_path, recwarn, method, size):
    """As of a mask of the least number there is: equal tensors come back, as long as they were."""
    value = np.array([[0, size], [size / 2, 0]], np.float32)
    got, found = run([write("a", w=value), write("b", w=value)], tmp_path / "out.safetensors", Recipe(method))
    assert np.array_equal(got["w"], value) and found.lengths == {"w": pytest.approx(1.0)} and not recwarn.list


@pytest.mark.parametrize(("head", "share"), [("first", 0.5), ("union", 12.0)])
def test_heads_are_read_block_by_block(write, tmp_path, monkeypatch, head, share):
    """Held at once: blocks, and of a union, of twice the rows, its sum in float64 and what is written of it."""
    monkeypatch.setattr(tensors, "BLOCK", 1 << 12)
    classes = [json.dumps([f"{n}-{k}" for k in range(2000)]) for n in range(2)]
    rows = np.random.default_rng(0).normal(size=(2000, 500)).astype(np.float16)
    paths = [write(f"m{n}", {"dmm.classes": names}, fc__weight=rows) for n, names in enumerate(classes)]
    tracemalloc.start()
    sources = resolve_sources([str(path) for path in paths])
    engine.merge(sources, tmp_path / "out.safetensors", Recipe(head=head), {"format": "pt"})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < share * rows.nbytes, peak / rows.nbytes
    assert np.array_equal(load_file(tmp_path / "out.safetensors")["fc.weight"][:2000], rows)
