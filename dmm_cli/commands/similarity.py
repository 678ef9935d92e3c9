"""dmm similarity: how alike checkpoints are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..devices import require_device_name
from ..errors import CheckFailed, DmmError
from ..inputs import files_of, named_files, resolve_source, resolve_sources
from ..similarity import MEASURES
from ..similarity.parts import comparable_parts
from ..synthesis.kind import require_made_from, require_pseudo_data
from . import _options as options
from ._measures import with_aligned, with_cka
from ._outputs import check_files
from ._run import epilog, standard_input

if TYPE_CHECKING:
    from ..manifest import SimilarityReport

EPILOG = epilog(
    "dmm similarity site-*.safetensors --per-layer",
    "dmm similarity runs/*.safetensors --against base.safetensors --fail-under 0.95 --format md",
)


def similarity(
    checkpoints: options.Checkpoints,
    base: Annotated[
        str | None, options.option("--base", help="Common start: compare what each checkpoint learned since.")
    ] = None,
    against: Annotated[
        str | None, options.option("--against", help="Also compare every checkpoint with this one.")
    ] = None,
    fail_under: Annotated[
        float | None, options.gate("Exit 1 when a cosine is below this, or cannot be taken (nan).", -1, 1)
    ] = None,
    measure: Annotated[
        list[str] | None,
        options.option("--measure", help=f"The cosine and these measures alone: {', '.join(MEASURES)}. Repeatable."),
    ] = None,
    data: Annotated[
        str | None,
        options.option("--data", help="Pseudo-data of the checkpoints; cka is measured on them."),
    ] = None,
    per_layer: Annotated[bool, options.option("--per-layer", help="Show the ten least similar layers.")] = False,
    figure: Annotated[Path | None, options.option("--figure", help="Draw the matrix to a .png or .svg file.")] = None,
    arch: options.Arch = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    format: options.Format = "table",
    json: options.Json = False,
    output: options.Output = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
) -> None:
    """Compare checkpoints of one architecture, in total and per layer.

    Cosine and sign agreement are taken over weights of two or more dimensions without the classifier;
    "bn" is the distance of the BatchNorm statistics, 0 for equal ones. "cka" compares what the networks make of
    pseudo-images, whatever the order of their units; "aligned", on request, puts the units in one order first.
    """
    style = options.chosen_format(format, json)
    require_device_name(device)
    measures = _chosen(measure, data)
    told = measure[0] if measure and len(measure) == 1 else "cosine"
    if quiet and told != "cosine" and style != "json":
        _require_cosine(told, against, fail_under)
    sources = resolve_sources(checkpoints, stdin=standard_input(), minimum=1 if against else 2)
    origin, reference, pseudo = (resolve_source(path) if path else None for path in (base, against, data))
    read = files_of([*sources, *filter(None, (origin, reference, pseudo))])
    comparable_parts(sources, origin, reference)
    if pseudo:
        require_pseudo_data(pseudo)
    check_files(output, figure, inputs=[*read, *named_files(checkpoints)], force=force)
    if pseudo:
        require_made_from(pseudo, sources)  # last: checkpoints are hashed for it

    from ..report.console import Progress, emit, emit_plan, status

    if dry_run:
        size = sum(info.nbytes for source in sources for info in source.tensors.values())
        plan = f"compare {len(sources)} checkpoints, {len(sources[0].tensors)} tensors each, {size} bytes in all"
        emit_plan(plan, as_json=style == "json")
        return

    from ..similarity.engine import compute_similarity

    progress = Progress(quiet)
    static = [name for name in measures if not MEASURES.traits(name)]
    report = compute_similarity(sources, base=origin, reference=reference, measures=static, on_progress=progress)
    if "cka" in measures:
        report = with_cka(report, sources, pseudo, arch=arch, device=device, seed=seed, on_progress=progress)
    if "aligned" in measures:
        report = with_aligned(report, sources, arch=arch, seed=seed, on_progress=progress)
    shown = _values(report, told) if quiet and style != "json" else _shown(report, style, per_layer)
    emit(shown, output, beside={figure: _drawn(report, figure)} if figure else {}, force=force)
    if figure:
        status(f"wrote {figure}", quiet=quiet)
    _check(report, fail_under)


def _require_cosine(told: str, against: str | None, fail_under: float | None) -> None:
    """Refuse what goes by cosines where another measure is all that would be printed."""
    if against:
        raise DmmError(
            f"--against is told as a cosine, and -q --measure {told} asks for another measure",
            hint=f"dmm similarity CKPT REFERENCE -q --measure {told} prints that of every two",
        )
    if fail_under is not None:
        raise DmmError(
            f"--fail-under judges cosines, and -q --measure {told} prints another measure",
            hint=f"leave out --measure {told}, or -q",
        )


def _drawn(report: SimilarityReport, figure: Path) -> bytes:
    from ..grouping import group_checkpoints
    from ..report.figures import draw_heat_map, encode

    return encode(draw_heat_map(report, group_checkpoints(report)), figure.suffix[1:])


def _shown(report: SimilarityReport, style: str, per_layer: bool) -> str:
    """The report as JSON or as tables, with its groups."""
    from ..grouping import group_checkpoints
    from ..manifest import dump
    from ..report.tables import group_table, render, similarity_tables

    if style == "json":
        return dump(report)
    tables = similarity_tables(report, 10 if per_layer else None)
    return render([*tables, group_table(group_checkpoints(report))], style)


def _chosen(names: list[str] | None, data: str | None) -> list[str]:
    """The measures to take: those named, or all that can be.

    Raises:
        DmmError: there is no such measure, or images that one needs are missing, or there are some for none.
    """
    usual = [name for name in MEASURES if "order" not in MEASURES.traits(name)]
    chosen = [MEASURES.check(name) for name in names or usual]
    needy = [name for name in chosen if "activations" in MEASURES.traits(name)]
    if data is None and names and needy:
        raise DmmError(
            f"{needy[0]} needs images",
            hint="dmm synthesize CKPT... -o pseudo.safetensors, then --data pseudo.safetensors",
        )
    if data is not None and not needy:
        raise DmmError("--data is for the measure cka", hint="add --measure cka, or leave out --data")
    return [name for name in chosen if data is not None or name not in needy]


def _pairs(report: SimilarityReport, measure: str = "cosine") -> list[tuple[str, float]]:
    """A measure by what it compares, NaN between checkpoints that are not comparable; against a reference, cosines."""
    if report.against is not None:
        return list(report.against.items())
    known = [[math.nan if value is None else value for value in row] for row in report.measures[measure]]
    labels = report.labels
    return [(f"{labels[a]} {labels[b]}", known[a][b]) for a in range(len(known)) for b in range(a)]


def _values(report: SimilarityReport, measure: str) -> str:
    return "\n".join(f"{value:.6f}" for _, value in _pairs(report, measure))


def _check(report: SimilarityReport, bound: float | None) -> None:
    low = [(name, value) for name, value in _pairs(report) if bound is not None and not value >= bound]  # NaN is low
    if low:
        raise CheckFailed(
            f"cosine below {bound!r}",
            evidence=[
                f"{name}: {'not comparable' if math.isnan(value) else repr(value)}"
                for name, value in sorted(low, key=lambda pair: (not math.isnan(pair[1]), pair[1]))
            ],
        )
