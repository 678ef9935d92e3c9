"""Files of recorded statistics: whose they are, and what they say of themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DmmError, printable
from ..inputs import Source, read_record, resolve_sources
from ..metadata import class_counts

if TYPE_CHECKING:
    from ..spaces import Spec

KIND = "dmm.statistics/1"
AGAIN = "record them again with dmm record"
Pair = tuple[str, str]  # SHA-256 of the checkpoint whose data it is, and of the one whose network saw them


def describe(model: Source, owner: Source | None, spec: Spec, images: int, counts: Sequence[int]) -> dict[str, str]:
    """Metadata of a file of statistics, for ``stamp``: whose, which input, how many images of which classes."""
    from ..spaces import recorded

    facts = {
        "kind": KIND,
        "model": _named(model),
        **({"owner": _named(owner)} if owner else {}),
        "input": json.dumps(recorded(spec), sort_keys=True),
        "images": str(images),
    }
    return {**facts, "class_counts": json.dumps(list(counts))} if counts else facts


def _named(source: Source) -> str:
    return json.dumps({"label": source.label, "sha256": source.sha256}, sort_keys=True)


def statistics_of(files: Sequence[str], teachers: Sequence[Source]) -> dict[Pair, Source]:
    """Files of recorded statistics by whose data they are of, and in whose network.

    Args:
        files: paths, globs, lists, as those of checkpoints.

    Raises:
        DmmError: a file is of another kind or of no teacher, or two are of one.
    """
    found: dict[Pair, Source] = {}
    given = {source.path.resolve(): source for source in resolve_sources(files)} if files else {}
    for source in given.values():
        model, owner = _told(source)
        for label, sha256 in (model, owner):
            _require_teacher(source, label, sha256, teachers)
        pair = owner[1], model[1]
        if pair in found:
            raise DmmError(
                f"two files hold statistics of one checkpoint: {found[pair].path} and {source.path}",
                hint="leave one of them out, or record all the data in one call",
            )
        found[pair] = source
    return found


def recorded_counts(recorded: Mapping[Pair, Source], owner: Source) -> tuple[Path, list[float]] | None:
    """A file that tells the images of every class in the data that a checkpoint was trained on, and what it tells.

    Raises:
        DmmError: two files tell other numbers.
    """
    mine = [source for (sha256, _), source in recorded.items() if sha256 == owner.sha256]
    told = [(source.path, counts) for source in mine if (counts := class_counts(source))]
    for path, counts in told:
        if counts != told[0][1]:
            raise DmmError(
                f"statistics {told[0][0]} and {path} tell other class counts of the data of {owner.label}",
                hint=f"{AGAIN}, of the same data",
            )
    return told[0] if told else None


def _require_teacher(source: Source, label: str, sha256: str, teachers: Sequence[Source]) -> None:
    if sha256 not in {teacher.sha256 for teacher in teachers}:
        raise DmmError(
            f"statistics {source.path} belong to none of the checkpoints",
            evidence=[
                f"they are of {printable(label)} (sha256 {printable(sha256)[:12]}...)",
                *(f"given: {teacher.path} (sha256 {teacher.sha256[:12]}...)" for teacher in teachers),
            ],
            hint="name the checkpoint they were recorded of, unchanged, or record them again with dmm record",
        )


def _told(source: Source) -> tuple[tuple[str, str], tuple[str, str]]:
    """Label and SHA-256 of the network that saw the data, and of the one that was trained on them."""
    if source.metadata.get("dmm.kind") != KIND:
        raise DmmError(
            f"not a file of recorded statistics: {source.path}",
            evidence=[f"its metadata says {printable(source.metadata.get('dmm.kind', 'nothing about its kind'))}"],
            hint="make one with: dmm record MODEL --data DATA -o stats.safetensors",
        )
    model = _whose(source, "dmm.model")
    return model, _whose(source, "dmm.owner") if "dmm.owner" in source.metadata else model


def _whose(source: Source, key: str) -> tuple[str, str]:
    """Label and SHA-256 of a checkpoint that the metadata name."""
    of = read_record(source.metadata.get(key, "{}"), f"{key} of {source.path}")
    if not all(isinstance(of.get(part), str) for part in ("label", "sha256")):
        raise DmmError(f"{key} of {source.path} does not name a checkpoint by label and sha256", hint=AGAIN)
    return of["label"], of["sha256"]


def require_input(statistics: Source, spec: Spec) -> None:
    """Raise DmmError unless images were prepared for the recording as the teacher takes them now."""
    from ..spaces import in_words, parsed

    if "dmm.input" not in statistics.metadata:
        raise DmmError(f"statistics {statistics.path} do not tell which input they are of (dmm.input)", hint=AGAIN)
    given = read_record(statistics.metadata["dmm.input"], f"dmm.input of {statistics.path}")
    try:
        same = parsed(given) == spec
    except (ValueError, KeyError, TypeError, AttributeError):  # it is damaged
        same = False
    if not same:
        flags = (("--input-size", "size"), ("--mean", "mean"), ("--std", "std"))
        wanted = [f"{flag} {str(given[key]).strip('[]').replace(' ', '')}" for flag, key in flags if key in given]
        raise DmmError(
            f"statistics {statistics.path} were recorded with another input",
            evidence=[f"the model's is {in_words(spec)}"],
            hint=f"use the recorded one: {' '.join(wanted)}" if len(wanted) == len(flags) else AGAIN,
        )
