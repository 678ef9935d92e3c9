"""The nulls of grouping, against permutations that are really carried out, and on planted checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from dmm_cli.grouping import group_checkpoints
from dmm_cli.inputs import resolve_source
from dmm_cli.manifest import Grouping, SimilarityReport
from dmm_cli.similarity.engine import compute_similarity

LAYERS, SHAPE = 6, (24, 16, 3, 3)


@pytest.fixture
def compared(tmp_path):
    def compare(networks: dict[str, list[np.ndarray]]) -> SimilarityReport:
        for name, layers in networks.items():
            held = {f"conv{n}.weight": layer.astype(np.float32) for n, layer in enumerate(layers)}
            save_file(held, tmp_path / f"{name}.safetensors")
        sources = [resolve_source(str(tmp_path / f"{name}.safetensors")) for name in networks]
        return compute_similarity(sources, measures=["cosine"])

    return compare


def cosine(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    a, b = (np.concatenate([layer.ravel() for layer in layers]) for layers in (a, b))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_units_in_random_order_stay_below_what_unrelated_ones_reach(compared):
    draw = np.random.default_rng(0)
    blob = np.array([[0, 1, 0], [1, 3, 1], [0, 1, 0]])  # what all kernels have in common
    nets = {name: [blob + 3 * draw.standard_normal(SHAPE) for _ in range(2)] for name in "ab"}
    reached = compared(nets).unrelated[0][1]
    kernels = [layer.reshape(-1, 9) for layer in nets["b"]]
    shuffled = [cosine(nets["a"], [draw.permutation(layer) for layer in kernels]) for _ in range(2000)]
    assert np.mean(np.array(shuffled) > reached) < 0.01
    assert np.mean(shuffled) + 3 * np.std(shuffled) <= reached + 0.01 <= np.mean(shuffled) + 10 * np.std(shuffled)
    matrices = {name: [layer.reshape(24, 144) for layer in layers] for name, layers in nets.items()}  # kernels of one
    elements = [cosine(nets["a"], [draw.permutation(x.ravel()) for x in nets["b"]]) for _ in range(2000)]
    exact = np.mean(elements) + 3 * np.std(elements)
    assert compared(matrices).unrelated[0][1] == pytest.approx(exact, abs=0.01)


def groups(grouping: Grouping) -> list[str]:
    return ["".join(grouping.labels[i] for i in group.members) for group in grouping.groups]


def test_what_all_units_share_does_not_make_one_start(compared):
    draw = np.random.default_rng(1)
    starts = [[1 + draw.standard_normal(SHAPE) for _ in range(LAYERS)] for _ in range(2)]
    nets = {name: [layer + 0.2 * draw.standard_normal(SHAPE) for layer in starts[name in "cd"]] for name in "abcd"}
    grouping = group_checkpoints(compared(nets))
    assert groups(grouping) == ["ab", "cd"]
    apart = next(pair for pair in grouping.pairs if {pair.a, pair.b} == {0, 2})
    assert (
        apart.similarity > 0.45 and "different starts" in apart.reason and "unrelated units reach 0.5" in apart.reason
    )


def tuned(draw: np.random.Generator, agreed: list[str]) -> dict[str, list[np.ndarray]]:
    """Fine-tunings of one start; in every layer two of them went one way, two another."""
    nets: dict[str, list[np.ndarray]] = {name: [] for name in "abcd"}
    for pair in agreed:
        start, *ways = draw.standard_normal((3, *SHAPE))
        for name in nets:
            own = 0.2 * draw.standard_normal(SHAPE)
            nets[name].append(start + ways[name in pair] + own)
    return nets


def test_a_gap_counts_where_the_layers_agree_on_it(compared):
    draw = np.random.default_rng(2)
    agreeing = group_checkpoints(compared(tuned(draw, ["ab"] * LAYERS)))
    assert groups(agreeing) == ["ab", "cd"]
    assert "with layers shuffled" in next(pair.reason for pair in agreeing.pairs if not pair.together)
    torn = tuned(draw, ["ab", "ac"])
    report = compared({name: [2.4 * first, second] for name, (first, second) in torn.items()})
    assert groups(group_checkpoints(replace(report, layers=()))) == ["ab", "cd"]  # the gap alone is large enough
    whole = group_checkpoints(report)
    assert groups(whole) == ["abcd"] and all("one start" in pair.reason for pair in whole.pairs)
    again = SimilarityReport.from_json(json.loads(json.dumps(report.to_json())))  # as through a pipe
    assert group_checkpoints(again) == whole


def test_files_of_another_architecture_change_no_group(compared):
    draw = np.random.default_rng(2)
    torn = {name: [2.4 * first, second] for name, (first, second) in tuned(draw, ["ab", "ac"]).items()}
    agreeing = dict(zip("pqrs", tuned(draw, ["ab"] * LAYERS).values(), strict=True))
    agreeing |= {"t": [layer + 0.2 * draw.standard_normal(SHAPE) for layer in agreeing["p"]]}
    lone = {"z": [draw.standard_normal((4, 4))]}
    whole, parts = groups(group_checkpoints(compared(torn))), groups(group_checkpoints(compared(agreeing)))
    assert whole == ["abcd"] and parts == ["pqt", "rs"]
    for nets in (torn | agreeing | lone, lone | agreeing | torn):
        report = compared(nets)
        assert groups(group_checkpoints(report)) == [*whole, *parts, "z"]
        assert len(report.layers) == 2 + LAYERS and {len(layer.norms) for layer in report.layers} == {len(nets)}
        assert all(layer.minimum is not None for layer in report.layers)
