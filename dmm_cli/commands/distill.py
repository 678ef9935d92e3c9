"""dmm distill: teach the merged model what merging lost."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..devices import require_device_name, require_precision
from ..distillation.settings import Settings
from ..errors import CheckFailed, DmmError, capped, printable
from ..files import check_output
from ..inputs import Source, files_of, named_files, resolve_source, resolve_sources, twins
from ..metadata import class_names
from ..ranks import Ranks, joined
from ..synthesis.kind import require_made_from, require_pseudo_data
from . import _options as options
from ._provenance import inherited, lineage, records, stamp
from ._run import epilog, resumable, standard_input
from ._teachers import SAME_CLASSES, require_same_class_names, require_told, untold

SAME_INPUT = "student and teachers are shown the pseudo-data as they are: all need the same input"

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from ..distillation.lessons import Lessons
    from ..manifest import DistillManifest, Start
    from ..synthesis.pseudodata import PseudoData

EPILOG = epilog(
    "dmm distill 'merged/group-*.safetensors' merged/merge.json --data pseudo.safetensors -o model.safetensors",
    "dmm distill student.safetensors site-*.safetensors --data pseudo.safetensors --steps 1000 -o out.safetensors",
)


def distill(
    student: Annotated[
        str,
        typer.Argument(
            metavar="STUDENT",
            help="The checkpoint to refine; of several ('merged/group-*.safetensors', in quotes, or @list.txt) "
            "the one that names most targets. None is changed.",
        ),
    ],
    teachers: Annotated[
        list[str],
        typer.Argument(metavar="TEACHER...", help="Teachers of the pseudo-data, or merge.json, or -."),
    ],
    data: Annotated[Path, options.option("--data", help="Pseudo-data from dmm synthesize.")],
    output: options.NeededOutput = None,
    steps: Annotated[
        int, options.option("--steps", help="Optimiser steps; 0 only resets BatchNorm.", min=0)
    ] = Settings.steps,
    batch: Annotated[int, options.option("--batch", help="Images per step.", min=2)] = Settings.batch,
    fail_under: Annotated[
        float | None,
        options.gate("Exit 1 when the student retains less than this of a class of a teacher, in per cent."),
    ] = None,
    learning_rate: Annotated[
        float, options.option("--learning-rate", help="Peak of the one-cycle schedule.")
    ] = Settings.learning_rate,
    temperature: Annotated[
        float, options.option("--temperature", help="Softens both sides' logits.")
    ] = Settings.temperature,
    arch: options.Arch = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    seed: options.Seed = 0,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json: options.JsonAlone = False,
    dry_run: options.DryRun = False,
) -> None:
    """Refine a student on the pseudo-data of its teachers.

    All teachers answer every image together; whom to believe is learned from the pseudo-data. BatchNorm
    statistics are reset on the pseudo-data before and after. The last step is the result, its biases set
    right: it names every class of the pseudo-data as often as all teachers together do.
    """
    if output is None:
        raise DmmError("nowhere to write", hint="name a file with -o model.safetensors")
    if learning_rate <= 0 or temperature <= 0:
        raise DmmError("--learning-rate and --temperature must be above zero")
    require_precision(precision)
    require_device_name(device)
    students = resolve_sources([student])
    sources = resolve_sources(teachers, stdin=standard_input())
    pseudo = resolve_source(str(data))
    read = [*files_of((*students, pseudo, *sources)), *named_files([student, *teachers])]
    check_output(output, inputs=read, force=force)
    _require_lessons(pseudo, students, sources, arch)

    from ..report.console import Progress, emit_plan, status

    if dry_run:
        names = ", ".join(source.label for source in sources)
        pupil = " or ".join(source.label for source in students)
        emit_plan(f"distill {names} into {pupil} with {data}, {steps} steps -> {output}", as_json=json)
        return

    settings = Settings(steps, batch, learning_rate, temperature, seed=seed, precision=precision)
    with joined() as ranks:
        manifest = distill_sources(
            students, sources, pseudo, output, settings,
            arch=arch, device=device, force=force, ranks=ranks, on_progress=Progress(quiet),
        )  # fmt: skip
        if not ranks.is_first:
            return
    status(f"computed on {manifest.device} in {manifest.seconds:.0f} s", quiet=quiet)
    _report(manifest, quiet, json)
    _check(manifest, fail_under)


def _require_lessons(data: Source, students: Sequence[Source], teachers: Sequence[Source], arch: str | None) -> None:
    """Refuse what headers and hashes tell that cannot be taught."""
    require_pseudo_data(data)
    require_told(students, arch)
    for teacher in teachers:
        require_told([teacher], untold(teacher, arch))
    require_same_class_names([*teachers, *students])  # pseudo-data know teachers by their files: a hint changes others
    require_made_from(data, teachers)
    for _, teacher in twins(teachers):
        raise DmmError(f"{teacher.path} is among the teachers twice", hint="name it once")


def distill_sources(
    students: Sequence[Source],
    teachers: Sequence[Source],
    data: Source,
    output: Path,
    settings: Settings,
    *,
    arch: str | None,
    device: str,
    force: bool = False,
    ranks: Ranks = Ranks(),
    on_progress=None,
) -> DistillManifest:
    """Load the student to start from, refine it, and write the checkpoint; go on from what an interrupted call did."""
    from ..checkpoint import save_like
    from ..distillation.refine import refine
    from ..loading import TORCH_DTYPES
    from ..manifest import DistillManifest, SourceRecord
    from ..norms import norm_layers
    from ..runtime import Host, describe_device, resolve_device, resolve_precision
    from ..synthesis.pseudodata import load_pseudo_data

    where = resolve_device(device)
    settings = replace(settings, precision=resolve_precision(settings.precision, where))
    pseudo = load_pseudo_data(data)
    told = next(filter(None, map(class_names, [*students, *teachers])), pseudo.classes)
    lessons = _lessons(pseudo, told, teachers, where)
    networks = [_network(teacher, untold(teacher, arch), lessons, where) for teacher in teachers if settings.steps]
    student, model, starts = _start(students, arch, lessons, where)
    layers = [layer for _, layer in norm_layers(model)]
    started = time.monotonic()
    parameters = asdict(settings)
    parents = records([student, *teachers])
    depends = {"sources": [parent.sha256 for parent in parents], "data": data.sha256, "arch": arch, **parameters}
    depends["device"] = where.type
    ranks.require_same(**depends)
    with resumable(output, **depends, processes=ranks.count) as reached:
        host = Host(where, reached, ranks, on_progress)
        stored = {name: TORCH_DTYPES[info.dtype] for name, info in student.tensors.items()}
        history, retention = refine(model, layers, lessons, networks, settings, host, stored)
        if ranks.is_first:
            metadata = stamp(
                "distill",
                parameters,
                sources=lineage(parents),
                data=data.sha256,
                device=where.type,
                seed=str(settings.seed),
                retention=jsonlib.dumps([asdict(item) for item in retention]),
            )
            inputs = files_of((student, data, *teachers))
            changed = model.state_dict() if settings.steps else dict(model.named_buffers())
            arrays = {name: value.cpu().numpy() for name, value in changed.items()}
            _require_convergence(arrays, settings)
            taught_by = teachers if settings.steps else None
            metadata |= {**inherited([student], taught_by=taught_by), **_taught_in(pseudo)}
            save_like(output, student, arrays, metadata, inputs=inputs, force=force)
        ranks.wait()
    return DistillManifest(
        student=parents[0],
        starts=starts,
        sources=parents[1:],
        data=SourceRecord(data.label, str(data.path), data.sha256),
        parameters=parameters,
        device=describe_device(where),
        seconds=time.monotonic() - started,
        retention=retention,
        history=history,
        output=str(output),
    )


def _require_convergence(arrays: Mapping[str, np.ndarray], settings: Settings) -> None:
    import numpy as np

    lost = [name for name, array in arrays.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
    if lost:
        raise DmmError(
            f"the student diverged: {len(lost)} of its tensors hold NaN or infinity",
            evidence=capped([printable(name) for name in lost]),
            hint=f"teach it more gently: --learning-rate below {settings.learning_rate:g}",
        )


def _taught_in(data: PseudoData) -> dict[str, str]:
    """The input that the student was taught with, which may be another than its file told, or one it did not tell."""
    from ..images import InputSpec

    return {"dmm.input": jsonlib.dumps(asdict(data.spec))} if isinstance(data.spec, InputSpec) else {}


def _lessons(data: PseudoData, told: tuple[str, ...], teachers: Sequence[Source], device: torch.device) -> Lessons:
    """The rows of the pseudo-data that belong to the named teachers; classes as told, if these are as many."""
    import numpy as np
    import torch

    from ..distillation.lessons import Lessons
    from ..examples import each
    from ..spaces import space_of

    count = data.logits.shape[1]
    places = [data.place_of(teacher) for teacher in teachers]
    rows = np.flatnonzero(np.isin(data.teacher_id, places))
    rank = np.full(len(data.teachers), -1)
    rank[places] = np.arange(len(places))
    return Lessons(
        images=each(data.images[rows], torch.from_numpy).to(device),
        space=space_of(data.spec, device),
        targets=torch.from_numpy(data.targets[rows]).to(device),
        teacher_id=torch.from_numpy(rank[data.teacher_id[rows]]).to(device),
        labels=tuple(teacher.label for teacher in teachers),
        classes=told if len(told) == count else tuple(map(str, range(count))),
    )


def _start(
    students: Sequence[Source], arch: str | None, lessons: Lessons, device: torch.device
) -> tuple[Source, nn.Module, tuple[Start, ...]]:
    """The student that names most targets, the first of equals, its module, and what all of them name."""
    from ..distillation.start import retained
    from ..manifest import Start

    starts: list[Start] = []
    for source in students:
        _require_writable(source)
        candidate = _network(source, arch, lessons, device)
        starts.append(Start(source.label, retained(candidate, lessons)))
        if starts[-1].retained > max((start.retained for start in starts[:-1]), default=-1.0):
            best, model = source, candidate
    return best, model, tuple(starts)


def _require_writable(student: Source) -> None:
    """Raise DmmError for tensors of a kind that is read but not written: the student keeps its dtypes."""
    from ..checkpoint import WRITABLE

    odd = [info for info in student.tensors.values() if info.dtype not in WRITABLE]
    if odd:
        raise DmmError(
            f"a student is not written in {odd[0].dtype}, as {student.path} is",
            evidence=capped([printable(info.name) for info in odd]),
            hint="store it as float16 or wider",
        )


def _network(source: Source, arch: str | None, lessons: Lessons, device: torch.device) -> nn.Module:
    """A frozen network of the pseudo-data's classes, on its device.

    Raises:
        DmmError: it has other classes, or takes another input.
    """
    from .. import architectures, loading
    from ..layout import place, require_fit

    model, _ = loading.load_model(source, arch)
    found = architectures.num_classes(model)
    if found != len(lessons.classes):
        raise DmmError(
            f"{source.path} has {found} classes, the pseudo-data {len(lessons.classes)}",
            hint=SAME_CLASSES,
        )
    shown = next(lessons.in_order(2))
    place(model.requires_grad_(False), device, shown)
    require_fit(str(source.path), model, shown, SAME_INPUT)
    return model


def _check(manifest: DistillManifest, bound: float | None) -> None:
    low = sorted(
        (item.after, f"class {item.name} of {teacher.label}: {item.after:.1f} on {item.images} images")
        for teacher in manifest.retention
        for item in teacher.classes
        if bound is not None and item.after < bound
    )
    if low:
        raise CheckFailed(f"retained agreement below {bound}", evidence=[line for _, line in low])


def _report(manifest: DistillManifest, quiet: bool, json: bool) -> None:
    from ..manifest import dump
    from ..report.console import emit
    from ..report.tables import render, retention_table, start_table

    if json:
        emit(dump(manifest))
    elif quiet:
        emit(manifest.output)
    else:
        choice = [start_table(manifest)] if len(manifest.starts) > 1 else []
        emit(render([*choice, retention_table(manifest)], "table"))
