"""How to merge, checked against what the headers tell. Loads no array library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import takewhile
from shlex import quote
from typing import Any

from ..devices import require_device_name
from ..errors import DmmError, capped, printable
from ..header import Layout
from ..inputs import Source, require_same_tensors
from ..metadata import class_counts
from ..registry import did_you_mean, mistyped
from . import CALIBRATIONS, METHODS, parameters
from .heads import POLICIES, Union, differ_in_rows, head_union, heads_of, unlike_heads
from .method import check_parameters

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
RANGE = (1e-12, 1e12)  # of weights: in it no sum of theirs, nor a product with one, leaves float32


@dataclass(frozen=True)
class Override:
    """Parameters and weights for the tensors whose name matches a glob."""

    pattern: str
    parameters: dict[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """How to merge.

    Attributes:
        weights: one per checkpoint, or empty for equal ones.
        parameters: of the method; missing ones take its defaults.
        overrides: for some tensors, later ones win.
        calibrate: post-processing of merged task matrices, from ``CALIBRATIONS``.
        calibration: its parameters.
        head: from ``heads.POLICIES``.
        dtype: of the output's float tensors, from ``DTYPES``; None keeps the first checkpoint's.
        seed: of methods that draw.
        device: for methods on matrices.
        features: pseudo-data of the checkpoints, for methods on features.
    """

    method: str = "linear"
    weights: tuple[float, ...] = ()
    parameters: dict[str, Any] = field(default_factory=dict)
    base: Source | None = None
    overrides: tuple[Override, ...] = ()
    calibrate: str | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    head: str = "union"
    dtype: str | None = None
    seed: int = 0
    device: str = "cpu"
    features: Source | None = None

    def parameters_of(self, name: str) -> dict[str, Any]:
        """The parameters for one tensor."""
        matching = [o.parameters for o in self.overrides if fnmatchcase(name, o.pattern)]
        return {key: value for part in (self.parameters, *matching) for key, value in part.items()}

    def weights_of(self, names: Sequence[str], count: int) -> tuple[float, ...]:
        """The weights for a tensor, one per checkpoint, by its name and those of tensors that it goes with."""
        given = [o.weights for o in self.overrides if o.weights and any(fnmatchcase(n, o.pattern) for n in names)]
        return given[-1] if given else self.weights or (1.0,) * count


def check(sources: Sequence[Source], recipe: Recipe, *, settled: bool = True) -> None:
    """Everything about a merge that the recipe and the headers can tell.

    Args:
        settled: whether just these are merged, and not parts of them that are not known yet.

    Raises:
        DmmError: tensors differ, weights do not fit, a name is unknown, a parameter is out of its range, or the
            method lacks its base or its pseudo-data or is not defined for this many checkpoints, or class counts are
            damaged.
    """
    _check_method(recipe)
    if settled:
        _check_count(recipe.method, len(sources))
    others = [recipe.base] if recipe.base else []
    require_same_tensors([*sources, *others], any_shape=loose_heads(sources, recipe))
    _require_same_kinds([*sources, *others] if "base" in METHODS.traits(recipe.method) else sources)
    check_weights(recipe, len(sources))
    for override in recipe.overrides:
        _require_match(override.pattern, sources[0])
    _check_parameters(recipe)
    require_device_name(recipe.device)
    for source in sources:
        class_counts(source)  # their sum is written in the end


def _require_match(pattern: str, source: Source) -> None:
    if not any(fnmatchcase(name, pattern) for name in source.tensors):
        near = _near_glob(pattern, source.tensors)
        listing = f"dmm inspect --tensors {printable(str(source.path))} lists the tensors"
        raise DmmError(
            f"no tensor matches {printable(pattern)}",
            evidence=capped(map(printable, source.tensors), 5),
            hint=f"did you mean {printable(near)}? {listing}" if near else listing,
        )


def _near_glob(pattern: str, names: Iterable[str]) -> str | None:
    """The glob with its first words, those without wildcards, as the names nearest to them have them."""
    words = list(takewhile(lambda word: not set(word) & set("*?["), pattern.split(".")))
    literal, depth = ".".join(words), len(words)
    near = (
        did_you_mean(literal, dict.fromkeys(".".join(name.split(".")[:depth]) for name in names)) if literal else None
    )
    return near and near + pattern[len(literal) :]


def _check_method(recipe: Recipe) -> None:
    traits = METHODS.traits(recipe.method)
    if "base" in traits and recipe.base is None:
        raise DmmError(f"{recipe.method} needs the common start", hint="name it with --base")
    if "features" in traits and recipe.features is None:
        raise DmmError(
            f"{recipe.method} needs pseudo-data of the checkpoints",
            hint="dmm synthesize CKPT... -o pseudo.safetensors, then --recalibrate pseudo.safetensors",
        )
    if recipe.calibrate:
        CALIBRATIONS.check(recipe.calibrate)
        if "base" not in traits:
            raise DmmError(
                f"--calibrate {recipe.calibrate} works on task vectors, which {recipe.method} has none of",
                hint=f"one of {', '.join(name for name in METHODS if 'base' in METHODS.traits(name))}",
            )
    if recipe.head not in POLICIES:
        raise mistyped(f"unknown head policy: {printable(recipe.head)}", recipe.head, POLICIES)
    if recipe.dtype and recipe.dtype not in DTYPES:
        raise mistyped(f"unknown dtype: {printable(recipe.dtype)}", recipe.dtype, DTYPES)


def _check_count(method: str, count: int) -> None:
    if "pair" in METHODS.traits(method) and count > 2:
        raise DmmError(f"{method} merges two checkpoints, not {count}", hint="use --method karcher or linear for more")


def _check_parameters(recipe: Recipe) -> None:
    kinds = parameters(METHODS, recipe.method)
    for given in (recipe.parameters, *(override.parameters for override in recipe.overrides)):
        check_parameters(recipe.method, kinds, given)
    if recipe.calibrate:
        check_parameters(recipe.calibrate, parameters(CALIBRATIONS, recipe.calibrate), recipe.calibration)


def loose_heads(sources: Sequence[Source], recipe: Recipe) -> frozenset[str]:
    """Head tensors whose rows do not correspond, so that their shapes may differ.

    Raises:
        DmmError: heads differ, and nothing tells how their rows correspond.
    """
    if recipe.head == "first":
        heads = heads_of(sources[0])
        if not heads:
            head_union(sources)  # which refuses lists that differ: rows of unlike classes would be averaged
        return heads
    union = head_union(sources)
    if union:
        return union.tensors
    unlike = unlike_heads(sources)
    if unlike:
        require_same_tensors(sources, any_shape=[name for name in unlike if differ_in_rows(sources, name)])
        raise DmmError(
            "the checkpoints have heads of different sizes, and not all name their classes",
            evidence=capped(f"{s.path}: {printable(n)} is {list(s.tensors[n].shape)}" for n in unlike for s in sources),
            hint="name the classes in the metadata (dmm.classes), or keep one head with --head first",
        )
    return frozenset()


def union_of(sources: Sequence[Source], recipe: Recipe) -> Union | None:
    """How the heads of these checkpoints go together, None where they are merged, or kept, as they are."""
    return head_union(sources) if recipe.head == "union" else None


def merged_layout(sources: Sequence[Source], recipe: Recipe) -> Layout:
    """Names, dtypes and shapes of the merged tensors."""
    wanted, union = DTYPES.get(recipe.dtype or ""), union_of(sources, recipe)
    layout = {}
    for name, info in sources[0].tensors.items():
        shape = info.shape
        if union and name in union.tensors:
            shape = (len(union.classes), *shape[1:])
        layout[name] = (wanted if wanted and info.is_float else info.dtype, shape)
    return layout


def check_weights(recipe: Recipe, count: int) -> None:
    """Raise DmmError unless the weights, if there are any, are ``count``, in ``RANGE`` or zero, and not all zero."""
    for pattern, weights in [("", recipe.weights), *((one.pattern, one.weights) for one in recipe.overrides)]:
        if weights and len(weights) != count:
            each = ",".join(str(number) for number in range(1, count + 1))
            way = f"--param {quote(f'{pattern}:weights={each}')}" if pattern else f"--weights {each}"
            raise DmmError(f"{len(weights)} weights for {count} checkpoints", hint=f"give one each: {way}")
        low, high = RANGE
        if weights and not (all(w == 0 or low <= w <= high for w in weights) and any(weights)):
            shown = ", ".join(f"{weight:g}" for weight in weights)
            raise DmmError(
                f"weights must be zero or more, with a positive sum: {shown}",
                hint=f"those that are not zero lie between {low:g} and {high:g}",
            )


def _require_same_kinds(sources: Sequence[Source]) -> None:
    for name, info in sources[0].tensors.items():
        for source in sources[1:]:
            other = source.tensors[name]
            if other.is_float != info.is_float or (not info.is_float and other.dtype != info.dtype):
                raise DmmError(
                    f"tensor {printable(name)} is {info.dtype} in {sources[0].path} and {other.dtype} in {source.path}"
                )
