"""dmm merge: average what is alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..digest import hashing
from ..errors import DmmError
from ..inputs import (
    Source,
    kinds_of,
    paths_in_record,
    read_record,
    read_standard_input,
    read_text,
    resolve_source,
    resolve_sources,
)
from ..merging import CALIBRATIONS, METHODS
from ..merging.heads import POLICIES
from ..merging.recipe import DTYPES, Recipe, merged_layout
from ..ranks import joined
from ..registry import Registry
from ..shards import bytes_of, parse_size, plan_shards
from ..synthesis.kind import require_made_from, require_pseudo_data
from . import _options as options
from ._align import POLICIES as ALIGN
from ._align import Aligning
from ._groups import (
    Destination,
    Team,
    check_each,
    check_outputs,
    inputs_of,
    merge_groups,
    parents_of,
    require_one_file,
)
from ._measures import with_aligned
from ._parameters import parse_parameters
from ._recalibrate import Recalibration
from ._run import epilog, standard_input
from ._veto import settle

if TYPE_CHECKING:
    from ..manifest import Grouping, MergeManifest, SimilarityReport

EPILOG = epilog(
    "dmm merge a.safetensors b.safetensors --weights 3,1 -o merged.safetensors",
    "dmm similarity sites/*.safetensors --json | dmm merge --group - -o merged/",
)


def _listed(table: Registry) -> str:
    needs = {"base": " (needs --base)", "features": " (needs --recalibrate)"}
    return "; ".join(
        f"{name}: {table.summary(name)}{''.join(needs.get(trait, '') for trait in table.traits(name))}"
        for name in table
    )


Param = Annotated[
    list[str] | None,
    options.option(
        "--param",
        help="Parameter of the method: scale=0.3; for some tensors only: 'blocks.0.*:scale=0.1', or their "
        "'fc.*:weights=1,0'. Repeatable.",
    ),
]
Calibrate = Annotated[
    str | None,
    options.option(
        "--calibrate",
        help=f"Then calibrate merged task vectors; {_listed(CALIBRATIONS)}. Parameter: --param svc.alpha=1.",
    ),
]
Recalibrate = Annotated[
    str | None,
    options.option(
        "--recalibrate",
        help="Pseudo-data of the checkpoints: reset the BatchNorm statistics of the merge on them, or, of models "
        "without BatchNorm, rescale its layers to its parents' activations (REPAIR). With --group auto, checkpoints "
        "that would forget in the merge leave their group.",
    ),
]
Align = Annotated[
    str,
    options.option(
        "--align",
        help="Which checkpoints to bring into one order of units before (dmm align); "
        f"{'; '.join(f'{name}: {what}' for name, what in ALIGN.items())}.",
    ),
]
Overlap = Annotated[
    float,
    options.option(
        "--overlap",
        help="Share of the units of two checkpoints of different starts that is merged, those most alike; the others "
        "stay side by side, in a wider network (PLeaS).",
    ),
]
Head = Annotated[
    str,
    options.option(
        "--head",
        help=f"Classifiers of unlike classes; {'; '.join(f'{name}: {what}' for name, what in POLICIES.items())}.",
    ),
]


def merge(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CKPT...]", help="Checkpoints; may be left out when --group names them."),
    ] = None,
    output: Annotated[
        Path | None,
        options.option(
            "--output", "-o", help=f"A .safetensors file, or a directory for several groups.{options.NEEDED}"
        ),
    ] = None,
    method: Annotated[str, options.option("--method", help=f"{_listed(METHODS)}.")] = "linear",
    weights: Annotated[str | None, options.option("--weights", help="One number per checkpoint: 3,1,1.")] = None,
    base: Annotated[str | None, options.option("--base", help="Common start, for methods on task vectors.")] = None,
    group: Annotated[
        str,
        options.option("--group", help="auto, all, a cosine threshold, a JSON file, or - for standard input."),
    ] = "all",
    param: Param = None,
    calibrate: Calibrate = None,
    recalibrate: Recalibrate = None,
    align: Align = "auto",
    overlap: Overlap = 1.0,
    arch: options.Arch = None,
    head: Head = "union",
    dtype: Annotated[
        str | None, options.option("--dtype", help=f"Of the output: {', '.join(DTYPES)}; else the first checkpoint's.")
    ] = None,
    max_shard_size: Annotated[
        str | None,
        options.option("--max-shard-size", help="Write several files of at most this size, and an index: 5GB."),
    ] = None,
    device: Annotated[
        str,
        options.option("--device", help="For methods on matrices and --recalibrate: auto, cpu, cuda or cuda:N."),
    ] = "auto",
    seed: options.Seed = 0,
    force: options.Force = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
    json: options.JsonAlone = False,
) -> None:
    """Merge checkpoints of one architecture, all of them or group by group.

    BatchNorm variances follow the analytic rule for merged filters; integer buffers are never averaged.
    Several groups are written to a directory, with merge.json beside them.
    """
    METHODS.check(method)
    record = _group_record(group, checkpoints or [])
    sources = _sources(checkpoints or [], record)
    if output is None:
        raise DmmError("nowhere to write", hint="name a file or a directory with -o")
    given = parse_parameters(param or [], calibrate)
    pseudo = resolve_source(recalibrate) if recalibrate else None
    recipe = Recipe(
        method=method,
        weights=options.numbers(weights, "--weights"),
        parameters=given.method,
        base=resolve_source(base) if base else None,
        overrides=tuple(given.overrides),
        calibrate=calibrate,
        calibration=given.calibration,
        head=head,
        dtype=dtype,
        seed=seed,
        device=device,
        features=pseudo,
    )
    to = Destination(output, parse_size(max_shard_size) if max_shard_size else None, force)
    after = Recalibration(pseudo, arch, device, seed) if pseudo else None
    aligning = _aligning(Aligning(align, arch, seed, overlap), sources, recipe)
    known = known_groups([source.label for source in sources], group, record)
    _check_plan(sources, recipe, to, aligning, group, known)
    if dry_run:
        _require_parents(sources, recipe, known)
        _show_plan(sources, recipe, to, aligning, known, json)
    else:
        _execute(sources, recipe, to, after, aligning, group, known, quiet, json)


def _check_plan(
    sources: Sequence[Source],
    recipe: Recipe,
    to: Destination,
    aligning: Aligning,
    group: str,
    known: Grouping | SimilarityReport | None,
) -> None:
    """Refuse what the headers tell that cannot be done: of groups that are not known yet, the largest there can be."""
    from ..groups import given_groups
    from ..manifest import Grouping

    labels = [source.label for source in sources]
    kinds = [[labels[i] for i in kind] for kind in kinds_of(sources)]
    settled = isinstance(known, Grouping)
    least = known if settled else given_groups(labels, kinds, f"--group {group}")
    check_each(sources, [part.members for part in least.groups], recipe, settled=settled)
    if recipe.features:
        require_one_file(to)
    _require_one_group(aligning, least)
    check_outputs(to, least, inputs_of(sources, recipe), more=least is not known)
    if recipe.features:
        require_pseudo_data(recipe.features)


def _require_parents(sources: Sequence[Source], recipe: Recipe, known: Grouping | SimilarityReport | None) -> None:
    """Refuse pseudo-data that are not of the checkpoints of known groups, as a merge does once it has hashed them."""
    from ..manifest import Grouping

    if recipe.features and isinstance(known, Grouping):
        merged = [group.members for group in known.groups if len(group.members) > 1]
        require_made_from(recipe.features, [sources[i] for members in merged for i in members])


def _require_one_group(aligning: Aligning, grouping: Grouping) -> None:
    if aligning.widens and len(grouping.groups) > 1:
        raise DmmError(
            f"--overlap merges two checkpoints, and {grouping.rule} puts them in two groups",
            hint="leave out --overlap, or merge both with --group all",
        )


def _execute(
    sources: Sequence[Source],
    recipe: Recipe,
    to: Destination,
    recalibration: Recalibration | None,
    aligning: Aligning,
    group: str,
    known: Grouping | SimilarityReport | None,
    quiet: bool,
    json: bool,
) -> None:
    """Group, merge and report."""
    with joined() as ranks, hashing(ranks.deal(parents_of(sources, recipe))) as hashes:  # first: it takes longest
        from ..report.console import Progress

        progress = Progress(quiet or not ranks.is_first)
        grouping = grouping_of(sources, recipe.base, group, known, progress, aligning)
        _require_one_group(aligning, grouping)
        team = Team(ranks, hashes, progress)
        if recalibration and grouping.rule == "auto":
            grouping = settle(sources, grouping, to, recipe, team, recalibration, aligning)
        manifest = merge_groups(sources, grouping, to, recipe, team, recalibration, aligning)
    if ranks.is_first:
        _report(manifest, quiet, json)


def _show_plan(
    sources: Sequence[Source],
    recipe: Recipe,
    to: Destination,
    aligning: Aligning,
    known: Grouping | SimilarityReport | None,
    json: bool,
) -> None:
    from ..manifest import Grouping
    from ..report.console import emit_plan

    sizes = [str(len(group.members)) for group in known.groups] if isinstance(known, Grouping) else []
    apart = f", in groups of {', '.join(sizes)}" if len(sizes) > 1 else ""
    groups = [group.members for group in known.groups] if isinstance(known, Grouping) else kinds_of(sources)
    layouts = [merged_layout([sources[i] for i in members], recipe) for members in groups]
    held = sorted(set(map(bytes_of, layouts)))
    files = [] if aligning.widens else sorted({len(plan_shards(one, to.path, to.max_shard)) for one in layouts})
    parts = f" in {_span(files)} files and an index" if files and files[-1] > 1 else ""
    wider = f", {100 * (1 - aligning.overlap):g} % of the units side by side in more" if aligning.widens else ""
    emit_plan(
        f"merge {len(sources)} checkpoints with {recipe.method}{apart}, {len(layouts[0])} tensors, "
        f"{'more than ' * aligning.widens}{_span(held)} bytes a group{parts}{wider} -> {to.path}",
        as_json=json,
    )


def _span(numbers: Sequence[int]) -> str:
    """The least and the largest of sorted numbers, or the only one."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _aligning(asked: Aligning, sources: Sequence[Source], recipe: Recipe) -> Aligning:
    """What is asked for, once it is checked; a base says that all checkpoints have one start."""
    asked.check(len(sources), recipe.base is not None)
    return replace(asked, policy="never") if recipe.base else asked


