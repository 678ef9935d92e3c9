"""Measures of similarity that need the networks: their activations, or their units in one order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING

from ..errors import DmmError
from ..inputs import Source, kinds_of
from ..similarity import MEASURES
from ._align import RESTARTS
from ._pseudo import distinct_images, readable_errors

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
    from .. import loading
    from ..layout import place
    from ..runtime import deterministic, resolve_device
    from ..similarity.cka import BATCH, FEWEST
    from ..spaces import example
    from ..synthesis.pseudodata import load_pseudo_data

    where = resolve_device(device)
    pseudo = load_pseudo_data(data)
    whole = _empty(len(sources))
    for kind in kinds_of(sources):
        own = [sources[i] for i in kind]
        models = [loading.load_model(source, arch)[0] for source in own]
        for model in models:
            place(model, where, example(pseudo.spec, where))
        batches = list(distinct_images(pseudo, own, seed, "cka", where, BATCH))
        if len(batches[0]) < FEWEST:
            raise DmmError(
                f"cka needs {FEWEST} images, {data.path} holds {len(batches[0])} of these checkpoints",
                hint="make more of them: dmm synthesize CKPT... -o pseudo.safetensors",
            )
        with deterministic(where), readable_errors(data, own[0].label):
            matrix, _ = MEASURES.load("cka")(models, batches, on_progress)
        for number, row in zip(kind, matrix, strict=True):
            for other, value in zip(kind, row, strict=True):
                whole[number][other] = float(value)
    return _with(report, "cka", whole)


def with_aligned(
    report: SimilarityReport, sources: Sequence[Source], *, arch: str | None, seed: int, on_progress: Progress
) -> SimilarityReport:
    """The report with the cosine of the weights, those of different starts once their units are in one order."""
    from ..grouping import same_start

    measure = MEASURES.load("aligned")
    whole, known = [list(row) for row in report.raw_cosine], same_start(report)
    for kind in kinds_of(sources):
        pairs = [(a, b) for a, b in combinations(range(len(kind)), 2) if not known[kind[a], kind[b]]]
        own = [sources[i] for i in kind]
        found = measure(own, pairs, arch=arch, seed=seed, restarts=RESTARTS, on_progress=on_progress) if pairs else {}
        for (a, b), value in found.items():
            whole[kind[a]][kind[b]] = whole[kind[b]][kind[a]] = value
    return _with(report, "aligned", whole)


def _empty(count: int) -> list[list[float | None]]:
    return [[None] * count for _ in range(count)]


def _with(report: SimilarityReport, name: str, rows: list[list[float | None]]) -> SimilarityReport:
    matrix: Matrix = tuple(map(tuple, rows))
    return replace(report, measures={**report.measures, name: matrix})
