"""The metadata every written file carries: who made it, from what, how."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..inputs import Source
from ..metadata import class_counts

if TYPE_CHECKING:
    from ..manifest import SourceRecord
    from ..merging.heads import Union

PENDING = "0" * 64
CARRIED = ("dmm.arch", "dmm.widths", "dmm.input", "dmm.classes")  # of our own metadata, what holds for a child too


def records(
    sources: Sequence[Source], weights: Sequence[float] = (), *, hashed: bool = True
) -> tuple[SourceRecord, ...]:
    """One record per source; without weights each has weight 1. Not hashed, zeros stand where hashes will."""

    from ..manifest import SourceRecord

    shares = weights or (1.0,) * len(sources)
    return tuple(
        SourceRecord(source.label, str(source.path), source.sha256 if hashed else PENDING, share)
        for source, share in zip(sources, shares, strict=True)
    )


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


def inherited(
    parents: Sequence[Source],
    union: Union | None = None,
    weights: Sequence[float] = (),
    taught_by: Sequence[Source] | None = None,
) -> dict[str, str]:
    """What a child takes from its parents: what they agree on, and the sum of their class counts.

    Args:
        union: how their classes go together where the lists differ.
        weights: of the parents; one of 0 counts where nobody else knows a class. Empty where all count.
        taught_by: whose class counts add up in the parents' place: a student has learned what its teachers saw.
    """
    metadata = {}
    foreign = [key for key in parents[0].metadata if key != "format" and not key.startswith("dmm.")]
    for key in (*CARRIED, *foreign):
        values = {_of_union(key, parent.metadata.get(key), union) for parent in parents}
        if len(values) == 1 and None not in values:
            metadata[key] = values.pop()
    counts = list(map(class_counts, taught_by or parents))
    if all(counts):
        metadata["dmm.class_counts"] = json.dumps(_summed(counts, union, weights or [1.0] * len(counts)))
    return metadata


def _of_union(key: str, text: str | None, union: Union | None) -> str | None:
    """A parent's metadata as it holds for a model of all classes."""
    if union is None or text is None:
        return text
    if key == "dmm.classes":
        return json.dumps(list(union.classes))
    return re.sub(r"num_classes=\d+", f"num_classes={len(union.classes)}", text)


def _summed(counts: list[list[float]], union: Union | None, weights: Sequence[float]) -> list[float]:
    size = len(union.classes) if union else min(map(len, counts))
    places = union.places if union else [range(size)] * len(counts)
    heard = {place for own, weight in zip(places, weights, strict=True) if weight for place in own}
    total = [0] * size
    for own, known, weight in zip(counts, places, weights, strict=True):
        for count, place in zip(own, known, strict=False):
            total[place] += count if weight or place not in heard else 0
    return total
