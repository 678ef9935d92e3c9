"""Pseudo-data from the normalisation statistics of trained teachers.

Importing this package loads no tensor library: the tables feed help and shell completion.
"""

from __future__ import annotations

from ..registry import Registry

LOSSES = Registry(
    "inversion loss",
    {
        "norm": ("dmm_cli.synthesis.losses.norm:norm", "stored against batch statistics"),
        "cross_entropy": (
            "dmm_cli.synthesis.losses.cross_entropy:cross_entropy",
            "the teacher sees the wanted class",
        ),
        "total_variation": (
            "dmm_cli.synthesis.losses.total_variation:total_variation",
            "smoothness of the images",
        ),
        "cross_norm": (
            "dmm_cli.synthesis.losses.cross_norm:cross_norm",
            "recorded against batch statistics, in the networks of other teachers",
        ),
        "adversarial": (
            "dmm_cli.synthesis.losses.adversarial:adversarial",
            "a student disagrees with the teacher",
        ),
    },
)

# traits: "draws" (once it is fitted, further images take no steps)
ENGINES = Registry(
    "synthesis engine",
    {
        "generator": (
            "dmm_cli.synthesis.generator:GeneratorEngine",
            "one network draws the images of every teacher",
            "draws",
        ),
        "pixels": ("dmm_cli.synthesis.pixels:PixelEngine", "every pixel is a free parameter"),
    },
)
