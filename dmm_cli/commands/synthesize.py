"""dmm synthesize: pseudo-data from normalisation statistics."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..devices import require_precision
from ..errors import DmmError
from ..files import check_output
from ..inputs import Source, resolve_sources
from ..ranks import Ranks, joined
from ..synthesis import ENGINES, LOSSES
from . import _options as options
from ._provenance import records, stamp
from ._run import epilog, guarded, resumable
from ._statistics import require_input, statistics_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..manifest import SynthesisManifest, TeacherReport
    from ..spaces import Spec
    from ..synthesis.pseudodata import PseudoData
    from ..synthesis.settings import Settings
    from ..synthesis.statistics import NormLayer
    from ..synthesis.teacher import Teacher

EPILOG = epilog(
    "dmm synthesize site-*.safetensors -o pseudo.safetensors --grid pseudo.png",
    "dmm synthesize merged/merge.json --count 2048 --steps 800 --seed 1 -o pseudo.safetensors",
)
COUNT, STEPS, BATCH = 1024, 300, 64


@guarded
def synthesize(
    checkpoints: options.Checkpoints,
    output: options.Output = None,
    count: Annotated[int, options.option("--count", help="Images per teacher.", min=1)] = COUNT,
    steps: Annotated[int, options.option("--steps", help="Optimiser steps.", min=1)] = STEPS,
    batch: Annotated[
        str,
        options.option(
            "--batch",
            help="Images per teacher and step; auto: as many as the free memory holds, a power of two up to 256.",
        ),
    ] = str(BATCH),
    engine: Annotated[
        str, options.option("--engine", help="; ".join(f"{e}: {ENGINES.summary(e)}" for e in ENGINES) + ".")
    ] = "generator",
    loss: Annotated[
        list[str] | None,
        options.option("--loss", help=f"Weight of a loss ({', '.join(LOSSES)}): total_variation=0.1. Repeatable."),
    ] = None,
    class_prior: Annotated[
        str | None,
        options.option("--class-prior", help="Class mix of every teacher: 10,10,1. Else it is estimated."),
    ] = None,
    grid: Annotated[
        Path | None, options.option("--grid", help="Draw the images to a .png or .svg file, a row per class.")
    ] = None,
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
    json: options.Json = False,
    dry_run: options.DryRun = False,
) -> None:
    """Invert the BatchNorm statistics of trained checkpoints into labelled pseudo-images.

    With --statistics, those that dmm record stored take their place. The class mix is taken from
    --class-prior, from dmm.class_counts in the file, or estimated from the statistics. Images that
    their teacher does not recognise are dropped. Models with several inputs are inverted through all of them.
    """
    ENGINES.check(engine)
    size = options.batch_size(batch)
    require_precision(precision)
    weights = {LOSSES.check(name): value for name, value in options.key_values(loss or [], "--loss").items()}
    if output is None:
        raise DmmError("nowhere to write", hint="name a file with -o pseudo.safetensors")
    flags = options.input_flags(input_size, mean, std)
    sources = resolve_sources(checkpoints, stdin=sys.stdin)
    recorded = statistics_of(statistics or [], sources)
    inputs = [path for source in (*sources, *recorded.values()) for path in source.files]
    check_output(output, inputs=inputs, force=force)

    from ..report.console import Progress, emit, status

    if dry_run:
        emit(f"synthesize {count} images from each of {len(sources)} teachers, {steps} steps -> {output}")
        return

    from ..synthesis.settings import Settings

    settings = Settings(count, steps, size, seed, engine, precision, weights)
    prior = options.numbers(class_prior, "--class-prior")
    with joined() as ranks:
        manifest, data = synthesize_sources(
            sources, output, settings, arch=arch, flags=flags, device=device, prior=prior, recorded=recorded,
            force=force, ranks=ranks, on_progress=Progress(quiet),
        )  # fmt: skip
    if ranks.is_first:
        status(f"computed on {manifest.device} in {manifest.seconds:.0f} s", quiet=quiet)
        if grid:
            _draw(data, grid, force, quiet)
        _report(manifest, quiet, json)


def _draw(data: PseudoData, path: Path, force: bool, quiet: bool) -> None:
    from ..report.console import status
    from ..report.figures import image_grid

    image_grid(data, path, force=force)
    status(f"wrote {path}", quiet=quiet)


def synthesize_sources(
    sources: Sequence[Source],
    output: Path,
    settings: Settings,
    *,
    arch: str | None,
    device: str,
    flags: options.InputFlags = options.InputFlags(),
    prior: tuple[float, ...] = (),
    recorded: Mapping[str, Source] | None = None,
    force: bool = False,
    ranks: Ranks = Ranks(),
    on_progress=None,
) -> tuple[SynthesisManifest, PseudoData]:
    """Load the teachers, synthesise, and write the pseudo-data file; go on from what an interrupted call has done.

    For ``recorded`` see ``load_teachers``.
    """
    from ..manifest import SynthesisManifest
    from ..runtime import Host, describe_device, resolve_device, resolve_precision
    from ..synthesis.inversion import synthesize as invert
    from ..synthesis.memory import fitting_batch
    from ..synthesis.objective import Objective
    from ..synthesis.pseudodata import save_pseudo_data

    where = resolve_device(device)
    settings = replace(settings, precision=resolve_precision(settings.precision, where))
    teachers, spec = load_teachers(sources, arch, where, prior, flags, recorded)
    teachers = [replace(teacher, precision=settings.precision) for teacher in teachers]
    started = time.monotonic()
    if settings.batch is None:
        fitting = fitting_batch(teachers, spec, settings, where, ranks.local)
        settings = replace(settings, batch=min(ranks.gather(fitting)))
    parameters = {**asdict(settings), "weights": Objective(settings.weights).weights}
    files = sorted((recorded or {}).values(), key=lambda file: file.sha256)
    statistics = [file.sha256 for file in files]
    depends = {
        "sources": [source.sha256 for source in sources],
        "input": asdict(spec),
        "prior": prior,
        "arch": arch,
        "statistics": statistics,
    }
    with resumable(output, **depends, **parameters, device=where.type) as reached:
        data, history = invert(teachers, spec, settings, Host(where, reached, ranks, on_progress))
        if ranks.is_first:
            facts = {"statistics": json.dumps(statistics)} if statistics else {}
            metadata = stamp("synthesize", parameters, device=where.type, seed=str(settings.seed), **facts)
            inputs = [path for source in (*sources, *files) for path in source.files]
            save_pseudo_data(output, data, metadata, inputs=inputs, force=force)
        ranks.wait()
    manifest = SynthesisManifest(
        sources=records(sources),
        teachers=tuple(_teacher_report(number, teachers, data) for number in range(len(teachers))),
        parameters=parameters,
        device=describe_device(where),
        seconds=time.monotonic() - started,
        history=history,
        output=str(output),
    )
    return manifest, data


def load_teachers(
    sources: Sequence[Source],
    arch: str | None,
    device: torch.device,
    prior: tuple[float, ...] = (),
    flags: options.InputFlags = options.InputFlags(),
    recorded: Mapping[str, Source] | None = None,
) -> tuple[list[Teacher], Spec]:
    """Frozen teachers with the priors that are known, and the input they share.

    Args:
        recorded: files of recorded statistics by the SHA-256 of their teachers.
    """
    from .. import architectures
    from ..spaces import in_words
    from ..synthesis import prior as priors
    from ..synthesis.soft import require_soft
    from ..synthesis.teacher import Teacher, freeze, require_statistics

    teachers, specs = [], {}
    for source in sources:
        model, _ = architectures.load_model(source, arch)
        spec = architectures.input_spec(source, model, **asdict(flags))
        specs.setdefault(spec, source.label)
        file = (recorded or {}).get(source.sha256)
        model = freeze(model, device)
        require_soft(str(source.path), model, spec, device)
        layers = _known_layers(model, file, spec, device)
        require_statistics(str(source.path), layers)
        classes = architectures.num_classes(model)
        counts = prior or (file and architectures.class_counts(file)) or architectures.class_counts(source)
        known = priors.from_counts(list(counts), classes, source.label) if counts else None
        origin = "" if known is None else "--class-prior" if prior else "dmm.class_counts"
        path = str(file.path) if file else ""
        teachers.append(Teacher(source.label, source.sha256, model, layers, classes, known, origin, path))
    if len(specs) > 1:
        raise DmmError(
            "the teachers take different inputs",
            evidence=[f"{label}: {in_words(s)}" for s, label in specs.items()],
            hint="synthesize them apart, one file for each kind of input",
        )
    return teachers, next(iter(specs))


def _known_layers(model: nn.Module, statistics: Source | None, spec: Spec, device: torch.device) -> list[NormLayer]:
    """Layers with running statistics, and those with recorded ones, which win; in module order."""
    from .. import architectures
    from ..synthesis.recorded import load_recorded
    from ..synthesis.statistics import NormLayer

    running = architectures.norm_layers(model)
    known = {name: NormLayer(layer, layer.running_mean, layer.running_var) for name, layer in running}
    if statistics is not None:
        require_input(statistics, spec)
        known |= load_recorded(statistics, architectures.norm_inputs(model), device)
    return [known[name] for name, _ in model.named_modules() if name in known]


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
        float(data.bn_loss[-1]) if len(data.bn_loss) else None,
        float(mine.astype(float).mean()),
        teachers[number].statistics or None,
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
