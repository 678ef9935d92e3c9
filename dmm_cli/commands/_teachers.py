"""Frozen networks: teachers with what is known of them, and a student to work against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from shlex import quote
from typing import TYPE_CHECKING

from ..archspec import stated_classes
from ..errors import DmmError, capped, printable
from ..inputs import Source, twins
from ..metadata import (
    class_counts,
    class_names,
    require_class_mix,
    require_names_of_all,
    stated_input,
    without_statistics,
)
from ..names import is_statistic
from ..trust import require_trust
from . import _options as options
from ._statistics import Pair, recorded_counts, require_input

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..spaces import Spec
    from ..synthesis.statistics import NormLayer
    from ..synthesis.teacher import Teacher, Witness

SAME_CLASSES = "a student needs the classes of its teachers, in their order"
ONE_ORDER = "bring them into one: dmm merge {first} {other} --weights 0,1 --align never -o in-order.safetensors"


def require_teachers(
    sources: Sequence[Source],
    arch: str | None,
    prior: tuple[float, ...] = (),
    recorded: Mapping[Pair, Source] | None = None,
) -> None:
    """Refuse checkpoints that cannot teach together, without running them; for the arguments see ``load_teachers``."""
    require_same_class_names(sources)
    require_told(sources, arch, prior, recorded)
    _require_distinct(sources)
    for source in sources:
        named = arch or source.metadata.get("dmm.arch")
        known = bool(recorded) and (source.sha256, source.sha256) in recorded
        if named and not known and not any(map(is_statistic, source.tensors)):
            raise without_statistics(str(source.path))


def require_told(
    sources: Sequence[Source],
    arch: str | None,
    prior: tuple[float, ...] = (),
    recorded: Mapping[Pair, Source] | None = None,
) -> None:
    """Refuse, by the headers alone, checkpoints that tell of themselves what no network can be.

    Args:
        prior, recorded: see ``load_teachers``.
    """
    for source in sources:
        stated_input(source)
        spec = arch or source.metadata.get("dmm.arch")
        if not arch:
            require_trust(source)
        classes = stated_classes(spec) if spec else None
        if classes:
            require_names_of_all(source, classes)
        counts, where = _told_counts(prior, recorded or {}, source)
        if counts:
            require_class_mix(counts, classes, where)


def _told_counts(
    prior: tuple[float, ...], recorded: Mapping[Pair, Source], source: Source
) -> tuple[Sequence[float] | None, str]:
    """How often a checkpoint saw every class, None where nothing tells, and what tells it."""
    if prior:
        return prior, "--class-prior"
    told = recorded_counts(recorded, source)
    return (told[1], str(told[0])) if told else (class_counts(source), source.label)


def load_teachers(
    sources: Sequence[Source],
    arch: str | None,
    device: torch.device,
    prior: tuple[float, ...] = (),
    flags: options.InputFlags = options.InputFlags(),
    recorded: Mapping[Pair, Source] | None = None,
) -> tuple[list[Teacher], Spec]:
    """Frozen teachers with the priors that are known, and the input they share.

    Args:
        recorded: files of recorded statistics, as ``statistics_of`` finds them.
    """
    from .. import architectures, loading
    from ..layout import require_fit
    from ..spaces import example, in_words
    from ..synthesis import prior as priors
    from ..synthesis.soft import require_soft
    from ..synthesis.teacher import Teacher, freeze, require_statistics, require_use

    require_same_class_names(sources)
    recorded = recorded or {}
    teachers, specs = [], {}
    for source in sources:
        model, _ = loading.load_model(source, arch)
        spec = architectures.input_spec(source, model, **asdict(flags))
        specs.setdefault(spec, source.label)
        file = recorded.get((source.sha256, source.sha256))
        model = freeze(model, spec, device)
        require_soft(str(source.path), model, spec, device)
        layers = _known_layers(model, file, spec, device)
        require_statistics(str(source.path), layers, str(file.path) if file else "")
        require_fit(str(source.path), model, example(spec, device))
        classes = architectures.num_classes(model)
        require_names_of_all(source, classes)
        counts, where = _told_counts(prior, recorded, source)
        known = priors.from_counts(list(counts), classes, where) if counts else None
        origin = "" if known is None else "--class-prior" if prior else "dmm.class_counts"
        path, names = str(file.path) if file else "", class_names(source) or ()
        teacher = Teacher(source.label, source.sha256, model, layers, classes, known, origin, path, classes=names)
        teachers.append(teacher)
        require_use(str(source.path), teacher, spec, device)
    if len(specs) > 1:
        raise DmmError(
            "the teachers take different inputs",
            evidence=[f"{label}: {in_words(s)}" for s, label in specs.items()],
            hint="synthesize them apart, one file for each kind of input",
        )
    _require_same_number(sources, teachers)
    spec = next(iter(specs))
    witnesses = [_witnesses(place, teachers, recorded, spec, device) for place in range(len(teachers))]
    return [replace(teacher, witnesses=found) for teacher, found in zip(teachers, witnesses, strict=True)], spec


def _require_same_number(sources: Sequence[Source], teachers: Sequence[Teacher]) -> None:
    """Raise DmmError unless all have as many classes: their logits go side by side, and one student learns them."""
    if len({teacher.num_classes for teacher in teachers}) > 1:
        pairs = zip(sources, teachers, strict=True)
        raise DmmError(
            "the teachers have different numbers of classes",
            evidence=capped([f"{source.path}: {teacher.num_classes}" for source, teacher in pairs]),
            hint="synthesize those of the same classes, one file for each list of classes",
        )


def _witnesses(
    place: int, teachers: Sequence[Teacher], recorded: Mapping[Pair, Source], spec: Spec, device: torch.device
) -> tuple[Witness, ...]:
    """The other networks that a teacher's data were recorded in, the next in line first.

    Where all were, no two teachers have the same witness in one turn.
    """
    from ..synthesis.teacher import Witness

    owner = teachers[place].sha256
    others = [
        (other.model, recorded.get((owner, other.sha256))) for other in (*teachers[place + 1 :], *teachers[:place])
    ]
    return tuple(
        Witness(model, _ordered(model, _recorded_layers(model, file, spec, device)), str(file.path))
        for model, file in others
        if file is not None
    )


def _known_layers(model: nn.Module, statistics: Source | None, spec: Spec, device: torch.device) -> list[NormLayer]:
    """Layers with running statistics of batches, and those with recorded ones, which win; in module order."""
    from ..norms import batch_norm_layers
    from ..synthesis.statistics import NormLayer

    running = batch_norm_layers(model)
    known = {name: NormLayer(layer, layer.running_mean, layer.running_var) for name, layer in running}
    if statistics is not None:
        known |= _recorded_layers(model, statistics, spec, device)
    return _ordered(model, known)


def _recorded_layers(model: nn.Module, statistics: Source, spec: Spec, device: torch.device) -> dict[str, NormLayer]:
    """A network's layers by name, with the statistics of a file that must fit it and its input."""
    from ..norms import norm_inputs
    from ..synthesis.recorded import load_recorded

    require_input(statistics, spec)
    return load_recorded(statistics, norm_inputs(model), device)


