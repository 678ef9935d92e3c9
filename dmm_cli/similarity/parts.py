"""Which checkpoints can be compared, by what their headers tell. Loads no array library."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import DmmError
from ..inputs import Source, kinds_of, require_same_tensors
from ..names import is_head, is_weight


def comparable_parts(
    sources: Sequence[Source], base: Source | None = None, reference: Source | None = None
) -> list[tuple[int, ...]]:
    """Indices of the checkpoints that are compared with one another: all, or those of each architecture.

    Raises:
        DmmError: no two are of one architecture, or, with a base or a reference, not all are; or there are no weights
            to compare.
    """
    parts = kinds_of(sources)
    if base or reference or len(parts) == len(sources):
        parts = [tuple(range(len(sources)))]
    others = [source for source in (base, reference) if source]
    for part in parts:
        first, *more = [sources[i] for i in part]
        heads = [name for name in first.tensors if is_head(name)]
        require_same_tensors([first, *more, *others], any_shape=heads)
        if not any(map(is_weight, first.tensors.values())):
            raise DmmError(f"no float weights of two or more dimensions in {first.path}")
    return parts
