"""Running statistics of a merged model, without data.

Averaging filters shrinks the variance of what they compute, so neither the mean of the parents'
variances nor the law of total variance fits the merged model. For filters with inputs of equal,
uncorrelated variance the merged variance follows from the parents' and the filters' cosines:
``var = sum_ij w_i w_j rho_ij s_i s_j`` (Model Folding, Wang et al., ICLR 2025).

Legend: N checkpoints, C channels.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping

import numpy as np

from ..header import TensorInfo

# in the order that blocks of timm's EfficientNets run them; without conv_pwl, conv_pw comes after conv_dw
TIMM = {"conv_stem": 0, "conv_exp": 1, "conv_pw": 2, "conv_dw": 3, "conv_pwl": 5, "conv_head": 6}


def merged_variance(filters: np.ndarray | None, variances: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Running variance (C,) of the merged layer.

    Args:
        filters: (N, C, K), the rows of the convolution or linear layer in front, or None where it
            is not known: then rho is taken as 1, the squared mean of the deviations.
        variances: (N, C). shares: (N,), sum to 1.
    """
    if (variances == variances[0]).all() and (filters is None or (filters == filters[0]).all()):
        return variances[0]
    deviations = shares[:, None] * np.sqrt(np.maximum(variances, 0.0))  # (N, C)
    if filters is None:
        return np.square(deviations.sum(0))
    norms = np.linalg.norm(filters, axis=2, keepdims=True)  # (N, C, 1)
    units = filters / np.where(norms == 0, 1.0, norms)
    combined = np.einsum("nc,nck->ck", deviations, units)  # (C, K)
    return np.square(combined).sum(1)


def pair_layers(tensors: Mapping[str, TensorInfo]) -> dict[str, str | None]:
    """For every layer with running statistics, the weight whose output it normalises, or None if unsure.

    Read from the names alone, per parent module: the preceding entry of a sequence, layers of the same number (conv1,
    bn1) or of known order, or, where the widths show that normalisation comes first, the convolution before (conv1,
    norm2). Modules whose layers have the same names are of one kind and work alike: where one of them does not fit by
    its widths, none of the kind does. Running variances that are no vectors are not paired.

    Tensors do not tell a transposed convolution, whose filters lie along the second axis, from a plain one. With as
    many inputs as outputs it is paired as a plain one, and the merged variance is off: pseudo-data set it right.
    """
    norms: dict[str, dict[str, int]] = defaultdict(dict)  # channels by name, by parent module
    weights: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)  # shapes
    for name, info in tensors.items():
        path, _, kind = name.rpartition(".")
        parent, _, leaf = path.rpartition(".")
        if kind == "running_var" and path and len(info.shape) == 1:
            norms[parent][leaf] = info.shape[0]
        elif kind == "weight" and len(info.shape) >= 2 and info.is_float:
            weights[parent][leaf] = info.shape
    kinds: dict[tuple[frozenset[str], frozenset[str]], dict[str, dict[str, int]]] = defaultdict(dict)
    for parent, layers in norms.items():
        filters = _filters(weights[parent])
        kinds[frozenset(layers), frozenset(filters)][parent] = layers | filters
    pairs: dict[str, str | None] = {}
    for (layers, filters), modules in kinds.items():
        in_sequence = all(leaf.isdigit() for leaf in layers | filters)
        alike = {} if in_sequence else _pairs_of_kind(layers, filters, modules.values())
        for parent, width in modules.items():
            found = _pairs_in_sequence(layers, filters, width) if in_sequence else alike
            pairs |= {_join(parent, layer): _weight(parent, found.get(layer)) for layer in layers}
    return pairs


def _join(parent: str, leaf: str) -> str:
    return f"{parent}.{leaf}" if parent else leaf


def _weight(parent: str, leaf: str | None) -> str | None:
    return leaf and f"{_join(parent, leaf)}.weight"


def _filters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Channels of the convolutions, else of the linear layers; of those with numbers alone, if some have.

    A classifier beside convolutions, and a shortcut beside numbered layers, are no part of the chain.
    """
    chosen = [leaf for leaf, shape in shapes.items() if len(shape) > 2] or list(shapes)
    chosen = list(_numbers(chosen).values()) or chosen
    return {leaf: shapes[leaf][0] for leaf in chosen}


def _pairs_in_sequence(layers: Collection[str], filters: Collection[str], width: Mapping[str, int]) -> dict[str, str]:
    before = {layer: str(int(layer) - 1) for layer in layers}
    return {layer: leaf for layer, leaf in before.items() if leaf in filters and width[leaf] == width[layer]}


def _pairs_of_kind(
    layers: Collection[str], filters: Collection[str], widths: Collection[Mapping[str, int]]
) -> dict[str, str]:
    """The first guess that fits all modules of a kind, by the widths of their layers and filters."""
    for pairs in _guesses(layers, filters):
        if pairs and all(width[layer] == width[leaf] for width in widths for layer, leaf in pairs.items()):
            return pairs
    return {}


def _guesses(layers: Collection[str], filters: Collection[str]) -> Iterator[dict[str, str]]:
    """What may belong together by name: a convolution and the normalisation after it, else the one before."""
    numbered, places = _numbers(layers), _numbers(filters)
    endings = {_ending(leaf): leaf for leaf in filters}
    if numbered and places:
        for shift in (0, 1):
            yield {layer: places[n - shift] for n, layer in numbered.items() if n - shift in places}
    elif len(layers) == len(filters) == 1 and not places:
        yield dict(zip(layers, filters, strict=True))
    elif all(_ending(layer) and _ending(layer) in endings for layer in layers):
        yield {layer: endings[_ending(layer)] for layer in layers}
    elif len(filters) >= len(numbered) > 0 and TIMM.keys() >= set(filters):
        after_depthwise = "conv_pwl" not in filters
        order = sorted(filters, key=lambda leaf: 4 if leaf == "conv_pw" and after_depthwise else TIMM[leaf])
        yield dict(zip((numbered[n] for n in sorted(numbered)), order, strict=False))


def _ending(leaf: str) -> str:
    return leaf.partition("_")[2]


def _numbers(leaves: Iterable[str]) -> dict[int, str]:
    """Names by the first number in them, which in conv2d is none; none at all where two have the same."""
    found = [(int(match.group(1)), leaf) for leaf in leaves if (match := re.match(r"\D*(\d+)(?![\dd])", leaf))]
    return dict(found) if len(dict(found)) == len(found) else {}
