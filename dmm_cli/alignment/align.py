"""Align checkpoints to the first of them: load, trace, match, verify, and write.

All weights are held in memory, four bytes a value and basin (twice while one is matched), and while a checkpoint is
verified some thirty bytes for each of its values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import numpy as np
from torch import nn

from .. import architectures, loading
from ..checkpoint import Checkpoint, require_finite, save_checkpoint
from ..errors import DmmError, listed, printable
from ..examples import IMAGES, named
from ..files import Outputs
from ..header import ITEM_SIZE
from ..images import InputSpec
from ..inputs import Source
from ..metadata import class_names
from ..names import is_head, is_statistic, is_weight
from ..signature import examples_of
from ..streaming import one_blas_thread
from .apply import carry, identity, permute, permute_tensor
from .matching import match
from .spec import Spec
from .trace import trace
from .verify import verify

ROUNDS = 10  # at most, of aligning every basin to the mean of the others

Arrays = Mapping[str, np.ndarray]
Progress = Callable[..., None]
Specs = dict[tuple, Spec]  # by architecture, size of an input, and names and shapes of the float tensors


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
        self,
        path: Path,
        metadata: Mapping[str, str],
        *,
        inputs: Iterable[Path] = (),
        force: bool = False,
        outputs: Outputs | None = None,
    ) -> None:
        """Write the checkpoint with its units in order; every value keeps its bytes.

        Args:
            outputs: others that it takes its place with.

        Raises:
            DmmError: the output is refused or cannot be written, or the checkpoint has changed.
        """
        layout = {name: (info.dtype, info.shape) for name, info in self.source.tensors.items()}
        file = Checkpoint(self.source)

        def chunks(name: str) -> list[np.ndarray]:
            raw = file.raw(name)
            if name in self.spec.tensors:
                dtype, shape = layout[name]
                array = raw.view(f"u{ITEM_SIZE[dtype]}").reshape(shape)
                array = permute_tensor(array, self.spec.tensors[name], self.image)
                raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            return [raw]

        save_checkpoint(path, layout, chunks, metadata, reading=file, inputs=inputs, force=force, outputs=outputs)


def align(
    basins: Sequence[Sequence[Source]],
    *,
    arch: str | None = None,
    size: tuple[int, ...] = (),
    seed: int = 0,
    restarts: int = 0,
    on_progress: Progress | None = None,
) -> list[Alignment]:
    """Align every basin but the first to the mean of those before it, then to that of all others, until stable.

    Those most alike to the first, in the order their units have now, come first.

    Args:
        basins: checkpoints of one start each; their mean is aligned, and one permutation moves all of them.
        size: of one input; empty takes what the checkpoints say.
        restarts: of every matching.

    Returns:
        One alignment for each checkpoint of ``basins[1:]``, in the order they were aligned, verified.

    Raises:
        DmmError: a module cannot be built or traced, no unit may move, weights are not finite, or a permuted network
            does not compute the same function.
    """
    known: Specs = {}
    first, *others = [_Basin.load(sources, arch, size, known) for sources in basins]
    names = _compared([first, *others])
    held = first.sources[0].tensors  # of tied weights perhaps one
    weights = [name for name in names if name in held and is_weight(held[name])]
    others.sort(key=lambda basin: -cosine(first.arrays, basin.arrays, weights))
    with one_blas_thread():
        _fit(first, others, names, lambda basin, to: basin.fit(to, seed, restarts, on_progress))
    reference = {name: first.arrays[name] for name in weights}
    return [alignment for basin in others for alignment in basin.results(reference, arch, size, known)]


def _fit(first: _Basin, others: Sequence[_Basin], names: Sequence[str], fit: Callable[[_Basin, Arrays], bool]) -> None:
    """Fit every basin to the sum of those before it, then to that of all others until none moves."""
    total = {name: first.arrays[name] for name in names}
    for basin in others:
        fit(basin, total)
        total = _plus(total, basin.ordered(names))
    for _ in range(ROUNDS if len(others) > 1 else 0):
        stable = True
        for basin in others:
            rest = _plus(total, basin.ordered(names), sign=-1)
            stable &= not fit(basin, rest)
            total = _plus(rest, basin.ordered(names))
        if stable:
            break


@dataclass
class _Basin:
    """Checkpoints of one start: the mean of their weights, and the order of its units found so far."""

    sources: Sequence[Source]
    spec: Spec
    arrays: Arrays
    image: np.ndarray
    objective: tuple[float, float] = (-np.inf, -np.inf)

    @classmethod
    def load(cls, sources: Sequence[Source], arch: str | None, size: tuple[int, ...], known: Specs) -> _Basin:
        spec, arrays, _, _ = opened(sources[0], arch, size, known)
        for source in sources[1:]:
            more = floats(source, loading.load_model(source, arch)[0])
            arrays = {name: a + more[name] for name, a in arrays.items() if more[name].shape == a.shape}
        mean = {name: array / len(sources) for name, array in arrays.items()} if len(sources) > 1 else arrays
        return cls(sources, spec, mean, identity(spec))

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

    def results(self, reference: Arrays, arch: str | None, size: tuple[int, ...], known: Specs) -> Iterator[Alignment]:
        """What was found, for each checkpoint, verified.

        Args:
            reference: weights of two or more dimensions of the first basin.
        """
        for source in self.sources:
            spec, arrays, model, shape = opened(source, arch, size, known)
            try:
                image = carry(self.image, self.spec, spec)
            except ValueError as error:
                raise _unlike(self.sources[0], source, arch) from error
            infos = source.tensors.values()
            parameters = [info for info in infos if info.is_float and not is_statistic(info.name)]
            moved = permute({name: arrays[name] for name in reference}, spec, image)
            yield Alignment(
                source=source,
                spec=spec,
                image=image,
                objective=self.objective,
                cosine=(cosine(reference, arrays, reference), cosine(reference, moved, reference)),
                covered=sum(i.numel for i in parameters if i.name in spec.tensors) / sum(i.numel for i in parameters),
                difference=verify(str(source.path), model, spec, image, shape),
            )


def opened(
    source: Source, arch: str | None, size: tuple[int, ...], known: Specs
) -> tuple[Spec, Arrays, nn.Module, tuple[int, ...]]:
    """The spec, the float tensors and the module of a checkpoint, and the size of its input.

    Args:
        known: specs found so far; a new one is added. What comes of one is verified with the network itself.
    """
    model, architecture = loading.load_model(source, arch)
    shape = size or image_size(source, model)
    arrays = floats(source, model)
    alike = (architecture.spec, shape, *((name, array.shape) for name, array in arrays.items()))
    if alike not in known:
        known[alike] = trace(model, shape)
    spec = known[alike]
    if not spec.groups:
        raise DmmError(
            f"no units of {printable(architecture.spec)} may change places, so {source.path} cannot be aligned",
            hint="operations that dmm does not know fix the units they touch",
        )
    return spec, arrays, model, shape


def _unlike(first: Source, other: Source, arch: str | None) -> DmmError:
    """What is raised of two checkpoints of one start whose units are grouped differently."""
    return DmmError(
        f"{first.path} and {other.path} have one start, and units that do not correspond",
        evidence=[
            f"{source.path} is {printable(architectures.identify(source, arch).spec)}" for source in (first, other)
        ],
        hint="where they are one network, --arch names it",
    )


def image_size(source: Source, model: nn.Module) -> tuple[int, ...]:
    """The size of an input, without the batch axis.

    Raises:
        DmmError: there are several inputs, or tokens, or forward takes others first.
    """
    unused = {} if examples_of(model) is not None else {"mean": (0.0,), "std": (1.0,)}  # whatever the file tells
    parts = named(architectures.input_spec(source, model, **unused))
    name, only = next(iter(parts.items()))
    taken = [one.name for one in signature(model.forward).parameters.values() if one.kind is not one.KEYWORD_ONLY]
    if len(parts) == 1 and isinstance(only, InputSpec) and name in (IMAGES, *taken[:1]):
        return only.size
    inputs = f"several inputs ({listed(parts)})" if len(parts) > 1 else listed(parts)
    raise DmmError(
        f"{source.path} takes {inputs}, and dmm aligns networks of images, or of one input of numbers that their "
        "forward takes first",
        hint="dmm merge --align never takes checkpoints as they are",
    )


def floats(source: Source, model: nn.Module) -> Arrays:
    """The float tensors of a module (they share its memory).

    Raises:
        DmmError: one is not finite.
    """
    arrays = {name: t.numpy() for name, t in model.state_dict().items() if t.is_floating_point()}
    for name, array in arrays.items():
        require_finite(source, name, array.ravel())
    return arrays


def _compared(basins: Sequence[_Basin]) -> list[str]:
    """Parameters that all checkpoints hold in one shape; heads only where they know the same classes."""
    classes = {class_names(source) for basin in basins for source in basin.sources} - {None}
    return [
        name
        for name, array in basins[0].arrays.items()
        if not is_statistic(name)
        and all(name in basin.arrays and basin.arrays[name].shape == array.shape for basin in basins)
        and not (is_head(name) and len(classes) > 1)
    ]


def _plus(total: Arrays, arrays: Arrays, sign: int = 1) -> dict[str, np.ndarray]:
    return {name: value + arrays[name] if sign > 0 else value - arrays[name] for name, value in total.items()}


def _dot(a: Arrays, b: Arrays) -> float:
    """The sum of products of all tensors of ``a``."""
    pairs = ((value.ravel(), b[name].ravel()) for name, value in a.items())
    return sum(float(np.einsum("i,i", x, y, dtype=np.float64)) for x, y in pairs)


def cosine(a: Arrays, b: Arrays, names: Iterable[str]) -> float:
    """Cosine of these tensors, taken together; where a side is zero 0, and 1 if both are."""
    a, b = ({name: arrays[name] for name in names} for arrays in (a, b))
    one, other = np.sqrt(_dot(a, a)), np.sqrt(_dot(b, b))
    return _dot(a, b) / (one * other) if one and other else float(one == other)
