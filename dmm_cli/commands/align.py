"""dmm align: units of one network in the order of another's."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import DmmError
from ..files import check_output
from ..inputs import Source, require_same_tensors, resolve_sources
from ..merging.heads import unlike_heads
from . import _options as options
from ._provenance import inherited, lineage, records, stamp
from ._run import epilog, guarded

if TYPE_CHECKING:
    from ..alignment.align import Alignment
    from ..manifest import AlignedSource, AlignManifest

EPILOG = epilog(
    "dmm align a.safetensors b.safetensors -o b-aligned.safetensors",
    "dmm align a.safetensors b.safetensors c.safetensors -o aligned/ --restarts 5 --groups",
)
RESTARTS = 2


@guarded
def align(
    checkpoints: Annotated[
        list[str],
        typer.Argument(metavar="REFERENCE CKPT...", help="The checkpoint whose order of units stays, then others."),
    ],
    output: Annotated[
        Path | None, options.option("--output", "-o", help="A .safetensors file, or a directory for several.")
    ] = None,
    restarts: Annotated[
        int, options.option("--restarts", help="Further attempts, with groups in random order; the best wins.", min=0)
    ] = RESTARTS,
    groups: Annotated[bool, options.option("--groups", help="Show every group of units.")] = False,
    arch: options.Arch = None,
    input_size: options.InputSize = None,
    seed: options.Seed = 0,
    format: options.Format = "table",
    json: options.Json = False,
    force: options.Force = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
) -> None:
    """Bring the units of networks from different starts into one order.

    What may change places is found out from the network itself: channels, hidden units, attention heads and the units
    in them, groups of convolutions. Every output is checked, in float64, to compute what its input computes. Merge
    checkpoints of different starts after this; those of one start are better merged as they are.
    """
    style = options.chosen_format(format, json)
    size = options.input_flags(input_size, None, None).size
    sources = resolve_sources(checkpoints, stdin=sys.stdin, minimum=2)
    require_same_tensors(sources, any_shape=unlike_heads(sources))
    paths = _outputs(sources, output, force)

    from ..report.console import Progress, emit, status

    if dry_run:
        names = ", ".join(source.label for source in sources[1:])
        emit(f"align {names} to {sources[0].label}, {len(sources[0].tensors)} tensors each -> {output}")
        return

    from ..alignment.align import align as align_sources
    from ..manifest import dump
    from ..report.tables import alignment_tables, render

    started = time.monotonic()
    found = align_sources(sources, arch=arch, size=size, seed=seed, restarts=restarts, on_progress=Progress(quiet))
    parameters = {"restarts": restarts}
    _write(sources, found, paths, stamp("align", parameters, seed=str(seed)), force)
    manifest = _manifest(sources, found, {**parameters, "seed": seed}, paths, time.monotonic() - started)
    status(f"aligned in {manifest.seconds:.0f} s", quiet=quiet)
    if style == "json":
        emit(dump(manifest))
    elif quiet:
        emit("\n".join(manifest.outputs))
    else:
        emit(render(alignment_tables(manifest, groups), style))


def _outputs(sources: Sequence[Source], output: Path | None, force: bool) -> list[Path]:
    """One path for every checkpoint but the first, refused if it cannot or must not be written."""
    if output is None:
        raise DmmError("nowhere to write", hint="name a file with -o aligned.safetensors, or a directory for several")
    if output.suffix == ".safetensors":
        if len(sources) > 2:
            raise DmmError(f"{len(sources) - 1} checkpoints do not fit in one file: {output}", hint="name a directory")
        paths = [output]
    else:
        paths = [output / f"{source.label.replace('/', '-')}.safetensors" for source in sources[1:]]
        if not output.parent.is_dir() or (output.exists() and not output.is_dir()):
            raise DmmError(f"cannot make the directory {output}", hint="name a directory in one that exists")
    inputs = [path for source in sources for path in source.files]
    for path in paths:
        if path.parent.is_dir():
            check_output(path, inputs=inputs, force=force)
    return paths


def _write(
    sources: Sequence[Source], found: Sequence[Alignment], paths: Sequence[Path], facts: dict[str, str], force: bool
) -> None:
    inputs = [path for source in sources for path in source.files]
    reference = lineage(records(sources[:1]))
    for alignment in found:
        source, path = alignment.source, paths[sources.index(alignment.source) - 1]
        metadata = {**facts, "dmm.sources": lineage(records([source])), "dmm.reference": reference}
        path.parent.mkdir(exist_ok=True)
        alignment.write(path, {**metadata, **inherited([source])}, inputs=inputs, force=force)


def _manifest(
    sources: Sequence[Source], found: Sequence[Alignment], parameters: dict, paths: Sequence[Path], seconds: float
) -> AlignManifest:
    from ..manifest import AlignManifest

    return AlignManifest(
        sources=records([sources[0], *(alignment.source for alignment in found)]),
        aligned=tuple(map(_record, found)),
        parameters=parameters,
        seconds=seconds,
        outputs=tuple(map(str, paths)),
    )


def _record(alignment: Alignment) -> AlignedSource:
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
