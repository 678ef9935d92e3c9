"""What the pictures of records tell."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import DIGITS, dmm, shell
from scipy.cluster.hierarchy import fcluster

from dmm_cli.grouping import group_checkpoints
from dmm_cli.manifest import Grouping, History, SimilarityReport, SourceRecord
from dmm_cli.report.figures import draw_curves, draw_heat_map

SITES = [DIGITS / f"site-{name}.safetensors" for name in "abcde"]


def drawn(*words: object):
    """The heat map of a comparison, and the groups of it."""
    result = dmm("similarity", *words, "--json")
    assert result.exit_code == 0, result.stderr
    report = SimilarityReport.from_json(json.loads(result.stdout))
    grouping = group_checkpoints(report)
    return draw_heat_map(report, grouping), grouping


def cut_of(figure) -> tuple[str, list[float]]:
    """What is written over the tree, and where the broken line is."""
    tree = figure.axes[0]
    return tree.get_title(), [line.get_xdata()[0] for line in tree.lines if line.get_linestyle() == "--"]


def test_the_line_through_the_tree_parts_the_groups():
    figure, grouping = drawn(*SITES)
    title, (place,) = cut_of(figure)
    parts = fcluster(np.array(grouping.linkage), place, "distance")
    assert len(set(parts)) == len(grouping.groups) == 3 and title == f"cut at {1 - place:.2f}"
    bounds = [float(pair.reason.split("is below ")[1].split(",")[0]) for pair in grouping.pairs if not pair.together]
    assert 1 - place == pytest.approx(max(bounds), abs=1e-3)


def test_there_is_none_where_the_tree_is_of_something_else_than_the_groups():
    """Task vectors of one start may differ in any way: the three are one group by their weights."""
    figure, grouping = drawn(*SITES[:3], "--base", DIGITS / "base.safetensors")
    assert len(grouping.groups) == 1 and cut_of(figure) == ("", [])


def test_long_labels_keep_both_ends(tmp_path):
    names = [f"a-rather-long-name-of-hospital-number-{number}.safetensors" for number in range(3)]
    for name, site in zip(names, SITES, strict=False):
        (tmp_path / name).write_bytes(site.read_bytes())
    figure, _ = drawn(*(tmp_path / name for name in names))
    shown = {label.get_text() for label in figure.axes[1].get_yticklabels()}
    assert shown == {f"a-rather-lo...al-number-{number}" for number in range(3)}


@pytest.mark.parametrize("length", [22, 25, 26])
def test_labels_are_never_drawn_longer_than_they_are(tmp_path, length):
    names = [letter * length for letter in "ab"]
    for name in names:
        (tmp_path / f"{name}.safetensors").write_bytes(SITES[0].read_bytes())
    figure, _ = drawn(*(tmp_path / f"{name}.safetensors" for name in names))
    shown = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert all(len(text) == min(length, 25) for text in shown)


def test_a_figure_is_the_same_whatever_matplotlib_is_set_to(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 20\nsavefig.facecolor: black\n")
    own = {"MATPLOTLIBRC": str(tmp_path), "MPLBACKEND": "module://matplotlib_inline.backend_that_is_not_here"}
    plain, set_up = tmp_path / "plain.svg", tmp_path / "set-up.svg"
    assert dmm("similarity", *SITES[:2], "--figure", plain).exit_code == 0
    result = shell("similarity", *SITES[:2], "--figure", set_up, env=own)
    assert result.returncode == 0, result.stderr
    assert set_up.read_bytes() == plain.read_bytes()


def test_curves_tell_their_units():
    figure = draw_curves(History((0, 1), {"loss": (2.0, 1.0), "agreement_on_views": (50.0, 99.0)}), "distillation")
    assert [panel.get_title() for panel in figure.axes] == ["loss", "agreement on views, %"]


@pytest.mark.parametrize(("steps", "marker"), [((0,), "o"), ((0, 1), "")])
def test_a_curve_of_one_step_is_a_point(steps, marker):
    (panel,) = draw_curves(History(steps, {"loss": (1.0,) * len(steps)}), "synthesis").axes
    assert [line.get_marker() for line in panel.lines] == [marker]


@pytest.mark.parametrize(("count", "numbers", "inches"), [(3, 9, 6), (40, 1600, 30), (41, 0, 12), (100, 0, 20)])
def test_the_cells_of_many_checkpoints_are_small(count, numbers, inches):
    labels = tuple(f"site-{number}" for number in range(count))
    sources = tuple(SourceRecord(label, label) for label in labels)
    report = SimilarityReport(sources, {"cosine": tuple(map(tuple, np.eye(count).tolist()))}, ())
    figure = draw_heat_map(report, Grouping(labels, (), (), (), "auto"))
    assert len(figure.axes[1].texts) == numbers and max(figure.get_size_inches()) < inches
    assert len(figure.axes[1].get_yticklabels()) == count