def _ordered(model: nn.Module, layers: Mapping[str, NormLayer]) -> list[NormLayer]:
    """Layers in the order of the modules."""
    return [layers[name] for name, _ in model.named_modules() if name in layers]


def require_other(student: Source, teachers: Sequence[Source]) -> None:
    """Raise DmmError when the student is one of the teachers: they agree on everything."""
    same = [teacher for teacher in teachers if teacher.sha256 == student.sha256]
    if same:
        raise DmmError(
            f"the student {student.path} is the teacher {same[0].path}",
            evidence=[f"sha256 of both: {student.sha256}"],
            hint="name the checkpoint that dmm distill made of these teachers, or leave --student out",
        )


def _require_distinct(teachers: Sequence[Source]) -> None:
    """Raise DmmError when a teacher is named twice, be it as a copy or by a link: only one of them could teach."""
    for first, teacher in twins(teachers):
        raise DmmError(
            f"{teacher.path} is the same checkpoint as {first.path}",
            evidence=[f"{source.label}: sha256 {source.sha256}" for source in (first, teacher)],
            hint="leave one of them out",
        )


def require_same_class_names(sources: Sequence[Source]) -> None:
    """Raise DmmError when checkpoints that tell their classes tell others, or another order."""
    told = {source.path: class_names(source) for source in sources}
    lists = {path: names for path, names in told.items() if names}
    if len(set(lists.values())) < 2:
        return
    first, *others = lists
    other = next(path for path in others if lists[path] != lists[first])
    alike = len({tuple(sorted(names)) for names in lists.values()}) == 1
    raise DmmError(
        f"the checkpoints name {'the same classes in another order' if alike else 'different classes'}",
        evidence=capped([f"{path}: {printable(', '.join(names))}" for path, names in lists.items()]),
        hint=ONE_ORDER.format(first=quote(str(first)), other=quote(str(other))) if alike else SAME_CLASSES,
    )


def untold(source: Source, arch: str | None) -> str | None:
    """What ``--arch``, which is meant for others, says of a checkpoint: nothing, where its file tells."""
    return None if "dmm.arch" in source.metadata else arch


def load_student(
    student: Source,
    num_classes: int,
    spec: Spec,
    device: torch.device,
    flags: options.InputFlags,
    arch: str | None,
) -> nn.Module:
    """A frozen student of any architecture: its own, or the teachers' where it does not tell.

    Raises:
        DmmError: it has other classes than the teachers, or takes another input.
    """
    from .. import architectures, loading
    from ..layout import require_fit
    from ..spaces import example, in_words
    from ..synthesis.teacher import freeze

    model, _ = loading.load_model(student, untold(student, arch))
    found = architectures.num_classes(model)
    if found != num_classes:
        raise DmmError(
            f"the student {student.path} has {found} classes, its teachers {num_classes}",
            hint=SAME_CLASSES,
        )
    taken = architectures.input_spec(student, model, **asdict(flags))
    if taken != spec:
        raise DmmError(
            f"the student {student.path} takes another input than its teachers",
            evidence=[f"student: {in_words(taken)}", f"teachers: {in_words(spec)}"],
            hint="say what both take with --input-size, --mean and --std",
        )
    require_fit(str(student.path), model, example(spec))
    return freeze(model, spec, device)
