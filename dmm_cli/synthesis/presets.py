"""How much a synthesis does, by name; importing this loads no tensor library."""

from __future__ import annotations

from typing import NamedTuple


class Preset(NamedTuple):
    """How much to do.

    A student learns from the images of all teachers, and of few teachers it wants more: a generator, once it is
    fitted, draws them for next to nothing.

    Attributes:
        each: images of a teacher, at least. together: of all teachers, at least. steps: of the optimiser.
    """

    each: int
    together: int
    steps: int

    def count(self, teachers: int) -> int:
        """Images of each of so many teachers."""
        return max(self.each, self.together // teachers)


DEFAULT = "default"
PRESETS = {"fast": Preset(512, 2048, 150), DEFAULT: Preset(1024, 4096, 300), "best": Preset(2048, 8192, 600)}


def in_words() -> str:
    """All of them, for help."""
    return "; ".join(f"{name}: {each} images, {steps} steps" for name, (each, _, steps) in PRESETS.items())
