"""The records stages hand to each other as JSON.

Once released, a record grows by addition only; fields a reader does not know are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .serialization import Record
from .serialization import dump as dump

Matrix = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class SourceRecord(Record):
    """One input checkpoint."""

    label: str
    path: str
    sha256: str | None = None
    weight: float | None = None


@dataclass(frozen=True)
class LayerSimilarity(Record):
    """One tensor: its N x N cosine matrix, the least similar pair's value, and its norm in each checkpoint."""

    name: str
    shape: tuple[int, ...]
    cosine: Matrix
    minimum: float | None
    norms: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class SimilarityReport(Record):
    """How similar N checkpoints are.

    Attributes:
        measures: measure name to its N x N matrix.
        on: "weights", or "task vectors" when there is a base.
        against: cosine of each checkpoint with a reference, by label, or None.
        raw_cosine: of the weights themselves.
        unrelated: what that would be at most, were the units of one checkpoint in random order.
    """

    SCHEMA: ClassVar[str] = "dmm.similarity/1"

    sources: tuple[SourceRecord, ...]
    measures: dict[str, Matrix]
    layers: tuple[LayerSimilarity, ...]
    on: str = "weights"
    base: SourceRecord | None = None
    reference: SourceRecord | None = None
    against: dict[str, float] | None = None
    raw_cosine: Matrix = ()
    unrelated: Matrix = ()

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(source.label for source in self.sources)


@dataclass(frozen=True)
class Group(Record):
    """Checkpoints to merge with one another: indices into the labels."""

    name: str
    members: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class PairReason(Record):
    """Why two checkpoints share a group, or do not."""

    a: int
    b: int
    together: bool
    similarity: float | None
    reason: str


@dataclass(frozen=True)
class Grouping(Record):
    """Groups of checkpoints, and those that stay alone.

    Attributes:
        divergent: indices of checkpoints in a group of their own while another group has several.
        threshold: cosine at which the tree was cut, or None.
        linkage: scipy's linkage matrix over 1 - cosine, empty where none was made.
    """

    SCHEMA: ClassVar[str] = "dmm.groups/1"

    labels: tuple[str, ...]
    groups: tuple[Group, ...]
    divergent: tuple[int, ...]
    pairs: tuple[PairReason, ...]
    rule: str
    threshold: float | None = None
    linkage: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class ClassRetention(Record):
    """The same of the images of one class; its name where the checkpoints name their classes, else its number."""

    name: str
    images: int
    before: float
    after: float


@dataclass(frozen=True)
class Retention(Record):
    """How far a model agrees with one teacher on that teacher's pseudo-data, in per cent.

    Attributes:
        before: of the teacher itself for a merge, of the student that was given for a distillation.
        classes: that there are images of.
    """

    label: str
    images: int
    before: float
    after: float
    classes: tuple[ClassRetention, ...] = ()


@dataclass(frozen=True)
class UnitGroup(Record):
    """Units of a network that may change places with one another.

    Attributes:
        name: a tensor they stand in, and its axis.
        blocks: how many heads, or groups of a convolution, they are divided into.
        moved: how many come from another place.
    """

    name: str
    units: int
    blocks: int
    moved: int


@dataclass(frozen=True)
class AlignedSource(Record):
    """What aligning one checkpoint did.

    Attributes:
        covered: share of the parameters that have an axis with units that may move.
        objective_before, objective_after: sum of products with the weights it was compared with.
        cosine_before, cosine_after: of the weights, with the reference's; heads and vectors left out.
        difference: of an output between the order before and after, over the largest output, in float64.
    """

    label: str
    groups: tuple[UnitGroup, ...]
    units: int
    moved: int
    covered: float
    objective_before: float
    objective_after: float
    cosine_before: float
    cosine_after: float
    difference: float


@dataclass(frozen=True)
class WidenedGroup(Record):
    """Units of two networks, some of them side by side.

    Attributes:
        name: a tensor they stand in, and its axis.
        units: of either network.
        apart: how many of them stay side by side in the merge, which has as many more.
        may_widen: whether that can be; if not, all are merged.
    """

    name: str
    units: int
    apart: int
    may_widen: bool


@dataclass(frozen=True)
class WidenedRecord(Record):
    """What a partial merge keeps side by side.

    Attributes:
        overlap: the share of units that was to be merged.
        parameters_before, parameters_after: float values outside the running statistics.
        difference: of an output of either network when it is made wide, over the largest output, in float64.
    """

    overlap: float
    groups: tuple[WidenedGroup, ...]
    parameters_before: int
    parameters_after: int
    difference: float


