"""The record of what is in a checkpoint, which ``inspect`` tells and no stage reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .serialization import Record


@dataclass(frozen=True)
class ArchitectureGuess(Record):
    """The module a checkpoint belongs to, None where unknown, and what points to it."""

    spec: str | None
    evidence: str


@dataclass(frozen=True)
class TensorRecord(Record):
    """One tensor as the header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Inspection(Record):
    """What is in one checkpoint.

    Attributes:
        parameters: float values outside the running statistics; none in pseudo-data and statistics.
        kinds: last part of the tensor name to (tensors, values).
        norm_layers: layers with running statistics.
        provenance: the ``dmm.*`` metadata as stored.
        inputs: of a model of several inputs what ``dmm.input`` states of each, by name.
        tensors: all, by name; empty where they were not asked for.
        warnings: what metadata state and cannot be read.
    """

    SCHEMA: ClassVar[str] = "dmm.inspection/1"

    label: str
    path: str
    sha256: str
    bytes: int
    parameters: int
    architecture: ArchitectureGuess
    kinds: dict[str, tuple[int, ...]]
    dtypes: dict[str, int]
    norm_layers: int
    classes: tuple[str, ...]
    provenance: dict[str, str]
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: tuple[TensorRecord, ...] = ()
    warnings: tuple[str, ...] = ()
