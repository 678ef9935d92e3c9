"""dmm merge: average what is alike."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import DmmError
from ..files import check_output, write_text
from ..inputs import Source, paths_in_record, read_record, read_text, resolve_source, resolve_sources
from ..merging import METHODS
from ..merging.recipe import Recipe, check
from . import _options as options
from ._provenance import inherited, lineage, records, stamp
from ._run import epilog, guarded

if TYPE_CHECKING:
    from ..manifest import Grouping, MergeManifest

EPILOG = epilog(
    "dmm merge a.safetensors b.safetensors --weights 3,1 -o merged.safetensors",
    "dmm similarity sites/*.safetensors --json | dmm merge --group - -o merged/",
)


@guarded
def merge(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CKPT...]", help="Checkpoints; may be left out when --group names them."),
    ] = None,
    output: Annotated[
        Path | None,
        options.option("--output", "-o", help="A .safetensors file, or a directory for several groups."),
    ] = None,
    method: Annotated[
        str, options.option("--method", help="; ".join(f"{m}: {METHODS.summary(m)}" for m in METHODS) + ".")
    ] = "linear",
    weights: Annotated[str | None, options.option("--weights", help="One number per checkpoint: 3,1,1.")] = None,
    base: Annotated[str | None, options.option("--base", help="Common start, for methods on task vectors.")] = None,
    group: Annotated[
        str,
        options.option("--group", help="auto, all, a cosine threshold, a JSON file, or - for standard input."),
    ] = "all",
    param: Annotated[
        list[str] | None, options.option("--param", help="Parameter of the method: scale=0.3. Repeatable.")
    ] = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Merge checkpoints of one architecture, all of them or group by group.

    BatchNorm variances follow the analytic rule for merged filters; integer buffers are never averaged.
    Several groups are written to a directory, with merge.json beside them.
    """
    METHODS.check(method)
    record = _group_record(group)
    sources = _sources(checkpoints or [], record)
    if output is None:
        raise DmmError("nowhere to write", hint="name a file or a directory with -o")
    recipe = _recipe(sources, method, weights, base, param or [])

    from ..report.console import Progress, emit, status

    if dry_run:
        size = sum(info.nbytes for info in sources[0].tensors.values())
        emit(f"merge {len(sources)} checkpoints with {method}, {len(sources[0].tensors)} tensors, "
             f"{size} bytes a group -> {output}")  # fmt: skip
        return

    origin = "standard input" if group == "-" else group
    grouping = grouping_of(sources, recipe.base, group, record, origin, Progress(quiet))
    manifest = merge_groups(sources, grouping, output, recipe, force=force, on_progress=Progress(quiet))
    for warning in manifest.warnings:
        status(f"warning: {warning}")
    _report(manifest, quiet, json)


def merge_groups(
    sources: Sequence[Source],
    grouping: Grouping,
    output: Path,
    recipe: Recipe,
    *,
    force: bool = False,
    on_progress=None,
) -> MergeManifest:
    """Write one file for one group, or ``group-K.safetensors`` and ``merge.json`` in a directory."""

    from ..manifest import MergeManifest, SourceRecord, dump
    from ..merging import engine
    from ..merging.method import effective_parameters

    single = output.suffix == ".safetensors"
    if single and len(grouping.groups) > 1:
        raise DmmError(
            f"{len(grouping.groups)} groups do not fit in one file: {output}",
            evidence=[f"{g.name}: {', '.join(grouping.labels[i] for i in g.members)}" for g in grouping.groups],
            hint="name a directory with -o, or merge everything with --group all",
        )
    check(sources, recipe)
    inputs = [path for source in sources for path in source.files]
    paths = [output] if single else [output / f"{group.name}.safetensors" for group in grouping.groups]
    if not single:
        output.mkdir(parents=True, exist_ok=True)
    for path in [*paths, *([] if single else [output / "merge.json"])]:
        check_output(path, inputs=inputs, force=force)
    counts = {"paired": 0, "unpaired": 0}
    for group, path in zip(grouping.groups, paths, strict=True):
        members = [sources[i] for i in group.members]
        part = _part(recipe, group.members)
        found = engine.merge(
            members,
            path,
            part,
            metadata_of(members, part),
            inputs=inputs,
            force=force,
            on_progress=on_progress,
        )
        counts = {name: counts[name] + found[name] for name in counts} if len(members) > 1 else counts
    manifest = MergeManifest(
        sources=records(sources, recipe.weights),
        grouping=grouping,
        method=recipe.method,
        parameters=effective_parameters(METHODS.load(recipe.method), recipe.parameters),
        outputs=tuple(map(str, paths)),
        base=SourceRecord(recipe.base.label, str(recipe.base.path), recipe.base.sha256) if recipe.base else None,
        batchnorm=counts,
        warnings=_warnings(sources),
    )
    if not single:
        write_text(output / "merge.json", dump(manifest) + "\n", force=force)
    return manifest


