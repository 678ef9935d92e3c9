"""What a merge that was done warns of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..archspec import network_of
from ..errors import listed, printable
from ..inputs import Source, twins
from ._recalibrate import Recalibration

if TYPE_CHECKING:
    from ..manifest import Grouping
    from ..merging.engine import Outcome

USUAL = (0.8, 1.25)  # merged norm over the parents': two unrelated checkpoints average to 0.71


def told_twice(sources: Sequence[Source]) -> list[str]:
    """Of files that are there twice."""
    return [f"{source.path} has the same bytes as {first.path}: it counts twice" for first, source in twins(sources)]


def unlike_networks(sources: Sequence[Source], grouping: Grouping) -> list[str]:
    """Of groups whose members name different architectures, although their tensors are alike."""
    warnings = []
    for group in grouping.groups:
        named: dict[str, str] = {}  # one checkpoint of each architecture
        for source in (sources[i] for i in group.members):
            if arch := source.metadata.get("dmm.arch"):
                named.setdefault(network_of(arch), f"{source.label} is {arch}")
        if len(named) > 1:
            warnings.append(
                f"{group.name}: its checkpoints have the same tensors, but name different architectures "
                f"({listed(named.values(), 4)}): what is merged may compute what none of them does; "
                "--arch names one for all"
            )
    return warnings


def idle(recalibration: Recalibration | None, merges: Sequence[Outcome]) -> list[str]:
    """Of a recalibration without anything to set right."""
    return ["--recalibrate sets nothing right: no group has two checkpoints"] if recalibration and not merges else []


def drowned(outcomes: Sequence[Outcome]) -> list[str]:
    """Of weights whose task vectors are rounding alone."""
    return [
        f"{outcome.path}: {len(outcome.drowned)} of {len(outcome.lengths)} weights stay as in the base, "
        f"{printable(outcome.drowned[0])} among them: what was trained there, taken together, is no larger than the "
        "rounding of stored weights; merge checkpoints of a finer dtype, or with --method task_arithmetic"
        for outcome in outcomes
        if outcome.drowned
    ]


def odd_lengths(outcome: Outcome) -> list[str]:
    """Of weights far from their parents' norm."""
    low, high = USUAL
    odd = {name: ratio for name, ratio in outcome.lengths.items() if not low <= ratio <= high}
    if not odd:
        return []
    worst = max(odd, key=lambda name: max(odd[name], 1.0 / max(odd[name], 1e-9)))
    return [
        f"{outcome.path}: {len(odd)} of {len(outcome.lengths)} weights come out far from their parents' norm, "
        f"{printable(worst)} at {odd[worst]:.2f} of it; --group auto keeps unlike checkpoints apart"
    ]
