"""The pseudo-data file: images, the teachers' logits on them, and where each came from.

Legend: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checkpoint import Checkpoint, save_arrays
from ..errors import DmmError
from ..inputs import Source

KIND = "dmm.pseudo-data/1"
REQUIRED = ("images", "targets", "teacher_id", "logits", "confidence")


@dataclass(frozen=True)
class TeacherRecord:
    """One teacher of a pseudo-data file.

    Attributes:
        prior: share of each class, length K, sums to 1; zero outside the teacher's support.
        accepted, rejected: images kept, and images dropped because the teacher did not recognise them.
    """

    label: str
    sha256: str
    prior: tuple[float, ...]
    accepted: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class PseudoData:
    """Pseudo-data in memory.

    Attributes:
        images: uint8 (N, C, H, W), or float16 in normalised space where mean and std are unknown.
        targets: int64 (N,). teacher_id: int16 (N,), index into ``teachers``.
        logits: float16 (N, K), the teacher's own, without temperature. confidence: float16 (N,).
        bn_loss: float32, the statistics loss along the steps.
        mean, std: per channel, of the normalised space; empty where unknown.
    """

    images: np.ndarray
    targets: np.ndarray
    teacher_id: np.ndarray
    logits: np.ndarray
    confidence: np.ndarray
    bn_loss: np.ndarray
    teachers: tuple[TeacherRecord, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def priors(self) -> np.ndarray:
        """Class priors of the teachers, float32 (T, K)."""
        return np.array([teacher.prior for teacher in self.teachers], dtype=np.float32)

    def teacher_index(self, sha256: str) -> int | None:
        """Position of the teacher with this file hash, or None."""
        return next((i for i, teacher in enumerate(self.teachers) if teacher.sha256 == sha256), None)

    def place_of(self, teacher: Source) -> int:
        """Position of a teacher.

        Raises:
            DmmError: nothing was made from it.
        """
        place = self.teacher_index(teacher.sha256)
        if place is None:
            known = [f"it was made from {t.label} (sha256 {t.sha256[:12]}...)" for t in self.teachers]
            raise DmmError(
                f"the pseudo-data hold nothing of teacher {teacher.path} (sha256 {teacher.sha256[:12]}...)",
                evidence=known,
                hint="name the teachers the pseudo-data were made from, or synthesize again",
            )
        return place


def save_pseudo_data(
    path: Path,
    data: PseudoData,
    metadata: dict[str, str],
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
) -> None:
    """Write a pseudo-data file; equal data and metadata give equal bytes."""
    arrays = {name: getattr(data, name) for name in (*REQUIRED, "bn_loss")}
    record = {
        "dmm.kind": KIND,
        "dmm.teachers": json.dumps([vars(teacher) for teacher in data.teachers], sort_keys=True),
        "dmm.input": json.dumps({"mean": data.mean, "size": data.images.shape[1:], "std": data.std}),
    }
    save_arrays(path, arrays, {**metadata, **record}, inputs=inputs, force=force)


def load_pseudo_data(source: Source) -> PseudoData:
    """Read a pseudo-data file.

    Raises:
        DmmError: not a pseudo-data file, or its arrays do not belong together.
    """
    path = source.path
    if source.metadata.get("dmm.kind") != KIND:
        raise DmmError(
            f"not a pseudo-data file: {path}",
            evidence=[f"its metadata says {source.metadata.get('dmm.kind', 'nothing about its kind')}"],
            hint="make one with: dmm synthesize CKPT... -o pseudo.safetensors",
        )
    with Checkpoint(source) as file:
        missing = [name for name in (*REQUIRED, "bn_loss") if name not in source.tensors]
        if missing:
            raise DmmError(f"pseudo-data file {path} is incomplete", evidence=[f"missing {n}" for n in missing])
        arrays = {name: file.array(name) for name in (*REQUIRED, "bn_loss")}
    _require_rows(path, arrays)
    teachers = tuple(
        TeacherRecord(**{**item, "prior": tuple(item["prior"])}) for item in json.loads(source.metadata["dmm.teachers"])
    )
    space = json.loads(source.metadata["dmm.input"])
    return PseudoData(**arrays, teachers=teachers, mean=tuple(space["mean"]), std=tuple(space["std"]))


def _require_rows(path: Path, arrays: dict[str, np.ndarray]) -> None:
    rows = {name: len(arrays[name]) for name in REQUIRED}
    if len(set(rows.values())) != 1 or arrays["images"].ndim != 4 or arrays["logits"].ndim != 2:
        shapes = [f"{name} {list(arrays[name].shape)}" for name in REQUIRED]
        raise DmmError(f"arrays of {path} do not belong together", evidence=shapes)
