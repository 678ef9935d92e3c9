"""Files of recorded statistics: whose they are, and what they say of themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..errors import DmmError, printable
from ..inputs import Source, read_record, resolve_source

if TYPE_CHECKING:
    from ..images import InputSpec

KIND = "dmm.statistics/1"


def describe(model: Source, spec: InputSpec, images: int, counts: Sequence[int]) -> dict[str, str]:
    """Metadata of a file of statistics, for ``stamp``: which model and input, how many images of which classes."""
    facts = {
        "kind": KIND,
        "model": json.dumps({"label": model.label, "sha256": model.sha256}, sort_keys=True),
        "input": json.dumps(asdict(spec), sort_keys=True),
        "images": str(images),
    }
    return {**facts, "class_counts": json.dumps(list(counts))} if counts else facts


def statistics_of(files: Sequence[str], teachers: Sequence[Source]) -> dict[str, Source]:
    """Files of recorded statistics by the SHA-256 of the teacher they belong to.

    Raises:
        DmmError: a file is of another kind or of no teacher, or two are of one.
    """
    found: dict[str, Source] = {}
    for path in files:
        source = resolve_source(path)
        label, sha256 = _model_of(source)
        if sha256 not in {teacher.sha256 for teacher in teachers}:
            raise DmmError(
                f"statistics {source.path} belong to none of the checkpoints",
                evidence=[
                    f"they are of {printable(label)} (sha256 {printable(sha256)[:12]}...)",
                    *(f"given: {teacher.path} (sha256 {teacher.sha256[:12]}...)" for teacher in teachers),
                ],
                hint="name the checkpoint they were recorded of, unchanged, or record them again with dmm record",
            )
        if sha256 in found:
            raise DmmError(f"two files hold statistics of one checkpoint: {found[sha256].path} and {source.path}")
        found[sha256] = source
    return found


def _model_of(source: Source) -> tuple[str, str]:
    if source.metadata.get("dmm.kind") != KIND:
        raise DmmError(
            f"not a file of recorded statistics: {source.path}",
            evidence=[f"its metadata says {printable(source.metadata.get('dmm.kind', 'nothing about its kind'))}"],
            hint="make one with: dmm record MODEL --data DATA -o stats.safetensors",
        )
    model = read_record(source.metadata.get("dmm.model", "{}"), f"dmm.model of {source.path}")
    return str(model.get("label")), str(model.get("sha256"))


def require_input(statistics: Source, spec: InputSpec) -> None:
    """Raise DmmError unless images were prepared for the recording as the teacher takes them now."""
    given = read_record(statistics.metadata.get("dmm.input", "{}"), f"dmm.input of {statistics.path}")
    if given != json.loads(json.dumps(asdict(spec))):
        flags = (("--input-size", "size"), ("--mean", "mean"), ("--std", "std"))
        wanted = [f"{flag} {str(given.get(key)).strip('[]').replace(' ', '')}" for flag, key in flags]
        raise DmmError(
            f"statistics {statistics.path} were recorded with another input",
            evidence=[f"the model's is size {spec.size}, mean {spec.mean}, std {spec.std}"],
            hint=f"use the recorded one: {' '.join(wanted)}",
        )
