"""Two networks with their units in one order, made so wide that units which match badly stand side by side.

The partial merge of PLeaS (Nasery et al., CVPR 2025) averages the k pairs of n units that match best, and keeps the
other n - k of both networks: n + n - k units. Here both networks are first written as ones of that width, each of
which computes what it did before; their weighted mean, by any method, is the partial merge. In a layer whose outputs
and inputs are [merged, first's own, second's own], the first network A and the second B become

    A' = [[A_mm, A_ma, 0], [A_am, A_aa, 0], [B_bm, 0, B_bb]]
    B' = [[B_mm, 0, B_mb], [A_am, A_aa, 0], [B_bm, 0, B_bb]]

where the third row of A', and the second of B', is read by nobody. A merged unit then reads what it read in both, by
their weights, and a unit of one network reads what it read there. Logits are a merged unit: with no other one left, the
mean is the two networks side by side, and gives the weighted mean of their logits.

Legend: K units and blocks, n positions of an axis.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .. import loading
from ..checkpoint import Checkpoint, encode_floats, save_checkpoint
from ..errors import DmmError
from ..inputs import Source
from ..names import is_statistic
from ..runtime import generator
from ..widths import is_resizable, resize
from .align import image_size
from .matching import likeness
from .spec import Group, Spec, TensorAxis
from .verify import TOLERANCE, State, jitter, outputs

MERGED, FIRST, SECOND = range(3)  # whose a unit is

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Widening:
    """Two networks made wide.

    Attributes:
        spec: of their units, which are in one order.
        apart: how many units of every group stay side by side; -1 where the group cannot be widened.
        sources, arrays: of both networks, and those of their tensors that have changed.
        own: by tensor, the rows that the first and the second network alone has.
        archs: of their modules.
        difference: of an output of either network after the change, over the largest output, in float64.
    """

    spec: Spec
    apart: tuple[int, ...]
    sources: tuple[Source, Source]
    arrays: tuple[Arrays, Arrays]
    own: dict[str, tuple[list[int], list[int]]]
    archs: tuple[str, str]
    difference: float

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Units before and after, by the name of their group, where there are more."""
        pairs = zip(self.spec.groups, self.apart, strict=True)
        return {group.name: (group.size, group.size + extra) for group, extra in pairs if extra > 0}

    @property
    def parameters(self) -> tuple[int, int]:
        """Numbers of float values outside the running statistics, of the first network as it was and as it is."""
        infos = [info for info in self.sources[0].tensors.values() if info.is_float and not is_statistic(info.name)]
        after = (self.arrays[0][info.name].size if info.name in self.arrays[0] else info.numel for info in infos)
        return sum(info.numel for info in infos), sum(after)

    def write(self, number: int, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the first (0) or the second (1) network, in the dtypes it has."""
        source, arrays = self.sources[number], self.arrays[number]
        layout = {
            name: (info.dtype, arrays[name].shape if name in arrays else info.shape)
            for name, info in source.tensors.items()
        }
        file = Checkpoint(source)

        def chunks(name: str) -> list[np.ndarray]:
            if name not in arrays:
                return [file.raw(name)]
            return [encode_floats(arrays[name].reshape(-1), layout[name][0], name)]

        save_checkpoint(path, layout, chunks, metadata, reading=file)


def widen(first: Source, second: Source, spec: Spec, overlap: float, *, arch: str | None = None) -> Widening:
    """Keep some units of two networks side by side, of every group that allows it.

    Which groups do is found by trying: not those of heads or groups of a convolution, nor those that a normalisation
    over channels, or a layer of another kind than ``widths`` knows, works on.

    Args:
        second: with its units in the order of the first's.
        spec: of either.
        overlap: share of the units of each group that is merged, those most alike.

    Raises:
        DmmError: no group can be widened.
    """
    pair = (first, second)
    loaded = [loading.load_model(source, arch) for source in pair]
    models = [model.double() for model, _ in loaded]
    held = [_floats(source, spec) for source in pair]
    alike = likeness(*held, spec)
    trial = _Trial(spec, models, image_size(first, models[0]))
    chosen = {
        number: _least(group, alike[number], overlap)
        for number, group in enumerate(spec.groups)
        if _may_widen(group, spec, held[0], models[0])
    }
    difference = trial.difference(chosen.values())
    if not difference <= TOLERANCE:
        chosen = {number: units for number, units in chosen.items() if trial.difference([units]) <= TOLERANCE}
        difference = trial.difference(chosen.values())
    if not chosen or not difference <= TOLERANCE:
        raise DmmError(
            f"no units of {first.path} and {second.label} can be kept side by side",
            hint="this architecture cannot be widened; merge all units: leave out --overlap",
        )
    mask = _mask(spec, chosen.values())
    return Widening(
        spec,
        tuple(len(chosen[number]) if number in chosen else -1 for number in range(len(spec.groups))),
        pair,
        widened(*held, spec, mask),
        _own_rows(spec, mask),
        (loaded[0][1].spec, loaded[1][1].spec),
        difference,
    )


def _floats(source: Source, spec: Spec) -> dict[str, np.ndarray]:
    with Checkpoint(source) as file:
        infos = [source.tensors[name] for name in spec.tensors if name in source.tensors]
        return {info.name: file.floats(info.name).reshape(info.shape) for info in infos}


def _may_widen(group: Group, spec: Spec, held: Arrays, model: nn.Module) -> bool:
    """Whether a group is a plain set of units that stand along the channels of layers whose width can change.

    Of tied weights a file may hold one; no layer alone can be as wide as it.
    """
    if len(group.blocks) > 1:
        return False
    for name, axes in spec.tensors.items():
        for axis in axes:
            if np.isin(axis.units, group.roles[0]).any():
                layer = model.get_submodule(name.rpartition(".")[0])
                if axis.deps or axis.axis > 1 or name not in held or not is_resizable(layer):
                    return False
    return True


def _least(group: Group, alike: np.ndarray, overlap: float) -> np.ndarray:
    """Ids of the units that are least alike, all but a share of them."""
    units = group.roles[0].ravel()
    order = np.argsort(-alike, kind="stable")
    return units[order[round(overlap * len(units)) :]]


def _mask(spec: Spec, chosen: Iterable[np.ndarray]) -> np.ndarray:
    mask = np.zeros(spec.count, bool)
    for units in chosen:
        mask[units] = True
    return mask


class _Trial:
    """Runs two networks, and what becomes of them when they are made wide, in float64.

    With their own weights, and with random ones near them, since equal or zero weights hide mistakes.
    """

    def __init__(self, spec: Spec, models: Sequence[nn.Module], size: tuple[int, ...]) -> None:
        self._spec, self._models = spec, models
        self._images = torch.randn(1, *size, generator=generator(0, "verify"), dtype=torch.float64)
        own = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
        noisy = copy.deepcopy(own)
        for state in noisy:
            jitter(state)
        self._states = (own, noisy)
        self._before = [list(map(self._outputs, models, states)) for states in self._states]

    def difference(self, chosen: Iterable[np.ndarray]) -> float:
        """The largest difference of an output with these units side by side, over the largest output.

        Infinite where a network cannot be widened so, or does not run then.
        """
        mask = _mask(self._spec, chosen)
        try:
            pairs = zip(self._states, self._before, strict=True)
            found = [one for states, before in pairs for one in self._differences(states, before, mask)]
            return float(np.max(found))  # NaN if one is
        except DmmError:
            return float("inf")

    def _differences(
        self, states: Sequence[State], before: Sequence[torch.Tensor], mask: np.ndarray
    ) -> Iterator[float]:
        arrays = [{name: value.numpy() for name, value in state.items()} for state in states]
        wide = widened(*arrays, self._spec, mask)
        for model, state, expected, changed in zip(self._models, states, before, wide, strict=True):
            large = copy.deepcopy(model)
            resize(large, {name: array.shape for name, array in changed.items()})
            after = self._outputs(large, {**state, **_tensors(changed)})
            yield float((after - expected).abs().max() / expected.abs().max().clamp_min(1e-300))

    def _outputs(self, model: nn.Module, state: State) -> torch.Tensor:
        return outputs(type(model).__name__, model, state, self._images)


def _tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def widened(first: Arrays, second: Arrays, spec: Spec, apart: np.ndarray) -> tuple[Arrays, Arrays]:
    """The tensors of two networks that change when units are kept side by side; each computes what it did before.

    A unit's own pair of positions takes the place of its one, so that what lies beside it stays beside it.

    Args:
        apart: bool (K,), of units that stand along axes 0, outputs, and 1, inputs.
    """
    wide: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
    for name, axes in spec.tensors.items():
        if not any(apart[axis.units].any() for axis in axes):
            continue
        pair = [first[name], second[name]]
        owners: dict[int, np.ndarray] = {}
        for axis in axes:
            if apart[axis.units].any():
                places, owners[axis.axis] = _places(axis, apart)
                pair = [array.take(places, axis=axis.axis) for array in pair]
        if 1 in owners:  # inputs that a network does not have
            pair = [
                np.where(_along(owners[1] == other, 1, array.ndim), array.dtype.type(0), array)
                for array, other in zip(pair, (SECOND, FIRST), strict=True)
            ]
        if 0 in owners:  # outputs that a network does not have are the other's
            foreign = [_along(owners[0] == other, 0, pair[0].ndim) for other in (SECOND, FIRST)]
            pair = [np.where(foreign[0], pair[1], pair[0]), np.where(foreign[1], pair[0], pair[1])]
        for tensors, array in zip(wide, pair, strict=True):
            tensors[name] = array
    return wide


def _own_rows(spec: Spec, apart: np.ndarray) -> dict[str, tuple[list[int], list[int]]]:
    """By tensor, the rows that the first and the second network alone has, where there are any."""
    outputs_of = {name: axis for name, axes in spec.tensors.items() for axis in axes if axis.axis == 0}
    owners = {name: _places(axis, apart)[1] for name, axis in outputs_of.items() if apart[axis.units].any()}
    return {
        name: tuple(np.flatnonzero(whose == owner).tolist() for owner in (FIRST, SECOND))
        for name, whose in owners.items()
    }


def _along(mask: np.ndarray, axis: int, rank: int) -> np.ndarray:
    return mask.reshape([-1 if k == axis else 1 for k in range(rank)])


def _places(axis: TensorAxis, apart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every position of the wide axis the one its values come from, and whose its unit is.

    Positions of one unit that lie side by side (it was flattened with space) stay together.
    """
    units = axis.units
    starts = np.flatnonzero(np.r_[True, units[1:] != units[:-1]])
    places, owners = [], []
    for run in np.split(np.arange(len(units)), starts[1:]):
        whose = (FIRST, SECOND) if apart[units[run[0]]] else (MERGED,)
        places += [run] * len(whose)
        owners += [np.full(len(run), owner) for owner in whose]
    return np.concatenate(places), np.concatenate(owners)
