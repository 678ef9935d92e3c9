"""dmm similarity: how alike checkpoints are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..devices import require_device_name
from ..errors import CheckFailed, DmmError
from ..inputs import Source, resolve_source, resolve_sources
from ..similarity import MEASURES
from . import _options as options
from ._pseudo import balanced_images, readable_errors
from ._run import epilog, guarded

if TYPE_CHECKING:
    from ..manifest import Matrix, SimilarityReport

EPILOG = epilog(
    "dmm similarity site-*.safetensors --per-layer",
    "dmm similarity runs/*.safetensors --against base.safetensors --fail-under 0.95 --format md",
)


@guarded
def similarity(
    checkpoints: options.Checkpoints,
    base: Annotated[
        str | None, options.option("--base", help="Common start: compare what each checkpoint learned since.")
    ] = None,
    against: Annotated[
        str | None, options.option("--against", help="Also compare every checkpoint with this one.")
    ] = None,
    fail_under: Annotated[
        float | None, options.option("--fail-under", help="Exit 1 when a cosine is below this.", min=-1, max=1)
    ] = None,
    measure: Annotated[
        list[str] | None,
        options.option("--measure", help=f"Only these measures: {', '.join(MEASURES)}. Repeatable."),
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
    pseudo-images, whatever the order of their units.
    """

    from ..manifest import dump

    style = options.chosen_format(format, json)
    require_device_name(device)
    measures = _chosen(measure, data)
    if figure and figure.suffix not in (".png", ".svg"):
        raise DmmError(f"cannot draw {figure}", hint="name a .png or .svg file")
    sources = resolve_sources(checkpoints, stdin=sys.stdin, minimum=1 if against else 2)
    origin, reference, pseudo = (resolve_source(path) if path else None for path in (base, against, data))

    from ..report.console import Progress, emit, status

    if dry_run:
        size = sum(info.nbytes for source in sources for info in source.tensors.values())
        emit(f"compare {len(sources)} checkpoints, {len(sources[0].tensors)} tensors each, {size} bytes in all")
        return

    from ..grouping import group_checkpoints
    from ..report.tables import group_table, render, similarity_tables
    from ..similarity.engine import compute_similarity

    progress = Progress(quiet)
    static = [name for name in measures if "activations" not in MEASURES.traits(name)]
    report = compute_similarity(sources, base=origin, reference=reference, measures=static, on_progress=progress)
    if "cka" in measures:
        matrix = _cka(sources, pseudo, arch, device, seed, progress)
        report = replace(report, measures={**report.measures, "cka": matrix})
    if quiet:
        emit(_values(report), output, force=force)
    elif style == "json":
        emit(dump(report), output, force=force)
    else:
        tables = similarity_tables(report, 10 if per_layer else None)
        emit(render([*tables, group_table(group_checkpoints(report))], style), output, force=force)
    if figure:
        from ..report.figures import heat_map

        heat_map(report, group_checkpoints(report), figure, force=force)
        status(f"wrote {figure}", quiet=quiet)
    _check(report, fail_under)


def _chosen(names: list[str] | None, data: str | None) -> list[str]:
    """The measures to take: those named, or all that can be."""
    chosen = [MEASURES.check(name) for name in names or MEASURES.names()]
    needy = [name for name in chosen if "activations" in MEASURES.traits(name)]
    if data is None and names and needy:
        raise DmmError(
            f"{needy[0]} needs images",
            hint="dmm synthesize CKPT... -o pseudo.safetensors, then --data pseudo.safetensors",
        )
    return [name for name in chosen if data is not None or name not in needy]


def _cka(
    sources: Sequence[Source], data: Source, arch: str | None, device: str, seed: int, on_progress: Callable[..., None]
) -> Matrix:
    from .. import architectures
    from ..runtime import one_thread, resolve_device
    from ..similarity.cka import BATCH
    from ..synthesis.pseudodata import load_pseudo_data

    where = resolve_device(device)
    models = [architectures.load_model(source, arch)[0].to(where) for source in sources]
    images = balanced_images(load_pseudo_data(data), sources, seed, "cka", where)
    batches = [part for batch in images for part in batch.split(BATCH)]
    with one_thread(where), readable_errors(data, sources[0].label):
        matrix, _ = MEASURES.load("cka")(models, batches, on_progress)
    return tuple(tuple(float(value) for value in row) for row in matrix)


def _pairs(report: SimilarityReport) -> list[tuple[str, float]]:
    if report.against is not None:
        return list(report.against.items())
    matrix = report.measures["cosine"]
    return [(f"{report.labels[a]} {report.labels[b]}", matrix[a][b]) for a in range(len(matrix)) for b in range(a)]


def _values(report: SimilarityReport) -> str:
    return "\n".join(f"{value:.6f}" for _, value in _pairs(report))


def _check(report: SimilarityReport, bound: float | None) -> None:
    low = [(name, value) for name, value in _pairs(report) if bound is not None and value < bound]
    if low:
        raise CheckFailed(
            f"cosine below {bound!r}",
            evidence=[f"{name}: {value!r}" for name, value in sorted(low, key=lambda i: i[1])],
        )
