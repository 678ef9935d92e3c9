"""The pseudo-data file: images, or all inputs of a network, the teachers' logits on them, and where each came from.

Legend: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..checkpoint import Checkpoint, save_arrays
from ..errors import DmmError, printable
from ..examples import Examples, joined, named
from ..inputs import Source
from ..metadata import class_names, require_names_of_all
from ..spaces import Spec, parsed, recorded, space_of
from .kind import KIND, REQUIRED, nothing_of, require_arrays, require_pseudo_data


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
        images: uint8 (N, C, H, W); of networks with several inputs all of them, numbers float32, tokens
            int64.
        targets: int64 (N,). teacher_id: int16 (N,), index into ``teachers``.
        logits: float16 (N, K), the teacher's own, without temperature. confidence: float16 (N,).
        bn_loss: float32, the statistics loss along the steps.
        spec: size and normalisation of the input, or of each.
        classes: names of the K classes, empty where no teacher tells them.
    """

    images: np.ndarray | Examples
    targets: np.ndarray
    teacher_id: np.ndarray
    logits: np.ndarray
    confidence: np.ndarray
    bn_loss: np.ndarray
    teachers: tuple[TeacherRecord, ...]
    spec: Spec
    classes: tuple[str, ...] = ()

    def name_of(self, target: int) -> str:
        """Of a class: its number where it has no other."""
        return self.classes[target] if self.classes else str(target)

    def pictures(self) -> np.ndarray:
        """Something to look at, uint8 (N, C, H, W): the first input that is of images, else the first, in grey.

        Numbers are shown as the network takes them: of raw ones only those of the largest unit would show.
        """
        parts = named(self.images)
        found = [parts[name] for name, part in named(self.spec).items() if part.is_image]
        if found:
            return found[0]
        name, stored = next(iter(parts.items()))
        seen = space_of(named(self.spec)[name]).from_bytes(torch.from_numpy(stored))
        values = seen.numpy().reshape(len(self.targets), 1, 1, -1)  # (N, 1, 1, F)
        low, high = values.min(), values.max()
        return ((values - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8)

    def teacher_index(self, sha256: str) -> int | None:
        """Position of the teacher with this file hash, or None."""
        return next((i for i, teacher in enumerate(self.teachers) if teacher.sha256 == sha256), None)

    def place_of(self, teacher: Source) -> int:
        """Position of a teacher.

        Raises:
            DmmError: nothing was made from it, or none of it is left.
        """
        place = self.teacher_index(teacher.sha256)
        if place is None:
            raise nothing_of(teacher, [(known.label, known.sha256) for known in self.teachers])
        if not (self.teacher_id == place).any():
            raise DmmError(f"the pseudo-data hold no image of {teacher.path}", hint="make them again: dmm synthesize")
        return place


def save_pseudo_data(
    path: Path,
    data: PseudoData,
    metadata: dict[str, str],
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
) -> None:
    """Write a pseudo-data file; equal data and metadata give equal bytes.

    Every input is a tensor of its own name: ``images``, where there is one.
    """
    arrays = {**named(data.images), **{name: getattr(data, name) for name in (*REQUIRED, "bn_loss")}}
    record = {
        "dmm.kind": KIND,
        "dmm.teachers": json.dumps([vars(teacher) for teacher in data.teachers], sort_keys=True),
        "dmm.input": json.dumps(recorded(data.spec), sort_keys=True),
        **({"dmm.classes": json.dumps(list(data.classes))} if data.classes else {}),
    }
    save_arrays(path, arrays, {**metadata, **record}, inputs=inputs, force=force)


def load_pseudo_data(source: Source) -> PseudoData:
    """Read a pseudo-data file.

    Raises:
        DmmError: not a pseudo-data file, or its arrays do not belong together.
    """
    path = source.path
    require_pseudo_data(source)
    try:
        spec, teachers = parsed(json.loads(source.metadata["dmm.input"])), _teachers(source.metadata["dmm.teachers"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DmmError(
            f"the metadata of pseudo-data file {path} are damaged",
            evidence=[f"dmm.input, or dmm.teachers: {type(error).__name__}: {printable(str(error))}"],
            hint="make it again with: dmm synthesize CKPT... -o pseudo.safetensors",
        ) from error
    inputs = tuple(named(spec))
    require_arrays(source, inputs)
    with Checkpoint(source) as file:
        images = {name: file.array(name) for name in inputs}
        arrays = {name: file.array(name) for name in (*REQUIRED, "bn_loss")}
    _require_rows(path, spec, images, arrays)
    require_names_of_all(source, arrays["logits"].shape[1])
    numbers = {"targets": (arrays["logits"].shape[1], np.int64), "teacher_id": (len(teachers), np.int16)}
    for name, (count, kind) in numbers.items():
        _require_numbers_of(path, name, arrays[name], count)
        arrays[name] = arrays[name].astype(kind, copy=False)
    classes = class_names(source) or ()
    return PseudoData(images=joined(images), **arrays, teachers=teachers, spec=spec, classes=classes)


def _teachers(text: str) -> tuple[TeacherRecord, ...]:
    return tuple(TeacherRecord(**{**item, "prior": tuple(item["prior"])}) for item in json.loads(text))


def _require_rows(path: Path, spec: Spec, images: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> None:
    held = {**images, **{name: arrays[name] for name in REQUIRED}}
    whole = all(images[name].shape[1:] == part.size for name, part in named(spec).items())
    if len(set(map(len, held.values()))) != 1 or not whole or arrays["logits"].ndim != 2:
        raise DmmError(
            f"arrays of {path} do not belong together",
            evidence=[f"{name} {list(array.shape)}" for name, array in held.items()],
        )


def _require_numbers_of(path: Path, name: str, array: np.ndarray, count: int) -> None:
    """Raise DmmError unless an array (N,) holds at least one number, and none but 0 to count - 1."""
    if array.dtype.kind not in "iu" or not array.size or array.min() < 0 or array.max() >= count:
        raise DmmError(
            f"{name} of pseudo-data file {path} are not numbers from 0 to {count - 1}",
            hint="make it again with: dmm synthesize CKPT... -o pseudo.safetensors",
        )
