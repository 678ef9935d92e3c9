"""The rule for every tensor of a merge, by what it is for.

Float weights go through the method. Running means are averaged, running variances follow
``merged_variance``, step counters take the maximum, other integer and boolean tensors must be equal. Heads
of different classes follow ``heads``.

Legend: N checkpoints, n elements of a block, C channels, K classes.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..checkpoint import Checkpoint, encode_floats
from ..digest import Hashes
from ..errors import DmmError, printable
from ..header import Layout, TensorInfo
from ..names import COUNTER, RUNNING_MEAN, RUNNING_VAR, kind_of
from ..streaming import Piece, pieces, read_rows, split, width_of
from . import CALIBRATIONS, METHODS
from .batchnorm import merged_variance, pair_layers
from .facts import Fact, Gram, trim_threshold
from .heads import head_union, unlike_heads
from .method import Block, Facts, effective_parameters
from .recipe import DTYPES, Recipe

BLOCK = 1 << 18  # elements of one checkpoint held at a time; which elements share a random stream depends on it
UNHEARD = 1e-12  # share of a checkpoint of weight 0 in classes that no other knows


class Part(NamedTuple):
    """Merged bytes, and for weights the squared lengths of the merged piece and of its parents (N,)."""

    data: np.ndarray
    merged: float = 0.0
    parents: np.ndarray | None = None


class Tensors:
    """Merges one piece of a tensor at a time, after all rounds of measuring it; safe to use from several threads.

    Attributes:
        pairs: for every layer with running statistics, the weight whose output it normalises, or None.
        on_matrices: whether whole matrices are worked on, with torch.
    """

    def __init__(self, files: Sequence[Checkpoint], base: Checkpoint | None, recipe: Recipe) -> None:
        self._files, self._base, self._recipe = files, base, recipe
        self._all = [base, *files] if base else files
        self._told = self._reading = self._all
        sources = [file.source for file in files]
        self._infos = sources[0].tensors
        self._union = head_union(sources) if recipe.head == "union" else None
        self._kept = (
            frozenset(unlike_heads([file.source for file in self._all])) if recipe.head == "first" else frozenset()
        )
        self._method = METHODS.load(recipe.method)
        self._traits = METHODS.traits(recipe.method)
        self._parameters = {
            name: effective_parameters(self._method, recipe.parameters_of(name)) for name in self._infos
        }
        self._weights = {name: np.array(recipe.weights_of(name, len(files))) for name in self._infos}
        self._local = threading.local()
        self._facts = self._find_out()
        self.pairs = pair_layers(self._infos)
        self.on_matrices = "matrices" in self._traits or recipe.calibrate is not None
        self._open_device()

    def _open_device(self) -> None:
        if self.on_matrices:
            from ..runtime import resolve_device  # loads torch, which no other method needs
            from .matrices import load_linear_algebra

            self.device = resolve_device(self._recipe.device)
            load_linear_algebra(self.device)
            if self._recipe.calibrate:
                self._calibration = CALIBRATIONS.load(self._recipe.calibrate)
                self._calibration_parameters = effective_parameters(self._calibration, self._recipe.calibration)

    def layout(self) -> Layout:
        """Names, dtypes and shapes of the merged tensors."""
        wanted = DTYPES.get(self._recipe.dtype or "")
        layout = {}
        for name, info in self._infos.items():
            shape = info.shape
            if self._union and name in self._union.tensors:
                shape = (len(self._union.classes), *shape[1:])
            layout[name] = (wanted if wanted and info.is_float else info.dtype, shape)
        return layout

    def is_weight(self, name: str) -> bool:
        """Whether a tensor goes through the method."""
        return self._rule(self._infos[name]) == self._merge

    def shares(self, name: str) -> np.ndarray:
        """The weights of a tensor scaled to sum to 1, (N,)."""
        return self._weights[name] / self._weights[name].sum()

    def pieces(self, name: str) -> Iterator[Piece]:
        """The pieces a tensor is merged in."""
        info = self._infos[name]
        whole = not self.is_weight(name) or (self.on_matrices and self._matrix_shape(name))
        return pieces(info, max(info.numel, 1) if whole else BLOCK)

    def blocks(self, name: str) -> Iterator[Piece]:
        """The pieces a tensor is measured in."""
        return pieces(self._infos[name], BLOCK)

    def rounds(self, name: str) -> int:
        """How often a tensor must be measured before its blocks can be merged."""
        return self._facts[name].rounds if name in self._facts and self._infos[name].numel else 0

    def _find_out(self) -> dict[str, Fact]:
        """The facts to find out about every weight."""
        if not {"gram", "trim"} & set(self._traits):
            return {}
        return {info.name: self._fact(info) for info in self._infos.values() if self.is_weight(info.name)}

    def _fact(self, info: TensorInfo) -> Fact:
        if "gram" in self._traits:
            return Gram(len(self._files))
        density = self._parameters[info.name]["density"]
        return trim_threshold(density, len(self._files), info.numel, width_of(self._all, info.name))

    def measure(self, piece: Piece, number: int) -> np.ndarray:
        """What a block contributes to the round of this number, from 0 on."""
        rows, _, _ = self._read(piece, self._all if number else self._told)
        return self._facts[piece.name].measure(rows)

    def add(self, piece: Piece, contribution: np.ndarray) -> bool:
        """Take what a block contributes, in the order of the blocks; whether that ends the round."""
        fact = self._facts[piece.name]
        fact.add(contribution)
        if piece.stop < self._infos[piece.name].numel:
            return False
        fact.end_round()
        return True

    def pass_over(self, name: str) -> None:
        """Read a tensor for the hashes alone."""
        for file in self._told:
            file.raw(name)

    def merge(self, piece: Piece) -> Part:
        """The merged bytes of a piece."""
        info = self._infos[piece.name]
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told below, as an error
            return self._rule(info)(info, piece)

    def feed(self, hashes: Hashes, names: Sequence[str]) -> None:
        """Give hashes the bytes that merging these tensors, in this order, reads; of files where that is all, in order.

        Every byte is told once: by the one read of each tensor that goes through ``self._told``. That is the first
        round of measuring, in which all tensors are read if any is measured; else it is the merge.
        """
        skipped = set() if all(map(self.is_weight, names)) else {self._base}
        whole = [file for file in self._all if file not in skipped and not self._kept and file.is_ordered(names)]
        for header in (header for file in whole for header in file.source.headers):
            hashes.expect(header.path, header.data_start)
        self._told = [file.telling(hashes.feed) if file in whole else file for file in self._all]
        self._reading = self._all if any(map(self.rounds, names)) else self._told

    def _rule(self, info: TensorInfo) -> Callable[[TensorInfo, Piece], Part]:
        kind = kind_of(info.name)
        if not info.is_float:
            return self._largest if kind == COUNTER else self._equal
        if info.name in self._kept:
            return self._first
        if self._union and info.name in self._union.tensors:
            return self._head
        return {RUNNING_MEAN: self._mean, RUNNING_VAR: self._variance}.get(kind, self._merge)

    def _encode(self, info: TensorInfo, values: np.ndarray) -> np.ndarray:
        return encode_floats(values, DTYPES.get(self._recipe.dtype or "", info.dtype), info.name)

    def _read(self, piece: Piece, files: Sequence[Checkpoint]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Rows (N, n) of the checkpoints, or their task vectors where there is a base (n,); squared lengths (N,).

        The rows are this thread's until it reads again.
        """
        rows = self._scratch(len(self._all), piece.stop - piece.start, width_of(self._all, piece.name))
        squares = np.zeros(len(rows))
        for n, file in enumerate(files):  # file by file: the next thread can hash one while this one reads the others
            for block, part in _blocks(piece):
                squares[n] += read_rows([file], block, out=rows[n : n + 1, part])[1][0]
                if self._base and n:
                    rows[n, part] -= rows[0, part]
        return (rows[1:], rows[0], squares[1:]) if self._base else (rows, None, squares)

    def _scratch(self, count: int, width: int, dtype: np.dtype) -> np.ndarray:
        """Rows (count, width) that are allocated once per thread: fresh pages cost as much as reading into them."""
        size = count * width * dtype.itemsize
        held = getattr(self._local, "memory", None)
        if held is None or len(held) < size:
            held = self._local.memory = np.empty(size, np.uint8)
        return held[:size].view(dtype).reshape(count, width)

    def _merge(self, info: TensorInfo, piece: Piece) -> Part:
        rows, base, squares = self._read(piece, self._reading)
        known = self._learn(info.name)
        merged = np.empty(rows.shape[1], rows.dtype)
        if base is None:
            for _, part in _blocks(piece):
                _blend(rows[:, part], known, out=merged[part])
        else:
            self._merge_tasks(info, piece, rows, known, out=merged)
            merged += base
        length = float(np.dot(merged, merged))
        if not np.isfinite(length) and not np.isfinite(merged).all():
            raise DmmError(f"merging tensor {printable(info.name)} overflows", hint="lower the scale or the weights")
        return Part(self._encode(info, merged), length, squares)

    def _merge_tasks(
        self, info: TensorInfo, piece: Piece, tasks: np.ndarray, known: np.ndarray | None, *, out: np.ndarray
    ) -> None:
        """Fill ``out`` (n,) with the merged task vector, calibrated if asked for; overwrites the tasks (N, n)."""
        shape = self._matrix_shape(info.name) if self.on_matrices else None
        calibrated = shape and self._recipe.calibrate
        if shape and "matrices" in self._traits:
            out[:] = self._merged_matrix(info, tasks, shape)
        else:
            spent = tasks.copy() if calibrated else tasks
            for block, part in _blocks(piece):
                out[part] = self._merged_block(info, block, spent[:, part], known)
        if calibrated:
            from .matrices import calibrate_matrix

            parameters = self._calibration_parameters
            out[:] = calibrate_matrix(out, tasks, shape, self.device, self._calibration, parameters)

    def _learn(self, name: str) -> np.ndarray | None:
        """What blocks of a tensor are merged with, (N,): coefficients, or magnitudes to trim at."""
        fact = self._facts[name].result() if name in self._facts else None
        if "features" in self._traits:
            return self.shares(name)  # a draft, whose layers are solved later
        if "coefficients" not in self._traits:
            return fact
        used = self._used(name)
        coefficients = np.zeros(len(used))
        gram = fact if fact is None else fact[np.ix_(used, used)]
        coefficients[used] = self._method(Facts(self._weights[name][used], gram), **self._parameters[name])
        return coefficients

    def _used(self, name: str) -> np.ndarray:
        """Which checkpoints take part in a tensor, bool (N,): a weight of 0 leaves one out."""
        return self._weights[name] > 0

    def _merged_matrix(self, info: TensorInfo, tasks: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        from .matrices import merge_matrices

        used = self._used(info.name)
        weighted = tasks[used] * self._weights[info.name][used].astype(tasks.dtype)[:, None]
        return merge_matrices(weighted, shape, self.device, self._method, self._parameters[info.name])

    def _merged_block(self, info: TensorInfo, block: Piece, tasks: np.ndarray, known: np.ndarray | None) -> np.ndarray:
        """The merged task vector (n,) of a block; what is no matrix takes the mean from methods on matrices."""
        if "matrices" in self._traits:
            return self.shares(info.name).astype(tasks.dtype) @ tasks
        if "coefficients" in self._traits:
            return known.astype(tasks.dtype) @ tasks
        used = self._used(info.name)
        weights = self._weights[info.name].astype(tasks.dtype)
        if not used.all():
            tasks, weights, known = tasks[used], weights[used], known if known is None else known[used]
        stream = self._stream(block) if "random" in self._traits else None
        return self._method(Block(tasks, weights, known, stream), **self._parameters[info.name])

    def _stream(self, piece: Piece) -> np.random.Generator:
        key = hashlib.sha256(f"{self._recipe.seed}:{piece.start}:{piece.name}".encode()).digest()
        return np.random.Generator(np.random.SFC64(int.from_bytes(key, "little")))

    def _matrix_shape(self, name: str) -> tuple[int, int] | None:
        from .matrices import matrix_shape

        return matrix_shape(self._infos[name].shape)

    @property
    def _parents(self) -> Sequence[Checkpoint]:
        """The checkpoints as a merge reads them, without the base."""
        return self._reading[1:] if self._base else self._reading

    def _mean(self, info: TensorInfo, piece: Piece) -> Part:
        means = _doubles(self._parents, piece)  # (N, C); no differences, which can overflow where no mean does
        merged = np.where((means == means[0]).all(0), means[0], self.shares(info.name) @ means)
        return Part(self._encode(info, merged))

    def _variance(self, info: TensorInfo, piece: Piece) -> Part:
        variances = _doubles(self._parents, piece)  # (N, C)
        for file, row in zip(self._files, variances, strict=True):
            if row.size and row.min() < 0:
                raise DmmError(
                    f"negative running variance in {printable(info.name)} of {file.source.path}",
                    hint="this checkpoint was damaged, or merged as if statistics were weights; leave it out",
                )
        filters = None
        weight = self.pairs.get(info.name.rpartition(".")[0])
        if weight is not None:
            held = self._infos[weight]
            filters = _doubles(self._files, Piece(weight, 0, held.numel))
            filters = filters.reshape(len(variances), held.shape[0], -1)  # (N, C, S)
        return Part(self._encode(info, merged_variance(filters, variances, self.shares(info.name))))

    def _head(self, info: TensorInfo, piece: Piece) -> Part:
        width = info.numel // info.shape[0]
        total = np.zeros((len(self._union.classes), width))  # (K, width)
        known = np.zeros((len(total), 1))
        shares = np.maximum(self.shares(info.name), UNHEARD)
        for file, places, share in zip(self._parents, self._union.places, shares, strict=True):
            rows, _ = read_rows([file], Piece(info.name, 0, file.source.tensors[info.name].numel))
            total[list(places)] += share * rows.reshape(len(places), width)
            known[list(places)] += share
        return Part(self._encode(info, (total / known).reshape(-1)))

    def _first(self, info: TensorInfo, piece: Piece) -> Part:
        rows, _ = read_rows(self._files[:1], piece)
        return Part(self._encode(info, rows[0]))

    def _largest(self, info: TensorInfo, piece: Piece) -> Part:
        values = [file.array(info.name) for file in self._parents]
        return Part(np.maximum.reduce(values).reshape(-1).view(np.uint8))

    def _equal(self, info: TensorInfo, piece: Piece) -> Part:
        first, *others = (file.raw(info.name) for file in self._parents)
        for file, other in zip(self._files[1:], others, strict=True):
            if not np.array_equal(first, other):
                raise DmmError(
                    f"{info.dtype} tensor {printable(info.name)} differs between "
                    f"{self._files[0].source.path} and {file.source.path}",
                    hint="integer and boolean tensors have no mean; they must be equal",
                )
        return Part(first)


def _doubles(files: Sequence[Checkpoint], piece: Piece) -> np.ndarray:
    return read_rows(files, piece)[0].astype(np.float64)


def _blocks(piece: Piece) -> Iterator[tuple[Piece, slice]]:
    """The blocks of a piece, and where each lies in it."""
    for block in split(piece, BLOCK):
        yield block, slice(block.start - piece.start, block.stop - piece.start)


def _blend(rows: np.ndarray, coefficients: np.ndarray, *, out: np.ndarray) -> np.ndarray:
    """Fill ``out`` (n,) with ``sum_i c_i rows_i``; overwrites all rows but the first.

    Computed as the first row and weighted differences from it, so that equal rows come back bit for bit.
    """
    first, others = rows[0], rows[1:]
    np.subtract(others, first, out=others)
    weights = coefficients[1:].astype(rows.dtype)
    if len(others) == 1:
        np.multiply(others[0], weights[0], out=out)  # BLAS leaves a single row to a slow loop
    else:
        np.matmul(weights, others, out=out)
    total = float(coefficients.sum())  # above 1 for slerp and karcher, which lengthen the chord
    out += first if abs(total - 1.0) < 1e-12 else rows.dtype.type(total) * first
    return out
