"""dmm synthesize: pseudo-data from normalisation statistics."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..devices import require_device_name, require_precision
from ..errors import DmmError, listed
from ..inputs import Source, files_of, named_files, resolve_source, resolve_sources
from ..ranks import Ranks, joined
from ..synthesis import presets
from ..synthesis.settings import PARTS, Settings
from . import _inversion as inversion
from . import _options as options
from ._outputs import check_files
from ._provenance import records, stamp
from ._run import epilog, resumable, standard_input
from ._statistics import Pair, statistics_of
from ._teachers import (
    load_student,
    load_teachers,
    require_other,
    require_same_class_names,
    require_teachers,
    require_told,
    untold,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..manifest import SynthesisManifest, TeacherReport
    from ..spaces import Spec
    from ..synthesis.pseudodata import PseudoData
    from ..synthesis.teacher import Teacher

EPILOG = epilog(
    "dmm synthesize site-*.safetensors -o pseudo.safetensors --grid pseudo.png",
    "dmm synthesize merged/merge.json --count 2048 --steps 800 --seed 1 -o pseudo.safetensors",
)
BATCH = 64


def synthesize(
    checkpoints: options.Checkpoints,
    output: options.NeededOutput = None,
    preset: options.Preset = presets.DEFAULT,
    count: inversion.Count = None,
    steps: inversion.Steps = None,
    batch: inversion.Batch = str(BATCH),
    engine: inversion.Engine = "generator",
    loss: inversion.Loss = None,
    student: inversion.Student = None,
    jitter: inversion.Jitter = 0,
    flip: inversion.Flip = False,
    keep_best: inversion.KeepBest = False,
    plateau: inversion.Plateau = 0.0,
    coarse: inversion.Coarse = 0.0,
    norm_average: inversion.NormAverage = 0.0,
    class_prior: inversion.ClassPrior = None,
    grid: options.Grid = None,
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
    """Invert the BatchNorm statistics of trained checkpoints into labelled pseudo-images.

    With --statistics, those that dmm record stored take their place. The class mix is taken from
    --class-prior, from dmm.class_counts in the file, or estimated from the statistics. Images that
    their teacher does not recognise are dropped. Models with several inputs are inverted through all of them.
    """
    chosen = options.preset(preset, count, steps, engine)
    size = options.batch_size(batch)
    require_precision(precision)
    require_device_name(device)
    weights = inversion.loss_weights(loss or [])
    settings = Settings(
        chosen.each, chosen.steps, size, seed, engine, precision, weights, jitter, flip, keep_best, plateau / 100,
        norm_average, coarse / 100,
    )  # fmt: skip
    _require_consistent(settings, student)
    if output is None:
        raise DmmError("nowhere to write", hint="name a file with -o pseudo.safetensors")
    given = Given(
        arch, options.input_flags(input_size, mean, std), device, options.numbers(class_prior, "--class-prior")
    )
    sources = resolve_sources(checkpoints, stdin=standard_input())
    settings = replace(settings, count=chosen.count(len(sources)))
    recorded = statistics_of(statistics or [], sources)
    _require_witnesses(settings, recorded)
    rival = resolve_source(student) if student else None
    inputs = files_of((*sources, *recorded.values(), *([rival] if rival else [])))
    check_files(output, grid, inputs=[*inputs, *named_files(checkpoints)], force=force)
    require_teachers(sources, arch, given.prior, recorded)
    if rival:
        require_other(rival, sources)
        require_told([rival], untold(rival, arch))
        require_same_class_names([*sources, rival])
    if dry_run:
        _show_plan(sources, settings, output, json)
    else:
        _execute(sources, output, settings, given, recorded, rival, grid, force, quiet, json)


class Given(NamedTuple):
    """What the user says of the teachers.

    Attributes:
        arch: of their modules, None where the files tell. prior: their class mix, empty where it is to be estimated.
    """

    arch: str | None
    input: options.InputFlags
    device: str
    prior: tuple[float, ...]


def _show_plan(sources: Sequence[Source], settings: Settings, output: Path, json: bool) -> None:
    from ..report.console import emit_plan

    teachers = f"{settings.count} images from each of {len(sources)} teachers"
    emit_plan(f"synthesize {teachers}, {settings.steps} steps -> {output}", as_json=json)


def _execute(
    sources: Sequence[Source],
    output: Path,
    settings: Settings,
    given: Given,
    recorded: Mapping[Pair, Source],
    student: Source | None,
    grid: Path | None,
    force: bool,
    quiet: bool,
    json: bool,
) -> None:
    from ..report.console import Progress, status

    with joined() as ranks:
        manifest, data = synthesize_sources(
            sources, output, settings, arch=given.arch, flags=given.input, device=given.device, prior=given.prior,
            recorded=recorded, student=student, force=force, ranks=ranks, on_progress=Progress(quiet),
            on_warning=lambda text: status(f"warning: {text}", quiet=quiet or not ranks.is_first),
        )  # fmt: skip
    if ranks.is_first:
        fewer = f", {manifest.steps.taken} of {manifest.steps.planned} steps" if settings.plateau else ""
        status(f"computed on {manifest.device} in {manifest.seconds:.0f} s{fewer}", quiet=quiet)
        if grid:
            _draw(data, output, grid, force, quiet)
        _report(manifest, quiet, json)


def _require_consistent(settings: Settings, student: str | None) -> None:
    """Refuse options that the engine has no use for, a batch too small for it, and a loss that lacks a student."""
    if settings.engine == "generator" and settings.batch is not None and settings.batch < PARTS:
        raise DmmError(
            f"--batch {settings.batch} is too small for generators: the {PARTS} parts of a mixture share it",
            hint=f"--batch {PARTS} or more, or --engine pixels",
        )
    of = {"keep_best": "pixels", "coarse": "pixels", "norm_average": "generator"}
    idle = [name for name, engine in of.items() if getattr(settings, name) and engine != settings.engine]
    if idle:
        raise DmmError(
            f"--{idle[0].replace('_', '-')} is of the other engine",
            hint=f"add --engine {of[idle[0]]}, or leave it out",
        )
    if "adversarial" in settings.weights and student is None:
        raise DmmError("the adversarial loss compares the teacher with a student", hint="name one with --student")


def _require_witnesses(settings: Settings, recorded: Collection[Pair]) -> None:
    """Refuse a loss that lacks statistics of one teacher's data in the network of another."""
    if "cross_norm" in settings.weights and all(owner == model for owner, model in recorded):
        raise DmmError(
            "the cross_norm loss needs statistics of a teacher's data in another teacher's network",
            hint="record them: dmm record OTHER --data DATA --owner TEACHER -o stats.safetensors",
        )


