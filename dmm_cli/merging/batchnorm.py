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
from collections.abc import Mapping

import numpy as np

from ..header import TensorInfo


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

    Read from the names alone, per parent module: the preceding entry of a sequence, layers counted
    in order (conv1, bn1, conv2, bn2), or, where the widths show that normalisation comes first,
    the convolution before (conv1, norm2). Where widths do not fit, nothing is paired, nor for running variances
    that are no vectors.

    Tensors do not tell a transposed convolution, whose filters lie along the second axis, from a plain one. With as
    many inputs as outputs it is paired as a plain one, and the merged variance is off: pseudo-data set it right.
    """
    norms: dict[str, list[str]] = defaultdict(list)
    weights: dict[str, list[str]] = defaultdict(list)
    for name, info in tensors.items():
        path, _, kind = name.rpartition(".")
        if kind == "running_var" and path and len(info.shape) == 1:
            norms[path.rpartition(".")[0]].append(path)
        elif kind == "weight" and len(info.shape) >= 2 and info.is_float:
            weights[path.rpartition(".")[0]].append(path)
    pairs: dict[str, str | None] = {}
    for parent, layers in norms.items():
        width = {layer: tensors[f"{layer}.running_var"].shape[0] for layer in layers}
        height = {layer: tensors[f"{layer}.weight"].shape[0] for layer in _filters(weights[parent], tensors)}
        pairs |= _pair_children(width, height)
    return pairs


def _filters(layers: list[str], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The convolutions among the siblings, else the linear layers; a classifier beside convolutions is neither."""
    convolutions = [layer for layer in layers if len(tensors[f"{layer}.weight"].shape) > 2]
    return convolutions or layers


def _pair_children(width: dict[str, int], height: dict[str, int]) -> dict[str, str | None]:
    leaves = [layer.rpartition(".")[2] for layer in (*width, *height)]
    if all(leaf.isdigit() for leaf in leaves):
        return {layer: _before(layer, width[layer], height) for layer in width}
    layers, filters = sorted(width, key=_number), sorted(height, key=_execution_order(height))
    for shift in (0, 1):  # convolution before normalisation, or after
        pairs = dict(zip(layers[shift:], filters, strict=False))
        if pairs and all(width[layer] == height[weight] for layer, weight in pairs.items()):
            return {layer: f"{pairs[layer]}.weight" if layer in pairs else None for layer in layers}
    return dict.fromkeys(layers)


def _before(layer: str, width: int, height: dict[str, int]) -> str | None:
    parent, _, leaf = layer.rpartition(".")
    previous = f"{parent}.{int(leaf) - 1}" if parent else str(int(leaf) - 1)
    return f"{previous}.weight" if height.get(previous) == width else None


def _number(layer: str) -> int:
    digits = re.search(r"(\d+)$", layer)
    return int(digits.group(1)) if digits else 0


def _execution_order(names: Mapping[str, int]):
    """Sort key: numbers in order; timm's EfficientNet names in the order its blocks run them."""
    expands = any(name.endswith("conv_pwl") for name in names)
    ranks = {"conv_stem": 0, "conv_exp": 0, "conv_pw": 1 if expands else 3, "conv_dw": 2, "conv_pwl": 4}
    return lambda name: (ranks.get(name.rpartition(".")[2], 9), _number(name), name)
