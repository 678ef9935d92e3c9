"""The memory of a run: which stage was done with which inputs, so that it can be skipped.

``run.json`` maps each stage to a key, the SHA-256 of its inputs and parameters, and to the SHA-256 of
every file it wrote. A stage is up to date when its key is the same and its files still are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..files import write_text
from ..inputs import file_digest, read_record, read_text

STATE = "run.json"


class Stages:
    """Runs stages in one directory, or skips them.

    Args:
        on_event: told the stage and whether it is skipped.
    """

    def __init__(self, directory: Path, on_event: Callable[[str, bool], None]) -> None:
        self._directory, self._on_event = directory, on_event
        path = directory / STATE
        self._done: dict[str, Any] = read_record(read_text(path), str(path)) if path.exists() else {}

    def run(self, stage: str, inputs: Mapping[str, Any], outputs: Sequence[Path], work: Callable[[], None]) -> None:
        """Do the work unless these inputs already gave these outputs (files, or directories of files)."""
        import hashlib

        key = hashlib.sha256(json.dumps([__version__, stage, inputs], sort_keys=True).encode()).hexdigest()
        entry = self._done.get(stage, {})
        fresh = entry.get("key") == key and entry.get("outputs") == self._hashes(outputs)
        self._on_event(stage, fresh)
        if fresh:
            return
        work()
        self._done[stage] = {"key": key, "outputs": self._hashes(outputs)}
        write_text(self._directory / STATE, json.dumps(self._done, indent=2) + "\n", force=True)

    def _hashes(self, outputs: Sequence[Path]) -> dict[str, str | None]:
        files = [file for path in outputs for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
        return {str(file.relative_to(self._directory)): file_hash(file) for file in files}


def file_hash(path: Path) -> str | None:
    """SHA-256 of a file, None when it is not there."""
    return file_digest(path) if path.is_file() else None
