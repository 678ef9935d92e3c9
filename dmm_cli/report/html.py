"""One self-contained HTML file about a run: no script, no link to anything outside."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import printable
from ..files import write_text
from ..manifest import DistillManifest, Evaluation, MergeManifest, SimilarityReport, SynthesisManifest
from . import figures, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..synthesis.pseudodata import PseudoData

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #8884; text-align: left; vertical-align: top; }
img { max-width: 100%; background: white; border-radius: 4px; } .wide { overflow-x: auto; }
.result td { font-weight: 600; }
@page { size: A4 landscape; }
@media print {
  h2 { break-after: avoid; } td { overflow-wrap: anywhere; } table { font-size: .8em; } img { max-height: 14cm; }
}
"""


def write_report(
    path: Path,
    *,
    similarity: SimilarityReport,
    merged: MergeManifest,
    synthesis: SynthesisManifest,
    data: PseudoData,
    distillation: DistillManifest,
    evaluation: Evaluation | None,
) -> None:
    """Matrix, groups with reasons, pseudo-images, curves and, where there is one, the accuracy table."""
    grouping = merged.grouping
    names = ", ".join(source.label for source in similarity.sources)
    parts = [f"<h1>dmm run: {_text(names)}</h1>"]
    if evaluation is not None:
        accuracy, *recall = tables.accuracy_tables(evaluation)
        parts += ["<h2>Accuracy</h2>", _table(accuracy, last_is_result=True), *map(_table, recall)]
    parts += [
        "<h2>Similarity and groups</h2>",
        _picture(figures.draw_heat_map(similarity, grouping), "cosine matrix in cluster order"),
        _table(tables.group_table(grouping)),
        *(_table(table) for table in tables.retained_tables(merged)),
        _table(tables.pair_table(grouping)),
        "<h2>Pseudo-data</h2>",
        _table(tables.teacher_table(synthesis)),
        _picture(figures.draw_image_grid(data), "pseudo-images, a row per class"),
        _picture(figures.draw_curves(synthesis.history, "synthesis, first generator"), "losses of the synthesis"),
        "<h2>Distillation</h2>",
        _table(tables.start_table(distillation)),
        _table(tables.retention_table(distillation)),
        _table(tables.class_retention_table(distillation)),
        _picture(figures.draw_curves(distillation.history, "distillation"), "losses of the distillation")
        if distillation.history.step
        else "<p>No step of distillation: only the BatchNorm statistics were reset on the pseudo-data.</p>",
        "<h2>Inputs and parameters</h2>",
        _table(tables.source_table([*merged.sources, *([merged.base] if merged.base else [])])),
        _table(tables.parameter_table(merged, synthesis, distillation)),
        f"<p>dmm {__version__}; synthesis {synthesis.seconds:.0f} s on {_text(synthesis.device)}, "
        f"distillation {distillation.seconds:.0f} s on {_text(distillation.device)}.</p>",
    ]
    head = f'<meta charset="utf-8"><title>dmm run</title><style>{STYLE}</style>'
    page = f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    write_text(path, page, force=True)


def _picture(figure: Figure, description: str) -> str:
    content = base64.b64encode(figures.encode(figure, "png")).decode()
    return f'<p><img alt="{_text(description)}" src="data:image/png;base64,{content}"></p>'


def _table(table: tables.Table, last_is_result: bool = False) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in table.columns)
    body = []
    for number, row in enumerate(table.rows):
        kind = " class=result" if last_is_result and number + 1 == len(table.rows) else ""
        body.append(f"<tr{kind}>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>")
    caption = f"<caption>{_text(table.title)}</caption>"
    return f'<div class="wide"><table>{caption}<tr>{head}</tr>{"".join(body)}</table></div>'


def _text(text: str) -> str:
    """Text of a cell; a word is capped, a list of many names is not."""
    return escape(" ".join(printable(word, 500) for word in text.split(" ")))
