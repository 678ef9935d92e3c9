"""How similar checkpoints are. Importing this package loads no array library."""

from __future__ import annotations

from ..registry import Registry

MEASURES = Registry(
    "similarity measure",
    {
        "cosine": (
            "dmm_cli.similarity.cosine:Cosine",
            "cosine of the weights, or of the task vectors with a base",
        ),
        "sign": ("dmm_cli.similarity.sign:SignAgreement", "share of weights that have the same sign"),
        "bn": ("dmm_cli.similarity.bn:StatisticsDistance", "distance of the BatchNorm running statistics"),
    },
)
