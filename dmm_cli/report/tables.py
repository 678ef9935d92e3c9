"""Rows of text as aligned columns, TSV or Markdown."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import printable
from ..inspection import Inspection
from ..manifest import (
    AlignedSource,
    DistillManifest,
    Evaluation,
    Grouping,
    Matrix,
    MergeManifest,
    RecordManifest,
    Retention,
    SimilarityReport,
    SourceRecord,
    SynthesisManifest,
    WidenedGroup,
    WidenedRecord,
)

MARKUP = re.compile(r"[\\`*\[\]|~<&]|(?<!\w)_++|_++(?!\w)")  # underscores within a word are none
ENTITIES = {"<": "&lt;", "&": "&amp;"}  # not every renderer takes a backslash in front of them
MANY = 20  # classes, from which on a table has a row for each in place of a column


@dataclass(frozen=True)
class Table:
    """A title, column names and rows of cells that are already text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def render(tables: Sequence[Table], style: str) -> str:
    """Tables as text; ``style`` is table, tsv or md. Never truncated, never coloured."""
    writer = {"table": _aligned, "tsv": _tsv, "md": _markdown}[style]
    return "\n\n".join(writer(table) for table in tables) + "\n"


def number(value: float | None, digits: int = 4) -> str:
    """A number for a cell; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def matrix_table(title: str, labels: Sequence[str], matrix: Matrix, digits: int = 4) -> Table:
    """A square matrix with its labels."""
    rows = [[label, *(number(value, digits) for value in row)] for label, row in zip(labels, matrix, strict=True)]
    return Table(title, ["", *labels], rows)


def similarity_tables(report: SimilarityReport, per_layer: int | None) -> list[Table]:
    """All measures, the reference column, and the least similar layers."""
    kinds = {"bn": "distance", "cka": "activations", "aligned": "cosine of the weights, units in one order"}
    tables = [
        matrix_table(f"{name} ({kinds.get(name, report.on)})", report.labels, matrix)
        for name, matrix in report.measures.items()
        if len(report.labels) > 1
    ]
    if report.against is not None:
        rows = [[label, number(value, 6)] for label, value in report.against.items()]
        tables.append(Table(f"cosine with {report.reference.label}", ["checkpoint", "cosine"], rows))
    if per_layer is not None and len(report.labels) > 1:
        lowest = sorted(report.layers, key=lambda layer: (layer.minimum, layer.name))[:per_layer]
        rows = [[layer.name, "x".join(map(str, layer.shape)), number(layer.minimum)] for layer in lowest]
        tables.append(Table("least similar layers", ["tensor", "shape", "lowest cosine"], rows))
    return tables


def group_table(grouping: Grouping) -> Table:
    """Groups with their reasons."""
    rows = [
        [
            group.name,
            ", ".join(grouping.labels[i] for i in group.members),
            ("divergent; " if group.members[0] in grouping.divergent else "") + group.reason,
        ]
        for group in grouping.groups
    ]
    return Table(f"groups (rule: {grouping.rule})", ["group", "checkpoints", "reason"], rows)


def pair_table(grouping: Grouping) -> Table:
    """Every pair of checkpoints with the reason why it shares a group or does not."""
    rows = [
        [
            f"{grouping.labels[pair.b]}, {grouping.labels[pair.a]}",
            number(pair.similarity, 3),
            "together" if pair.together else "apart",
            pair.reason,
        ]
        for pair in grouping.pairs
    ]
    return Table("pairs", ["pair", "cosine", "", "reason"], rows)


def source_table(sources: Sequence[SourceRecord]) -> Table:
    """Input files and their hashes."""
    rows = [[source.label, source.path, source.sha256 or "-"] for source in sources]
    return Table("checkpoints", ["label", "path", "sha256"], rows)


def parameter_table(merged: MergeManifest, synthesis: SynthesisManifest, distillation: DistillManifest) -> Table:
    """By what the stages of a run worked, whether it was asked for or is the default."""
    stages = {
        "merge": {"method": merged.method, **merged.parameters},
        "synthesize": synthesis.parameters,
        "distill": distillation.parameters,
    }
    rows = [[stage, name, _value(told)] for stage, parameters in stages.items() for name, told in parameters.items()]
    return Table("parameters", ["stage", "parameter", "value"], rows)


def _value(told: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in told.items()) if isinstance(told, dict) else str(told)


def accuracy_tables(evaluation: Evaluation) -> list[Table]:
    """Accuracy and recall per class, in per cent; of many classes, the latter by themselves, a row a class."""
    title = f"accuracy on {evaluation.samples} samples of {evaluation.data}, %"
    rows = [[row.label, number(row.accuracy, 1)] for row in evaluation.rows]
    recalls = [[number(value, 0) for value in row.recall] for row in evaluation.rows]
    if len(evaluation.classes) <= MANY:
        columns = ["model", "accuracy", *(f"recall {name}" for name in evaluation.classes)]
        return [Table(title, columns, [[*row, *recall] for row, recall in zip(rows, recalls, strict=True)])]
    by_class = [[name, *values] for name, *values in zip(evaluation.classes, *recalls, strict=True)]
    return [
        Table(title, ["model", "accuracy"], rows),
        Table("recall, %", ["class", *(row.label for row in evaluation.rows)], by_class),
    ]


def recorded_table(manifest: RecordManifest) -> Table:
    """The layers whose statistics were recorded, or of several networks how many."""
    if len(manifest.networks) > 1:
        rows = [[of.source.label, str(len(of.layers)), of.output] for of in manifest.networks]
        return Table(f"statistics of {manifest.data}", ["network", "layers", "file"], rows)
    (only,) = manifest.networks
    rows = [[layer.name, layer.kind, str(layer.channels), str(layer.count)] for layer in only.layers]
    title = f"statistics of {only.images} images in {only.output}"
    return Table(title, ["layer", "kind", "channels", "values per channel"], rows)


def teacher_table(manifest: SynthesisManifest) -> Table:
    """What synthesis drew from each teacher; how many other networks saw it, where any did."""
    witnessed = any(teacher.elsewhere for teacher in manifest.teachers)
    rows = [
        [
            teacher.label,
            str(teacher.accepted),
            str(teacher.rejected),
            number(teacher.confidence, 3),
            _mix(teacher.prior),
            teacher.prior_from,
            *([str(len(teacher.elsewhere))] if witnessed else []),
        ]
        for teacher in manifest.teachers
    ]
    columns = ["teacher", "images", "rejected", "confidence", "class prior", "prior from", *["witnesses"] * witnessed]
    return Table(f"pseudo-data in {manifest.output}", columns, rows)


def _mix(prior: Sequence[float]) -> str:
    if len(prior) <= MANY:
        return " ".join(f"{value:.2f}" for value in prior)
    known = [value for value in prior if value > 0]
    return f"{len(known)} of {len(prior)} classes, {min(known):.4f} to {max(known):.4f}"


def start_table(manifest: DistillManifest) -> Table:
    """What the student could have started from."""
    taken = {manifest.student.label: "yes"}
    rows = [[start.label, number(start.retained, 1), taken.get(start.label, "")] for start in manifest.starts]
    return Table("targets that a start names, every class alike, %", ["start", "retained", "taken"], rows)


def retention_table(manifest: DistillManifest) -> Table:
    """The student's agreement with each teacher on that teacher's pseudo-data, in per cent."""
    rows = [
        [item.label, str(item.images), number(item.before, 1), number(item.after, 1), _least(item)]
        for item in manifest.retention
    ]
    return Table(
        "agreement with each teacher on its own pseudo-data, %",
        ["teacher", "images", "before", "after", "least retained class"],
        rows,
    )


def _least(item: Retention) -> str:
    worst = min(item.classes, key=lambda one: one.after, default=None)
    return f"{worst.name}: {number(worst.after, 1)}" if worst else "-"


def class_retention_table(manifest: DistillManifest) -> Table:
    """The same of every class of every teacher."""
    rows = [
        [item.label, one.name, str(one.images), number(one.before, 1), number(one.after, 1)]
        for item in manifest.retention
        for one in item.classes
    ]
    return Table("agreement by class, %", ["teacher", "class", "images", "before", "after"], rows)


def retained_tables(manifest: MergeManifest) -> list[Table]:
    """Per group, what its members and their merge recognise of each member's pseudo-data, in per cent."""
    return [
        Table(
            f"{name}: pseudo-images recognised, %",
            ["checkpoint", "images", "by itself", "by the merge"],
            [[item.label, str(item.images), number(item.before, 1), number(item.after, 1)] for item in items],
        )
        for name, items in manifest.retained.items()
    ]


