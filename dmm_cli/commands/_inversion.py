"""The options of the inversion."""

from __future__ import annotations

from typing import Annotated

from ..errors import DmmError, printable
from ..synthesis import ENGINES, LOSSES
from ._options import key_values, option

Count = Annotated[int | None, option("--count", help="Images per teacher, in place of the preset's.", min=1)]
Steps = Annotated[int | None, option("--steps", help="Optimiser steps, in place of the preset's.", min=1)]
Batch = Annotated[
    str,
    option(
        "--batch",
        help="Images per teacher and step; auto: as many as the free memory holds, a power of two up to 256.",
    ),
]
Engine = Annotated[str, option("--engine", help="; ".join(f"{e}: {ENGINES.summary(e)}" for e in ENGINES) + ".")]
Loss = Annotated[
    list[str] | None,
    option("--loss", help=f"Weight of a loss ({', '.join(LOSSES)}): total_variation=0.1. Repeatable."),
]
Student = Annotated[
    str | None, option("--student", help="Seek images on which this checkpoint and the teacher disagree.")
]
Jitter = Annotated[
    int, option("--jitter", help="Roll images by up to so many pixels before a teacher sees them.", min=0)
]
Flip = Annotated[bool, option("--flip", help="Mirror half of them too.")]
KeepBest = Annotated[bool, option("--keep-best", help="pixels: keep the images of the lowest loss, not the last.")]
Plateau = Annotated[
    float, option("--plateau", help="Stop when the loss falls by less than this, in per cent.", min=0, max=100)
]
Coarse = Annotated[
    float,
    option("--coarse", help="pixels: per cent of the steps at half the resolution, of 128 pixels up.", min=0, max=90),
]
NormAverage = Annotated[
    float,
    option("--norm-average", help="generator: compare an average over batches, of this momentum.", min=0, max=0.999),
]
ClassPrior = Annotated[
    str | None, option("--class-prior", help="Class mix of every teacher: 10,10,1. Else it is estimated.")
]


def loss_weights(pairs: list[str]) -> dict[str, float]:
    """Weights of losses by name, as ``--loss`` gives them.

    Raises:
        DmmError: there is no such loss, or a weight is not a number from 0 up.
    """
    weights = {LOSSES.check(name): value for name, value in key_values(pairs, "--loss").items()}
    for name, value in weights.items():
        if isinstance(value, str) or value < 0:
            raise DmmError(f"--loss {name} takes a number, 0 or more, not {printable(str(value))}")
    return weights