def _draw(data: PseudoData, output: Path, grid: Path, force: bool, quiet: bool) -> None:
    from ..report.console import status
    from ..report.figures import image_grid

    try:
        image_grid(data, grid, force=force)
    except DmmError as error:
        again = f"dmm inspect {shlex.quote(str(output))} --grid FILE draws them"
        raise DmmError(error.what, evidence=[f"the pseudo-data are written: {output}"], hint=again) from error
    status(f"wrote {grid}", quiet=quiet)


def synthesize_sources(
    sources: Sequence[Source],
    output: Path,
    settings: Settings,
    *,
    arch: str | None,
    device: str,
    flags: options.InputFlags = options.InputFlags(),
    prior: tuple[float, ...] = (),
    recorded: Mapping[Pair, Source] | None = None,
    student: Source | None = None,
    force: bool = False,
    ranks: Ranks = Ranks(),
    on_progress=None,
    on_warning: Callable[[str], None] = lambda _: None,
) -> tuple[SynthesisManifest, PseudoData]:
    """Load the teachers, synthesise, and write the pseudo-data file; go on from what an interrupted call has done.

    For ``recorded`` see ``load_teachers``, for ``student`` ``synthesis.task``.
    """
    from ..manifest import SynthesisManifest
    from ..runtime import Host, describe_device, resolve_device, resolve_precision
    from ..synthesis.inversion import synthesize as invert
    from ..synthesis.memory import Room
    from ..synthesis.objective import Objective
    from ..synthesis.pseudodata import save_pseudo_data

    where = resolve_device(device)
    settings = replace(settings, precision=resolve_precision(settings.precision, where))
    teachers, spec = load_teachers(sources, arch, where, prior, flags, recorded)
    teachers = [replace(teacher, precision=settings.precision) for teacher in teachers]
    rival = student and load_student(student, teachers[0].num_classes, spec, where, flags, arch)
    started = time.monotonic()
    settings, idle = _without_idle(settings, teachers, spec, where, rival)
    warnings = _partial_statistics(teachers, spec, where) + idle
    for warning in warnings:
        on_warning(warning)
    files = sorted((recorded or {}).values(), key=lambda file: file.sha256)
    statistics = [file.sha256 for file in files]
    depends = {
        "sources": [source.sha256 for source in sources],
        "input": asdict(spec),
        "prior": prior,
        "arch": arch,
        "statistics": statistics,
        "student": student and student.sha256,
    }
    ranks.require_same(**depends, **settings.record(), device=where.type)
    room = Room(teachers, spec, settings, where, ranks.local, rival)
    if settings.batch is None:
        settings = replace(settings, batch=min(ranks.gather(room.fitting_batch())))
    replace(room, settings=settings).require()
    parameters = {**settings.record(), "weights": Objective(settings.weights, teachers, rival).weights}
    with resumable(output, **depends, **parameters, device=where.type) as reached:
        made = invert(teachers, spec, settings, Host(where, reached, ranks, on_progress), rival)
        if ranks.is_first:
            facts = {"statistics": json.dumps(statistics)} if statistics else {}
            facts |= {"student": json.dumps({"label": student.label, "sha256": student.sha256})} if student else {}
            metadata = stamp("synthesize", parameters, device=where.type, seed=str(settings.seed), **facts)
            read = [*sources, *files, *([student] if student else [])]
            inputs = files_of(read)
            save_pseudo_data(output, made.data, metadata, inputs=inputs, force=force)
        ranks.wait()
    manifest = SynthesisManifest(
        sources=records(sources),
        teachers=tuple(_teacher_report(number, teachers, made.data) for number in range(len(teachers))),
        parameters=parameters,
        device=describe_device(where),
        seconds=time.monotonic() - started,
        history=made.history,
        output=str(output),
        steps=made.steps,
        student=records([student])[0] if student else None,
        warnings=tuple(warnings),
    )
    return manifest, made.data


