"""Measures of similarity that need the networks: their activations, or their units in one order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING

from ..inputs import Source, kinds_of
from ..similarity import MEASURES
from ._align import RESTARTS
from ._pseudo import balanced_images, readable_errors

if TYPE_CHECKING:
    from ..manifest import Matrix, SimilarityReport

Progress = Callable[..., None]


def with_cka(
    report: SimilarityReport,
    sources: Sequence[Source],
    data: Source,
    *,
    arch: str | None,
    device: str,
    seed: int,
    on_progress: Progress,
) -> SimilarityReport:
    """The report with the CKA of activations on pseudo-data, between checkpoints of one architecture."""
    from .. import architectures
    from ..runtime import one_thread, resolve_device
    from ..similarity.cka import BATCH
    from ..synthesis.pseudodata import load_pseudo_data

    where = resolve_device(device)
    pseudo = load_pseudo_data(data)
    whole = _empty(len(sources))
    for kind in kinds_of(sources):
        own = [sources[i] for i in kind]
        models = [architectures.load_model(source, arch)[0].to(where) for source in own]
        images = balanced_images(pseudo, own, seed, "cka", where)
        with one_thread(where), readable_errors(data, own[0].label):
            batches = [part for batch in images for part in batch.split(BATCH)]
            matrix, _ = MEASURES.load("cka")(models, batches, on_progress)
        for place, row in zip(kind, matrix, strict=True):
            for other, value in zip(kind, row, strict=True):
                whole[place][other] = float(value)
    return _with(report, "cka", whole)


def with_aligned(
    report: SimilarityReport, sources: Sequence[Source], *, arch: str | None, seed: int, on_progress: Progress
) -> SimilarityReport:
    """The report with the cosine of the weights, those of different starts once their units are in one order."""
    from ..alignment.align import align
    from ..grouping import BASIN

    whole = [list(row) for row in report.raw_cosine]
    for a, b in combinations(range(len(sources)), 2):
        if whole[a][b] is not None and whole[a][b] < BASIN:
            pair = [[sources[a]], [sources[b]]]
            (found,) = align(pair, arch=arch, seed=seed, restarts=RESTARTS, on_progress=on_progress)
            whole[a][b] = whole[b][a] = found.cosine[1]
    return _with(report, "aligned", whole)


def _empty(count: int) -> list[list[float | None]]:
    return [[None] * count for _ in range(count)]


def _with(report: SimilarityReport, name: str, rows: list[list[float | None]]) -> SimilarityReport:
    matrix: Matrix = tuple(map(tuple, rows))
    return replace(report, measures={**report.measures, name: matrix})
