"""What a tensor is for, told by its name."""

from __future__ import annotations

import re

from .header import TensorInfo

RUNNING_MEAN, RUNNING_VAR, COUNTER = "running_mean", "running_var", "num_batches_tracked"
WRAPPERS = r"((module|model|net|backbone|encoder)\.)*"  # what training code puts in front
CLASSIFIERS = (
    "fc", "last_linear", "classif", r"classifier(\.\d+)?", "head", r"head\.(fc|fc\.fc2|fc2|l|linear|head\.l)",
    r"head\.classifier\.(4|linear)", r"head_dist(\.(l|linear))?", r"head\.head_dist\.l", r"heads(_dist)?\.\d",
    r"heads\.head", r"head\.proj", "aux_head", "lm_head", "score",
)  # fmt: skip
HEADS = re.compile(rf"{WRAPPERS}({'|'.join(CLASSIFIERS)})\.(weight|bias)")


def kind_of(name: str) -> str:
    """The last part of a tensor's name."""
    return name.rpartition(".")[2]


def is_statistic(name: str) -> bool:
    """Whether a tensor is a running statistic of a normalisation layer."""
    return kind_of(name) in (RUNNING_MEAN, RUNNING_VAR, COUNTER)


def is_head(name: str) -> bool:
    """Whether a tensor belongs to the last classifier, by the names that timm and transformers have for it."""
    return bool(HEADS.fullmatch(name))


def is_weight(info: TensorInfo) -> bool:
    """Whether a tensor is a float parameter of two or more dimensions outside the classifier.

    One-dimensional tensors are left out: normalisation scales start at one and biases at zero, so
    they look alike in models that share nothing. Heads are, since class lists may differ.
    """
    return info.is_float and len(info.shape) >= 2 and not is_statistic(info.name) and not is_head(info.name)
