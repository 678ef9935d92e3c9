"""``dmm similarity``: what it prints, its checks and its figures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import DIGITS, dmm, shell

from dmm_cli.manifest import SimilarityReport

SITES = [DIGITS / f"site-{name}.safetensors" for name in "abcde"]


@pytest.mark.parametrize(
    ("style", "start"), [("json", "{"), ("tsv", "cosine (weights)\tsite-a"), ("md", "**cosine"), ("table", "cosine")]
)
def test_formats(style, start):
    result = dmm("similarity", *SITES[:2], "--format", style)
    assert result.exit_code == 0 and result.stdout.startswith(start)
    if style == "json":
        assert json.loads(result.stdout)["schema"] == "dmm.similarity/1"
    if style == "tsv":
        assert result.stdout.splitlines()[1].split("\t")[1] == "1.0000"
        heads = [part.partition("\t")[0] for part in result.stdout.split("\n\n")]
        assert heads == ["cosine (weights)", "sign (weights)", "bn (distance)", "group"]
    assert "\x1b" not in result.stdout


def test_quiet_prints_one_number_a_line():
    values = [float(line) for line in dmm("similarity", *SITES[:3], "-q").stdout.split()]
    assert json.loads(dmm("similarity", *SITES[:3], "-q", "--json").stdout)["schema"] == "dmm.similarity/1"
    told = [float(line) for line in dmm("similarity", *SITES[:3], "-q", "--measure", "bn").stdout.split()]
    report = json.loads(dmm("similarity", *SITES[:3], "--measure", "bn", "--json").stdout)["measures"]["bn"]
    assert told == pytest.approx([report[1][0], report[2][0], report[2][1]], abs=1e-6)
    assert len(values) == 3 and all(0.9 < value < 1 for value in values)


def test_another_measure_against_a_reference_is_not_told_as_a_cosine():
    command = ["similarity", *SITES[:2], "--against", SITES[2], "-q"]
    refused = dmm(*command, "--measure", "bn")
    assert refused.exit_code == 2 and "--against is told as a cosine" in refused.stderr and not refused.stdout
    assert dmm(*command, "--measure", "cosine").stdout == dmm(*command).stdout != ""


def test_a_gate_exits_1_and_prints_both_numbers():
    passed = dmm("similarity", SITES[1], "--against", SITES[0], "--fail-under", 0.9)
    assert passed.exit_code == 0
    failed = dmm("similarity", SITES[3], "--against", SITES[0], "--fail-under", 0.9)
    assert failed.exit_code == 1
    assert "cosine below 0.9" in failed.stderr and "site-d: -0.00" in failed.stderr


def test_a_gate_is_not_shown_another_measure():
    refused = dmm("similarity", *SITES[:2], "-q", "--measure", "sign", "--fail-under", 0.5)
    assert refused.exit_code == 2 and "--fail-under judges cosines" in refused.stderr and not refused.stdout
    assert dmm("similarity", *SITES[:2], "--measure", "sign", "--fail-under", 0.5).exit_code == 0


def test_a_gate_lets_equal_checkpoints_pass():
    for site in SITES:
        assert dmm("similarity", site, "--against", site, "--fail-under", 1).exit_code == 0


def test_a_gate_stops_what_cannot_be_compared(write):
    draw = np.random.default_rng(0)
    shapes = {"a": (4, 4), "b": (4, 4), "c": (5, 4)}
    paths = [write(name, w=draw.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()]
    result = dmm("similarity", *paths, "-q", "--fail-under", -1)
    assert result.exit_code == 1
    values = result.stdout.split()
    assert -1 < float(values[0]) < 1 and values[1:] == ["nan", "nan"]
    assert "  c a: not comparable\n  c b: not comparable\n" in result.stderr and "b a" not in result.stderr
    vast = [write(name, w=draw.normal(size=(4, 4)) * 1e200) for name in ("d", "e")]  # their squares are infinite
    result = dmm("similarity", vast[0], "--against", vast[1], "--fail-under", -1)
    assert result.exit_code == 1 and result.stderr.endswith("  d: not comparable\n"), result.stderr


def test_labels_are_taken_once_for_all_pairs(write, monkeypatch):
    taken, labels = [], SimilarityReport.labels
    monkeypatch.setattr(SimilarityReport, "labels", property(lambda self: taken.append(self) or labels.fget(self)))
    counts = []
    for number in (2, 7):
        paths = [write(f"m{i}", w=np.eye(2, dtype=np.float32) + i) for i in range(number)]
        assert dmm("similarity", *paths, "-q").exit_code == 0
        counts.append(len(taken) - sum(counts))
    assert counts[0] == counts[1]


def test_a_dry_run_of_similarity_refuses_what_cannot_be_compared(write):
    draw = np.random.default_rng(0)
    shapes = {"a": (4, 4), "b": (5, 4), "c": (4, 4), "flat": (4,)}
    a, b, c, flat = (write(name, w=draw.normal(size=shape)) for name, shape in shapes.items())
    for paths, code in (([a, b], 2), ([a, c, "--against", b], 2), ([flat, flat], 2), ([a, b, c], 0), ([a, c], 0)):
        dry, result = dmm("similarity", *paths, "--dry-run"), dmm("similarity", *paths)
        assert dry.exit_code == result.exit_code == code and dry.stderr == result.stderr


def test_per_layer_shows_the_ten_least_similar():
    text = dmm("similarity", *SITES, "--per-layer").stdout
    rows = text[text.index("least similar layers") :].split("\n\n")[0].splitlines()[2:]
    values = [float(row.split()[-1]) for row in rows]
    assert len(rows) == 10 and values == sorted(values)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_figures_are_deterministic(tmp_path, suffix):
    paths = [tmp_path / f"{number}.{suffix}" for number in range(2)]
    for path in paths:
        assert dmm("similarity", *SITES, "--figure", path).exit_code == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()
    if suffix == "svg":
        assert "</svg>" in paths[0].read_text()
    refused = dmm("similarity", *SITES, "--figure", tmp_path / "x.pdf")
    assert refused.exit_code == 2 and "name a .png or .svg file" in refused.stderr


def test_a_figure_of_equal_checkpoints_is_drawn_without_a_warning(tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(SITES[0].read_bytes())
    result = shell("similarity", SITES[0], copy, "--figure", tmp_path / "x.svg", "-q")
    assert (result.returncode, result.stdout, result.stderr) == (0, "1.000000\n", "")
    assert (tmp_path / "x.svg").exists()
