"""Merging checkpoints of one architecture. Importing this package loads no array library."""

from __future__ import annotations

from ..registry import Registry

# The first trait says what a method computes, see ``method``: "coefficients", "elements", "matrices"
# or "features", which needs pseudo-data.
# The others: "base" needs a common start, "gram" the inner products of whole tensors, "trim" the
# magnitude that a share ``density`` of each tensor exceeds, "outputs" what layers give in the checkpoints themselves,
# "pair" merges two checkpoints only, "noise" how large the rounding of stored weights can be. Then come the parameters,
# "name: kind" in the order of the function's, see ``method.KINDS``.
METHODS = Registry(
    "merge method",
    {
        "linear": ("dmm_cli.merging.linear:linear", "weighted mean of the weights (FedAvg)", "coefficients"),
        "slerp": (
            "dmm_cli.merging.slerp:slerp",
            "spherical interpolation of two checkpoints",
            "coefficients", "gram", "pair",
        ),
        "karcher": (
            "dmm_cli.merging.karcher:karcher",
            "mean on the sphere of any number of checkpoints",
            "coefficients", "gram",
        ),
        "task_arithmetic": (
            "dmm_cli.merging.task_arithmetic:task_arithmetic",
            "base plus a scaled sum of task vectors",
            "coefficients", "base", "scale: number",
        ),
        "model_stock": (
            "dmm_cli.merging.model_stock:model_stock",
            "between base and mean, by the angle of the task vectors",
            "coefficients", "base", "gram",
        ),
        "ties": (
            "dmm_cli.merging.ties:ties",
            "trim, elect sign, disjoint mean",
            "elements", "base", "trim", "density: share", "scale: number",
        ),
        "dare_linear": (
            "dmm_cli.merging.dare_linear:dare_linear",
            "drop at random, rescale, sum",
            "elements", "base", "random", "density: share", "scale: number",
        ),
        "dare_ties": (
            "dmm_cli.merging.dare_ties:dare_ties",
            "drop at random, rescale, elect sign, disjoint mean",
            "elements", "base", "random", "density: share", "scale: number",
        ),
        "tsv": (
            "dmm_cli.merging.tsv:tsv",
            "leading singular vectors of every task, decorrelated",
            "matrices", "base", "noise", "scale: number",
        ),
        "iso_c": (
            "dmm_cli.merging.iso_c:iso_c",
            "sum of task matrices with a flat spectrum",
            "matrices", "base", "noise", "scale: number",
        ),
        "iso_cts": (
            "dmm_cli.merging.iso_cts:iso_cts",
            "common and task directions with a flat spectrum",
            "matrices", "base", "noise", "scale: number", "common: share",
        ),
        "wudi": (
            "dmm_cli.merging.wudi:wudi",
            "least interference with the rows of every task",
            "matrices", "base", "scale: number", "ridge: positive", "steps: count", "rate: positive",
        ),
        "regmean": (
            "dmm_cli.merging.regmean:regmean",
            "every layer answers its parents' inputs as they do (RegMean++)",
            "features", "off_diagonal: share", "ridge: positive",
        ),
        "pleas": (
            "dmm_cli.merging.pleas:pleas",
            "every layer gives what its parents give (PLeaS)",
            "features", "outputs", "ridge: positive",
        ),
    },
)  # fmt: skip

CALIBRATIONS = Registry(
    "calibration",
    {"svc": ("dmm_cli.merging.svc:svc", "shrink directions that several tasks share (SVC)", "alpha: positive")},
)


def parameters(table: Registry, name: str) -> dict[str, str]:
    """The parameters of a method or calibration and their kinds, as its table states them."""
    return dict(trait.split(": ") for trait in table.traits(name) if ": " in trait)
