"""SHA-256 of files that were hashed before, kept in the user's cache directory.

Hashing large checkpoints costs more than merging them, and the same ones are merged again and again. A hash
is believed as long as the file looks as it did when it was hashed, the time of its last change included, which
no program can set; git goes by the same. Nothing here ever fails: what is not remembered is hashed again.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from .header import Fingerprint, fingerprint

ENTRIES = 1024  # files remembered
SETTLED = 2.0  # seconds since the last change: two changes within one tick of the clock look like one


def recall(files: Mapping[Path, Fingerprint]) -> dict[Path, str]:
    """The SHA-256 of those files that looked the same when they were hashed."""
    known = _load()
    entries = {path: known.get(str(path.resolve())) for path in files}
    return {path: entry[-1] for path, entry in entries.items() if entry and entry[:-1] == list(files[path])}


def remember(digests: Mapping[Path, tuple[Fingerprint, str]]) -> None:
    """Keep the hashes of files that looked like this before they were read.

    Files that look different now, or were changed a moment ago, are left out.
    """
    with suppress(OSError):
        known = _load()
        for path, (before, digest) in digests.items():
            if fingerprint(path.stat()) == before and time.time() - before[-1] / 1e9 > SETTLED:
                known.pop(str(path.resolve()), None)  # the newest go last
                known[str(path.resolve())] = [*before, digest]
        _store(dict(list(known.items())[-ENTRIES:]))


def _file() -> Path:
    named = os.environ.get("XDG_CACHE_HOME", "")
    cache = named if os.path.isabs(named) else os.path.expanduser("~/.cache")  # the XDG specification says so
    if not os.path.isabs(cache):
        raise FileNotFoundError("no home directory")
    return Path(cache) / "dmm" / "sha256.json"


def _load() -> dict[str, list]:
    try:
        entries = json.loads(_file().read_text())
        return {path: entry for path, entry in entries.items() if _is_entry(entry)}
    except (OSError, ValueError, AttributeError, RecursionError):  # not there, or not ours
        return {}


def _is_entry(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 6 and re.fullmatch("[0-9a-f]{64}", str(entry[-1])) is not None


def _store(entries: Mapping[str, list]) -> None:
    """Replace the file; of two processes that do so at once, one is forgotten."""
    path = _file()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(entries))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
