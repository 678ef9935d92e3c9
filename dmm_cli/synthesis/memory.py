"""How many images a step has room for.

Legend: B images.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..errors import DmmError
from ..examples import joined, named
from ..runtime import deterministic, workers
from ..spaces import Spec
from . import ENGINES
from .objective import Objective
from .settings import PARTS, Settings
from .teacher import Teacher

LARGEST = 256  # images; more fill no device better
SHARE = 0.5  # of the free memory; the rest is for gradients, kernels' workspace, and others
PROBES = (2, 4)  # images


def fitting_batch(
    teachers: Sequence[Teacher],
    spec: Spec,
    settings: Settings,
    device: torch.device,
    local: int,
    student: nn.Module | None = None,
) -> int:
    """The largest power of two up to ``LARGEST`` and the count whose step has room.

    What a step needs is what autograd keeps for the backward pass, which grows with the batch by the same number of
    bytes for every image.

    Args:
        local: processes on this machine.
    """
    room = SHARE * free_memory(device) / local / _of_an_image(teachers, spec, settings, device, local, student)
    least = PARTS if settings.engine == "generator" else 2
    largest = max(least, min(LARGEST, settings.count, int(room)))
    return 1 << (largest.bit_length() - 1)


def require_room(
    teachers: Sequence[Teacher],
    spec: Spec,
    settings: Settings,
    device: torch.device,
    local: int,
    student: nn.Module | None = None,
) -> None:
    """Raise DmmError where the main memory has no room for the images, or for a step on the CPU.

    There the system ends a process that takes more than there is, and nobody is told why; a GPU refuses by itself.
    """
    size = sum(math.prod(part.size) * np.dtype(part.stored).itemsize for part in named(spec).values())
    wanted = f"{settings.count:,} images of each of {len(teachers)} teachers"
    _require(wanted, settings.count * len(teachers) * size, "a smaller --count")
    if device.type == "cpu" and settings.batch > LARGEST:
        step = settings.batch * local * _of_an_image(teachers, spec, settings, device, local, student)
        _require(f"a step on {settings.batch:,} images", step, "a smaller --batch, or --batch auto")


def _require(what: str, needed: float, remedy: str) -> None:
    free = free_memory(torch.device("cpu"))
    if needed > free:
        gib = [f"{size / 2**30:,.1f} GiB" for size in (needed, free)]
        raise DmmError(f"no room for {what}: they take {gib[0]} of memory, {gib[1]} are free", hint=f"take {remedy}")


def _of_an_image(
    teachers: Sequence[Teacher],
    spec: Spec,
    settings: Settings,
    device: torch.device,
    local: int,
    student: nn.Module | None,
) -> float:
    """Bytes by which the steps that a process takes at a time grow with every image of their batches."""
    objective = Objective(settings.weights, teachers, student)
    with deterministic(device):
        small, large = ([_kept(t, spec, objective, batch, device) for t in teachers] for batch in PROBES)
    slopes = [(b - a) / (PROBES[1] - PROBES[0]) for a, b in zip(small, large, strict=True)]
    together = ENGINES.load(settings.engine).TOGETHER
    return max(1.0, (sum(slopes) if together else max(slopes)) * workers(device, local))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of the main memory, what this process may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # pages of the file cache are free too, where the system says so
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = [int(lines["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in lines else free
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
        free.append(int(limit) - int((group / "memory.current").read_text()))
    return max(0, min(free))


def _kept(teacher: Teacher, spec: Spec, objective: Objective, batch: int, device: torch.device) -> int:
    """Bytes that autograd keeps between forward and backward of so many images, weights left out."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = {n: torch.zeros(batch, *p.free, device=device, requires_grad=True) for n, p in named(spec).items()}
    targets = torch.zeros(batch, dtype=torch.int64, device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _graph, _ = objective(teacher, joined(inputs), targets)  # held, so that no address is used twice
    for model in (teacher.model, *(witness.model for witness in teacher.witnesses)):
        for tensor in (*model.parameters(), *model.buffers()):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())
