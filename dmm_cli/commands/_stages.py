"""The memory of a run: which stage was done with which inputs, so that it can be skipped.

``run.json`` maps each stage to a key, the SHA-256 of its inputs and parameters, and to the SHA-256 of
every file it wrote. A stage is up to date when its key is the same and its files still are. It also tells of which
checkpoints the run is, and does so before there is any other file: a run stopped in its first stage is known by it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import __version__
from ..errors import DmmError
from ..files import write_text
from ..imagefolder import files_below
from ..inputs import Source, file_digest, read_record, read_text

STATE = "run.json"
CHECKPOINTS = "checkpoints"  # in it, beside the stages


@dataclass(frozen=True)
class Layout:
    """Where a run keeps its files."""

    root: Path

    similarity = property(lambda self: self.root / "similarity.json")
    heat_map = property(lambda self: self.root / "similarity.svg")
    merged = property(lambda self: self.root / "merged")
    merge = property(lambda self: self.root / "merged" / "merge.json")
    everything = property(lambda self: self.root / "linear-merge-of-all.safetensors")
    pseudo = property(lambda self: self.root / "pseudo.safetensors")
    synthesis = property(lambda self: self.root / "synthesis.json")
    images = property(lambda self: self.root / "pseudo.png")
    model = property(lambda self: self.root / "model.safetensors")
    distillation = property(lambda self: self.root / "distill.json")
    evaluation = property(lambda self: self.root / "evaluation.json")
    report = property(lambda self: self.root / "report.html")

    def group(self, name: str) -> Path:
        """The merged checkpoint of a group."""
        return self.merged / f"{name}.safetensors"

    def written(self) -> list[Path]:
        """All that a run writes, and what stands in its directory of merges."""
        fixed = [getattr(self, name) for name, kind in vars(Layout).items() if isinstance(kind, property)]
        return [*fixed, *self.merged.glob("*")]


def checkpoints_of(directory: Path) -> list[str]:
    """Labels of the checkpoints that an earlier run in this directory was of; none if there was none.

    Raises:
        DmmError: what tells it is damaged.
    """
    try:
        labels = _state(directory).get(CHECKPOINTS)
    except DmmError as error:
        error.hint = "name another directory with -o, or do all its stages again with --force"
        raise
    return list(map(str, labels)) if isinstance(labels, list) else []


def _state(directory: Path) -> dict[str, Any]:
    path = directory / STATE
    return read_record(read_text(path), str(path)) if path.exists() else {}


def _readable_state(directory: Path) -> dict[str, Any]:
    try:
        return _state(directory)
    except DmmError:  # whose stages are done again
        return {}


class Stages:
    """Runs stages in one directory, which it makes and marks as a run's, or skips them.

    Where the first one fails and has written nothing, no mark is left, nor its directory if that was not there.

    Args:
        sources: the checkpoints that the run is of.
        on_event: told the stage and whether it is skipped.
    """

    def __init__(self, directory: Path, sources: Sequence[Source], on_event: Callable[[str, bool], None]) -> None:
        self._directory, self._on_event, self._is_new = directory, on_event, not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        earlier = _readable_state(directory)
        self._done = earlier | {CHECKPOINTS: [source.label for source in sources]}
        if self._done != earlier:
            self._save()

    def run(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[Path],
        work: Callable[[], None],
        outdates: Mapping[str, Sequence[Path]] = MappingProxyType({}),
    ) -> None:
        """Do the work unless these inputs already gave these outputs (files, or directories of files).

        Args:
            outdates: later stages that may not be asked for this time, with their files, which tell of what the work
                replaces; they are removed first.
        """
        import hashlib

        key = hashlib.sha256(json.dumps([__version__, stage, inputs], sort_keys=True).encode()).hexdigest()
        fresh = self._done.get(stage) == {"key": key, "outputs": self._hashes(outputs)}
        self._on_event(stage, fresh)
        if fresh:
            return
        for name, files in outdates.items():
            self._done.pop(name, None)
            for file in files:
                file.unlink(missing_ok=True)
        try:
            work()
        except DmmError:
            self._withdraw()
            raise
        self._done[stage] = {"key": key, "outputs": self._hashes(outputs)}
        self._save()

    def _withdraw(self) -> None:
        state = self._directory / STATE
        if [*self._directory.iterdir()] == [state]:
            state.unlink()
            if self._is_new:
                self._directory.rmdir()

    def _save(self) -> None:
        write_text(self._directory / STATE, json.dumps(self._done, indent=2) + "\n", force=True)

    def _hashes(self, outputs: Sequence[Path]) -> dict[str, str | None]:
        files = [file for path in outputs for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
        return {str(file.relative_to(self._directory)): file_hash(file) for file in files}


def file_hash(path: Path) -> str | None:
    """SHA-256 of a file, None when it is not there."""
    return file_digest(path) if path.is_file() else None


def data_hash(path: Path) -> str | None:
    """The same of labelled data; of an ImageFolder its classes, and name, size and time of every file."""
    if not path.is_dir():
        return file_hash(path)
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir())  # one may hold nothing
    return str((classes, [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files_below(path) if p.exists()]))
