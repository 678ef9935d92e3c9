"""What devices and precisions are called, and how many cores there are.

Whether a device is there, only torch can tell: see ``runtime``.
"""

from __future__ import annotations

import os
import re

from .errors import DmmError, printable

PRECISIONS = ("auto", "float32", "bfloat16")
NAMES = re.compile(r"auto|(cpu|cuda)(:(0|[1-9]\d?))?")


def require_device_name(name: str) -> None:
    """Raise DmmError for what cannot be a device that dmm computes on."""
    if not NAMES.fullmatch(name):
        raise DmmError(
            f"unknown device: {printable(name)}; dmm computes on cpu or cuda",
            hint="one of auto, cpu, cuda, cuda:0, ...",
        )


def require_precision(name: str) -> None:
    """Raise DmmError for what is not a precision that networks are run in."""
    if name not in PRECISIONS:
        raise DmmError(f"unknown precision: {printable(name)}", hint=f"one of {', '.join(PRECISIONS)}")


def cores() -> int:
    """How many threads can run at once: what this process is confined to, where the system (not macOS) confines any."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
