from __future__ import annotations

import numpy as np
import pytest
from conftest import shell, small_net

from dmm_cli.errors import DmmError
from dmm_cli.inputs import resolve_source, resolve_sources
from dmm_cli.similarity.engine import compute_similarity

WEIGHTS = ["conv1.weight"]  # of small_net: two dimensions or more, not the classifier


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def sources(paths):
    return resolve_sources([str(path) for path in paths])


def test_cosine_sign_and_layers_match_plain_numpy(three):
    report = compute_similarity(sources(three))
    nets = [small_net(seed)["conv1.weight"] for seed in range(3)]
    for i in range(3):
        for j in range(3):
            assert report.measures["cosine"][i][j] == pytest.approx(cosine(nets[i], nets[j]), abs=1e-6)
            agree = float((np.sign(nets[i]) == np.sign(nets[j])).mean())
            assert report.measures["sign"][i][j] == pytest.approx(agree, abs=1e-12)
    assert [layer.name for layer in report.layers] == WEIGHTS
    lowest = min(cosine(nets[i], nets[j]) for i in range(3) for j in range(i))
    assert report.layers[0].minimum == pytest.approx(lowest, abs=1e-6)


def test_bn_distance_is_the_jeffreys_divergence(three):
    matrix = compute_similarity(sources(three)).measures["bn"]
    a, b = small_net(0), small_net(1)
    total = 0.0
    for m1, v1, m2, v2 in zip(
        a["bn1.running_mean"], a["bn1.running_var"], b["bn1.running_mean"], b["bn1.running_var"], strict=True
    ):
        v1, v2 = v1 + 1e-5, v2 + 1e-5
        one = 0.5 * (np.log(v2 / v1) + (v1 + (m1 - m2) ** 2) / v2 - 1)
        other = 0.5 * (np.log(v1 / v2) + (v2 + (m1 - m2) ** 2) / v1 - 1)
        total += one + other
    assert matrix[0][1] == pytest.approx(total / 4, rel=1e-6)
    assert matrix[0][0] == 0.0


def test_hash_seeds_do_not_change_a_bit(write):
    paths = []
    for seed in range(3):
        draw = np.random.default_rng(seed)
        net = {"w": draw.normal(size=(4, 4)).astype(np.float32)}
        for layer in range(12):
            values = np.abs(draw.normal(size=(2, 7))) * 10.0 ** draw.uniform(-3, 3, (2, 1))
            net[f"l{layer}.running_mean"], net[f"l{layer}.running_var"] = values.astype(np.float32)
        paths.append(write(f"m{seed}", **net))
    shown = {shell("similarity", *paths, "--json", env={"PYTHONHASHSEED": str(seed)}).stdout for seed in range(4)}
    assert len(shown) == 1


def test_sums_over_millions_of_elements_stay_accurate(write):
    """A running float32 dot over 16.8 M positive elements is off by 5e-4."""
    draw = np.random.default_rng(0)
    a = draw.random((4096, 4096), dtype=np.float32)
    b = a + 0.1 * draw.random((4096, 4096), dtype=np.float32)
    paths = [write("a", w=a), write("b", w=b)]
    exact = cosine(a, b)
    assert compute_similarity(sources(paths), measures=["cosine"]).measures["cosine"][0][1] == pytest.approx(
        exact, abs=1e-7
    )


def test_task_vectors_are_taken_from_the_base(write, three):
    nets = [small_net(seed)["conv1.weight"] for seed in range(3)]
    report = compute_similarity(sources(three[:2]), base=resolve_source(str(three[2])))
    expected = cosine(nets[0] - nets[2], nets[1] - nets[2])
    assert report.measures["cosine"][0][1] == pytest.approx(expected, abs=1e-6)
    assert report.on == "task vectors"
    assert report.raw_cosine[0][1] == pytest.approx(cosine(nets[0], nets[1]), abs=1e-6)


def test_a_reference_is_compared_with_everyone(three):
    report = compute_similarity(sources(three[:1]), reference=resolve_source(str(three[1])))
    nets = [small_net(seed)["conv1.weight"] for seed in range(2)]
    assert report.against == {"m0": pytest.approx(cosine(*nets), abs=1e-6)}
    assert np.shape(report.measures["cosine"]) == (1, 1)


def test_a_checkpoint_equals_itself_and_zero_is_defined(write):
    zero, one = np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)
    paths = [write("a", w=zero), write("b", w=zero), write("c", w=one)]
    matrix = compute_similarity(sources(paths), measures=["cosine"]).measures["cosine"]
    assert matrix == ((1.0, 1.0, 0.0), (1.0, 1.0, 0.0), (0.0, 0.0, 1.0))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["conv1.weight", "bn1.weight", "bn1.running_mean", "fc.weight"])
def test_nan_is_refused_by_name_also_where_no_measure_looks(write, name, value):
    bad = small_net(0)
    bad[name].reshape(-1)[1] = value
    paths = [write("a", **small_net(0)), write("b", **bad)]
    for more in ({}, {"measures": ["cosine"]}, {"base": resolve_source(str(paths[0]))}):
        with pytest.raises(DmmError, match=rf"tensor {name} of .*b\.safetensors"):
            compute_similarity(sources(paths), **more)
    with pytest.raises(DmmError, match=rf"tensor {name} of .*b\.safetensors"):
        compute_similarity(sources(paths[:1]), reference=resolve_source(str(paths[1])))


def test_a_negative_variance_is_refused_by_name(write):
    w, good, bad = np.ones((2, 2), np.float32), np.ones(2, np.float32), np.array([1, -1e-3], np.float32)
    statistics = [{"bn.running_mean": good, "bn.running_var": variance} for variance in (good, bad)]
    paths = [write(name, w=w, **own) for name, own in zip("ab", statistics, strict=True)]
    with pytest.raises(DmmError, match=r"negative running variance in bn.running_var of .*b\.safetensors"):
        compute_similarity(sources(paths))


def test_checkpoints_without_weights_are_refused(write):
    paths = [write(name, count=np.array(1, np.int64)) for name in "ab"]
    with pytest.raises(DmmError, match="no float weights"):
        compute_similarity(sources(paths))


@pytest.mark.parametrize("count", [2, 3, 9])
def test_equal_checkpoints_have_the_cosine_one_to_the_last_bit(write, count):
    for seed in range(8):
        draw = np.random.default_rng(seed)
        arrays = {"a": draw.normal(size=(16, 16)).astype(np.float32), "b": draw.normal(size=(64, 16))}
        paths = [write(f"m{number}", **arrays) for number in range(count)]
        cosines = np.array(compute_similarity(sources(paths), measures=["cosine"]).measures["cosine"])
        assert (cosines == 1.0).all()


@pytest.mark.parametrize("size", [1e20, 1e38, 1e-25, 1e-40])
def test_cosines_of_huge_and_tiny_weights(write, size, recwarn):
    """Squares of such float32 values are infinite, or zero."""
    nets = [(np.random.default_rng(seed).uniform(-3, 3, (8, 8)) * size).astype(np.float32) for seed in range(2)]
    matrix = compute_similarity(sources([write("a", w=nets[0]), write("b", w=nets[1])])).measures["cosine"]
    assert matrix[0][1] == pytest.approx(cosine(*nets), abs=1e-6) and abs(matrix[0][1]) < 0.5
    assert not recwarn.list
