"""Streams tensors through a merge method, block by block.

Legend: N checkpoints, n elements of a block, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ..checkpoint import Checkpoint, encode_floats, require_finite, save_checkpoint
from ..errors import DmmError, printable
from ..header import TensorInfo
from ..inputs import Source
from . import METHODS
from .batchnorm import merged_variance, pair_layers
from .method import Block, effective_parameters
from .recipe import Recipe, check

BLOCK = 1 << 18  # elements of one checkpoint held at a time

Progress = Callable[..., None]


def merge(
    sources: Sequence[Source],
    output: Path,
    recipe: Recipe,
    metadata: dict[str, str],
    *,
    inputs: Sequence[Path] = (),
    force: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, int]:
    """Merge checkpoints into one file.

    Float tensors go through the method, in float64; running means are averaged, running variances
    follow ``merged_variance``, step counters take the maximum, and other integer or boolean tensors
    must be equal. Every tensor keeps the dtype it has in the first checkpoint.

    Returns:
        How many normalisation layers were "paired" with their filters, and "unpaired".

    Raises:
        DmmError: see ``check``; a value is NaN or infinite; integer tensors differ; the output is refused.
    """
    check(sources, recipe)
    infos = sources[0].tensors
    pairs = pair_layers(infos)
    layout = {name: (info.dtype, info.shape) for name, info in infos.items()}
    total, done = sum(info.nbytes for info in infos.values()), 0
    with ExitStack() as stack:
        files = [stack.enter_context(Checkpoint(source)) for source in sources]
        base = stack.enter_context(Checkpoint(recipe.base)) if recipe.base else None
        work = _Merge(files, base, recipe, pairs)

        def chunks(name: str) -> Iterator[np.ndarray]:
            nonlocal done
            for chunk in work.tensor(infos[name]):
                done += chunk.nbytes
                yield chunk
                if on_progress:
                    on_progress("merge", done, total)

        save_checkpoint(output, layout, chunks, metadata, inputs=inputs, force=force)
    found = sum(weight is not None for weight in pairs.values())
    return {"paired": found, "unpaired": len(pairs) - found}


class _Merge:
    def __init__(
        self, files: list[Checkpoint], base: Checkpoint | None, recipe: Recipe, pairs: dict[str, str | None]
    ) -> None:
        self._files, self._base, self._pairs = files, base, pairs
        self._method = METHODS.load(recipe.method)
        self._parameters = effective_parameters(self._method, recipe.parameters)
        self._needs_gram = "gram" in METHODS.traits(recipe.method) and len(files) > 1
        self._weight = np.array(recipe.weights or [1.0] * len(files))
        self._shares = self._weight / self._weight.sum()

    def tensor(self, info: TensorInfo) -> Iterator[np.ndarray]:
        """The merged bytes of one tensor, in pieces."""
        kind = info.name.rpartition(".")[2]
        if not info.is_float:
            yield self._integers(info)
        elif kind == "running_mean":
            first, rest = np.split(self._rows(info, 0, info.numel), [1])
            yield encode_floats(first[0] + self._shares[1:] @ (rest - first), info.dtype)
        elif kind == "running_var":
            yield encode_floats(self._variance(info), info.dtype)
        else:
            yield from self._weights(info)

    def _rows(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        rows = np.empty((len(self._files), stop - start))  # (N, n)
        for row, file in zip(rows, self._files, strict=True):
            row[:] = file.floats(info.name, start, stop)
            require_finite(file.source, info.name, row)
        return rows

    def _weights(self, info: TensorInfo) -> Iterator[np.ndarray]:
        gram = self._gram(info) if self._needs_gram else None
        for start in range(0, info.numel, BLOCK):
            stop = min(start + BLOCK, info.numel)
            values = self._rows(info, start, stop)
            if len(values) == 1 and self._base is None:
                merged = values[0]
            else:
                base = self._base.floats(info.name, start, stop).astype(np.float64) if self._base else None
                merged = self._method(Block(values, self._weight, base, gram), **self._parameters)
            yield encode_floats(merged, info.dtype)

    def _gram(self, info: TensorInfo) -> np.ndarray:
        gram = np.zeros((len(self._files), len(self._files)))
        for start in range(0, info.numel, BLOCK):
            rows = self._rows(info, start, min(start + BLOCK, info.numel))
            gram += rows @ rows.T
        return gram

    def _variance(self, info: TensorInfo) -> np.ndarray:
        variances = self._rows(info, 0, info.numel)  # (N, C)
        for file, row in zip(self._files, variances, strict=True):
            if row.size and row.min() < 0:
                raise DmmError(f"negative running variance in {printable(info.name)} of {file.source.path}")
        weight = self._pairs.get(info.name.rpartition(".")[0])
        if weight is None:
            return merged_variance(None, variances, self._shares)
        held = self._files[0].source.tensors[weight]
        rows = self._rows(held, 0, held.numel)
        filters = rows.reshape(len(rows), held.shape[0], -1)  # (N, C, K)
        return merged_variance(filters, variances, self._shares)

    def _integers(self, info: TensorInfo) -> np.ndarray:
        values = [file.array(info.name) for file in self._files]
        if info.name.rpartition(".")[2] == "num_batches_tracked":
            return np.maximum.reduce(values).reshape(-1).view(np.uint8)
        for file, value in zip(self._files[1:], values[1:], strict=True):
            if not np.array_equal(value, values[0]):
                raise DmmError(
                    f"{info.dtype} tensor {printable(info.name)} differs between "
                    f"{self._files[0].source.path} and {file.source.path}",
                    hint="integer and boolean tensors have no mean; they must be equal",
                )
        return values[0].reshape(-1).view(np.uint8)
