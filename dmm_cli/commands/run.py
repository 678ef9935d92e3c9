"""dmm run: similarity, merge, synthesize and distill in one directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..devices import require_device_name, require_precision
from ..distillation.settings import Settings as DistillSettings
from ..errors import DmmError, printable
from ..files import refuse_dangling, refuse_inputs, require_writable, write_text
from ..inputs import Source, files_of, read_record, read_text, require_same_tensors, resolve_source, resolve_sources
from ..merging import METHODS
from ..merging.recipe import Recipe, check
from ..synthesis import presets
from ..synthesis.settings import Settings as SynthesisSettings
from . import _options as options
from . import distill as distillation
from . import synthesize as synthesis
from ._groups import Destination, Team, merge_groups, metadata_of
from ._run import epilog, standard_input
from ._stages import STATE, Layout, Stages, checkpoints_of, data_hash, file_hash
from ._statistics import Pair, statistics_of
from ._teachers import require_teachers
from ._veto import FORGOTTEN
from .evaluate import evaluate_sources, require_data_fit
from .merge import grouping_of, known_groups

if TYPE_CHECKING:
    from ..manifest import DistillManifest

EPILOG = epilog(
    "dmm run fixtures/digits/site-*.safetensors -o out/ --data fixtures/digits/test.safetensors",
    "dmm run sites/*.safetensors --base base.safetensors --seed 1 -o out/",
)
STATIC = [name for name in METHODS if "features" not in METHODS.traits(name)]  # they need no pseudo-data


@dataclass(frozen=True)
class Plan:
    """What to run."""

    sources: Sequence[Source]
    base: Source | None
    group: str
    method: str
    arch: str | None
    flags: options.InputFlags
    device: str
    synthesis: SynthesisSettings
    statistics: Mapping[Pair, Source]
    distill_steps: int | None
    data: Path | None
    quiet: bool


SynthesizeSteps = Annotated[
    int | None,
    options.option("--synthesize-steps", help="Optimiser steps of the synthesis, in place of the preset's.", min=1),
]
DistillSteps = Annotated[
    int | None,
    options.option(
        "--distill-steps",
        help=f"Optimiser steps of the distillation; if not given {DistillSettings.steps}, or 0, which only resets "
        "BatchNorm, where --group auto finds one group and its merge forgets nothing.",
        min=0,
    ),
]


def run(
    checkpoints: options.Checkpoints,
    output: Annotated[
        Path | None, options.option("--output", "-o", help=f"Directory for everything.{options.NEEDED}")
    ] = None,
    data: Annotated[
        Path | None, options.option("--data", help="Labelled data to judge the result by; nothing is tuned on it.")
    ] = None,
    base: Annotated[
        str | None, options.option("--base", help="Common start of the checkpoints, if there is one.")
    ] = None,
    group: Annotated[str, options.option("--group", help="auto, all or a cosine threshold.")] = "auto",
    method: Annotated[str, options.option("--method", help=f"Merge method: {', '.join(STATIC)}.")] = "linear",
    preset: options.Preset = presets.DEFAULT,
    count: Annotated[
        int | None, options.option("--count", help="Pseudo-images per teacher, in place of the preset's.", min=1)
    ] = None,
    synthesize_steps: SynthesizeSteps = None,
    distill_steps: DistillSteps = None,
    statistics: options.Statistics = None,
    arch: options.Arch = None,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    seed: options.Seed = 0,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json: options.JsonAlone = False,
    dry_run: options.DryRun = False,
) -> None:
    """Group, merge, synthesize and distill: N checkpoints to one, in one directory.

    Stages whose inputs and parameters have not changed are skipped. The result is model.safetensors;
    report.html shows how it came about. With --data the accuracy of every step is printed.
    """
    _check_arguments(output, method, group, device, precision, data)
    chosen = options.preset(preset, count, synthesize_steps)
    flags = options.input_flags(input_size, mean, std)
    sources = resolve_sources(checkpoints, stdin=standard_input(), minimum=2)
    origin = resolve_source(base) if base else None
    count = chosen.count(len(sources))
    require_same_tensors([*sources, *([origin] if origin else [])])
    check(sources, Recipe(method, base=origin), settled=False)
    recorded = statistics_of(statistics or [], sources)
    read = files_of([*sources, *([origin] if origin else []), *recorded.values()])
    files = Layout(output)
    _check_outputs(files, sources, [*read, *([data] if data else [])], force)
    require_teachers(sources, arch, recorded=recorded)
    if data is not None:
        require_data_fit(sources, data, arch, flags)

    from ..report.console import emit_plan

    if dry_run:
        images = f"{count} images from each of {len(sources)} teachers"
        words = f"similarity, merge --method {method} --group {group}, synthesize {images}, distill -> {output}"
        emit_plan(words, as_json=json)
        return

    from ..runtime import resolve_device

    resolve_device(device)  # two stages that need none would come first
    plan = Plan(
        sources=sources,
        base=origin,
        group=group,
        method=method,
        arch=arch,
        flags=flags,
        device=device,
        synthesis=SynthesisSettings(count, chosen.steps, seed=seed, precision=precision),
        statistics=recorded,
        distill_steps=distill_steps,
        data=data,
        quiet=quiet,
    )
    execute(plan, files, Stages(output, sources, partial(_tell, quiet)))
    _report(files, data, quiet, json)


def _tell(quiet: bool, stage: str, fresh: bool) -> None:
    from ..report.console import status

    status(f"{stage}: up to date" if fresh else stage, quiet=quiet)


def _check_arguments(
    output: Path | None, method: str, group: str, device: str, precision: str, data: Path | None
) -> None:
    """Refuse what can be refused before any checkpoint is opened."""
    if output is None:
        raise DmmError("nowhere to write", hint="name a directory with -o out/")
    if "features" in METHODS.traits(method):
        raise DmmError(
            f"{method} needs pseudo-data, which run makes after it has merged",
            hint=f"dmm synthesize, then dmm merge --method {method} --recalibrate pseudo.safetensors",
        )
    options.group_rule(group, records=False)
    require_device_name(device)
    require_precision(precision)
    if data is not None and not data.exists():
        raise DmmError(f"no such file: {data}")


def execute(plan: Plan, files: Layout, stages: Stages) -> None:
    """All stages, in order; each one reads what the one before wrote."""
    from ..manifest import MergeManifest

    hashes = [source.sha256 for source in plan.sources]
    where = {"arch": plan.arch, "device": plan.device}
    names = [[source.label, str(source.path)] for source in plan.sources]
    stages.run(
        "similarity",
        {"sources": hashes, "names": names, "base": plan.base and plan.base.sha256},
        [files.similarity, files.heat_map],
        lambda: _similarity(plan, files),
    )
    stages.run(
        "merge",
        {
            "sources": hashes,
            "base": plan.base and plan.base.sha256,
            "similarity": file_hash(files.similarity),
            "recipe": [plan.group, plan.method, plan.synthesis.seed, plan.device],
        },
        [files.merged],
        lambda: _merge(plan, files),
    )
    stages.run(
        "synthesize",
        {
            "sources": hashes,
            "names": names,
            "settings": plan.synthesis.record(),
            "input": asdict(plan.flags),
            "statistics": sorted(file.sha256 for file in plan.statistics.values()),
            **where,
        },
        [files.pseudo, files.synthesis, files.images],
        lambda: _synthesize(plan, files),
    )
    settings = DistillSettings(seed=plan.synthesis.seed, precision=plan.synthesis.precision)
    merged = _read(files.merge, MergeManifest)
    groups = [resolve_source(str(files.group(group.name))) for group in merged.grouping.groups]
    lessons = {"data": file_hash(files.pseudo), "sources": hashes, "names": names}
    stages.run(
        "distill",
        {
            **lessons,
            "students": [group.sha256 for group in groups],
            "settings": asdict(settings),
            "steps": plan.distill_steps,
            "group": plan.group,
            **where,
        },
        [files.model, files.distillation],
        lambda: _distill(plan, files, groups, settings),
        outdates={"evaluate": [files.evaluation, files.everything]},
    )
    if plan.data is not None:
        stages.run(
            "evaluate",
            {
                "model": file_hash(files.model),
                "sources": hashes,
                "names": names,
                "data": data_hash(plan.data),
            },
            [files.evaluation],
            lambda: _evaluate(plan, files),
        )
    _write_report(plan, files)


def _similarity(plan: Plan, files: Layout) -> None:
    from ..grouping import group_checkpoints
    from ..manifest import dump
    from ..report.console import Progress
    from ..report.figures import heat_map
    from ..similarity.engine import compute_similarity

    report = compute_similarity(plan.sources, base=plan.base, on_progress=Progress(plan.quiet))
    write_text(files.similarity, dump(report) + "\n", force=True)
    heat_map(report, group_checkpoints(report), files.heat_map, force=True)


def _merge(plan: Plan, files: Layout) -> None:
    from ..report.console import Progress

    recipe = Recipe(plan.method, base=plan.base, seed=plan.synthesis.seed, device=plan.device)
    group, record = plan.group, None
    if group == "auto":
        group = str(files.similarity)
        record = read_record(read_text(files.similarity), group)
    progress = Progress(plan.quiet)
    known = known_groups([source.label for source in plan.sources], group, record)
    grouping = grouping_of(plan.sources, plan.base, group, known, progress)
    merge_groups(plan.sources, grouping, Destination(files.merged, force=True), recipe, Team(on_progress=progress))


def _synthesize(plan: Plan, files: Layout) -> None:
    from ..manifest import dump
    from ..report.console import Progress
    from ..report.figures import image_grid

    manifest, data = synthesis.synthesize_sources(
        plan.sources, files.pseudo, plan.synthesis, arch=plan.arch, flags=plan.flags, device=plan.device,
        recorded=plan.statistics, force=True, on_progress=Progress(plan.quiet),
    )  # fmt: skip
    write_text(files.synthesis, dump(manifest) + "\n", force=True)
    image_grid(data, files.images, force=True)


def _distill(plan: Plan, files: Layout, students: Sequence[Source], settings: DistillSettings) -> None:
    """As asked; unless asked, there is nothing to teach where none diverges and their merge forgets nothing."""
    from ..report.console import status

    if plan.distill_steps is not None:
        settings = replace(settings, steps=plan.distill_steps)
    elif plan.group == "auto" and len(students) == 1:
        retention = _refine(plan, files, students, replace(settings, steps=0)).retention
        worst = min(retention, key=lambda teacher: (teacher.after, teacher.label))
        if worst.after >= 100.0 - FORGOTTEN:
            return
        words = f"the merge recognises {worst.after:.1f} % of the pseudo-images of {worst.label}: it has to learn"
        status(words, quiet=plan.quiet)
    _refine(plan, files, students, settings)


def _refine(plan: Plan, files: Layout, students: Sequence[Source], settings: DistillSettings) -> DistillManifest:
    from ..manifest import dump
    from ..report.console import Progress

    manifest = distillation.distill_sources(
        students, plan.sources, resolve_source(str(files.pseudo)), files.model, settings,
        arch=plan.arch, device=plan.device, force=True, on_progress=Progress(plan.quiet),
    )  # fmt: skip
    write_text(files.distillation, dump(manifest) + "\n", force=True)
    return manifest


def _evaluate(plan: Plan, files: Layout) -> None:
    """Every checkpoint, their ensembles, both linear merges, and the result."""
    from ..manifest import MergeManifest, dump
    from ..merging import engine
    from ..report.console import Progress

    recipe = Recipe("linear")
    engine.merge(plan.sources, files.everything, recipe, metadata_of(plan.sources, recipe), force=True)
    merged = _read(files.merge, MergeManifest)
    groups = [
        replace(resolve_source(str(files.group(group.name))), label=f"{plan.method} merge of {group.name}")
        for group in merged.grouping.groups
        if len(group.members) > 1
    ]
    everything = replace(resolve_source(str(files.everything)), label="linear merge of all")
    model = replace(resolve_source(str(files.model)), label="dmm run")
    how = {"arch": plan.arch, "flags": plan.flags, "device": plan.device, "on_progress": Progress(plan.quiet)}
    first = evaluate_sources(plan.sources, plan.data, ensemble=True, **how)
    extra = evaluate_sources([everything, *groups, model], plan.data, ensemble=False, **how)
    write_text(files.evaluation, dump(replace(first, rows=first.rows + extra.rows)) + "\n", force=True)


def _write_report(plan: Plan, files: Layout) -> None:
    from ..manifest import DistillManifest, Evaluation, MergeManifest, SimilarityReport, SynthesisManifest
    from ..report.html import write_report
    from ..synthesis.pseudodata import load_pseudo_data

    merged = _read(files.merge, MergeManifest)
    write_report(
        files.report,
        similarity=_read(files.similarity, SimilarityReport),
        merged=merged,
        synthesis=_read(files.synthesis, SynthesisManifest),
        data=load_pseudo_data(resolve_source(str(files.pseudo))),
        distillation=_read(files.distillation, DistillManifest),
        evaluation=_read(files.evaluation, Evaluation) if plan.data is not None else None,
    )


def _read(path: Path, kind: type):
    return kind.from_json(_record(path))


def _record(path: Path) -> dict:
    return read_record(read_text(path), str(path))


def _check_outputs(files: Layout, sources: Sequence[Source], inputs: Sequence[Path], force: bool) -> None:
    """Refuse a directory that is somebody else's, or of a run of other checkpoints, and outputs over inputs."""
    output = files.root
    refuse_dangling(output)
    if output.exists() and not output.is_dir():
        raise DmmError(f"the output is not a directory: {output}", hint="name a directory with -o")
    if output.is_dir() and any(output.iterdir()) and not (output / STATE).exists() and not force:
        raise DmmError(
            f"the output directory is not empty and not of an earlier run: {output}",
            hint="name another with -o, or use it all the same with --force",
        )
    earlier = [] if force else checkpoints_of(output)
    if earlier and sorted(earlier) != sorted(source.label for source in sources):
        raise DmmError(
            f"the output directory holds a run of other checkpoints: {output}",
            evidence=[f"of {printable(label)}" for label in earlier],
            hint="name another with -o, or replace it with --force",
        )
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise DmmError(f"cannot make the directory {output}: {there} is a file", hint="name another with -o")
    require_writable(there)
    for path in files.written():
        refuse_inputs(path, inputs)


def _report(files: Layout, data: Path | None, quiet: bool, json: bool) -> None:
    from json import dumps

    from ..manifest import DistillManifest, Evaluation
    from ..report.console import emit
    from ..report.tables import accuracy_tables, render, start_table

    if json:
        told = _record(files.distillation)
        emit(dumps(told if data is None else told | {"evaluation": _record(files.evaluation)}, indent=2))
        return
    manifest = _read(files.distillation, DistillManifest)
    if len(manifest.starts) > 1 and not quiet:
        emit(render([start_table(manifest)], "table"))
    if data is not None and not quiet:
        emit(render(accuracy_tables(_read(files.evaluation, Evaluation)), "table"))
    emit(str(files.model))
