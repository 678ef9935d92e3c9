"""Every measure in one pass over the data.

Legend: N checkpoints, n elements of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

import numpy as np

from ..chance import unrelated_cosine
from ..checkpoint import Checkpoint, require_variances
from ..header import TensorInfo
from ..inputs import Source
from ..manifest import LayerSimilarity, Matrix, SimilarityReport, SourceRecord
from ..names import RUNNING_VAR, is_weight, kind_of
from ..streaming import Piece, in_order, one_blas_thread, pieces, read_rows
from . import MEASURES
from .cosine import Cosine
from .parts import comparable_parts

BLOCK = 1 << 16  # elements; a float32 dot product of this length is good to 1e-6
READ = 1 << 20  # elements read at once, per checkpoint

Progress = Callable[..., None]


def compute_similarity(
    sources: Sequence[Source],
    *,
    base: Source | None = None,
    reference: Source | None = None,
    measures: Sequence[str] = ("cosine", "sign", "bn"),
    on_progress: Progress | None = None,
) -> SimilarityReport:
    """Compare checkpoints, block by block; what blocks contribute is added in float64.

    Checkpoints of different architectures are not comparable: their entries are None, as long as there are two of
    one architecture, and neither base nor reference.

    Args:
        sources: two or more checkpoints, or one with a reference.
        base: where given, cosine and sign are taken on ``theta_i - base``.
        reference: every checkpoint's cosine with it goes to ``against``.
        measures: names from ``MEASURES``; cosine is always among them, since grouping stands on it.

    Raises:
        DmmError: see ``comparable_parts``; a value is NaN or infinite, or a running variance negative.
    """
    kinds = comparable_parts(sources, base, reference)
    if len(kinds) == 1:
        return _compare(sources, base, reference, measures, on_progress)
    parts = [_compare([sources[i] for i in kind], None, None, measures, on_progress) for kind in kinds]
    return _joined(sources, kinds, parts)


def _compare(
    sources: Sequence[Source],
    base: Source | None,
    reference: Source | None,
    measures: Sequence[str],
    on_progress: Progress | None,
) -> SimilarityReport:
    """A report on checkpoints of one architecture."""
    everything = [*sources, *([reference] if reference else [])]
    names = ["cosine", *(name for name in measures if name != "cosine")]
    tools = {name: MEASURES.load(name)(len(everything)) for name in names}
    raw = Cosine(len(everything))
    with ExitStack() as stack:
        stack.enter_context(one_blas_thread())
        files = [stack.enter_context(Checkpoint(source)) for source in everything]
        origin = stack.enter_context(Checkpoint(base)) if base else None
        _scan(files, origin, tools, raw, on_progress)
        unrelated = unrelated_cosine(files[: len(sources)], filter(is_weight, sources[0].tensors.values()))
    count = len(sources)
    return SimilarityReport(
        sources=tuple(_record(source) for source in sources),
        measures={name: _plain(tool.matrix()[:count, :count]) for name, tool in tools.items()},
        layers=_layers(tools["cosine"], sources[0], count),
        on="task vectors" if base else "weights",
        base=_record(base) if base else None,
        reference=_record(reference) if reference else None,
        against=_against(tools["cosine"], sources) if reference else None,
        raw_cosine=_plain((raw if base else tools["cosine"]).matrix()[:count, :count]),
        unrelated=_plain(unrelated),
    )


def _joined(
    sources: Sequence[Source], kinds: Sequence[tuple[int, ...]], parts: Sequence[SimilarityReport]
) -> SimilarityReport:
    """One report from one per architecture; layers are those of all that have two checkpoints or more."""
    count = len(sources)

    def spread(matrices: Iterable[tuple[tuple[int, ...], Matrix]]) -> Matrix:
        whole: list[list[float | None]] = [[None] * count for _ in range(count)]
        for kind, matrix in matrices:
            for place, row in zip(kind, matrix, strict=True):
                for other, value in zip(kind, row, strict=True):
                    whole[place][other] = value
        return tuple(map(tuple, whole))

    def spread_layer(kind: tuple[int, ...], layer: LayerSimilarity) -> LayerSimilarity:
        norms = dict(zip(kind, layer.norms, strict=True))
        return replace(layer, cosine=spread([(kind, layer.cosine)]), norms=tuple(map(norms.get, range(count))))

    pairs = list(zip(kinds, parts, strict=True))
    return SimilarityReport(
        sources=tuple(_record(source) for source in sources),
        measures={name: spread((kind, part.measures[name]) for kind, part in pairs) for name in parts[0].measures},
        layers=tuple(spread_layer(kind, layer) for kind, part in pairs if len(kind) > 1 for layer in part.layers),
        raw_cosine=spread((kind, part.raw_cosine) for kind, part in pairs),
        unrelated=spread((kind, part.unrelated) for kind, part in pairs),
    )


def _scan(
    files: list[Checkpoint], base: Checkpoint | None, tools: dict, raw: Cosine, on_progress: Progress | None
) -> None:
    infos = [info for info in files[0].source.tensors.values() if any(t.wants(info) for t in tools.values())]
    _require_sound([*files, base] if base else files, {info.name for info in infos})
    total, done = sum(info.numel for info in infos), 0
    with _read_ahead(files, base, infos) as parts:
        for info, rows, origin in parts:
            for start in range(0, rows.shape[1], BLOCK):
                block = rows[:, start : start + BLOCK]
                if origin is not None and is_weight(info):
                    raw.add(info.name, block)
                    block = block - origin[start : start + BLOCK]
                for tool in tools.values():
                    if tool.wants(info):
                        tool.add(info.name, block)
            done += rows.shape[1]
            if on_progress:
                on_progress("similarity", done, total)


def _require_sound(files: list[Checkpoint], measured: Collection[str]) -> None:
    """Refuse NaN, infinity and negative variances also in what is not measured: such a network is like no other."""
    for file in files:
        for info in file.source.tensors.values():
            if info.is_float and info.name not in measured:
                for piece in pieces(info, READ):
                    _read([file], piece)


def _read_ahead(
    files: list[Checkpoint], base: Checkpoint | None, infos: list[TensorInfo]
) -> AbstractContextManager[Iterator[tuple[TensorInfo, np.ndarray, np.ndarray | None]]]:
    """Pieces of all checkpoints as rows (N, n), and of the base, read while earlier ones are worked on."""
    everything = [*files, base] if base else files
    known = {info.name: info for info in infos}

    def read(piece: Piece) -> tuple[TensorInfo, np.ndarray, np.ndarray | None]:
        rows = _read(everything, piece)
        return known[piece.name], rows[: len(files)], rows[-1] if base else None

    return in_order(read, (piece for info in infos for piece in pieces(info, READ)), 1)


def _read(files: list[Checkpoint], piece: Piece) -> np.ndarray:
    """The same piece of every checkpoint, (N, n), which a network can be made of."""
    rows, _ = read_rows(files, piece)
    if kind_of(piece.name) == RUNNING_VAR:
        for file, row in zip(files, rows, strict=True):
            require_variances(file.source, piece.name, row)
    return rows


def _record(source: Source) -> SourceRecord:
    return SourceRecord(source.label, str(source.path))


def _layers(cosine: Cosine, source: Source, count: int) -> tuple[LayerSimilarity, ...]:
    layers = []
    for name, full in cosine.layers().items():
        matrix = full[:count, :count]
        pairs = matrix[np.triu_indices(count, 1)]
        lowest = float(pairs.min()) if pairs.size else None
        norms = tuple(float(value) for value in np.sqrt(np.diag(cosine.grams[name])[:count]))
        layers.append(LayerSimilarity(name, source.tensors[name].shape, _plain(matrix), lowest, norms))
    return tuple(layers)


def _against(cosine: Cosine, sources: Sequence[Source]) -> dict[str, float]:
    last = cosine.matrix()[-1]
    return {source.label: float(value) for source, value in zip(sources, last, strict=False)}


def _plain(matrix: np.ndarray) -> Matrix:
    return tuple(tuple(None if np.isnan(value) else float(value) for value in row) for row in matrix)