def _group_record(group: str, checkpoints: Sequence[str]) -> dict | None:
    if group == "-" and "-" in checkpoints:
        raise DmmError(
            "standard input is read once, and both CKPT and --group are -",
            hint="name the checkpoints, or leave them out where the JSON for --group names them",
        )
    if group == "-":
        return read_record(read_standard_input(standard_input()), "standard input")
    if group.endswith(".json"):
        return read_record(read_text(Path(group)), group)
    options.group_rule(group)
    return None


def _sources(arguments: list[str], record: dict | None) -> list[Source]:
    if not arguments and record is not None:
        arguments = paths_in_record(record, "the JSON given with --group")
    if not arguments:
        raise DmmError("no checkpoints given", hint="dmm merge a.safetensors b.safetensors -o merged.safetensors")
    return resolve_sources(arguments, stdin=standard_input())


def known_groups(labels: Sequence[str], group: str, record: dict | None) -> Grouping | SimilarityReport | None:
    """The groups that a record or ``--group all`` names, or a report of similarities; None if these are to be taken.

    Raises:
        DmmError: the record does not fit the checkpoints.
    """
    from ..groups import given_groups, stated

    if record is not None:
        return stated(record, labels, "standard input" if group == "-" else group)
    return given_groups(labels, [labels], "--group all") if group == "all" or len(labels) == 1 else None