def alignment_tables(title: str, aligned: Sequence[AlignedSource], detail: bool = False) -> list[Table]:
    """What aligning did to every checkpoint, and with ``detail`` to every group of units."""
    rows = [
        [
            item.label,
            str(len(item.groups)),
            f"{100 * item.covered:.1f}",
            str(item.units),
            str(item.moved),
            f"{item.objective_before:.5g}",
            f"{item.objective_after:.5g}",
            number(item.cosine_before, 3),
            number(item.cosine_after, 3),
            f"{item.difference:.0e}",
        ]
        for item in aligned
    ]
    columns = [
        "checkpoint",
        "groups",
        "weights %",
        "units",
        "moved",
        "objective",
        "then",
        "cosine",
        "then",
        "difference",
    ]
    tables = [Table(title, columns, rows)]
    for item in aligned if detail else ():
        own = [[g.name, str(g.units), str(g.blocks), str(g.moved)] for g in item.groups]
        tables.append(Table(f"units of {item.label}", ["group", "units", "blocks", "moved"], own))
    return tables


def widened_table(record: WidenedRecord) -> Table:
    """Which units of a partial merge stand side by side."""
    rows = [
        [group.name, str(group.units), str(group.apart), str(group.units + group.apart), _widened_how(group)]
        for group in record.groups
    ]
    title = f"side by side: {record.parameters_before} parameters become {record.parameters_after}"
    return Table(title, ["group", "units", "apart", "width", ""], rows)


