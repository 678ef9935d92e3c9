"""How much a synthesis does, by name; importing this loads no tensor library."""

from __future__ import annotations

from typing import NamedTuple


class Preset(NamedTuple):
    """Images per teacher, and optimiser steps."""

    count: int
    steps: int


DEFAULT = "default"
PRESETS = {"fast": Preset(512, 150), DEFAULT: Preset(1024, 300), "best": Preset(2048, 600)}


def in_words() -> str:
    """All of them, for help."""
    return "; ".join(f"{name}: {preset.count} images, {preset.steps} steps" for name, preset in PRESETS.items())