def grouping_of(
    sources: Sequence[Source],
    base: Source | None,
    group: str,
    known: Grouping | SimilarityReport | None,
    on_progress,
    aligning: Aligning = Aligning(),
) -> Grouping:
    """The groups that are known, or those that the rule ``group`` makes of the checkpoints' similarity.

    Where all are to be aligned, those that are one network but for the order of its units are found, too.
    """
    from ..grouping import group_checkpoints
    from ..manifest import Grouping

    if isinstance(known, Grouping):
        return known
    if known:
        return group_checkpoints(known)
    from ..similarity.engine import compute_similarity

    report = compute_similarity(sources, base=base, measures=["cosine"], on_progress=on_progress)
    if aligning.policy == "always":
        report = with_aligned(report, sources, arch=aligning.arch, seed=aligning.seed, on_progress=on_progress)
    return group_checkpoints(report, options.group_rule(group))


def _report(manifest: MergeManifest, quiet: bool, json: bool) -> None:
    from ..manifest import dump
    from ..report.console import emit, status
    from ..report.tables import Table, alignment_tables, group_table, render, retained_tables, widened_table

    for warning in manifest.warnings:
        status(f"warning: {warning}")
    if json:
        emit(dump(manifest))
    elif quiet:
        emit("\n".join(manifest.outputs))
    else:
        paired, unpaired = manifest.batchnorm["paired"], manifest.batchnorm["unpaired"]
        rows = [[path] for path in manifest.outputs]
        aligned = alignment_tables("aligned", manifest.aligned) if manifest.aligned else []
        written = Table("written", ["file"], rows)
        widened = [widened_table(manifest.widened)] if manifest.widened else []
        tables = [group_table(manifest.grouping), *aligned, *widened, *retained_tables(manifest), written]
        emit(render(tables, "table"))
        for name, done in manifest.recalibrated.items():
            emit(f"{name}: {done}")
        if paired + unpaired and not manifest.recalibrated:
            emit(f"BatchNorm layers: {paired} by the analytic rule, {unpaired} without a known filter")
