"""Streams tensors through a merge method, block by block.

Legend: N checkpoints, n elements of a block, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint, encode_floats, require_finite, save_checkpoint
from ..errors import DmmError, printable
from ..header import TensorInfo
from ..inputs import Source, require_same_tensors
from . import METHODS
from .batchnorm import merged_variance, pair_layers
from .method import Block, effective_parameters

BLOCK = 1 << 18  # elements of one checkpoint held at a time

Progress = Callable[..., None]


@dataclass(frozen=True)
class Recipe:
    """How to merge.

    Attributes:
        weights: one per checkpoint, or empty for equal ones.
        parameters: of the method; missing ones take its defaults.
    """

    method: str = "linear"
    weights: tuple[float, ...] = ()
    parameters: dict[str, Any] = field(default_factory=dict)
    base: Source | None = None


@dataclass(frozen=True)
class Checked:
    """A recipe that fits its sources: the method loaded, weights and parameters complete."""

    function: Callable[..., np.ndarray]
    weights: np.ndarray
    parameters: dict[str, Any]
    base: Source | None

    @property
    def shares(self) -> np.ndarray:
        return self.weights / self.weights.sum()


def check(sources: Sequence[Source], recipe: Recipe) -> Checked:
    """Everything about a merge that headers can tell.

    Raises:
        DmmError: tensors differ, weights do not fit, the method is unknown, lacks its base or is not
            defined for this many checkpoints.
    """
    function = METHODS.load(recipe.method)
    if function.needs_base and recipe.base is None:
        raise DmmError(f"{recipe.method} needs the common start", hint="name it with --base")
    if recipe.base is not None and not function.needs_base:
        raise DmmError(f"{recipe.method} does not use a base", hint="leave --base out")
    if function.checkpoints not in (None, len(sources)) and len(sources) > 1:
        raise DmmError(
            f"{recipe.method} merges {function.checkpoints} checkpoints, not {len(sources)}",
            hint="use --method linear for more",
        )
    require_same_tensors([*sources, *([recipe.base] if recipe.base else [])])
    _require_same_kinds(sources)
    return Checked(
        function, _weights(sources, recipe), effective_parameters(function, recipe.parameters), recipe.base
    )


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
    checked = check(sources, recipe)
    infos = sources[0].tensors
    pairs = pair_layers(infos)
    layout = {name: (info.dtype, info.shape) for name, info in infos.items()}
    total, done = sum(info.nbytes for info in infos.values()), 0
    with ExitStack() as stack:
        files = [stack.enter_context(Checkpoint(source)) for source in sources]
        base = stack.enter_context(Checkpoint(recipe.base)) if recipe.base else None
        work = _Merge(files, base, checked, pairs)

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
        self, files: list[Checkpoint], base: Checkpoint | None, checked: Checked, pairs: dict[str, str | None]
    ) -> None:
        self._files, self._base, self._checked, self._pairs = files, base, checked, pairs

    def tensor(self, info: TensorInfo) -> Iterator[np.ndarray]:
        """The merged bytes of one tensor, in pieces."""
        kind = info.name.rpartition(".")[2]
        if not info.is_float:
            yield self._integers(info)
        elif kind == "running_mean":
            first, rest = np.split(self._rows(info, 0, info.numel), [1])
            yield encode_floats(first[0] + self._checked.shares[1:] @ (rest - first), info.dtype)
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
        checked = self._checked
        gram = self._gram(info) if checked.function.needs_gram and len(self._files) > 1 else None
        for start in range(0, info.numel, BLOCK):
            stop = min(start + BLOCK, info.numel)
            values = self._rows(info, start, stop)
            if len(values) == 1 and self._base is None:
                merged = values[0]
            else:
                base = self._base.floats(info.name, start, stop).astype(np.float64) if self._base else None
                merged = checked.function(Block(values, checked.weights, base, gram), **checked.parameters)
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
        weight = self._pairs[info.name.rpartition(".")[0]]
        if weight is None:
            return merged_variance(None, variances, self._checked.shares)
        held = self._files[0].source.tensors[weight]
        rows = self._rows(held, 0, held.numel)
        filters = rows.reshape(len(rows), held.shape[0], -1)  # (N, C, K)
        return merged_variance(filters, variances, self._checked.shares)

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


def _weights(sources: Sequence[Source], recipe: Recipe) -> np.ndarray:
    weights = np.array(recipe.weights or [1.0] * len(sources), dtype=np.float64)
    if len(weights) != len(sources):
        raise DmmError(f"{len(weights)} weights for {len(sources)} checkpoints", hint="give one each: --weights 1,2")
    if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise DmmError(
            f"weights must be zero or more, with a positive sum: {', '.join(f'{w:g}' for w in weights)}"
        )
    return weights


def _require_same_kinds(sources: Sequence[Source]) -> None:
    for name, info in sources[0].tensors.items():
        for source in sources[1:]:
            other = source.tensors[name]
            if other.is_float != info.is_float or (not info.is_float and other.dtype != info.dtype):
                raise DmmError(
                    f"tensor {printable(name)} is {info.dtype} in {sources[0].path} and {other.dtype} in {source.path}"
                )
