"""Pictures of records: heat map with dendrogram, image grid, curves. Deterministic bytes."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ..errors import DmmError
from ..files import write_bytes
from ..manifest import Grouping, History, SimilarityReport

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..synthesis.pseudodata import PseudoData

COLUMNS, ROWS = 16, 60  # images per class in a grid, and classes of all teachers
NUMBERED, CELL, SMALL_CELL = 40, 0.62, 0.16  # checkpoints whose cosines are written; inches of a cell with, without
UNITS = {"agreement_on_views": ", %"}  # of curves that have one
SETTINGS = {"svg.hashsalt": "dmm", "svg.fonttype": "path"}
SHORT, DOTS = 22, "..."  # letters of a label that is shortened, and what stands for others


def save(figure: Figure, path: Path, *, force: bool = False) -> None:
    """Write a figure as .png or .svg.

    Raises:
        DmmError: another suffix, or the output is refused.
    """
    check_drawable(path)
    write_bytes(path, encode(figure, path.suffix[1:]), force=force)


def check_drawable(path: Path) -> None:
    """Raise DmmError for a file that is not .png or .svg."""
    if path.suffix not in (".png", ".svg"):
        raise DmmError(f"cannot draw {path}", hint="name a .png or .svg file")


@contextmanager
def _by_our_settings() -> Iterator[None]:
    """Draw by matplotlib's defaults and ``SETTINGS``, whatever the user's matplotlibrc says."""
    matplotlib = _matplotlib()
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    with matplotlib.rc_context({**defaults, **SETTINGS}):
        yield


def _matplotlib() -> ModuleType:
    """The package, imported without MPLBACKEND: a notebook names a backend there that may not be installed here."""
    named = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named
    return matplotlib


@_by_our_settings()
def encode(figure: Figure, kind: str) -> bytes:
    """The bytes of a figure, ``png`` or ``svg``; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # labels in letters that the font does not have
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def heat_map(report: SimilarityReport, grouping: Grouping, path: Path, *, force: bool = False) -> None:
    """Draw the cosine matrix in cluster order beside its dendrogram, see ``draw_heat_map``."""
    save(draw_heat_map(report, grouping), path, force=force)


@_by_our_settings()
def draw_heat_map(report: SimilarityReport, grouping: Grouping) -> Figure:
    """The cosine matrix in cluster order, numbers in the cells, the tree and its cut line on the left.

    The colour scale is fixed at [-1, 1], so that figures can be compared. The cells of more than ``NUMBERED``
    checkpoints are small and have no numbers.
    """
    import numpy as np

    count = len(report.labels)
    matrix = np.array(report.measures["cosine"], dtype=float)
    labels = [_short(label) for label in report.labels]
    margin = 0.075 * max(map(len, labels)) + 0.2  # inches for the labels
    side = max(2.0, (CELL if count <= NUMBERED else SMALL_CELL) * count)
    figure = _figure(1.9 + side + margin + 1.0, side + margin + 0.6)
    width, height = figure.get_size_inches()
    bottom = margin / height
    tree = figure.add_axes((0.35 / width, bottom, 1.4 / width, side / height))
    cells = figure.add_axes((1.85 / width, bottom, side / width, side / height))
    bar = figure.add_axes(((1.95 + side + margin) / width, bottom, 0.14 / width, side / height))
    order = _draw_tree(tree, grouping, count)
    matrix = matrix[np.ix_(order, order)]
    image = cells.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    if count <= NUMBERED:
        _write_numbers(cells, matrix)
    names = [labels[i] for i in order]
    cells.set_xticks(range(count), names, rotation=90, fontsize=9)
    cells.set_yticks(range(count), names, fontsize=9)
    cells.yaxis.tick_right()
    cells.set_title(f"cosine of the {report.on}", fontsize=11)
    figure.colorbar(image, cax=bar)
    return figure


def _write_numbers(cells: Axes, matrix: np.ndarray) -> None:
    import numpy as np

    size = 9 if len(matrix) <= 12 else max(3.0, 110 / len(matrix))
    for row, column in np.ndindex(*matrix.shape):
        shade = "white" if abs(matrix[row, column]) > 0.6 else "black"
        value = matrix[row, column]
        text = "-" if np.isnan(value) else f"{value:.2f}".replace("-0.00", "0.00")
        cells.text(column, row, text, ha="center", va="center", color=shade, fontsize=size)


def _draw_tree(axes: Axes, grouping: Grouping, count: int) -> list[int]:
    """The dendrogram with its cut line, root on the left; returns the leaves from top to bottom."""
    import numpy as np
    from scipy.cluster.hierarchy import dendrogram

    axes.spines[["top", "left", "right"]].set_visible(False)
    if len(grouping.linkage) != count - 1 or count < 2:
        axes.axis("off")
        return list(range(count))
    drawn = dendrogram(np.array(grouping.linkage), no_plot=True)  # scipy's own plot has no width for equal checkpoints
    axes.plot(np.transpose(drawn["dcoord"]), np.transpose(drawn["icoord"]), color="#444444")
    axes.set_xlim(1.05 * np.max(drawn["dcoord"]) or 1.0, 0)
    axes.set_ylim(10 * count, 0)  # scipy gives a leaf a height of 10
    axes.set_yticks([])
    axes.set_xlabel("1 - cosine", fontsize=8)
    axes.tick_params(labelsize=7)
    if _cut_makes_groups(grouping):
        axes.axvline(1 - grouping.threshold, color="#c0392b", linestyle="--", linewidth=1)
        axes.set_title(f"cut at {grouping.threshold:.2f}", fontsize=8, color="#c0392b")
    return [int(leaf) for leaf in drawn["leaves"]]


