"""The rule for every tensor of a merge, by what it is for.

Float weights go through the method. Running means are averaged, running variances follow
``merged_variance``, step counters take the maximum, other integer and boolean tensors must be equal. Heads
of different classes follow ``heads``. No rule sees a checkpoint whose weight in the tensor is 0.

Legend: N checkpoints, of a tensor those whose weight is not 0; n elements of a block, C channels, K classes.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import compress
from typing import NamedTuple

import numpy as np

from ..checkpoint import Checkpoint, encode_floats, require_variances, squared_length
from ..digest import Hashes
from ..errors import DmmError, printable
from ..header import FLOAT8, Layout, TensorInfo
from ..names import COUNTER, RUNNING_MEAN, RUNNING_VAR, is_statistic, kind_of
from ..streaming import Piece, pieces, read_rows, split, width_of
from . import CALIBRATIONS, METHODS
from .batchnorm import merged_variance, pair_layers
from .facts import Fact, Gram, trim_threshold
from .heads import heads_of
from .method import Block, Facts, effective_parameters
from .recipe import DTYPES, Recipe, merged_layout, union_of

BLOCK = 1 << 18  # elements of one checkpoint held at a time; which elements share a random stream depends on it


class Part(NamedTuple):
    """Merged bytes, and for weights the squared lengths of the merged piece and of its parents (N,).

    ``drowned``: nothing of the tasks is larger than rounding, so that the piece is the base's.
    """

    data: np.ndarray
    merged: float = 0.0
    parents: np.ndarray | None = None
    drowned: bool = False


class Tensors:
    """Merges one piece of a tensor at a time, after all rounds of measuring it; safe to use from several threads.

    Attributes:
        pairs: for every layer with running statistics, the weight whose output it normalises, or None.
        on_matrices: whether whole matrices are worked on, with torch.
    """

    def __init__(self, files: Sequence[Checkpoint], base: Checkpoint | None, recipe: Recipe) -> None:
        self._traits = METHODS.traits(recipe.method)
        base = base if "base" in self._traits else None  # others merge weights, and it served to compare them
        self._files, self._base, self._recipe = files, base, recipe
        self._all = [base, *files] if base else files
        self._told = self._reading = self._all
        sources = [file.source for file in files]
        self._infos = sources[0].tensors
        self._union = union_of(sources, recipe)
        self._kept = heads_of(sources[0]) if recipe.head == "first" else frozenset()
        self._method = METHODS.load(recipe.method)
        self._parameters = {
            name: effective_parameters(self._method, recipe.parameters_of(name)) for name in self._infos
        }
        self.pairs = pair_layers(self._infos)
        self._given = {name: np.array(self._weights_for(name)) for name in self._infos}
        self._weights = {name: weights[weights > 0] for name, weights in self._given.items()}  # (N,) each
        self._local = threading.local()
        self._facts = self._find_out()
        self.on_matrices = "matrices" in self._traits or recipe.calibrate is not None
        self._open_device()

    def _weights_for(self, name: str) -> tuple[float, ...]:
        """Statistics take the last override of their own name or of the filters whose output they tell of."""
        paired = self.pairs.get(name.rpartition(".")[0]) if is_statistic(name) else None
        return self._recipe.weights_of((name, paired) if paired else (name,), len(self._files))

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
        return merged_layout([file.source for file in self._files], self._recipe)

    def is_weight(self, name: str) -> bool:
        """Whether a tensor goes through the method."""
        return self._rule(self._infos[name]) == self._merge

    def shares(self, name: str) -> np.ndarray:
        """The weights of a tensor scaled to sum to 1, (N,)."""
        return self._weights[name] / self._weights[name].sum()

    def pieces(self, name: str) -> Iterator[Piece]:
        """The pieces a tensor is merged in."""
        info, rule = self._infos[name], self._rule(self._infos[name])
        if rule == self._merge:
            whole = self.on_matrices and self._matrix_shape(name)
        else:
            whole = rule not in (self._equal, self._first)
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
            return Gram(len(self._weights[info.name]))
        density, files = self._parameters[info.name]["density"], self._used(self._all, info.name)
        return trim_threshold(density, len(self._weights[info.name]), info.numel, width_of(files, info.name))

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
        """Read a tensor for the hashes alone; heads of other classes have other lengths."""
        for file in self._told:
            for piece in pieces(file.source.tensors[name], BLOCK):
                file.raw(name, piece.start, piece.stop)

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
        read = set() if self._kept else set(self._all).intersection(*map(self._read_for, names))
        whole = [file for file in self._all if file in read and file.is_ordered(names)]
        for header in (header for file in whole for header in file.source.headers):
            hashes.expect(header.path, header.data_start)
        self._told = [file.telling(hashes.feed) if file in whole else file for file in self._all]
        self._reading = self._all if any(map(self.rounds, names)) else self._told

    def _used(self, files: Sequence[Checkpoint], name: str) -> list[Checkpoint]:
        """Of all files, the base if there is one and the checkpoints whose weight in a tensor is not 0."""
        first = len(files) - len(self._files)
        return [*files[:first], *compress(files[first:], self._given[name] > 0)]

    def _read_for(self, name: str) -> list[Checkpoint]:
        """Of all files, those that merging a tensor reads."""
        return self._used(self._all if self.is_weight(name) else self._files, name)

    def _parents(self, name: str) -> list[Checkpoint]:
        """The checkpoints of a tensor as a merge reads them, without the base."""
        return self._used(self._reading[1:] if self._base else self._reading, name)

    def _rule(self, info: TensorInfo) -> Callable[[TensorInfo, Piece], Part]:
        kind = kind_of(info.name)
        if kind == COUNTER:
            return self._largest
        if not info.is_float:
            return self._equal
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
        files = self._used(files, piece.name)
        rows = self._scratch(len(files), piece.stop - piece.start, width_of(files, piece.name))
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
        merged, drowned = np.empty(rows.shape[1], rows.dtype), False
        if base is None:
            for _, part in _blocks(piece):
                _blend(rows[:, part], known, out=merged[part])
        else:
            drowned = self._merge_tasks(info, piece, rows, base, known, out=merged)
            merged += base
        length = squared_length(merged)
        if not np.isfinite(length) and not np.isfinite(merged).all():
            raise DmmError(f"merging tensor {printable(info.name)} overflows", hint="lower the scale or the weights")
        return Part(self._encode(info, merged), length, squares, drowned)

    def _merge_tasks(
        self,
        info: TensorInfo,
        piece: Piece,
        tasks: np.ndarray,
        base: np.ndarray,
        known: np.ndarray | None,
        *,
        out: np.ndarray,
    ) -> bool:
        """Fill ``out`` (n,) with the merged task vector, calibrated if asked for; overwrites the tasks (N, n).

        Tells whether nothing of the tasks is larger than rounding.
        """
        shape, drowned = self._matrix_shape(info.name) if self.on_matrices else None, False
        calibrated = shape and self._recipe.calibrate
        if shape and "matrices" in self._traits:
            out[:], drowned = self._merged_matrix(info, tasks, base, shape)
        else:
            spent = tasks.copy() if calibrated else tasks
            for block, part in _blocks(piece):
                out[part] = self._merged_block(info, block, spent[:, part], known)
        if calibrated:
            from .matrices import calibrate_matrix

            parameters = self._calibration_parameters
            out[:] = calibrate_matrix(out, tasks, shape, self.device, self._calibration, parameters)
        return drowned

    def _learn(self, name: str) -> np.ndarray | None:
        """What blocks of a tensor are merged with, (N,): coefficients, or magnitudes to trim at."""
        fact = self._facts[name].result() if name in self._facts else None
        if "features" in self._traits:
            return self.shares(name)  # a draft, whose layers are solved later
        if "coefficients" not in self._traits:
            return fact
        return self._method(Facts(self._weights[name], fact), **self._parameters[name])

    def _merged_matrix(
        self, info: TensorInfo, tasks: np.ndarray, base: np.ndarray, shape: tuple[int, int]
    ) -> tuple[np.ndarray, bool]:
        """The merged task vector (n,), and whether it is 0 for no other reason than that rounding is left out."""
        from .matrices import merge_matrices
        from .rounding import rounding_noise

        weights, noise = self._weights[info.name], None
        if "noise" in self._traits:
            files = self._used(self._all, info.name)
            dtypes = [file.source.tensors[info.name].dtype for file in files]
            noise = weights * rounding_noise(tasks, base, shape, dtypes)
        weighted = tasks * weights.astype(tasks.dtype)[:, None]
        merge = partial(merge_matrices, weighted, shape, self.device, self._method, self._parameters[info.name])
        merged = merge(noise)
        return merged, noise is not None and not merged.any() and bool(merge(None).any())

    def _merged_block(self, info: TensorInfo, block: Piece, tasks: np.ndarray, known: np.ndarray | None) -> np.ndarray:
        """The merged task vector (n,) of a block; what is no matrix takes the mean from methods on matrices."""
        if "matrices" in self._traits:
            return self.shares(info.name).astype(tasks.dtype) @ tasks
        if "coefficients" in self._traits:
            return known.astype(tasks.dtype) @ tasks
        weights = self._weights[info.name].astype(tasks.dtype)
        stream = self._stream(block) if "random" in self._traits else None
        return self._method(Block(tasks, weights, known, stream), **self._parameters[info.name])

    def _stream(self, piece: Piece) -> np.random.Generator:
        key = hashlib.sha256(f"{self._recipe.seed}:{piece.start}:{piece.name}".encode()).digest()
        return np.random.Generator(np.random.SFC64(int.from_bytes(key, "little")))

    def _matrix_shape(self, name: str) -> tuple[int, int] | None:
        from .matrices import matrix_shape

        return matrix_shape(self._infos[name].shape)

    def _mean(self, info: TensorInfo, piece: Piece) -> Part:
        means = _doubles(self._parents(info.name), piece)  # (N, C)
        # not by differences, which can overflow where the mean does not
        merged = np.where((means == means[0]).all(0), means[0], self.shares(info.name) @ means)
        return Part(self._encode(info, merged))

    def _variance(self, info: TensorInfo, piece: Piece) -> Part:
        files = self._parents(info.name)
        variances = _doubles(files, piece)  # (N, C)
        for file, row in zip(files, variances, strict=True):
            require_variances(file.source, info.name, row)
        filters = None
        weight = self.pairs.get(info.name.rpartition(".")[0])
        if weight is not None:
            held = self._infos[weight]
            filters = _doubles(self._used(self._files, info.name), Piece(weight, 0, held.numel))
            filters = filters.reshape(len(variances), held.shape[0], -1)  # (N, C, S)
        return Part(self._encode(info, merged_variance(filters, variances, self.shares(info.name))))

    def _head(self, info: TensorInfo, piece: Piece) -> Part:
        width = info.numel // info.shape[0]
        step = max(1, BLOCK // max(width, 1))  # rows read at a time
        total = np.zeros((len(self._union.classes), width))  # (K, width)
        shares = _class_shares(self._union.places, self._given[info.name], len(total))  # (all checkpoints, K)
        files = self._reading[1:] if self._base else self._reading
        for file, places, share in zip(files, map(np.array, self._union.places), shares, strict=True):
            for start in range(0, len(places), step) if share.any() else ():
                own = places[start : start + step]
                rows, _ = read_rows([file], Piece(info.name, start * width, (start + len(own)) * width))
                total[own] += share[own, None] * rows.reshape(len(own), width)
        return Part(self._encode(info, total.reshape(-1)))

    def _first(self, info: TensorInfo, piece: Piece) -> Part:
        rows, _ = read_rows(self._files[:1], piece)
        return Part(self._encode(info, rows[0]))

    def _largest(self, info: TensorInfo, piece: Piece) -> Part:
        files = self._parents(info.name)
        if info.is_float:  # as some leave counters that cast all they have
            return Part(self._encode(info, read_rows(files, piece)[0].max(0)))
        return Part(np.maximum.reduce([file.array(info.name) for file in files]).reshape(-1).view(np.uint8))

    def _equal(self, info: TensorInfo, piece: Piece) -> Part:
        files = self._parents(info.name)
        first = files[0].raw(info.name, piece.start, piece.stop)
        for file in files[1:]:
            if not np.array_equal(first, file.raw(info.name, piece.start, piece.stop)):
                raise DmmError(
                    f"{info.dtype} tensor {printable(info.name)} differs between "
                    f"{files[0].source.path} and {file.source.path}",
                    hint="float8 is not merged: convert the checkpoints to bfloat16 first"
                    if info.dtype in FLOAT8
                    else "integer and boolean tensors have no mean; they must be equal",
                )
        return Part(first)


def _class_shares(places: Sequence[Sequence[int]], weights: np.ndarray, count: int) -> np.ndarray:
    """The share (N, K) of every checkpoint in each of ``count`` classes, of those that know it.

    One of weight 0 is heard about what nobody else knows: the row must come from somewhere.
    """
    known = np.zeros((len(weights), count))
    for row, own in zip(known, places, strict=True):
        row[list(own)] = 1.0
    shares = known * weights[:, None]
    unheard = ~shares.any(0)
    shares[:, unheard] = known[:, unheard]
    return shares / shares.sum(0)


def _doubles(files: Sequence[Checkpoint], piece: Piece) -> np.ndarray:
    return read_rows(files, piece)[0].astype(np.float64)


def _blocks(piece: Piece) -> Iterator[tuple[Piece, slice]]:
    """The blocks of a piece, and where each lies in it."""
    for block in split(piece, BLOCK):
        yield block, slice(block.start - piece.start, block.stop - piece.start)


def _blend(rows: np.ndarray, coefficients: np.ndarray, *, out: np.ndarray) -> np.ndarray:
    """Fill ``out`` (n,) with ``sum_i c_i rows_i``; overwrites all rows but the first.

    A mean is computed as the first row and weighted differences from it, so that equal rows come back bit for bit.
    Where the coefficients have another sum, as of slerp and karcher, which lengthen the chord, a long first row would
    drown the others.
    """
    first, others = rows[0], rows[1:]
    if not len(others):  # as it is, to the sign of its zeros
        return np.multiply(first, rows.dtype.type(coefficients[0]), out=out)
    if abs(float(coefficients.sum()) - 1.0) >= 1e-12:
        return np.matmul(coefficients.astype(rows.dtype), rows, out=out)
    np.subtract(others, first, out=others)
    weights = coefficients[1:].astype(rows.dtype)
    if len(others) == 1:
        np.multiply(others[0], weights[0], out=out)  # BLAS leaves a single row to a slow loop
    else:
        np.matmul(weights, others, out=out)
    out += first
    return out
