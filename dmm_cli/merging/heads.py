"""Classifiers of checkpoints that know different classes. Loads no array library.

Where every checkpoint names its classes (``dmm.classes``) and the lists differ, row k of one head is not row k of
another. The merged head has one row per class of any checkpoint; a class that several know is averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DmmError, printable
from ..inputs import Source
from ..metadata import class_names
from ..names import is_head

POLICIES = {
    "union": "one row per class of any checkpoint, by the names in dmm.classes",
    "first": "the first checkpoint's head, if known by its name, whatever the others hold",
}


@dataclass(frozen=True)
class Union:
    """How heads of different classes go together.

    Attributes:
        classes: names of all classes, in order of first appearance.
        places: per checkpoint, the place in ``classes`` of each of its own classes.
        tensors: names of the tensors whose rows are classes.
    """

    classes: tuple[str, ...]
    places: tuple[tuple[int, ...], ...]
    tensors: frozenset[str]


def head_union(sources: Sequence[Source]) -> Union | None:
    """How the heads of these checkpoints go together, None where class lists are equal or not all known.

    Raises:
        DmmError: a list of classes is damaged, or lists differ and no tensor is known to be the head.
    """
    lists = [class_names(source) for source in sources]
    if any(names is None for names in lists) or all(names == lists[0] for names in lists):
        return None
    classes = tuple(dict.fromkeys(name for names in lists for name in names))
    place = {name: number for number, name in enumerate(classes)}
    tensors = frozenset(
        name
        for name in sources[0].tensors
        if is_head(name)
        and all(_rows(source, name) == len(names) for source, names in zip(sources, lists, strict=True))
    )
    places = tuple(tuple(place[name] for name in names) for names in lists)
    if not tensors:
        raise DmmError(
            "the checkpoints name different classes, and no tensor is known to be their classifier",
            evidence=[
                f"{source.path}: {printable(', '.join(names))}" for source, names in zip(sources, lists, strict=True)
            ],
            hint="call it fc, head or classifier, as timm's networks do, or bring its rows into one order of classes",
        )
    return Union(classes, places, tensors)


def heads_of(source: Source) -> frozenset[str]:
    """Names of the tensors of a checkpoint's classifier."""
    return frozenset(filter(is_head, source.tensors))


def unlike_heads(sources: Sequence[Source]) -> list[str]:
    """Names of head tensors whose shapes differ."""
    first = sources[0].tensors
    return [
        name
        for name in sorted(heads_of(sources[0]))
        if any(s.tensors.get(name) and s.tensors[name].shape != first[name].shape for s in sources)
    ]


def differ_in_rows(sources: Sequence[Source], name: str) -> bool:
    """Whether all hold a tensor, and nothing but the number of its rows tells them apart."""
    return len({source.tensors[name].shape[1:] if name in source.tensors else None for source in sources}) == 1


def _rows(source: Source, name: str) -> int | None:
    info = source.tensors.get(name)
    return info.shape[0] if info and info.shape else None
