"""Planted permutations: are the units of a permuted, noisy copy of a network found again?

    python tests/benchmarks/alignment.py [ARCHITECTURE ...] [--work DIRECTORY]

A is a timm network as it is initialised; tensors that are constant then (normalisation scales, biases) get random
values, so that every unit is unlike any other. B is A with noise of half a standard deviation, of every tensor by
itself, and its units in a random order, drawn from all that leave the function as it is. ``dmm align A B`` runs once,
as a process of its own, with its defaults; then ``dmm merge A B-aligned``. Columns of the Markdown table:

    covered     parameters with an axis of units that may move, in per cent
    recovered   units that stand where they stood in A, in every tensor, in per cent
    noise       |merged - A| over half the norm of the noise: 1 where all units are recovered
    refused     whether a spec that lacks one axis of one tensor is refused
    s, CPU s    of the whole process of dmm align, start-up and verification included
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dmm_cli import architectures, loading
from dmm_cli.alignment.apply import permute, random_image
from dmm_cli.alignment.spec import Spec
from dmm_cli.alignment.trace import trace
from dmm_cli.alignment.verify import verify
from dmm_cli.checkpoint import save_arrays
from dmm_cli.errors import DmmError
from dmm_cli.inputs import resolve_source
from dmm_cli.names import is_statistic

ARCHITECTURES = (
    "resnet18", "resnet50", "wide_resnet50_2", "vgg11_bn", "mobilenetv3_large_100", "efficientnet_b0", "densenet121",
    "convnext_atto", "vit_tiny_patch16_224", "mixer_s32_224", "regnety_002", "swin_tiny_patch4_window7_224",
)  # fmt: skip
NOISE = 0.5  # of a tensor's standard deviation
SPREAD = 0.1  # of tensors that are constant at first

Arrays = dict[str, np.ndarray]


def network(arch: str) -> Arrays:
    """A network none of whose tensors is constant."""
    torch.manual_seed(0)
    tensors = {name: value.numpy().copy() for name, value in architectures.build(arch).state_dict().items()}
    draw = np.random.default_rng(0)
    for name, array in tensors.items():
        if array.dtype.kind == "f" and array.std() == 0:
            tensors[name] = np.abs(array + draw.normal(0, SPREAD, array.shape)).astype(array.dtype)
    return tensors


def noisy(tensors: Arrays) -> Arrays:
    """The same with noise; running variances stay positive."""
    draw = np.random.default_rng(1)
    changed = dict(tensors)
    for name, array in tensors.items():
        if array.dtype.kind == "f":
            changed[name] = (array + draw.normal(0, NOISE * array.std(), array.shape)).astype(array.dtype)
        if name.endswith("running_var"):
            changed[name] = np.abs(changed[name])
    return changed


def recovered(spec: Spec, wanted: Arrays, got: Arrays) -> float:
    """The share of units whose values are back in every tensor; of each, in most places along its other axes."""
    found = np.ones(spec.count, bool)
    for name, axes in spec.tensors.items():
        for axis in axes:
            if not axis.deps:
                others = tuple(k for k in range(wanted[name].ndim) if k != axis.axis)
                back = (wanted[name] == got[name]).mean(axis=others) > 0.5  # (n,)
                found[axis.units[~back]] = False
    ids = np.concatenate([role.ravel() for group in spec.groups for role in group.roles])
    return float(found[ids].mean())


def refuses(arch: str, spec: Spec) -> bool:
    """Whether verification stops a spec that lacks an axis."""
    model = architectures.build(arch).eval()
    name = max(spec.tensors, key=lambda name: len(spec.tensors[name]))
    wrong = replace(spec, tensors={**spec.tensors, name: spec.tensors[name][1:]})
    size = model.pretrained_cfg["input_size"]
    try:
        verify(arch, model, wrong, random_image(wrong, np.random.default_rng(0)), size)
    except DmmError:
        return True
    return False


def timed(*arguments: object) -> tuple[dict, float, float]:
    """The JSON that dmm prints, its wall time and its CPU time."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "dmm_cli", *map(str, arguments), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return json.loads(text), time.perf_counter() - began, usage.ru_utime + usage.ru_stime


def row(arch: str, work: Path) -> str:
    """One line of the table."""
    paths = [work / f"{name}.safetensors" for name in ("a", "b", "aligned", "merged")]
    a, b, aligned, merged = paths
    model = architectures.build(arch).eval()
    spec = trace(model, model.pretrained_cfg["input_size"])
    ours = network(arch)
    theirs = noisy(ours)
    save_arrays(a, ours, {"dmm.arch": arch}, force=True)
    planted = random_image(spec, np.random.default_rng(2))
    save_arrays(b, permute(theirs, spec, planted), {"dmm.arch": arch}, force=True)
    record, wall, cpu = timed("align", a, b, "-o", aligned, "--force")
    timed("merge", a, aligned, "--align", "never", "-o", merged, "--force")
    back, mean = (loading.load_state_dict(resolve_source(str(path))) for path in (aligned, merged))
    weights = [name for name, array in ours.items() if array.dtype.kind == "f" and not is_statistic(name)]
    distance = sum(float(np.square(mean[name].numpy() - ours[name], dtype=np.float64).sum()) for name in weights)
    noise = sum(float(np.square(theirs[name] - ours[name], dtype=np.float64).sum()) for name in weights) / 4
    (told,) = record["aligned"]
    share = recovered(spec, theirs, {name: value.numpy() for name, value in back.items()})
    return (
        f"| {arch} | {len(told['groups'])} | {told['units']} | {100 * told['covered']:.2f} | {100 * share:.2f} | "
        f"{np.sqrt(distance / noise):.3f} | {'yes' if refuses(arch, spec) else 'NO'} | {wall:.1f} | {cpu:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    print("| network | groups | units | covered | recovered | noise | refused | s | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|")
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        for arch in options.architectures:
            print(row(arch, Path(work)), flush=True)


if __name__ == "__main__":
    main()