def _widened_how(group: WidenedGroup) -> str:
    return "" if group.may_widen else "cannot be widened, all merged"


def inspection_tables(record: Inspection) -> list[Table]:
    """What is in a checkpoint: the facts, then its tensors by kind, and one by one if they are told."""
    facts = [
        ["file", record.path],
        ["sha256", record.sha256],
        ["bytes", str(record.bytes)],
        ["parameters", str(record.parameters)],
        ["architecture", record.architecture.spec or "unknown"],
        ["known from", record.architecture.evidence],
        *([f"input {name}", _stated(part)] for name, part in record.inputs.items()),
        ["BatchNorm layers", str(record.norm_layers)],
        ["dtypes", ", ".join(f"{count} {dtype}" for dtype, count in sorted(record.dtypes.items()))],
        ["classes", ", ".join(record.classes) or "not named"],
        *([name, text] for name, text in record.provenance.items()),
    ]
    kinds = [[kind, str(tensors), str(values)] for kind, (tensors, values) in sorted(record.kinds.items())]
    single = [[tensor.name, tensor.dtype, "x".join(map(str, tensor.shape)) or "-"] for tensor in record.tensors]
    return [
        Table(record.label, ["fact", "value"], facts),
        Table("tensors", ["kind", "tensors", "values"], kinds),
        *([Table("every tensor", ["name", "dtype", "shape"], single)] if single else []),
    ]


def _stated(part: dict[str, Any]) -> str:
    return "; ".join(f"{key} {str(value).strip('[]')}" for key, value in part.items()) or "as example_inputs say"


def _clean(table: Table) -> list[list[str]]:
    return [[printable(cell, None) for cell in row] for row in (table.columns, *table.rows)]


def _aligned(table: Table) -> str:
    cells = _clean(table)
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    numeric = [index > 0 and _numeric(cells, index) for index in range(len(widths))]
    lines = ["  ".join(map(_padded, row, widths, numeric)).rstrip() for row in cells]
    return "\n".join([printable(table.title, None), *lines])


def _padded(cell: str, width: int, right: bool) -> str:
    space = " " * (width - _width(cell))
    return space + cell if right else cell + space


def _width(text: str) -> int:
    """Columns of a terminal: wide letters, such as Chinese ones, take two, and accents of their own none."""
    if text.isascii():
        return len(text)
    shown = (letter for letter in text if unicodedata.category(letter) not in ("Mn", "Me"))
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in shown)


def _numeric(cells: list[list[str]], column: int) -> bool:
    return all(row[column] == "-" or row[column].replace(".", "").lstrip("-").isdigit() for row in cells[1:])


def _tsv(table: Table) -> str:
    """Without a title but in the corner of a matrix: nothing else tells of what it is."""
    head, *rows = _clean(table)
    corner = head[0] or printable(table.title, None)
    return "\n".join("\t".join(row) for row in ([corner, *head[1:]], *rows))


def _markdown(table: Table) -> str:
    head, *rows = [[_literal(cell) for cell in row] for row in _clean(table)]
    lines = [
        f"**{_literal(printable(table.title, None))}**",
        "",
        *("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)),
    ]
    return "\n".join(lines)


def _literal(text: str) -> str:
    """Text that Markdown shows as it is."""
    return MARKUP.sub(lambda found: ENTITIES.get(found[0]) or "".join(f"\\{letter}" for letter in found[0]), text)
