"""dmm align: units of one network in the order of another's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..inputs import files_of, named_files, require_same_tensors, resolve_sources
from ..merging.heads import unlike_heads
from . import _options as options
from ._align import RESTARTS, aligned_record, alignment_metadata, left_alone, write_aligned
from ._outputs import file_or_directory
from ._provenance import records
from ._run import epilog, standard_input

EPILOG = epilog(
    "dmm align a.safetensors b.safetensors -o b-aligned.safetensors",
    "dmm align a.safetensors b.safetensors c.safetensors -o aligned/ --restarts 5 --groups",
)


def align(
    checkpoints: Annotated[
        list[str],
        typer.Argument(metavar="REFERENCE CKPT...", help="The checkpoint whose order of units stays, then others."),
    ],
    output: Annotated[
        Path | None,
        options.option("--output", "-o", help=f"A .safetensors file, or a directory for several.{options.NEEDED}"),
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
    sources = resolve_sources(checkpoints, stdin=standard_input(), minimum=2)
    require_same_tensors(sources, any_shape=unlike_heads(sources))
    labels = [source.label for source in sources[1:]]
    inputs = [*files_of(sources), *named_files(checkpoints)]
    files = file_or_directory(output, labels, inputs=inputs, force=force, example="aligned.safetensors")
    paths = dict(zip(labels, files, strict=True))

    from ..report.console import Progress, emit, emit_plan, status

    if dry_run:
        plan = f"align {', '.join(labels)} to {sources[0].label}, {len(sources[0].tensors)} tensors each -> {output}"
        emit_plan(plan, as_json=style == "json")
        return

    from ..alignment.align import align as align_sources
    from ..manifest import AlignManifest, dump
    from ..report.tables import alignment_tables, render

    started = time.monotonic()
    basins = [[source] for source in sources]
    found = align_sources(basins, arch=arch, size=size, seed=seed, restarts=restarts, on_progress=Progress(quiet))
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    write_aligned(found, sources[:1], paths, alignment_metadata(seed, restarts), inputs=inputs, force=force)
    in_turn = [alignment.source for alignment in found]
    manifest = AlignManifest(
        sources=records([sources[0], *in_turn]),
        aligned=tuple(map(aligned_record, found)),
        parameters={"restarts": restarts, "seed": seed},
        seconds=time.monotonic() - started,
        outputs=tuple(str(paths[source.label]) for source in in_turn),
        warnings=left_alone(found),
    )
    for warning in manifest.warnings:
        status(f"warning: {warning}")
    status(f"aligned in {manifest.seconds:.0f} s", quiet=quiet)
    if style == "json":
        emit(dump(manifest))
    elif quiet:
        emit("\n".join(manifest.outputs))
    else:
        emit(render(alignment_tables(f"aligned to {sources[0].label}", manifest.aligned, groups), style))