def _group_record(group: str) -> dict | None:
    if group == "-":
        return read_record(sys.stdin.read(), "standard input")
    if group.endswith(".json"):
        return read_record(read_text(Path(group)), group)
    options.group_rule(group)
    return None


def _sources(arguments: list[str], record: dict | None) -> list[Source]:
    if not arguments and record is not None:
        arguments = paths_in_record(record, "the JSON given with --group")
    if not arguments:
        raise DmmError("no checkpoints given", hint="dmm merge a.safetensors b.safetensors -o merged.safetensors")
    return resolve_sources(arguments, stdin=sys.stdin)


def _recipe(sources: list[Source], method: str, weights: str | None, base: str | None, param: list[str]) -> Recipe:
    recipe = Recipe(
        method,
        options.numbers(weights, "--weights"),
        options.key_values(param, "--param"),
        resolve_source(base) if base else None,
    )
    check(sources, recipe)
    return recipe


def grouping_of(
    sources: Sequence[Source], base: Source | None, group: str, record: dict | None, origin: str, on_progress
) -> Grouping:
    """The groups a record names, or those that the rule ``group`` makes of the checkpoints' similarity."""
    from ..grouping import given_groups, group_checkpoints, groups_from_record

    labels = [source.label for source in sources]
    if record is not None:
        return groups_from_record(record, labels, origin)
    rule = options.group_rule(group)
    if rule == "all" or len(sources) == 1:
        return given_groups(labels, [labels], "--group all")
    from ..similarity.engine import compute_similarity

    report = compute_similarity(sources, base=base, measures=["cosine"], on_progress=on_progress)
    return group_checkpoints(report, rule)


def _part(recipe: Recipe, members: tuple[int, ...]) -> Recipe:
    from dataclasses import replace

    weights = tuple(recipe.weights[i] for i in members) if recipe.weights else ()
    if len(members) == 1 and recipe.base is None:
        return replace(recipe, weights=())
    return replace(recipe, weights=weights)


def metadata_of(members: Sequence[Source], recipe: Recipe) -> dict[str, str]:
    """Metadata of a merged file."""
    from ..merging.method import effective_parameters

    parameters = effective_parameters(METHODS.load(recipe.method), recipe.parameters)
    facts = {"method": recipe.method, "sources": lineage(records(members, recipe.weights))}
    return {**stamp("merge", parameters, **facts), **inherited(members)}


def _warnings(sources: Sequence[Source]) -> tuple[str, ...]:
    first: dict[str, str] = {}
    warnings = []
    for source in sources:
        if source.sha256 in first:
            warnings.append(f"{source.path} has the same bytes as {first[source.sha256]}")
        first.setdefault(source.sha256, str(source.path))
    return tuple(warnings)


def _report(manifest: MergeManifest, quiet: bool, json: bool) -> None:
    from ..manifest import dump
    from ..report.console import emit
    from ..report.tables import Table, group_table, render

    if json:
        emit(dump(manifest))
    elif quiet:
        emit("\n".join(manifest.outputs))
    else:
        paired, unpaired = manifest.batchnorm["paired"], manifest.batchnorm["unpaired"]
        rows = [[path] for path in manifest.outputs]
        tables = [group_table(manifest.grouping), Table("written", ["file"], rows)]
        emit(render(tables, "table"))
        if paired + unpaired:
            emit(f"BatchNorm layers: {paired} by the analytic rule, {unpaired} without a known filter")
