"""dmm record: the statistics that BatchNorm would have stored, of any normalisation layer."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..devices import require_device_name
from ..errors import DmmError
from ..files import check_output
from ..inputs import Source, resolve_source
from . import _options as options
from ._provenance import records, stamp
from ._run import epilog, guarded
from ._statistics import describe

if TYPE_CHECKING:
    from ..manifest import RecordManifest

EPILOG = epilog(
    "dmm record vit.safetensors --data train.safetensors -o stats.safetensors",
    "dmm record convnext.safetensors --data photos/ --device cuda -o stats.safetensors --json",
    "dmm record theirs.safetensors --data mine.npz --owner mine.safetensors -o mine-in-theirs.safetensors",
)
BATCH = 64


@guarded
def record(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The checkpoint; it is not changed.")],
    data: Annotated[
        Path,
        options.option(
            "--data", help="Its training data: .safetensors or .npz (images, and labels if any), or a folder of images."
        ),
    ],
    owner: Annotated[
        str | None,
        options.option("--owner", help="The checkpoint that was trained on these data, where MODEL is another's."),
    ] = None,
    output: options.Output = None,
    arch: options.Arch = None,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    device: options.Device = "auto",
    force: options.Force = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
    dry_run: options.DryRun = False,
) -> None:
    """Store mean and variance of the data in front of every normalisation layer.

    For whoever has the data of a model without BatchNorm (ViT, ConvNeXt), so that dmm synthesize can
    invert it: one mean and one variance per channel, no images. Labels, if any, are stored as counts.
    With --owner, of what the data look like in the network of another, which tells more of them.
    """
    if output is None:
        raise DmmError("nowhere to write", hint="name a file with -o stats.safetensors")
    require_device_name(device)
    flags = options.input_flags(input_size, mean, std)
    source = resolve_source(model)
    trained = resolve_source(owner) if owner else None
    if not data.exists():
        raise DmmError(f"no such file: {data}")
    check_output(output, inputs=[*source.files, *(trained.files if trained else ()), data], force=force)

    from ..report.console import Progress, emit, status

    if dry_run:
        whose = f", the data of {trained.label}" if trained else ""
        emit(f"record statistics of {source.label} on {data}{whose} -> {output}")
        return

    manifest = record_source(
        source, data, output, owner=trained, arch=arch, flags=flags, device=device, force=force,
        on_progress=Progress(quiet),
    )  # fmt: skip
    status(f"computed on {manifest.device} in {manifest.seconds:.0f} s", quiet=quiet)
    for name in manifest.unused:
        status(f"not recorded, since the model does not use it: {name}", quiet=quiet)
    _report(manifest, quiet, json)


def record_source(
    source: Source,
    data: Path,
    output: Path,
    *,
    owner: Source | None = None,
    arch: str | None,
    flags: options.InputFlags,
    device: str,
    force: bool = False,
    on_progress=None,
) -> RecordManifest:
    """Run the model over the data and write the file of statistics.

    Args:
        owner: the checkpoint that was trained on the data, where it is not the model.
    """
    from .. import architectures, evaluation
    from ..checkpoint import save_arrays
    from ..examples import named
    from ..layout import require_fit
    from ..manifest import RecordedLayer, RecordManifest
    from ..runtime import describe_device, resolve_device
    from ..spaces import example
    from ..synthesis.recorded import measure, to_arrays

    where = resolve_device(device)
    module, _ = architectures.load_model(source, arch)
    spec = architectures.input_spec(source, module, **asdict(flags))
    require_fit(str(source.path), module, example(spec))
    images = evaluation.load_images(data, tuple(named(spec)))
    layers = architectures.norm_inputs(module)
    if not layers:
        raise DmmError(f"{source.path} has no normalisation layers", hint="there is nothing to record, or to invert")
    counts = ()
    if images.labels is not None:
        own, width = architectures.class_names(source) or (), architectures.num_classes(module)
        labels = evaluation.labels_for(images, own, width, source.label)
        counts = evaluation.class_counts(labels, width, source.label)
    started = time.monotonic()
    found = measure(module, layers, images.batches(BATCH, spec, on_progress), where)
    metadata = stamp("record", {}, device=where.type, **describe(source, owner, spec, len(images), counts))
    inputs = [*source.files, *(owner.files if owner else ()), data]
    save_arrays(output, to_arrays(found), metadata, inputs=inputs, force=force)
    return RecordManifest(
        sources=records([source]),
        data=str(data),
        images=len(images),
        class_counts=counts,
        layers=tuple(
            RecordedLayer(name, type(layers[name].module).__name__, layers[name].channels, moments.count)
            for name, moments in found.items()
        ),
        unused=tuple(name for name in layers if name not in found),
        device=describe_device(where),
        seconds=time.monotonic() - started,
        output=str(output),
        owner=records([owner])[0] if owner else None,
    )


def _report(manifest: RecordManifest, quiet: bool, json: bool) -> None:
    from ..manifest import dump
    from ..report.console import emit
    from ..report.tables import recorded_table, render

    if json:
        emit(dump(manifest))
    elif quiet:
        emit(manifest.output)
    else:
        emit(render([recorded_table(manifest)], "table"))
