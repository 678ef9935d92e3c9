"""Permutations of units, and what they do to a state dict.

A permutation is an ``image``: int64 (K,), image[u] is the unit that comes to stand where u stood.

Legend: n positions of an axis, R positions of the axes its units depend on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from .spec import Spec, TensorAxis


def identity(spec: Spec) -> np.ndarray:
    """The permutation that moves nothing."""
    return np.arange(spec.count)


def random_image(spec: Spec, draw: np.random.Generator) -> np.ndarray:
    """A permutation drawn evenly from all that the spec allows."""
    image = identity(spec)
    for group in spec.groups:
        order = draw.permutation(len(group.blocks))
        if len(group.blocks) > 1:
            image[group.blocks] = group.blocks[order]
        for role in group.roles:
            image[role] = draw.permuted(role[order], axis=1)
    return image


def carry(image: np.ndarray, origin: Spec, spec: Spec) -> np.ndarray:
    """A permutation of one network as that of another that differs only in parts that do not move (its head).

    Raises:
        ValueError: the groups are not the same.
    """
    if [group.form for group in origin.groups] != [group.form for group in spec.groups]:
        raise ValueError("the groups are not the same")
    carried = identity(spec)
    for group, own in zip(origin.groups, spec.groups, strict=True):
        theirs, mine = group.everything, own.everything
        order = np.argsort(theirs)
        carried[mine] = mine[order[np.searchsorted(theirs[order], image[theirs])]]
    return carried


def permute(arrays: Mapping[str, np.ndarray], spec: Spec, image: np.ndarray) -> dict[str, np.ndarray]:
    """The state dict with its units in another order; tensors without units that move are not copied."""
    return {
        name: permute_tensor(array, spec.tensors[name], image) if name in spec.tensors else array
        for name, array in arrays.items()
    }


def permute_tensor(array: np.ndarray, axes: Iterable[TensorAxis], image: np.ndarray) -> np.ndarray:
    """One tensor of a state dict with its units in another order."""
    axes = sorted(axes, key=lambda axis: len(axis.deps))
    outer = {axis.axis: _sources(axis.units, axis.units, image) for axis in axes if not axis.deps}
    for k, sources in outer.items():
        if (sources != np.arange(len(sources))).any():
            array = array.take(sources, axis=k)
    for axis in axes[len(outer) :]:
        held = axis.units
        for place, k in enumerate(axis.deps):
            held = held.take(outer[k], axis=place) if k in outer else held
        sources = _sources(held, axis.units, image)  # (size of each axis in deps..., n)
        kept = [k if k in (*axis.deps, axis.axis) else None for k in range(array.ndim)]
        index = sources[tuple(None if k is None else slice(None) for k in kept)]
        array = np.take_along_axis(array, index, axis=axis.axis)
    return array


def _sources(held: np.ndarray, wanted: np.ndarray, image: np.ndarray) -> np.ndarray:
    """For every position the one its values come from, (R, n) or (n,).

    Args:
        held: units at the positions values come from, row by row.
        wanted: units at the positions they go to.
    """
    sources = np.empty(held.shape, np.int64)
    ranks = np.argsort(image[wanted], axis=-1, kind="stable")  # of a unit that stands several times, k-th to k-th
    np.put_along_axis(sources, ranks, np.argsort(held, axis=-1, kind="stable"), axis=-1)
    return sources