def _without_idle(
    settings: Settings, teachers: Sequence[Teacher], spec: Spec, device: torch.device, student: nn.Module | None
) -> tuple[Settings, list[str]]:
    """Settings without what these networks have no use for, and what that was."""
    from ..examples import named
    from ..synthesis.resolution import why_whole

    told = []
    whole = why_whole(teachers, spec, device, student) if settings.coarse else ""
    if whole:
        settings = replace(settings, coarse=0.0)
        told.append(f"no steps at half the resolution: {whole}")
    if not any(part.is_image for part in named(spec).values()):
        rough = settings.weights.get("total_variation")
        idle = {"--jitter": settings.jitter, "--flip": settings.flip, "--loss total_variation": rough}
        settings = replace(settings, jitter=0, flip=False)
        told += [f"{flag} changes nothing: no image goes in" for flag, wanted in idle.items() if wanted]
    return settings, told


def _partial_statistics(teachers: Sequence[Teacher], spec: Spec, device: torch.device) -> list[str]:
    """What recorded statistics leave out of the layers that a network runs."""
    from ..norms import layers_that_run
    from ..spaces import example

    told = []
    for teacher in (teacher for teacher in teachers if teacher.statistics):
        known = {layer.module for layer in teacher.layers}
        used = layers_that_run(teacher.model, example(spec, device))
        missing = [name for name, module in used.items() if module not in known]
        if missing:
            told.append(f"{teacher.statistics} leaves out layers of {teacher.label}: {listed(missing)}")
    return told


def _teacher_report(number: int, teachers: list[Teacher], data: PseudoData) -> TeacherReport:
    from ..manifest import TeacherReport

    record = data.teachers[number]
    mine = data.confidence[data.teacher_id == number]
    return TeacherReport(
        record.label,
        record.sha256,
        record.prior,
        teachers[number].prior_from or "estimated",
        record.accepted,
        record.rejected,
        float(mine.astype(float).mean()),
        teachers[number].statistics or None,
        tuple(witness.statistics for witness in teachers[number].witnesses),
    )


def _report(manifest: SynthesisManifest, quiet: bool, json: bool) -> None:
    from ..manifest import dump
    from ..report.console import emit
    from ..report.tables import render, teacher_table

    if json:
        emit(dump(manifest))
    elif quiet:
        emit(manifest.output)
    else:
        emit(render([teacher_table(manifest)], "table"))
