"""Merging checkpoints of one architecture. Importing this package loads no array library."""

from __future__ import annotations

from ..registry import Registry

# traits: "base" needs a common start; "gram" is given the inner products of whole tensors; "pair" merges two only
METHODS = Registry(
    "merge method",
    {
        "linear": ("dmm_cli.merging.linear:linear", "weighted mean of the weights (FedAvg)"),
        "slerp": (
            "dmm_cli.merging.slerp:slerp",
            "spherical interpolation of two checkpoints, tensor by tensor",
            "gram",
            "pair",
        ),
        "task_arithmetic": (
            "dmm_cli.merging.task_arithmetic:task_arithmetic",
            "base plus a scaled sum of task vectors; needs --base",
            "base",
        ),
    },
)
