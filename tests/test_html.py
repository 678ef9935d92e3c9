"""The report of a run."""

from __future__ import annotations

import numpy as np

from dmm_cli.images import InputSpec
from dmm_cli.manifest import (
    DistillManifest,
    Group,
    Grouping,
    History,
    MergeManifest,
    SimilarityReport,
    SourceRecord,
    SynthesisManifest,
)
from dmm_cli.report.html import write_report
from dmm_cli.synthesis.pseudodata import PseudoData, TeacherRecord

ONE = SourceRecord("one", "one.safetensors")


def page(tmp_path, grouping: Grouping) -> str:
    """The report of a run of little else than these groups."""
    data = PseudoData(
        images=np.zeros((1, 1, 4, 4), np.uint8),
        targets=np.zeros(1, np.int64),
        teacher_id=np.zeros(1, np.int16),
        logits=np.zeros((1, 2), np.float16),
        confidence=np.ones(1, np.float16),
        bn_loss=np.zeros(1, np.float32),
        teachers=(TeacherRecord("one", "0" * 64, (0.5, 0.5)),),
        spec=InputSpec((1, 4, 4), (0.5,), (0.5,)),
    )
    history = History((0, 1), {"loss": (2.0, 1.0)})
    write_report(
        tmp_path / "report.html",
        similarity=SimilarityReport((ONE,), {"cosine": ((1.0,),)}, ()),
        merged=MergeManifest((ONE,), grouping, "linear", {}, ()),
        synthesis=SynthesisManifest((ONE,), (), {}, "cpu", 1.0, history, "pseudo.safetensors"),
        data=data,
        distillation=DistillManifest(ONE, (), (ONE,), ONE, {}, "cpu", 1.0, (), history, "out.safetensors"),
        evaluation=None,
    )
    return (tmp_path / "report.html").read_text()


def test_all_members_of_a_group_are_named_and_endless_names_are_capped(tmp_path):
    labels = tuple(f"hospital-{number:02}-of-the-consortium" for number in range(60))
    shown = page(tmp_path, Grouping((*labels, "x" * 5000), (Group("group-0", tuple(range(61)), "-"),), (), (), "auto"))
    assert ", ".join(labels) in shown
    assert "x" * 400 in shown and "x" * 600 not in shown
