"""Write aligned checkpoints, and put them in the place of those that are to be merged."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DmmError, printable
from ..inputs import Source, resolve_source
from ..registry import mistyped
from ._provenance import inherited, lineage, records, stamp

if TYPE_CHECKING:
    from ..alignment.align import Alignment
    from ..manifest import AlignedSource, Group

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
    """

    policy: str = "never"
    arch: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise mistyped(f"unknown align policy: {printable(self.policy)}", self.policy, POLICIES)


@dataclass(frozen=True)
class Ordered:
    """Checkpoints with their units in order.

    Attributes:
        sources: all of them; aligned ones keep label, path and hash of what they were made from.
        aligned: what aligning did.
        warnings: what could not be aligned, and why.
    """

    sources: Sequence[Source]
    aligned: tuple[AlignedSource, ...] = ()
    warnings: tuple[str, ...] = ()


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
        DmmError: what must be aligned always cannot be.
    """
    ordered = Ordered(list(sources))
    with ExitStack() as stack:
        for group in groups:
            members = [sources[i] for i in group.members]
            starts = _starts(members, settings.policy)
            if len(starts) < 2:
                continue
            from ..alignment.align import align

            basins = [[members[i] for i in start] for start in starts]
            try:
                found = align(
                    basins, arch=settings.arch, seed=settings.seed, restarts=RESTARTS, on_progress=on_progress
                )
            except DmmError as error:
                if settings.policy == "always":
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
            )
        yield ordered


def _copies(found: Sequence[Alignment], reference: Sequence[Source], place: Path, seed: int) -> dict[str, Source]:
    """Aligned files by the label of what they were made from, whose label, path and hash they keep."""
    paths = {alignment.source.label: place / f"{number}.safetensors" for number, alignment in enumerate(found)}
    write_aligned(found, reference, paths, alignment_metadata(seed))
    copies = {}
    for alignment in found:
        source = alignment.source
        copy = replace(source, headers=resolve_source(str(paths[source.label])).headers)
        copy.know_sha256(source.sha256)
        copies[source.label] = copy
    return copies


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
    for alignment in found:
        source = alignment.source
        own = {"dmm.sources": lineage(records([source])), "dmm.reference": to, **inherited([source])}
        alignment.write(paths[source.label], {**metadata, **own}, inputs=inputs, force=force)


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
