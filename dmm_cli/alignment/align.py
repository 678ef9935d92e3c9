"""Align checkpoints to the first of them: load, trace, match, verify, and write.

All weights are held in memory, four bytes a value and checkpoint, and eight for one of them while it is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from .. import architectures
from ..checkpoint import Checkpoint, require_finite, save_checkpoint
from ..errors import DmmError
from ..header import ITEM_SIZE
from ..inputs import Source
from ..names import is_head, is_statistic, is_weight
from ..streaming import one_blas_thread
from .apply import identity, permute, permute_tensor
from .matching import match
from .spec import Spec
from .trace import trace
from .verify import verify

ROUNDS = 10  # at most, of aligning every checkpoint to the mean of the others

Arrays = Mapping[str, np.ndarray]
Progress = Callable[..., None]


@dataclass(frozen=True)
class Alignment:
    """How the units of one checkpoint are to be put in order.

    Attributes:
        image: the permutation, see ``apply``.
        objective: sum of products with the weights it was compared with, before and after.
        cosine: of its weights of two or more dimensions, heads left out, with the first checkpoint's, before and
            after.
        covered: share of the parameters that have an axis with units that may move.
        difference: of an output after the permutation, over the largest output, in float64.
    """

    source: Source
    spec: Spec
    image: np.ndarray
    objective: tuple[float, float]
    cosine: tuple[float, float]
    covered: float
    difference: float

    def moved(self, ids: np.ndarray) -> int:
        """How many of these units come from another place."""
        return int((self.image[ids] != ids).sum())

    def write(
        self, path: Path, metadata: Mapping[str, str], *, inputs: Iterable[Path] = (), force: bool = False
    ) -> None:
        """Write the checkpoint with its units in order; every value keeps its bytes.

        Raises:
            DmmError: the output is refused or cannot be written.
        """
        layout = {name: (info.dtype, info.shape) for name, info in self.source.tensors.items()}

        def chunks(name: str) -> list[np.ndarray]:
            raw = file.raw(name)
            if name in self.spec.tensors:
                dtype, shape = layout[name]
                array = raw.view(f"u{ITEM_SIZE[dtype]}").reshape(shape)
                array = permute_tensor(array, self.spec.tensors[name], self.image)
                raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            return [raw]

        with Checkpoint(self.source) as file:
            save_checkpoint(path, layout, chunks, metadata, inputs=inputs, force=force)


def align(
    sources: Sequence[Source],
    *,
    arch: str | None = None,
    size: tuple[int, ...] = (),
    seed: int = 0,
    restarts: int = 0,
    on_progress: Progress | None = None,
) -> list[Alignment]:
    """Align every checkpoint but the first to the mean of those before it, then to that of all others, until stable.

    Those most alike to the first, in the order their units have now, come first.

    Args:
        size: of one input; empty takes what the checkpoints say.
        restarts: of every matching.

    Returns:
        One alignment for each of ``sources[1:]``, in the order they were aligned, verified.

    Raises:
        DmmError: a module cannot be built or traced, no unit may move, weights are not finite, or a permuted network
            does not compute the same function.
    """
    first, *others = [_Network.load(source, arch, size) for source in sources]
    names = _compared([first, *others])
    weights = [name for name in names if is_weight(sources[0].tensors[name])]
    others.sort(key=lambda network: -_cosine(first.arrays, network.arrays, weights))
    with one_blas_thread():
        total = {name: first.arrays[name] for name in names}
        for network in others:
            network.fit(total, seed, restarts, on_progress)
            total = _plus(total, network.ordered(names))
        for _ in range(ROUNDS if len(others) > 1 else 0):
            stable = True
            for network in others:
                rest = _plus(total, network.ordered(names), sign=-1)
                stable &= not network.fit(rest, seed, restarts, on_progress)
                total = _plus(rest, network.ordered(names))
            if stable:
                break
    return [network.result(first, weights) for network in others]


@dataclass
class _Network:
    """One checkpoint, its module and the order of its units found so far."""

    source: Source
    model: nn.Module
    size: tuple[int, ...]
    spec: Spec
    arrays: Arrays
    image: np.ndarray
    objective: tuple[float, float] = (-np.inf, -np.inf)

    @classmethod
    def load(cls, source: Source, arch: str | None, size: tuple[int, ...]) -> _Network:
        model, architecture = architectures.load_model(source, arch)
        size = architectures.input_spec(source, model, size=size).size
        arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        for name, array in arrays.items():
            if array.dtype.kind == "f":
                require_finite(source, name, array.ravel())
        spec = trace(model, size)
        if not spec.groups:
            raise DmmError(
                f"no units of {architecture.spec} may change places, so {source.path} cannot be aligned",
                hint="operations that dmm does not know fix the units they touch",
            )
        return cls(source, model, size, spec, arrays, identity(spec))

    def ordered(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Weights with the units in the order found so far."""
        return permute({name: self.arrays[name] for name in names}, self.spec, self.image)

    def fit(self, reference: Arrays, seed: int, restarts: int, on_progress: Progress | None) -> bool:
        """Look for a better order with respect to other weights; whether one was found."""
        reference = {name: array for name, array in reference.items() if name in self.spec.tensors}
        found = match(reference, self.arrays, self.spec, seed=seed, restarts=restarts, on_progress=on_progress)
        current = _dot(reference, self.ordered(reference))
        self.objective = (_dot(reference, self.arrays), max(current, found.objective))
        if found.objective <= current + 1e-9 * abs(current):
            return False
        self.image = found.image
        return True

    def result(self, first: _Network, weights: Sequence[str]) -> Alignment:
        """What was found, verified."""
        infos = self.source.tensors.values()
        parameters = [info for info in infos if info.is_float and not is_statistic(info.name)]
        return Alignment(
            source=self.source,
            spec=self.spec,
            image=self.image,
            objective=self.objective,
            cosine=(_cosine(first.arrays, self.arrays, weights), _cosine(first.arrays, self.ordered(weights), weights)),
            covered=sum(i.numel for i in parameters if i.name in self.spec.tensors) / sum(i.numel for i in parameters),
            difference=verify(str(self.source.path), self.model, self.arrays, self.spec, self.image, self.size),
        )


def _compared(networks: Sequence[_Network]) -> list[str]:
    """Parameters that all checkpoints hold in one shape; heads only where they know the same classes."""
    first = networks[0].arrays
    classes = {architectures.class_names(network.source) for network in networks} - {None}
    return [
        name
        for name, array in first.items()
        if array.dtype.kind == "f"
        and not is_statistic(name)
        and all(name in n.arrays and n.arrays[name].shape == array.shape for n in networks)
        and not (is_head(name) and len(classes) > 1)
    ]


def _plus(total: Arrays, arrays: Arrays, sign: int = 1) -> dict[str, np.ndarray]:
    return {name: value + arrays[name] if sign > 0 else value - arrays[name] for name, value in total.items()}


def _dot(a: Arrays, b: Arrays) -> float:
    """The sum of products of all tensors of ``a``."""
    pairs = ((value.ravel(), b[name].ravel()) for name, value in a.items())
    return sum(float(np.einsum("i,i", x, y, dtype=np.float64)) for x, y in pairs)


def _cosine(a: Arrays, b: Arrays, names: Iterable[str]) -> float:
    a, b = ({name: arrays[name] for name in names} for arrays in (a, b))
    norm = np.sqrt(_dot(a, a) * _dot(b, b))
    return _dot(a, b) / norm if norm else 1.0
