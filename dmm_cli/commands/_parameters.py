"""``--param``: of the method, of a calibration, or for some tensors only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import DmmError, printable
from ..merging import CALIBRATIONS
from ..merging.recipe import Override
from . import _options as options


@dataclass
class Parameters:
    """Parsed ``--param`` options."""

    method: dict[str, float | str] = field(default_factory=dict)
    calibration: dict[str, float | str] = field(default_factory=dict)
    overrides: list[Override] = field(default_factory=list)


def parse_parameters(pairs: Sequence[str], calibrate: str | None) -> Parameters:
    """Parse ``scale=0.3``, ``svc.alpha=1`` and ``GLOB:scale=0.1`` or ``GLOB:weights=1,0``.

    Raises:
        DmmError: a pair has no equals sign, or names a calibration that is not asked for.
    """
    parsed = Parameters()
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not text:
            raise DmmError(f"--param takes name=value, not {printable(pair)}")
        pattern, colon, own = name.rpartition(":")
        owner, _, rest = name.partition(".")
        if colon and own == "weights":
            parsed.overrides.append(Override(pattern, weights=options.numbers(text, f"--param {name}")))
        elif colon:
            parsed.overrides.append(Override(pattern, options.key_values([f"{own}={text}"], "--param")))
        elif owner in CALIBRATIONS and rest:
            if owner != calibrate:
                raise DmmError(f"--param {pair} is for --calibrate {owner}", hint=f"add --calibrate {owner}")
            parsed.calibration |= options.key_values([pair.partition(".")[2]], "--param")
        else:
            parsed.method |= options.key_values([pair], "--param")
    return parsed
