"""Write aligned checkpoints, and put them in the place of those that are to be merged."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DmmError, listed, printable
from ..files import together
from ..inputs import Source, resolve_source
from ..merging.method import require_share
from ..registry import mistyped
from ._provenance import inherited, lineage, records, stamp

if TYPE_CHECKING:
    from ..alignment.align import Alignment
    from ..alignment.widen import Widening
    from ..manifest import AlignedSource, Group, WidenedRecord

RESTARTS = 2
POLICIES = {
    "auto": "those of different starts, unless there is a base",
    "never": "none",
    "always": "every checkpoint to the first",
}


@dataclass(frozen=True)
class Aligning:
    """Which checkpoints of a merge to align, and how.

    Attributes:
        policy: from ``POLICIES``.
        arch: of their module, None where the files tell.
        overlap: share of the units of two checkpoints that is merged; the others stay side by side.
    """

    policy: str = "never"
    arch: str | None = None
    seed: int = 0
    overlap: float = 1.0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise mistyped(f"unknown align policy: {printable(self.policy)}", self.policy, POLICIES)

    @property
    def widens(self) -> bool:
        """Whether the merge gets more units than its parents have."""
        return self.overlap < 1.0

    def check(self, count: int, has_base: bool) -> None:
        """Refuse what contradicts itself, for so many checkpoints.

        Raises:
            DmmError: all of one start are to be aligned, or the units of others than two of different starts are to
                stay side by side.
        """
        if has_base and self.policy == "always":
            raise DmmError(
                "checkpoints with a common start have their units in one order",
                hint="leave out --base or --align always",
            )
        require_share("--overlap", self.overlap)
        if not self.widens:
            return
        hint = "leave out --overlap"
        if count != 2:
            raise DmmError(f"--overlap merges two checkpoints, not {count}", hint=f"{hint}, or merge two at a time")
        if has_base:
            raise DmmError("--overlap is for checkpoints of different starts, and --base names a common one", hint=hint)
        if self.policy == "never":
            raise DmmError("--overlap needs the units of both checkpoints in one order", hint="leave out --align never")


@dataclass(frozen=True)
class Ordered:
    """Checkpoints with their units in order.

    Attributes:
        sources: all of them; aligned ones keep label, path and hash of what they were made from.
        aligned: what aligning did.
        warnings: what could not be aligned, and why.
        widened: what was done to keep units side by side.
    """

    sources: Sequence[Source]
    aligned: tuple[AlignedSource, ...] = ()
    warnings: tuple[str, ...] = ()
    widened: WidenedRecord | None = None


@contextmanager
def aligned_copies(
    sources: Sequence[Source],
    groups: Sequence[Group],
    settings: Aligning,
    directory: Path,
    on_progress: Callable[..., None] | None,
) -> Iterator[Ordered]:
    """Align what the policy says, group by group, to temporary files that end with the block.

    Args:
        directory: for the temporary files, which are as large as the checkpoints they stand for.

    Raises:
        DmmError: what must be aligned always cannot be, or units that are to stay side by side cannot.
    """
    ordered = Ordered(list(sources))
    with ExitStack() as stack:
        for group in groups:
            members = [sources[i] for i in group.members]
            starts = _starts(members, settings.policy)
            if len(starts) < 2:
                if settings.widens:
                    raise DmmError(
                        f"{' and '.join(source.label for source in members)} have one start, and units that correspond",
                        hint="leave out --overlap, or keep units side by side all the same with --align always",
                    )
                continue
            from ..alignment.align import align

            basins = [[members[i] for i in start] for start in starts]
            try:
                found = align(
                    basins, arch=settings.arch, seed=settings.seed, restarts=RESTARTS, on_progress=on_progress
                )
            except DmmError as error:
                if settings.policy == "always" or settings.widens:
                    raise
                told = f"{group.name}: checkpoints of {len(starts)} starts were merged without aligning: {error.what}"
                told += f"; {error.hint}" if error.hint else ""
                ordered = replace(ordered, warnings=(*ordered.warnings, told))
                continue
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".dmm-", dir=directory)))
            copies = _copies(found, basins[0], place, settings.seed)
            ordered = replace(
                ordered,
                sources=[copies.get(source.label, source) for source in ordered.sources],
                aligned=(*ordered.aligned, *map(aligned_record, found)),
                warnings=(*ordered.warnings, *left_alone(found)),
            )
            if settings.widens:
                ordered = _widened(ordered, found[0], settings, place)
        yield ordered


def _widened(ordered: Ordered, alignment: Alignment, settings: Aligning, place: Path) -> Ordered:
    """Both checkpoints, aligned, made so wide that some of their units stay side by side."""
    from ..alignment.widen import widen
    from ..widths import OWN, WIDTHS

    widening = widen(*ordered.sources, alignment.spec, settings.overlap, arch=settings.arch)
    facts = {WIDTHS: json.dumps(widening.widths, sort_keys=True), OWN: json.dumps(widening.own, sort_keys=True)}
    sources = []
    for number, source in enumerate(ordered.sources):
        path = place / f"wide-{number}.safetensors"
        widening.write(number, path, {**source.metadata, "dmm.arch": widening.archs[number], **facts})
        sources.append(_in_place_of(source, path))
    return replace(ordered, sources=sources, widened=widened_record(widening, settings.overlap))


def _in_place_of(source: Source, path: Path) -> Source:
    """The checkpoint in a temporary file, under the label, path and hash of the one it was made from."""
    copy = replace(source, headers=resolve_source(str(path)).headers)
    copy.know_sha256(source.sha256)
    return copy


def _copies(found: Sequence[Alignment], reference: Sequence[Source], place: Path, seed: int) -> dict[str, Source]:
    """Aligned files by the label of what they were made from, whose label, path and hash they keep."""
    paths = {alignment.source.label: place / f"{number}.safetensors" for number, alignment in enumerate(found)}
    write_aligned(found, reference, paths, alignment_metadata(seed))
    return {label: _in_place_of(alignment.source, paths[label]) for label, alignment in zip(paths, found, strict=True)}


def _starts(members: Sequence[Source], policy: str) -> list[list[int]]:
    if policy == "never" or len(members) < 2:
        return []
    if policy == "always":
        return [[number] for number in range(len(members))]
    from ..alignment.basins import basins

    return basins(members)


def alignment_metadata(seed: int, restarts: int = RESTARTS) -> dict[str, str]:
    """Metadata of an aligned checkpoint that do not depend on its parents."""
    return stamp("align", {"restarts": restarts}, seed=str(seed))


def write_aligned(
    found: Sequence[Alignment],
    reference: Sequence[Source],
    paths: Mapping[str, Path],
    metadata: Mapping[str, str],
    *,
    inputs: Sequence[Path] = (),
    force: bool = False,
) -> None:
    """Write every aligned checkpoint to the path of its label, with its parent and the reference in its metadata."""
    to = lineage(records(reference))
    with together() as outputs:
        for alignment in found:
            source = alignment.source
            own = {"dmm.sources": lineage(records([source])), "dmm.reference": to, **inherited([source])}
            alignment.write(paths[source.label], {**metadata, **own}, inputs=inputs, force=force, outputs=outputs)


def left_alone(found: Sequence[Alignment]) -> tuple[str, ...]:
    """Warnings of parameters that did not move with the units that they may have been trained with."""
    return tuple(
        f"{alignment.source.label} does not use {listed(alignment.spec.unread, 4)} outside training: left as it is, "
        "in the order that units had before"
        for alignment in found
        if alignment.spec.unread and alignment.moved(alignment.spec.movable.nonzero()[0])
    )


def aligned_record(alignment: Alignment) -> AlignedSource:
    """What is told about an alignment."""
    from ..manifest import AlignedSource, UnitGroup

    groups = tuple(
        UnitGroup(group.name, group.size, len(group.blocks), sum(alignment.moved(role.ravel()) for role in group.roles))
        for group in alignment.spec.groups
    )
    return AlignedSource(
        label=alignment.source.label,
        groups=groups,
        units=sum(group.units for group in groups),
        moved=sum(group.moved for group in groups),
        covered=alignment.covered,
        objective_before=alignment.objective[0],
        objective_after=alignment.objective[1],
        cosine_before=alignment.cosine[0],
        cosine_after=alignment.cosine[1],
        difference=alignment.difference,
    )


def widened_record(widening: Widening, overlap: float) -> WidenedRecord:
    """What is told about a widening."""
    from ..manifest import WidenedGroup, WidenedRecord

    groups = tuple(
        WidenedGroup(group.name, group.size, max(apart, 0), apart >= 0)
        for group, apart in zip(widening.spec.groups, widening.apart, strict=True)
    )
    return WidenedRecord(overlap, groups, *widening.parameters, widening.difference)
