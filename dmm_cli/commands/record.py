"""dmm record: the statistics that BatchNorm would have stored, of any normalisation layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..devices import require_device_name
from ..errors import DmmError, listed
from ..files import together
from ..inputs import Source, files_of, named_files, resolve_source, resolve_sources
from ..metadata import class_names
from . import _options as options
from ._outputs import file_or_directory
from ._provenance import records, stamp
from ._run import epilog, standard_input
from ._statistics import describe
from ._teachers import require_told

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..manifest import RecordedNetwork, RecordManifest

EPILOG = epilog(
    "dmm record vit.safetensors --data train.safetensors -o stats.safetensors",
    "dmm record convnext.safetensors --data photos/ --device cuda -o stats.safetensors --json",
    "dmm record b.safetensors c.safetensors --data mine.npz --owner a.safetensors -o stats/",
)
BATCH = 64


def record(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="The checkpoint, or several; they are not changed.")
    ],
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
    output: Annotated[
        Path | None,
        options.option("--output", "-o", help=f"A .safetensors file, or a directory for several.{options.NEEDED}"),
    ] = None,
    arch: options.Arch = None,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    device: options.Device = "auto",
    force: options.Force = False,
    quiet: options.Quiet = False,
    json: options.JsonAlone = False,
    dry_run: options.DryRun = False,
) -> None:
    """Store mean and variance of the data in front of every normalisation layer.

    For whoever has the data of a model without BatchNorm (ViT, ConvNeXt), so that dmm synthesize can
    invert it: one mean and one variance per channel, no images. Labels, if any, are stored as counts.
    With --owner, of what the data look like in the networks of others, which tells more of them.
    """
    require_device_name(device)
    flags = options.input_flags(input_size, mean, std)
    sources = resolve_sources(models, stdin=standard_input())
    trained = resolve_source(owner) if owner else None
    if len(sources) > 1 and not trained:
        raise DmmError(
            f"of {len(sources)} checkpoints, whose data are {data}?", hint="name the one trained on them with --owner"
        )
    require_told(sources, arch)
    if not data.exists():
        raise DmmError(f"no such file: {data}")
    inputs = [*files_of([*sources, *([trained] if trained else [])]), *named_files(models), data]
    names = [f"{trained.label}-in-{source.label}" if trained else source.label for source in sources]
    names = [name.replace("/", "-") for name in names]  # labels of files of one name begin with their folder
    paths = file_or_directory(output, names, inputs=inputs, force=force, example="stats.safetensors")

    from ..report.console import Progress, emit_plan, status

    if dry_run:
        whose = f", the data of {trained.label}" if trained else ""
        names = ", ".join(source.label for source in sources)
        emit_plan(f"record statistics of {names} on {data}{whose} -> {output}", as_json=json)
        return

    manifest = record_sources(
        sources, data, paths, owner=trained, arch=arch, flags=flags, device=device, force=force,
        on_progress=Progress(quiet),
    )  # fmt: skip
    status(f"computed on {manifest.device} in {manifest.seconds:.0f} s", quiet=quiet)
    for network in manifest.networks:
        for name in network.unused:
            status(f"not recorded, since {network.source.label} does not use it: {name}", quiet=quiet)
        for warning in network.warnings:
            status(f"warning: {network.source.label}: {warning}")
    _report(manifest, quiet, json)


def record_sources(
    sources: Sequence[Source],
    data: Path,
    paths: Sequence[Path],
    *,
    owner: Source | None = None,
    arch: str | None,
    flags: options.InputFlags,
    device: str,
    force: bool = False,
    on_progress: Callable[..., None] | None = None,
) -> RecordManifest:
    """Run every network over the data and, when all are done, write a file of statistics for each.

    Args:
        owner: the checkpoint that was trained on the data, where it is not the network.

    Raises:
        DmmError: the data or a network cannot be used; nothing is written.
    """
    from ..checkpoint import save_arrays
    from ..manifest import RecordManifest
    from ..runtime import describe_device, resolve_device

    started, where = time.monotonic(), resolve_device(device)
    networks, files = [], []
    for source, path in zip(sources, paths, strict=True):
        network, *contents = _measured(source, data, path, owner, arch, flags, where, on_progress)
        networks.append(network)
        files.append((path, *contents))
    inputs = [*files_of([*sources, *([owner] if owner else [])]), data]
    with together() as outputs:
        for path, arrays, metadata in files:
            path.parent.mkdir(exist_ok=True)
            save_arrays(path, arrays, metadata, inputs=inputs, force=force, outputs=outputs)
    return RecordManifest(
        networks=tuple(networks),
        data=str(data),
        device=describe_device(where),
        seconds=time.monotonic() - started,
        owner=records([owner])[0] if owner else None,
    )


def _measured(
    source: Source,
    data: Path,
    path: Path,
    owner: Source | None,
    arch: str | None,
    flags: options.InputFlags,
    device: torch.device,
    on_progress: Callable[..., None] | None,
) -> tuple[RecordedNetwork, dict[str, np.ndarray], dict[str, str]]:
    """One network: what is told of it, and the arrays and metadata of its file."""
    from .. import architectures, evaluation, loading
    from ..examples import named
    from ..layout import require_fit
    from ..manifest import RecordedLayer, RecordedNetwork
    from ..norms import norm_inputs, unknown_norms
    from ..spaces import example
    from ..synthesis.recorded import measure, to_arrays

    module, _ = loading.load_model(source, arch)
    spec = architectures.input_spec(source, module, **asdict(flags))
    require_fit(str(source.path), module, example(spec))
    images = evaluation.load_images(data, tuple(named(spec)))
    layers, unknown = norm_inputs(module), unknown_norms(module)
    foreign = f"not recorded, since dmm does not know their class: {listed(unknown)}" if unknown else ""
    if not layers:
        raise DmmError(
            f"{source.path} has no normalisation layers that dmm knows",
            evidence=[foreign] if foreign else [],
            hint="derive their class from the one of torch that it is like"
            if foreign
            else "there is nothing to record, or to invert",
        )
    counts, warnings = (), [foreign] if foreign else []
    if images.labels is not None:
        own, width = class_names(source) or (), architectures.num_classes(module)
        labels = evaluation.labels_for(images, own, width, source.label)
        warning = evaluation.taken_in_order(images, own)
        warnings += [warning] if warning else []
        counts = evaluation.class_counts(labels, width, source.label)
    found = measure(module, layers, images.batches(BATCH, spec, on_progress, source.label), device)
    network = RecordedNetwork(
        source=records([source])[0],
        images=len(images),
        class_counts=counts,
        layers=tuple(
            RecordedLayer(name, type(layers[name].module).__name__, layers[name].channels, moments.count)
            for name, moments in found.items()
        ),
        unused=tuple(name for name in layers if name not in found),
        output=str(path),
        warnings=tuple(warnings),
    )
    metadata = stamp("record", {}, device=device.type, **describe(source, owner, spec, len(images), counts))
    return network, to_arrays(found), metadata


def _report(manifest: RecordManifest, quiet: bool, json: bool) -> None:
    from ..manifest import dump
    from ..report.console import emit
    from ..report.tables import recorded_table, render

    if json:
        emit(dump(manifest))
    elif quiet:
        emit("\n".join(network.output for network in manifest.networks))
    else:
        emit(render([recorded_table(manifest)], "table"))
