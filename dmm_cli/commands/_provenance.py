"""The metadata every written file carries: who made it, from what, how."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..inputs import Source

if TYPE_CHECKING:
    from ..manifest import SourceRecord

CARRIED = ("dmm.arch", "dmm.input", "dmm.classes")  # kept when all parents agree


def records(sources: Sequence[Source], weights: Sequence[float] = ()) -> tuple[SourceRecord, ...]:
    """One record per source; without weights each has weight 1."""

    from ..manifest import SourceRecord

    shares = weights or (1.0,) * len(sources)
    return tuple(SourceRecord(s.label, str(s.path), s.sha256, w) for s, w in zip(sources, shares, strict=True))


def stamp(command: str, parameters: Mapping[str, Any], **facts: str) -> dict[str, str]:
    """Metadata of any output: version, command, parameters, and further ``dmm.*`` facts."""
    return {
        "format": "pt",
        "dmm.version": __version__,
        "dmm.command": command,
        "dmm.parameters": json.dumps(parameters, sort_keys=True),
        **{f"dmm.{name}": value for name, value in facts.items()},
    }


def lineage(parents: Sequence[SourceRecord]) -> str:
    """The parents of a checkpoint as JSON. Paths stay out, so that moving files changes no byte."""
    entries = [{"label": r.label, "sha256": r.sha256, "weight": r.weight} for r in parents]
    return json.dumps(entries, sort_keys=True)


def inherited(parents: Sequence[Source]) -> dict[str, str]:
    """What a child takes from its parents: what they agree on, and the sum of their class counts."""
    metadata = {}
    for key in CARRIED:
        values = {parent.metadata.get(key) for parent in parents}
        if len(values) == 1 and None not in values:
            metadata[key] = values.pop()
    counts = [parent.metadata.get("dmm.class_counts") for parent in parents]
    if all(counts):
        columns = zip(*map(json.loads, counts), strict=False)
        metadata["dmm.class_counts"] = json.dumps([sum(column) for column in columns])
    return metadata


def ancestors(source: Source) -> set[str]:
    """SHA-256 of the checkpoint and of the parents its metadata names."""
    named = json.loads(source.metadata.get("dmm.sources", "[]"))
    return {source.sha256, *(entry["sha256"] for entry in named)}
