"""How similar checkpoints are. Importing this package loads no array library."""

from __future__ import annotations

from ..registry import Registry

# A measure of weights reads them block by block, see ``blocks``. Traits mark the others, which need the networks:
# "activations" needs images, see ``cka``; "order" puts units in one order, which a user asks for, since it takes long.
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
        "aligned": (
            "dmm_cli.alignment.cosines:aligned_cosines",
            "cosine of the weights with their units in one order",
            "order",
        ),
    },
)
