"""dmm evaluate: accuracy on labelled data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from ..errors import CheckFailed, DmmError, listed
from ..inputs import Source, files_of, named_files, resolve_sources
from ..metadata import class_names, require_names_of_all
from . import _options as options
from ._outputs import check_files
from ._run import epilog, standard_input

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..evaluation import LabelledData
    from ..manifest import Evaluation
    from ..spaces import Spec

EPILOG = epilog(
    "dmm evaluate merged.safetensors --data test.safetensors",
    "dmm evaluate sites/*.safetensors --data photos/ --ensemble --json",
)


def evaluate(
    checkpoints: options.Checkpoints,
    data: Annotated[
        Path,
        options.option("--data", help="Labelled data: .safetensors or .npz (images, labels), or an ImageFolder."),
    ],
    ensemble: Annotated[
        bool, options.option("--ensemble", help="Add the mean of all models' probabilities, and of their logits.")
    ] = False,
    fail_under: Annotated[float | None, options.gate("Exit 1 when an accuracy is below this, in per cent.")] = None,
    arch: options.Arch = None,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    device: options.Device = "auto",
    format: options.Format = "table",
    json: options.Json = False,
    output: options.Output = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure accuracy and recall per class on labelled data.

    Images are resized to the model's input and normalised as the checkpoint says. Of a model with several
    inputs the file holds an array for each, by its name. Classes that the data name are found by name.
    """
    style = options.chosen_format(format, json)
    flags = options.input_flags(input_size, mean, std)
    sources = resolve_sources(checkpoints, stdin=standard_input())
    check_files(output, inputs=[*files_of(sources), *named_files(checkpoints), data], force=force)

    from ..manifest import dump
    from ..report.console import Progress, emit
    from ..report.tables import accuracy_tables, render

    result = evaluate_sources(
        sources, data, arch=arch, flags=flags, device=device, ensemble=ensemble, on_progress=Progress(quiet)
    )
    if style == "json":
        shown = dump(result)
    elif quiet:
        shown = "\n".join(f"{row.accuracy:.4f}" for row in result.rows)
    else:
        shown = render(accuracy_tables(result), style)
    emit(shown, output, force=force)
    low = [row for row in result.rows if fail_under is not None and row.accuracy < fail_under]
    if low:
        raise CheckFailed(
            f"accuracy below {fail_under} %", evidence=[f"{row.label}: {row.accuracy!r} %" for row in low]
        )


def evaluate_sources(
    sources: Sequence[Source],
    data: Path,
    *,
    arch: str | None,
    flags: options.InputFlags,
    device: str,
    ensemble: bool,
    on_progress: Callable[..., None],
) -> Evaluation:
    """Accuracy of every checkpoint and, if asked, of their ensembles."""
    from .. import evaluation
    from ..examples import named
    from ..manifest import Evaluation
    from ..report.console import status
    from ..runtime import resolve_device

    load = cache(evaluation.load_labelled)
    answered = _answered(
        sources, lambda spec: load(data, tuple(named(spec))), arch, flags, resolve_device(device), on_progress
    )
    warning = evaluation.taken_in_order(answered.data, answered.classes)
    if warning:
        status(f"warning: {warning}")
    rows = [(source.label, *pair) for source, *pair in zip(sources, answered.logits, answered.labels, strict=True)]
    if ensemble:
        together = evaluation.ensembles(answered.logits)
        rows += [(name, answers, answered.labels[0]) for name, answers in together.items()]
    names = answered.classes or answered.data.classes or tuple(map(str, range(answered.logits[0].shape[1])))
    return Evaluation(str(data), len(answered.data), names, tuple(evaluation.score(*row) for row in rows))


class _Answered(NamedTuple):
    """What checkpoints say to labelled data.

    Attributes:
        data: as they were shown.
        logits: of each, (N, K), their classes in one order. labels: (N,) in that order, once for each.
        classes: names in that order, empty where no checkpoint has any.
    """

    data: LabelledData
    logits: list[torch.Tensor]
    labels: list[torch.Tensor]
    classes: tuple[str, ...]


def _answered(
    sources: Sequence[Source],
    load: Callable[[Spec], LabelledData],
    arch: str | None,
    flags: options.InputFlags,
    device: torch.device,
    on_progress: Callable[..., None] | None = None,
) -> _Answered:
    """What checkpoints say to labelled data, which ``load`` gives as a network takes them.

    Raises:
        DmmError: they cannot be judged by the data, or not in one table.
    """
    import torch

    from .. import evaluation

    predictions, labels, names = [], [], ()
    for number, source in enumerate(sources):
        own = class_names(source) or ()
        model, spec = _network(source, arch, flags)
        labelled = load(spec)
        told = _as_part(on_progress, number, len(sources)) if on_progress else None
        answers = evaluation.predict(model, labelled, spec, device, on_progress=told)  # (N, K)
        require_names_of_all(source, answers.shape[1])
        by_name = not set(own).isdisjoint(labelled.classes) and len(own) == answers.shape[1]
        if by_name and sorted(own) == sorted(names):  # as the first that names them has them
            answers, own = answers[:, [own.index(name) for name in names]], names
        labels.append(evaluation.labels_for(labelled, own, answers.shape[1], source.label))
        unlike = predictions and (answers.shape != predictions[0].shape or (own and names and own != names))
        if unlike or not torch.equal(labels[-1], labels[0]):  # by name for one, in order for another
            raise _unlike(source, sources[0], own, names)
        evaluation.class_counts(labels[-1], answers.shape[1], source.label)  # refuses labels of no class
        predictions.append(answers)
        names = names or own
    return _Answered(labelled, predictions, labels, names)


def _unlike(source: Source, first: Source, own: Sequence[str], names: Sequence[str]) -> DmmError:
    """Why a checkpoint of some classes cannot stand in one table with those before it, as far as they name theirs."""
    lists = ((source.label, own), (first.label, names))
    return DmmError(
        f"{source.label} and {first.label} do not have the same classes in the same order",
        evidence=[f"{label}: {listed(told) or 'no names'}" for label, told in lists],
        hint="dmm evaluate judges them one by one; classes in another order go together where the data name them too",
    )


def _as_part(on_progress: Callable[..., None], number: int, count: int) -> Callable[[str, int, int], None]:
    """Progress with one of ``count`` checkpoints, told as progress with all."""
    return lambda stage, done, total: on_progress(stage, number * total + done, count * total)


def require_data_fit(sources: Sequence[Source], data: Path, arch: str | None, flags: options.InputFlags) -> None:
    """Raise DmmError unless checkpoints can be judged by the data, together; of the images the first is looked at."""
    import torch

    from .. import evaluation
    from ..examples import named

    @cache
    def load(names: tuple[str, ...]) -> LabelledData:
        labelled = evaluation.load_labelled(data, names)
        return replace(labelled, images=labelled.images[:1])

    _answered(sources, lambda spec: load(tuple(named(spec))), arch, flags, torch.device("cpu"))


def _network(source: Source, arch: str | None, flags: options.InputFlags) -> tuple[nn.Module, Spec]:
    """The network of a checkpoint, and what it takes."""
    from .. import architectures, loading
    from ..layout import require_fit
    from ..spaces import example

    model, _ = loading.load_model(source, arch)
    spec = architectures.input_spec(source, model, **asdict(flags))
    require_fit(str(source.path), model, example(spec))
    return model, spec
