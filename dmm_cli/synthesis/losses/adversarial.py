"""How much a student agrees with the teacher."""

from __future__ import annotations

import math

import torch

from ...examples import floored
from . import Observation


def adversarial(seen: Observation) -> torch.Tensor:
    """``1 - JS / log 2`` of teacher and student, mean over (B, K): 0 where they have no class in common, 1 where equal.

    JS is the Jensen-Shannon divergence of their probabilities, as in DeepInversion's adaptive competition (Yin et al.,
    CVPR 2020): images are sought that the teacher has still to teach.
    """
    teacher, student = (floored(logits.float()).log_softmax(1) for logits in (seen.logits, seen.student_logits))
    middle = torch.logaddexp(teacher, student) - math.log(2.0)  # (B, K)
    parts = [(own.exp() * (own - middle)).sum(1) for own in (teacher, student)]
    return 1.0 - (parts[0] + parts[1]).mean() / (2.0 * math.log(2.0))
