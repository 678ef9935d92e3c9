"""Merge group by group, and record how."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..digest import Hashes, glance
from ..errors import DmmError, listed
from ..files import Outputs, check_output, remove, together, write_files, write_text
from ..inputs import Source, files_of, resolve_source
from ..merging import CALIBRATIONS, METHODS
from ..merging.heads import head_union, unlike_heads
from ..merging.recipe import Recipe, check, check_weights
from ..ranks import Ranks, process_count
from ._align import Aligning, aligned_copies
from ._earlier import earlier_files, remove_earlier
from ._outputs import file_or_directory
from ._provenance import inherited, lineage, records, stamp
from ._recalibrate import Recalibrated, Recalibration, draft, recalibrate
from ._warnings import drowned, idle, odd_lengths, told_twice, unlike_networks

if TYPE_CHECKING:
    from ..manifest import Group, Grouping, MergeManifest
    from ..merging.engine import Outcome


@dataclass(frozen=True)
class Destination:
    """Where a merge goes.

    Attributes:
        path: a .safetensors file for one group, or a directory.
        max_shard: bytes of tensors in one file, None for no limit.
    """

    path: Path
    max_shard: int | None = None
    force: bool = False

    @property
    def is_file(self) -> bool:
        return self.path.suffix == ".safetensors"

    def group(self, name: str) -> Path:
        """The file of one group."""
        return self.path if self.is_file else self.path / f"{name}.safetensors"

    @property
    def directory(self) -> Path:
        """Where temporary files go."""
        return self.path.parent if self.is_file else self.path

    @property
    def record(self) -> Path | None:
        """Where merge.json goes: beside the groups in a directory."""
        return None if self.is_file else self.path / "merge.json"

    @contextmanager
    def made(self) -> Iterator[None]:
        """The directory is there during the block; one that was not, and in which nothing stays, goes with it."""
        new = not self.directory.exists()
        self.directory.mkdir(exist_ok=True)
        try:
            yield
        finally:
            if new:
                with suppress(OSError):  # there is something in it
                    self.directory.rmdir()


@dataclass(frozen=True)
class Team:
    """Who merges together: this process, those beside it, and the threads that hash what is read.

    Attributes:
        hashes: of every ``ranks.count``-th parent, in the making; None to take them afterwards.
    """

    ranks: Ranks = field(default_factory=Ranks)
    hashes: Hashes | None = None
    on_progress: Callable[..., None] | None = None

    def share_hashes(self, parents: Sequence[Source]) -> None:
        """Wait until every parent knows its hash, from whichever process took it."""
        if self.hashes:
            self.hashes.wait(parents)
        digests = self.ranks.collect([source.sha256 for source in self.ranks.deal(parents)])
        for source, digest in zip(parents, digests, strict=True):
            source.know_sha256(digest)


def parents_of(sources: Sequence[Source], recipe: Recipe) -> list[Source]:
    """All checkpoints a merge reads."""
    return [*sources, *([recipe.base] if recipe.base else [])]


def inputs_of(sources: Sequence[Source], recipe: Recipe) -> list[Path]:
    """All files a merge reads, and must not write to."""
    return files_of([*parents_of(sources, recipe), *([recipe.features] if recipe.features else [])])


def merge_groups(
    sources: Sequence[Source],
    grouping: Grouping,
    to: Destination,
    recipe: Recipe,
    team: Team = Team(),
    recalibration: Recalibration | None = None,
    aligning: Aligning = Aligning(),
) -> MergeManifest:
    """Write one file for one group, or ``group-K.safetensors`` and ``merge.json`` in a directory.

    Of several groups, one with a single member keeps it as it is, whatever the method.

    Args:
        recalibration: of every merge of several checkpoints, by this process alone.
        aligning: of the checkpoints of every group, before they are merged.

    Raises:
        DmmError: the recipe does not fit the checkpoints, an output is refused, or another process was told otherwise.
    """
    from ..manifest import MergeManifest, dump
    from ..merging.method import effective_parameters

    if team.ranks.count > 1:
        _require_same_merge(sources, grouping, to, recipe, team.ranks, aligning)
    check_each(sources, [group.members for group in grouping.groups], recipe)
    parameters = effective_parameters(METHODS.load(recipe.method), recipe.parameters)
    check_outputs(to, grouping, inputs_of(sources, recipe))
    earlier = earlier_files([to.group(group.name) for group in grouping.groups], to.record)
    with to.made(), aligned_copies(sources, grouping.groups, aligning, to.directory, team.on_progress) as ordered:
        outcomes, recalibrated = _merge_each(ordered.sources, grouping, to, recipe, team, recalibration, earlier)
    several = [o for o, group in zip(outcomes, grouping.groups, strict=True) if len(group.members) > 1]
    # units side by side meet zeros, so that lengths are expected to shrink
    odd = [] if ordered.widened else [line for outcome in outcomes for line in odd_lengths(outcome)]
    manifest = MergeManifest(
        sources=records(sources, recipe.weights),
        grouping=grouping,
        method=recipe.method,
        parameters=parameters,
        outputs=tuple(str(outcome.path) for outcome in outcomes),
        base=records([recipe.base])[0] if recipe.base else None,
        batchnorm={"paired": sum(o.paired for o in several), "unpaired": sum(o.unpaired for o in several)},
        warnings=(
            *told_twice(sources),
            *([] if aligning.arch else unlike_networks(sources, grouping)),
            *ordered.warnings,
            *odd,
            *drowned(outcomes),
            *idle(recalibration, several),
        ),
        norms=tuple(outcome.lengths for outcome in outcomes),
        recalibrated={name: result.done for name, result in recalibrated.items()},
        retained={name: result.retained for name, result in recalibrated.items()},
        aligned=ordered.aligned,
        widened=ordered.widened,
    )
    if to.record and team.ranks.is_first:
        write_text(to.record, dump(manifest) + "\n", force=to.force)
    return manifest


def _require_same_merge(
    sources: Sequence[Source], grouping: Grouping, to: Destination, recipe: Recipe, ranks: Ranks, aligning: Aligning
) -> None:
    """Raise DmmError unless every process merges the same; on one machine, to the same place."""
    outputs = [to.group(group.name) for group in grouping.groups]
    told = asdict(replace(recipe, base=None, features=None, device=recipe.device.partition(":")[0]))
    parents = parents_of(sources, recipe)
    ranks.require_same(
        **{f"checkpoint {place}": [source.label, glance(source)] for place, source in enumerate(parents, 1)},
        **told,
        groups=[group.members for group in grouping.groups],
        aligning=asdict(aligning),
        outputs=[os.path.realpath(path) if ranks.local == ranks.count else path.name for path in outputs],
        max_shard=to.max_shard,
    )


def _files(outcome: Outcome) -> list[Path]:
    """What a merge wrote: a checkpoint, or an index and its shards."""
    shards = json.loads(outcome.index)["weight_map"].values() if outcome.index else ()
    return [outcome.path, *(outcome.path.parent / name for name in sorted(set(shards)))]


def _merge_each(
    sources: Sequence[Source],
    grouping: Grouping,
    to: Destination,
    recipe: Recipe,
    team: Team,
    recalibration: Recalibration | None,
    earlier: Sequence[Path],
) -> tuple[list[Outcome], dict[str, Recalibrated]]:
    """What every merge found out, and by group what recalibration did; all groups take their places at the end.

    Args:
        earlier: files of a merge of before, which go then.
    """
    outcomes: list[Outcome] = []
    recalibrated: dict[str, Recalibrated] = {}

    def make_way() -> None:
        """Nothing is to tell of a mixture of old and new, were the process killed while groups take their places."""
        remove_earlier(earlier, (path for outcome in outcomes for path in _files(outcome)))
        if to.record and to.force:
            remove(to.record)

    def write_indexes() -> None:
        indexes = {outcome.path: outcome.index.encode() for outcome in outcomes if outcome.index}
        write_files(indexes, force=to.force)

    with together() as outputs:
        if team.ranks.is_first:
            outputs.before(make_way)
        outputs.before(team.ranks.wait)
        for group in grouping.groups:
            if recalibration and len(group.members) > 1:
                outcome, recalibrated[group.name] = _written(
                    sources, group, grouping, to, recipe, team, recalibration, outputs
                )
            else:
                outcome = _merge_group(sources, group, len(grouping.groups), to, recipe, team, outputs)
            outcomes.append(outcome)
        outputs.after(team.ranks.wait)
        if team.ranks.is_first:
            outputs.after(write_indexes)
    return outcomes, recalibrated


def check_each(
    sources: Sequence[Source], groups: Sequence[tuple[int, ...]], recipe: Recipe, *, settled: bool = True
) -> None:
    """Everything about the merges of these groups that the recipe and the headers can tell.

    Args:
        settled: whether these are the groups, and not those that groups will be parts of.

    Raises:
        DmmError: see ``check``.
    """
    if len(groups) == 1:
        check(sources, recipe, settled=settled)
        return
    check_weights(recipe, len(sources))
    for members in groups:
        own, part = [sources[i] for i in members], _part(recipe, members, len(groups))
        given = (part.weights, *(override.weights for override in part.overrides))
        if any(weights and not any(weights) for weights in given):
            names = listed(source.label for source in own)
            raise DmmError(f"the weights of a group are all 0: {names}", hint="one of each group must be above 0")
        check(own, part, settled=settled)


def check_outputs(to: Destination, grouping: Grouping, inputs: Sequence[Path], *, more: bool = False) -> None:
    """Refuse outputs that cannot be written, before anything is computed.

    Args:
        more: whether these groups may be parted before they are merged.

    Raises:
        DmmError: see ``file_or_directory``; or several groups are to go to one file.
    """
    if to.is_file and len(grouping.groups) > 1:
        raise DmmError(
            f"{len(grouping.groups)} groups do not fit in one file: {to.path}",
            evidence=[f"{g.name}: {', '.join(grouping.labels[i] for i in g.members)}" for g in grouping.groups],
            hint="name a directory with -o, or merge everything with --group all",
        )
    names = [group.name for group in grouping.groups]
    example = "merged.safetensors"
    file_or_directory(to.path, names, inputs=inputs, force=to.force, example=example, more=more)
    record = [to.record] if to.record and to.path.is_dir() else []
    for path in (*record, *earlier_files([to.group(name) for name in names], to.record)):
        check_output(path, inputs=inputs, force=to.force)


def require_one_file(to: Destination) -> None:
    """Raise DmmError where a recalibrated checkpoint would have to go to several files, or be written by several."""
    if to.max_shard or process_count() > 1:
        raise DmmError(
            "recalibrated checkpoints are written by one process, to one file",
            hint="leave out --max-shard-size and torchrun, or --recalibrate",
        )


def _written(
    sources: Sequence[Source],
    group: Group,
    grouping: Grouping,
    to: Destination,
    recipe: Recipe,
    team: Team,
    recalibration: Recalibration,
    outputs: Outputs,
) -> tuple[Outcome, Recalibrated]:
    """A group merged, recalibrated and saved among the outputs."""
    path = to.group(group.name)
    with draft(path) as place:
        outcome, result = merge_and_recalibrate(
            sources, group, len(grouping.groups), place, recipe, team, recalibration
        )
        result.save(path, recalibration, inputs=inputs_of(sources, recipe), force=to.force, outputs=outputs)
    return replace(outcome, path=path), result


def merge_and_recalibrate(
    sources: Sequence[Source],
    group: Group,
    groups: int,
    place: Path,
    recipe: Recipe,
    team: Team,
    recalibration: Recalibration,
) -> tuple[Outcome, Recalibrated]:
    """Merge one of several groups to a file, and recalibrate it in memory."""
    outcome = _merge_group(sources, group, groups, Destination(place), recipe, team)
    merged = replace(resolve_source(str(place)), label=group.name)
    members = [sources[i] for i in group.members]
    result = recalibrate(merged, members, _part(recipe, group.members, groups), recalibration)
    return replace(outcome, lengths={**outcome.lengths, **result.lengths}), result


def _merge_group(
    sources: Sequence[Source],
    group: Group,
    groups: int,
    to: Destination,
    recipe: Recipe,
    team: Team,
    outputs: Outputs | None = None,
) -> Outcome:
    from ..merging import engine

    members = [sources[i] for i in group.members]
    inputs = inputs_of(sources, recipe)
    recipe = _part(recipe, group.members, groups)
    parents = parents_of(members, recipe)

    def final_metadata() -> dict[str, str]:
        team.share_hashes(parents)
        return metadata_of(members, recipe)

    return engine.merge(
        members,
        to.group(group.name),
        recipe,
        metadata_of(members, recipe, hashed=False),
        final_metadata=final_metadata,
        hashes=team.hashes,
        max_shard=to.max_shard,
        ranks=team.ranks,
        inputs=inputs,
        force=to.force,
        outputs=outputs,
        on_progress=team.on_progress if team.ranks.is_first else None,
    )


def _part(recipe: Recipe, members: tuple[int, ...], groups: int) -> Recipe:
    """The recipe for some of the checkpoints."""

    def chosen(weights: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(weights[i] for i in members) if weights else ()

    if len(members) == 1 and groups > 1:
        return Recipe(dtype=recipe.dtype)
    overrides = tuple(replace(override, weights=chosen(override.weights)) for override in recipe.overrides)
    return replace(recipe, weights=chosen(recipe.weights), overrides=overrides)


def metadata_of(members: Sequence[Source], recipe: Recipe, *, hashed: bool = True) -> dict[str, str]:
    """Metadata of a merged file; not hashed, it is as long, with zeros for the hashes."""
    from ..merging.method import effective_parameters

    parameters = effective_parameters(METHODS.load(recipe.method), recipe.parameters)
    facts = {"method": recipe.method, "sources": lineage(records(members, recipe.weights, hashed=hashed))}
    if recipe.base:
        facts["base"] = lineage(records([recipe.base], hashed=hashed))
    aligned = [source.label for source in members if "dmm.reference" in source.metadata]
    if aligned:
        facts["aligned"] = json.dumps(aligned)
    if recipe.overrides:
        facts["overrides"] = json.dumps([[o.pattern, o.parameters, o.weights] for o in recipe.overrides])
    if recipe.calibrate:
        own = effective_parameters(CALIBRATIONS.load(recipe.calibrate), recipe.calibration)
        facts["calibrate"] = json.dumps({"method": recipe.calibrate, **own})
    if "random" in METHODS.traits(recipe.method):
        facts["seed"] = str(recipe.seed)
    unlike = unlike_heads(members) or len({member.metadata.get("dmm.classes") for member in members}) > 1
    own_head = recipe.head == "first" and unlike
    union = head_union(members) if recipe.head == "union" else None
    taken = inherited(members[:1]) if own_head else inherited(members, union, recipe.weights)
    return {**stamp("merge", parameters, **facts), **taken}
