"""What tells a pseudo-data file from other files, by its header. Loads no array library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from ..errors import DmmError, printable
from ..inputs import Source

KIND = "dmm.pseudo-data/1"
REQUIRED = ("targets", "teacher_id", "logits", "confidence")


def require_pseudo_data(source: Source) -> None:
    """Raise DmmError for a file of another kind, or one that lacks an array; of its inputs not every one is known."""
    if source.metadata.get("dmm.kind") != KIND:
        raise DmmError(
            f"not a pseudo-data file: {source.path}",
            evidence=[f"its metadata says {printable(source.metadata.get('dmm.kind', 'nothing about its kind'))}"],
            hint="make one with: dmm synthesize CKPT... -o pseudo.safetensors",
        )
    require_arrays(source, (*REQUIRED, "bn_loss"))


def require_arrays(source: Source, names: tuple[str, ...]) -> None:
    """Raise DmmError for a pseudo-data file that lacks an array."""
    missing = [name for name in names if name not in source.tensors]
    if missing:
        raise DmmError(
            f"pseudo-data file {source.path} is incomplete", evidence=[f"missing {printable(name)}" for name in missing]
        )


def require_made_from(data: Source, teachers: Sequence[Source]) -> None:
    """Raise DmmError for a checkpoint that nothing was made from, in the words of whoever reads the images.

    Metadata that do not tell of teachers are left to them too.
    """
    try:
        told = [(str(item["label"]), str(item["sha256"])) for item in json.loads(data.metadata["dmm.teachers"])]
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    known = {digest for _, digest in told}
    for teacher in teachers:
        if teacher.sha256 not in known:
            raise nothing_of(teacher, told)


def nothing_of(teacher: Source, told: Iterable[tuple[str, str]]) -> DmmError:
    """The error of a checkpoint that is none of these, by label and SHA-256."""
    return DmmError(
        f"the pseudo-data hold nothing of teacher {teacher.path} (sha256 {teacher.sha256[:12]}...)",
        evidence=[f"it was made from {label} (sha256 {digest[:12]}...)" for label, digest in told],
        hint="name the teachers the pseudo-data were made from, or synthesize again",
    )
