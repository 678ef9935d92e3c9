"""What devices are called. Whether one is there, only torch can tell: see ``runtime``."""

from __future__ import annotations

import re

from .errors import DmmError, printable

NAMES = re.compile(r"auto|(cpu|cuda)(:(0|[1-9]\d?))?")


def require_device_name(name: str) -> None:
    """Raise DmmError for what cannot be a device that dmm computes on."""
    if not NAMES.fullmatch(name):
        raise DmmError(
            f"unknown device: {printable(name)}; dmm computes on cpu or cuda",
            hint="one of auto, cpu, cuda, cuda:0, ...",
        )
