"""How many images a step has room for.

Legend: B images.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Room:
    """What steps and images take of the memory, and whether there is so much.

    What a step needs is what autograd keeps for the backward pass, which grows with the batch by the same number of
    bytes for every image.

    Attributes:
        device: that steps run on. local: processes on this machine. student: see ``Objective``.
    """

    teachers: Sequence[Teacher]
    spec: Spec
    settings: Settings
    device: torch.device
    local: int
    student: nn.Module | None = None

    def fitting_batch(self) -> int:
        """The largest power of two up to ``LARGEST`` and the count whose step has room."""
        room = SHARE * free_memory(self.device) / self.local / self._of_an_image()
        least = PARTS if self.settings.engine == "generator" else 2
        largest = max(least, min(LARGEST, self.settings.count, int(room)))
        return 1 << (largest.bit_length() - 1)

    def require(self) -> None:
        """Raise DmmError where the main memory has no room for the images, or for a step on the CPU.

        There the system ends a process that takes more than there is, and nobody is told why; a GPU refuses by itself.
        """
        count, batch = self.settings.count, self.settings.batch
        size = sum(math.prod(part.size) * np.dtype(part.stored).itemsize for part in named(self.spec).values())
        images = f"{count:,} images of each of {len(self.teachers)} teachers"
        _require(images, count * len(self.teachers) * size, "a smaller --count")
        if self.device.type == "cpu" and batch > LARGEST:
            step = batch * self.local * self._of_an_image()
            _require(f"a step on {batch:,} images", step, "a smaller --batch, or --batch auto")

    def _of_an_image(self) -> float:
        """Bytes by which the steps that a process takes at a time grow with every image of their batches."""
        objective = Objective(self.settings.weights, self.teachers, self.student, self.spec)
        with deterministic(self.device):
            small, large = (
                [_kept(teacher, self.spec, objective, batch, self.device) for teacher in self.teachers]
                for batch in PROBES
            )
        slopes = [(b - a) / (PROBES[1] - PROBES[0]) for a, b in zip(small, large, strict=True)]
        together = ENGINES.load(self.settings.engine).TOGETHER
        return max(1.0, (sum(slopes) if together else max(slopes)) * workers(self.device, self.local))


def _require(what: str, needed: float, remedy: str) -> None:
    free = free_memory(torch.device("cpu"))
    if needed > free:
        gib = [f"{size / 2**30:,.1f} GiB" for size in (needed, free)]
        raise DmmError(f"no room for {what}: they take {gib[0]} of memory, {gib[1]} are free", hint=f"take {remedy}")


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of the main memory, what this process may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS tells of all alone
    free = [os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")]
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
