"""The last word on a group: what its merge would make its members forget, on their own pseudo-data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..inputs import Source
from ._align import Aligning, aligned_copies
from ._groups import Destination, Team, check_outputs, inputs_of, merge_and_recalibrate
from ._recalibrate import Recalibration, draft

if TYPE_CHECKING:
    from ..manifest import Grouping, Retention
    from ..merging.recipe import Recipe

FORGOTTEN = 10.0  # points of agreement


def settle(
    sources: Sequence[Source],
    grouping: Grouping,
    to: Destination,
    recipe: Recipe,
    team: Team,
    recalibration: Recalibration,
    aligning: Aligning,
) -> Grouping:
    """Part groups until no member loses more than ``FORGOTTEN`` points in the merge of its group.

    Every group is aligned, merged and recalibrated in a draft beside the output, of which nothing stays. As long as a
    member forgets too much, the one that forgets most leaves; those that left a group are tried together next.
    """
    from ..grouping import split_group
    from ..manifest import Group

    check_outputs(to, grouping, inputs_of(sources, recipe))

    def judge(members: tuple[int, ...]) -> tuple[Retention, ...]:
        group = Group("a trial merge", members, "")
        with (
            to.made(),
            aligned_copies(sources, [group], aligning, to.directory, team.on_progress) as ordered,
            draft(to.group("trial")) as place,
        ):
            _, trial = merge_and_recalibrate(ordered.sources, group, len(sources), place, recipe, team, recalibration)
        return trial.retained

    accepted: set[tuple[int, ...]] = set()
    while doubtful := [g.members for g in grouping.groups if len(g.members) > 1 and g.members not in accepted]:
        kept, reason = _compatible(doubtful[0], judge)
        accepted.add(kept)
        if reason:
            grouping = split_group(grouping, [i for i in doubtful[0] if i not in kept], reason)
    return grouping


def _compatible(
    members: tuple[int, ...], judge: Callable[[tuple[int, ...]], tuple[Retention, ...]]
) -> tuple[tuple[int, ...], str]:
    """Members that can be merged, and why the others cannot; empty where all can."""
    reasons = []
    while len(members) > 1:
        retained = judge(members)
        worst = max(retained, key=lambda item: (_forgotten(item), item.label))
        if _forgotten(worst) <= FORGOTTEN:
            break
        reasons.append(
            f"merged, {worst.label} would recognise {worst.after:.1f} % of its pseudo-images "
            f"instead of {worst.before:.1f} %"
        )
        left = retained.index(worst)
        members = (*members[:left], *members[left + 1 :])
    return members, f"vetoed: {'; '.join(reasons)}" if reasons else ""


def _forgotten(member: Retention) -> float:
    """In points, of whole images: the difference of two shares may be more by its rounding."""
    return 100.0 * round((member.before - member.after) * member.images / 100) / member.images
