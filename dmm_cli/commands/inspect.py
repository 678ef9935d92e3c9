"""dmm inspect: what is in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from ..errors import DmmError, printable
from ..header import FLOAT8, TensorInfo
from ..inputs import Source, files_of, read_record, resolve_source
from ..metadata import class_names, is_by_name, stated_input
from ..names import is_statistic
from . import _options as options
from ._outputs import check_files
from ._run import epilog

if TYPE_CHECKING:
    from ..inspection import ArchitectureGuess, Inspection

Stated = TypeVar("Stated")
EPILOG = epilog("dmm inspect model.safetensors --tensors", "dmm inspect sites/a/ --json")


def inspect(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="A .safetensors file or a model directory.")],
    tensors: Annotated[
        bool, options.option("--tensors", help="List name, dtype and shape of every tensor; with -q, the names.")
    ] = False,
    grid: options.Grid = None,
    arch: options.Arch = None,
    format: options.Format = "table",
    json: options.Json = False,
    output: options.Output = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Show a checkpoint's architecture, inputs, tensors, BatchNorm layers, classes and provenance."""

    from ..manifest import dump

    style = options.chosen_format(format, json)
    source = resolve_source(checkpoint)
    check_files(output, grid, inputs=files_of([source]), force=force)

    from ..report.console import emit, status
    from ..report.tables import inspection_tables, render

    record = inspect_source(source, arch, tensors=tensors)
    for warning in record.warnings:
        status(f"warning: {warning}")
    if style == "json":
        shown = dump(record)
    elif quiet:
        essential = [tensor.name for tensor in record.tensors] or [record.architecture.spec or "unknown"]
        shown = "\n".join(printable(word, None) for word in essential)
    else:
        shown = render(inspection_tables(record), style)
    emit(shown, output, beside={grid: _drawn(source, grid)} if grid else {}, force=force)


def _drawn(source: Source, grid: Path) -> bytes:
    from ..report.figures import draw_image_grid, encode
    from ..synthesis.pseudodata import load_pseudo_data

    return encode(draw_image_grid(load_pseudo_data(source)), grid.suffix[1:])


def inspect_source(source: Source, arch: str | None = None, *, tensors: bool = False) -> Inspection:
    """Everything headers and metadata tell, and the architecture they point to; with ``tensors``, of each of them."""

    from ..inspection import Inspection, TensorRecord

    kinds: dict[str, list[int]] = {}
    dtypes: dict[str, int] = {}
    for info in source.tensors.values():
        entry = kinds.setdefault(info.name.rpartition(".")[2], [0, 0])
        entry[0], entry[1] = entry[0] + 1, entry[1] + info.numel
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + 1
    warnings: list[str] = []
    inputs = _undamaged(_stated_input, source, warnings) or {}
    classes = _undamaged(class_names, source, warnings) or ()
    own = {name: text for name, text in sorted(source.metadata.items()) if name.startswith("dmm.")}
    return Inspection(
        label=source.label,
        path=str(source.path),
        sha256=source.sha256,
        bytes=sum(path.stat().st_size for path in source.files),
        parameters=0 if _is_data(source) else sum(i.numel for i in source.tensors.values() if _is_parameter(i)),
        architecture=_architecture(source, arch),
        kinds={name: tuple(entry) for name, entry in kinds.items()},
        dtypes=dtypes,
        norm_layers=kinds.get("running_var", [0])[0],
        classes=classes,
        provenance=own,
        inputs=inputs if is_by_name(inputs) else {},
        tensors=tuple(TensorRecord(i.name, i.dtype, i.shape) for i in source.tensors.values()) if tensors else (),
        warnings=tuple(warnings),
    )


def _is_data(source: Source) -> bool:
    """Whether a file holds pseudo-data or statistics, and no weights."""
    return "dmm.kind" in source.metadata


def _is_parameter(info: TensorInfo) -> bool:
    return (info.is_float or info.dtype in FLOAT8) and not is_statistic(info.name)


def _stated_input(source: Source) -> dict:
    """Of a checkpoint; pseudo-data and statistics may tell that of their network in a form of their own."""
    try:
        return stated_input(source)
    except DmmError:
        if not _is_data(source):
            raise
        read_record(source.metadata["dmm.input"], f"{source.path}: dmm.input")
        return {}


def _undamaged(read: Callable[[Source], Stated], source: Source, warnings: list[str]) -> Stated | None:
    """What metadata state; a damaged entry is shown as it is, among the provenance, and warned of."""
    try:
        return read(source)
    except DmmError as error:
        warnings.append(error.what)
        return None


def _architecture(source: Source, arch: str | None) -> ArchitectureGuess:
    from ..inspection import ArchitectureGuess

    if _is_data(source) and not arch:
        return ArchitectureGuess(None, f"no checkpoint, but {printable(source.metadata['dmm.kind'])}")

    from ..architectures import identify
    from ..loading import load_model

    if arch:
        load_model(source, arch)  # which refuses what does not fit
    try:
        found = identify(source, arch)
    except DmmError as error:
        return ArchitectureGuess(None, error.what)
    return ArchitectureGuess(found.spec, found.evidence)
