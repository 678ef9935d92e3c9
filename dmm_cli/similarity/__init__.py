"""How similar checkpoints are. Importing this package loads no array library."""

from __future__ import annotations

from ..registry import Registry

# The trait "activations" marks a measure of what networks make of images, see ``cka``; the others are measures of
# weights, see ``blocks``.
MEASURES = Registry(
    "similarity measure",
    {
        "cosine": (
            "dmm_cli.similarity.cosine:Cosine",
            "cosine of the weights, or of the task vectors with a base",
        ),
        "sign": ("dmm_cli.similarity.sign:SignAgreement", "share of weights that have the same sign"),
        "bn": ("dmm_cli.similarity.bn:StatisticsDistance", "distance of the BatchNorm running statistics"),
        "cka": ("dmm_cli.similarity.cka:cka", "linear CKA of the activations on pseudo-data", "activations"),
    },
)