@dataclass(frozen=True)
class MergeManifest(Record):
    """What a merge did.

    Attributes:
        outputs: one path per group, in group order.
        batchnorm: layers whose variance came from the analytic rule ("paired") or from plain
            interpolation of standard deviations ("unpaired").
        norms: per group, of every matrix or kernel: its norm over the weighted mean of the parents' norms.
        recalibrated: group name to what was set right on pseudo-data, in words.
        retained: group name to what its merge still recognises of its members' pseudo-images.
        aligned: checkpoints whose units were put in another order before.
        widened: which units were kept side by side.
    """

    SCHEMA: ClassVar[str] = "dmm.merge/1"

    sources: tuple[SourceRecord, ...]
    grouping: Grouping
    method: str
    parameters: dict[str, Any]
    outputs: tuple[str, ...]
    base: SourceRecord | None = None
    batchnorm: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    norms: tuple[dict[str, float], ...] = ()
    recalibrated: dict[str, str] = field(default_factory=dict)
    aligned: tuple[AlignedSource, ...] = ()
    retained: dict[str, tuple[Retention, ...]] = field(default_factory=dict)
    widened: WidenedRecord | None = None


@dataclass(frozen=True)
class AlignManifest(Record):
    """What an alignment did: the first source is the reference, the others follow in the order they were aligned."""

    SCHEMA: ClassVar[str] = "dmm.align/1"

    sources: tuple[SourceRecord, ...]
    aligned: tuple[AlignedSource, ...]
    parameters: dict[str, Any]
    seconds: float
    outputs: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class History(Record):
    """Named curves over steps; every list is as long as ``step``."""

    step: tuple[int, ...]
    curves: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class RecordedLayer(Record):
    """Statistics in front of one normalisation layer: its kind, its channels, and the values seen of each."""

    name: str
    kind: str
    channels: int
    count: int


@dataclass(frozen=True)
class RecordedNetwork(Record):
    """Statistics of the data in one network, and their file.

    Attributes:
        class_counts: images per class of the network; empty where the data have no labels.
        unused: normalisation layers that the network holds but does not run.
        warnings: what was read in a way that may not be meant, and layers that are of no class that is known.
    """

    source: SourceRecord
    images: int
    class_counts: tuple[int, ...]
    layers: tuple[RecordedLayer, ...]
    unused: tuple[str, ...]
    output: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecordManifest(Record):
    """What a recording of statistics did.

    Attributes:
        owner: the checkpoint that was trained on the data, where it was named.
    """

    SCHEMA: ClassVar[str] = "dmm.record/2"

    networks: tuple[RecordedNetwork, ...]
    data: str
    device: str
    seconds: float
    owner: SourceRecord | None = None


@dataclass(frozen=True)
class TeacherReport(Record):
    """What synthesis drew from one teacher.

    Attributes:
        statistics: the file they were recorded in, or None where they are running statistics.
        elsewhere: files that tell of its data in the networks of other teachers.
    """

    label: str
    sha256: str
    prior: tuple[float, ...]
    prior_from: str
    accepted: int
    rejected: int
    confidence: float | None
    statistics: str | None = None
    elsewhere: tuple[str, ...] = ()


@dataclass(frozen=True)
class Steps(Record):
    """Optimiser steps of all batches or generators together: taken, and planned."""

    taken: int
    planned: int


@dataclass(frozen=True)
class SynthesisManifest(Record):
    """What a synthesis did.

    Attributes:
        student: that images were made against, or None.
        warnings: what was asked for and could not be done, and why.
    """

    SCHEMA: ClassVar[str] = "dmm.synthesis/1"

    sources: tuple[SourceRecord, ...]
    teachers: tuple[TeacherReport, ...]
    parameters: dict[str, Any]
    device: str
    seconds: float
    history: History
    output: str
    steps: Steps | None = None
    student: SourceRecord | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Start(Record):
    """A checkpoint that a student could start from, and the share of the targets it names, in per cent."""

    label: str
    retained: float


@dataclass(frozen=True)
class DistillManifest(Record):
    """What a distillation did.

    Attributes:
        student: the one it started from. starts: all that it could have.
    """

    SCHEMA: ClassVar[str] = "dmm.distill/1"

    student: SourceRecord
    starts: tuple[Start, ...]
    sources: tuple[SourceRecord, ...]
    data: SourceRecord
    parameters: dict[str, Any]
    device: str
    seconds: float
    retention: tuple[Retention, ...]
    history: History
    output: str


@dataclass(frozen=True)
class EvaluationRow(Record):
    """Accuracy of one model in per cent; recall per class, None where the class has no sample."""

    label: str
    accuracy: float
    recall: tuple[float | None, ...]


@dataclass(frozen=True)
class Evaluation(Record):
    """Accuracy of models on one labelled set."""

    SCHEMA: ClassVar[str] = "dmm.evaluation/1"

    data: str
    samples: int
    classes: tuple[str, ...]
    rows: tuple[EvaluationRow, ...]
