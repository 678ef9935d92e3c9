"""A merge from open files to written ones: passes, threads, shards, norms.

Legend: N checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..checkpoint import Checkpoint, replace_metadata, write_checkpoint
from ..devices import cores
from ..digest import Hashes
from ..files import Outputs, atomic_write, check_output, remove, together
from ..header import Layout, file_order
from ..inputs import Source
from ..ranks import Ranks
from ..shards import index_path, index_text, plan_shards
from ..streaming import Piece, Until, in_order, one_blas_thread
from .recipe import Recipe, check
from .tensors import Part, Tensors

LAG = 4  # tensors that are worked on between two rounds of one, so that nobody waits for the end of a round
MATRIX_THREADS = 4  # each holds the matrices of all checkpoints

Progress = Callable[..., None]


@dataclass(frozen=True)
class Outcome:
    """What a merge found out.

    Attributes:
        path: the file, or where the index of the shards belongs.
        index: the text of that index, to be written now that every process has its shards; None for one file.
        paired, unpaired: normalisation layers whose filters are known, or not.
        lengths: of every matrix or kernel in file order, its norm over the weighted mean of the parents' norms.
        drowned: those that stay as in the base, since their tasks are no larger than rounding.
    """

    path: Path
    index: str | None
    paired: int
    unpaired: int
    lengths: dict[str, float]
    drowned: tuple[str, ...] = ()


def merge(
    sources: Sequence[Source],
    output: Path,
    recipe: Recipe,
    metadata: Mapping[str, str],
    *,
    final_metadata: Callable[[], Mapping[str, str]] | None = None,
    hashes: Hashes | None = None,
    max_shard: int | None = None,
    ranks: Ranks = Ranks(),
    inputs: Sequence[Path] = (),
    force: bool = False,
    outputs: Outputs | None = None,
    on_progress: Progress | None = None,
) -> Outcome:
    """Merge checkpoints into one file, or into shards; the index is the caller's to write.

    Every tensor keeps the dtype it has in the first checkpoint unless the recipe names another. The rules
    for buffers are told in ``tensors``.

    Args:
        metadata: of the output; ``final_metadata``, of the same length, replaces it when everything is merged.
        hashes: of the sources, taken from the reads that merge them where that can be.
        max_shard: bytes of tensors in one file.
        ranks: this process and those beside it; each writes its part of the files.
        outputs: others that the files take their places with, whose block has to be left before the index is written.

    Raises:
        DmmError: see ``recipe.check``; a value is NaN or infinite, or becomes so; a running variance is
            negative; integer tensors differ; the output is refused.
    """
    check(sources, recipe)
    files = [Checkpoint(source) for source in sources]
    base = Checkpoint(recipe.base) if recipe.base else None
    tensors = Tensors(files, base, recipe)
    shards = plan_shards(tensors.layout(), output, max_shard)
    index = index_path(output) if len(shards) > 1 else None
    for path in [*shards, *([index] if index else [])]:
        check_output(path, inputs=inputs, force=force)
    mine = dict(ranks.deal(list(shards.items())))
    work = _Work(tensors, mine, hashes, on_progress)
    ranks.wait()  # a file that another process has just written must not look like one that was there
    parents = [*files, *([base] if base else [])]
    with one_blas_thread(), nullcontext(outputs) if outputs else together() as placed:
        if index:  # one that stood there would tell of a mixture, were the process killed in between; without force
            # there is none, unless another merge has come first: then no shard takes its place
            placed.before(partial(remove if force else check_output, index))
        _write(mine, parents, work, metadata, final_metadata, placed, force)
    measured = {name: ratio for part in ranks.gather(work.lengths()) for name, ratio in part.items()}
    order = (name for layout in shards.values() for name in file_order(layout))
    lengths = {name: measured[name] for name in order if name in measured}
    told = {name for part in ranks.gather(work.drowned) for name in part}
    drowned = tuple(name for name in lengths if name in told)
    found = sum(weight is not None for weight in tensors.pairs.values())
    text = index_text(shards) if index else None
    return Outcome(index or output, text, found, len(tensors.pairs) - found, lengths, drowned)


def _write(
    shards: Mapping[Path, Layout],
    inputs: Sequence[Checkpoint],
    work: _Work,
    metadata: Mapping[str, str],
    final_metadata: Callable[[], Mapping[str, str]] | None,
    outputs: Outputs,
    force: bool,
) -> None:
    """Write all shards; none is among the outputs before all are complete, and the inputs checked for changes."""
    with ExitStack() as stack:
        files = {path: stack.enter_context(atomic_write(path, force=force, outputs=outputs)) for path in shards}
        for checkpoint in inputs:
            stack.enter_context(checkpoint)
        stack.enter_context(work.running())
        for path, file in files.items():
            write_checkpoint(file, shards[path], work.chunks, metadata)
            file.flush()
        if final_metadata is not None:
            for file in files.values():
                os.fsync(file.fileno())  # the disk works while hashes are waited for
            final = final_metadata()
            for path, file in files.items():
                replace_metadata(file, shards[path], metadata, final)


class _Job(NamedTuple):
    """A piece to merge, or to measure in a round."""

    piece: Piece
    round: int | None = None


class _Work:
    """Measures and merges the pieces of all tensors, ahead of the writer.

    Attributes:
        drowned: tensors that stay as in the base, see ``Outcome``.
    """

    def __init__(
        self, tensors: Tensors, shards: Mapping[Path, Layout], hashes: Hashes | None, on_progress: Progress | None
    ) -> None:
        self._tensors, self._hashes, self._on_progress = tensors, hashes, on_progress
        self.names = [name for layout in shards.values() for name in file_order(layout)]
        self._pieces = {name: list(tensors.pieces(name)) for name in self.names}
        self._total = sum(len(pieces) for pieces in self._pieces.values())
        self._shapes = {name: shape for layout in shards.values() for name, (_, shape) in layout.items()}
        self._rounds = dict.fromkeys(self.names, 0)  # ended so far
        self._done = 0
        if hashes:
            tensors.feed(hashes, self.names)
        self._merged: dict[str, float] = {}
        self._parents: dict[str, np.ndarray] = {}
        self.drowned: list[str] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Work on the jobs, in threads that end with the block."""
        threads = min(cores(), MATRIX_THREADS) if self._tensors.on_matrices else cores()
        with in_order(self._do, self._jobs(), threads) as self._results:
            yield

    def _jobs(self) -> Iterator[_Job | Until]:
        """Every tensor is measured in rounds, then merged; while the results of one come in, others go on.

        Tensors are first read in file order, and merged in it.
        """
        last = max(map(self._tensors.rounds, self.names), default=0)
        for slot in range(len(self.names) + last * LAG):
            for stage in range(last + 1):
                place = slot - stage * LAG
                if 0 <= place < len(self.names):
                    yield from self._stage(self.names[place], stage, last)

    def _stage(self, name: str, stage: int, last: int) -> Iterator[_Job | Until]:
        rounds = self._tensors.rounds(name)
        if stage == last:
            yield Until(lambda: self._rounds[name] == rounds)
            yield from (_Job(piece) for piece in self._pieces[name])
        elif stage < rounds:
            yield Until(lambda: self._rounds[name] == stage)
            yield from (_Job(piece, stage) for piece in self._tensors.blocks(name))
        elif stage == 0:
            yield _Job(Piece(name, 0, 0), stage)

    def _do(self, job: _Job) -> tuple[_Job, Part | np.ndarray | None]:
        try:
            if job.round is None:
                return job, self._tensors.merge(job.piece)
            if self._tensors.rounds(job.piece.name):
                return job, self._tensors.measure(job.piece, job.round)
            self._tensors.pass_over(job.piece.name)
            return job, None
        except BaseException:
            if self._hashes:
                self._hashes.stop()  # other threads wait there for what this one will not read
            raise

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """The merged bytes of one tensor; to be called in file order, while ``running``."""
        left = len(self._pieces[name])
        while left:
            job, result = next(self._results)
            if job.round is None:
                left -= 1
                self._measure(name, result)
                yield result.data
                self._done += 1
                if self._on_progress:
                    self._on_progress("merge", self._done, self._total)
            elif result is not None:
                self._rounds[job.piece.name] += self._tensors.add(job.piece, result)

    def _measure(self, name: str, part: Part) -> None:
        if part.parents is not None and len(self._shapes[name]) > 1:
            self._merged[name] = self._merged.get(name, 0.0) + part.merged
            self._parents[name] = self._parents.get(name, 0.0) + part.parents
        if part.drowned:
            self.drowned.append(name)

    def lengths(self) -> dict[str, float]:
        """Merged norm over the weighted mean of the parents' norms, 1 where all are zero."""
        ratios = {}
        for name, squared in self._merged.items():
            parents = float(self._tensors.shares(name) @ np.sqrt(self._parents[name]))
            ratios[name] = float(np.sqrt(squared)) / parents if parents else 1.0 if squared == 0 else float("inf")
        return ratios