def _cut_makes_groups(grouping: Grouping) -> bool:
    """Whether a cut of the tree at the threshold gives just the groups, which basins and several cuts need not."""
    import numpy as np
    from scipy.cluster.hierarchy import fcluster

    if grouping.threshold is None:
        return False
    parts = fcluster(np.array(grouping.linkage), 1 - grouping.threshold + 1e-12, "distance")
    found = {frozenset(np.flatnonzero(parts == part).tolist()) for part in parts}
    return found == {frozenset(group.members) for group in grouping.groups}


def image_grid(data: PseudoData, path: Path, *, force: bool = False) -> None:
    """Draw pseudo-images, see ``draw_image_grid``."""
    save(draw_image_grid(data), path, force=force)


@_by_our_settings()
def draw_image_grid(data: PseudoData) -> Figure:
    """A row of images per class of each teacher; its caption tells the teacher's mean confidence.

    Of more than ``ROWS`` rows, as many from all over are drawn, and a line above them says so.
    """
    import numpy as np

    pictures = data.pictures()
    every = [
        (teacher, int(target))
        for teacher in range(len(data.teachers))
        for target in np.unique(data.targets[data.teacher_id == teacher])
    ]
    rows = [every[i] for i in np.unique(np.linspace(0, len(every) - 1, ROWS).round().astype(int))]
    height = 0.2 + 0.47 * len(rows) + 0.25 * (len(rows) < len(every))
    figure = _figure(1.9 + 0.45 * COLUMNS, height)
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    figure.subplots_adjust(left=1.8 / (1.9 + 0.45 * COLUMNS), right=0.995, top=0.995, bottom=0.005, hspace=0.08)
    if len(rows) < len(every):
        figure.subplots_adjust(top=1 - 0.25 / height)
        figure.suptitle(f"{len(rows)} of {len(every)} classes of the teachers", fontsize=9, y=1 - 0.05 / height)
    for (teacher, target), axis in zip(rows, axes, strict=True):
        mine = np.flatnonzero((data.teacher_id == teacher) & (data.targets == target))
        shape = "auto" if pictures.shape[2] == 1 else "equal"  # numbers, which are in a line, would be as thin as one
        axis.imshow(_strip(pictures[mine[:COLUMNS]]), cmap="gray", vmin=0, vmax=255, aspect=shape)
        axis.set_anchor("W")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(_caption(data, teacher, target, mine), rotation=0, ha="right", va="center", fontsize=7)
    return figure


def _caption(data: PseudoData, teacher: int, target: int, rows: Sequence[int]) -> str:
    """Whose images of what, and how sure the teacher is of these rows."""
    label, name = _short(data.teachers[teacher].label), _short(data.name_of(target))
    apart = ": " if len(label) + len(name) <= SHORT + len(DOTS) + 3 else "\n"  # the margin holds no more in a line
    return f"{label}{apart}class {name}\nconfidence {data.confidence[rows].astype(float).mean():.2f}"


def _strip(images):
    """Images (n, C, H, W) side by side, (H, COLUMNS (W + 1), 3 or none), white where there are fewer.

    Two channels are no colours: the first is drawn alone.
    """
    import numpy as np

    _, channels, height, width = images.shape
    strip = np.full((height, COLUMNS * (width + 1), channels), 255, dtype=np.uint8)
    for number, image in enumerate(images):
        left = number * (width + 1)
        strip[:, left : left + width] = image.transpose(1, 2, 0)
    return strip[..., 0] if channels < 3 else strip[..., :3]


@_by_our_settings()
def draw_curves(history: History, title: str) -> Figure:
    """Every curve of a history over steps, one panel each."""
    figure = _figure(2.6 * max(1, len(history.curves)), 2.2)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, max(1, len(history.curves)), squeeze=False)[0]
    for panel, (name, values) in zip(panels, history.curves.items(), strict=False):
        marker = "o" if len(values) == 1 else ""  # one point makes no line
        panel.plot(history.step, values, color="#2c5f8a", linewidth=1.3, marker=marker)
        panel.set_title(name.replace("_", " ") + UNITS.get(name, ""), fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(which="both", labelsize=7)  # a logarithmic axis of few decades labels its minor ticks
        panel.grid(alpha=0.25)
        if min(values) > 0 and max(values) > 30 * min(values):
            panel.set_yscale("log")
    figure.suptitle(title, fontsize=10)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _short(label: str) -> str:
    from ..errors import printable

    text = printable(label, None)
    if len(text) > SHORT + len(DOTS):  # labels of one project often differ in the end alone
        text = f"{text[: SHORT // 2]}{DOTS}{text[-(SHORT // 2) :]}"
    return text.replace("$", r"\$")  # matplotlib reads $...$ as a formula
