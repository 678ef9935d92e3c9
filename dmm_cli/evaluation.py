"""Accuracy on labelled data.

Legend: N samples, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .checkpoint import Checkpoint
from .errors import DmmError, capped, is_out_of_memory, listed, printable
from .examples import IMAGES, Inputs, answer, floored, joined, named, percentage, require_finite
from .header import require_regular
from .imagefolder import IMAGE_FOLDER, decode, image_folder
from .images import InputSpec
from .inputs import resolve_source
from .layout import place
from .manifest import EvaluationRow
from .metadata import class_name, class_names
from .spaces import Spec, TokenSpec, example, space_of

ANEW = "write it anew with numpy.savez"
OTHERS = {".csv", ".tsv", ".npy", ".parquet"}  # what tables are kept in elsewhere


@dataclass(frozen=True)
class LabelledData:
    """Images and their classes.

    Attributes:
        images: uint8 (N, C, H, W), or paths of image files to decode when they are needed; or all inputs of a network,
            those that are no images numbers, float32, or tokens, int64 (N, ...).
        labels: int64 (N,), or None where the data have none and need none.
        classes: names, or empty where the data have none.
    """

    images: Inputs | tuple[Path, ...]
    labels: torch.Tensor | None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, start: int, stop: int, spec: Spec) -> Inputs:
        """Images [start, stop) at the model's size, normalised, float32 (B, C, H, W), or all its inputs.

        Raises:
            DmmError: the data are not what the model takes.
        """
        if isinstance(self.images, tuple):
            decoded = (torch.from_numpy(decode(path, spec.size[0])) for path in self.images[start:stop])
            return torch.cat([prepare(image, spec) for image in decoded])
        held = named(self.images[start:stop])
        return joined({name: prepare(held[name], part, name) for name, part in named(spec).items()})

    def batches(
        self,
        size: int,
        spec: Spec,
        on_progress: Callable[[str, int, int], None] | None = None,
        stage: str = "images",
    ) -> Iterator[Inputs]:
        """All images in order, at most ``size`` at a time, see ``batch``; progress is told as that of ``stage``."""
        for start in range(0, len(self), size):
            yield self.batch(start, start + size, spec)
            if on_progress:
                on_progress(stage, min(start + size, len(self)), len(self))


def prepare(values: torch.Tensor, spec: InputSpec | TokenSpec, name: str = IMAGES) -> torch.Tensor:
    """One input as the model takes it: images, uint8 (B, C, H, W), are resized (bilinear, antialiased); all normalised.

    Raises:
        DmmError: the data are of another kind or shape than the model's input.
    """
    _require_kind(values, spec, name)
    if not spec.is_image:
        return space_of(spec).from_bytes(values)
    pixels = values.float() / 255.0
    if tuple(pixels.shape[2:]) != tuple(spec.size[1:]):
        pixels = F.interpolate(pixels, size=spec.size[1:], mode="bilinear", antialias=True, align_corners=False)
    return space_of(spec).normalise(pixels)


def _require_kind(values: torch.Tensor, spec: InputSpec | TokenSpec, name: str) -> None:
    if spec.is_image and values.dtype == torch.uint8 and values.dim() == 4:
        if values.shape[1] != spec.size[0]:
            raise DmmError(f"the data have {values.shape[1]} channels, the model takes {spec.size[0]}")
        return
    tokens = isinstance(spec, TokenSpec)
    held, shown = list(values.shape[1:]), printable(name)
    if spec.is_image or (values.dtype == torch.uint8 and not tokens) or values.is_floating_point() == tokens:
        kind = "images, uint8 [N, C, H, W]" if spec.is_image else "tokens, int64" if tokens else "numbers, float"
        hint = None if spec.is_image or tokens else "store them as floats: array.astype('float32')"
        raise DmmError(f"{shown} of the data must be {kind}, not {values.dtype} {held}", hint=hint)
    if held != list(spec.size):
        raise DmmError(f"{shown} of the data are {held}, of the model {list(spec.size)}")
    if tokens and not 0 <= int(values.min()) <= int(values.max()) < spec.vocabulary:
        raise DmmError(f"{shown} of the data hold tokens beyond the {spec.vocabulary} that the model has")


def load_labelled(path: Path, names: Sequence[str] = (IMAGES,)) -> LabelledData:
    """Labelled data from a safetensors or npz file (``labels``, and an array per input) or an ImageFolder.

    Args:
        names: of the model's inputs.

    Raises:
        DmmError: the file lacks an array, an array has the wrong dtype or shape, or the folder holds no classes.
    """
    if not path.is_dir():
        return _arrays(path, names, ("labels",))
    data = _folder(path, names)
    if data.labels is None:
        raise DmmError(f"the images in {path} have no classes", hint=IMAGE_FOLDER)
    return data


def load_images(path: Path, names: Sequence[str] = (IMAGES,)) -> LabelledData:
    """The same where labels may be missing; a directory may also hold the images themselves.

    Raises:
        DmmError: there are no images, or an array has the wrong dtype or shape.
    """
    return _folder(path, names) if path.is_dir() else _arrays(path, names)


def _arrays(path: Path, names: Sequence[str], required: Sequence[str] = ()) -> LabelledData:
    wanted = (*names, "labels")
    try:
        arrays, held, classes = _read_npz(path, wanted) if path.suffix == ".npz" else _read_safetensors(path)
    except DmmError as error:
        if path.suffix.lower() not in OTHERS or not path.is_file():
            raise
        told = ", ".join(f"{printable(name)}=..." for name in (*names, *required))
        raise DmmError(
            f"labelled data are no {path.suffix} file: {path}", hint=f"write an .npz file: numpy.savez(FILE, {told})"
        ) from error
    for name in (*names, *required):
        if name not in arrays:
            raise DmmError(
                f"{path} has no array named {printable(name)}",
                evidence=[f"it holds {listed(held) or 'none'}"],
                hint="images: uint8 [N, C, H, W]; labels: int64 [N]; of a model with several inputs, each by its name",
            )
    for name in names:
        _require_input(path, name, arrays[name], len(arrays[names[0]]))
    images, labels = joined({name: _tensor(arrays[name]) for name in names}), arrays.get("labels")
    if labels is None:
        return LabelledData(images, None, classes)
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise DmmError(f"labels of {path} must be integers [{len(images)}], not {labels.dtype} {list(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > np.iinfo(np.int64).max:
        wrong = "a negative class" if low < 0 else f"class {high}, which int64 cannot hold"
        raise DmmError(f"labels of {path} hold {wrong}", hint="number the classes from 0")
    return LabelledData(images, torch.from_numpy(labels.astype(np.int64)), classes)


def _require_input(path: Path, name: str, array: np.ndarray, count: int) -> None:
    """Raise DmmError unless an array holds ``count`` images, or as many examples of an input that is none."""
    if not array.ndim or not len(array) or len(array) != count:
        raise DmmError(f"{printable(name)} of {path} must hold {count or 'some'} examples, not {list(array.shape)}")
    if not array.size:
        raise DmmError(
            f"{printable(name)} of {path} are empty: {array.dtype} {list(array.shape)}",
            hint="write them anew, with no axis of length 0",
        )
    images = array.dtype == np.uint8 and array.ndim == 4
    others = array.dtype.kind in "fiu" and array.ndim > 1 and name != IMAGES
    if not images and not others:
        told = "uint8 [N, C, H, W]" + ("" if name == IMAGES else ", or numbers, float, or tokens, int64, [N, ...]")
        raise DmmError(f"{printable(name)} of {path} must be {told}, not {array.dtype} {list(array.shape)}")
    if others and not np.isfinite(array).all():
        raise DmmError(f"{printable(name)} of {path} hold NaN or infinity")


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Pixels may be bytes; other integers are tokens, int64, and other numbers float32."""
    if array.dtype != np.uint8:
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64, copy=False)
    return torch.from_numpy(array)


def _read_npz(path: Path, names: Sequence[str]) -> tuple[dict[str, np.ndarray], list[str], tuple[str, ...]]:
    """Some arrays, the names of all, and those of classes."""
    require_regular(path)
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("not an .npz archive, which numpy.savez writes")
        with np.load(path, allow_pickle=False) as file:
            arrays, held = {name: file[name] for name in (*names, "classes") if name in file}, list(file.files)
    except Exception as error:  # of zip's many ways to be broken, encrypted or packed
        if is_out_of_memory(error):
            raise
        raise DmmError(f"cannot read {path}: {printable(str(error))}", hint=f"copy it again, or {ANEW}") from None
    strange = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if strange:
        raise DmmError(f"cannot read {path}: {listed(strange)} in it is no array of numpy", hint=ANEW)
    return arrays, held, _names(path, arrays.pop("classes")) if "classes" in arrays else ()


def _names(path: Path, classes: np.ndarray) -> tuple[str, ...]:
    """The classes that an npz file names, by strings, bytes or integers."""
    if classes.ndim != 1 or not len(classes) or classes.dtype.kind not in "USiu":
        raise DmmError(
            f"classes of {path} must be a list of names, not {classes.dtype} {list(classes.shape)}",
            hint='write it anew with classes=["cat", "dog"], in the order of the labels, or without them',
        )
    names = [class_name(name.decode(errors="replace") if isinstance(name, bytes) else name) for name in classes]
    return _different_names(path, names, "write it anew with one name for every label")


def _different_names(path: Path, names: Sequence[str], hint: str) -> tuple[str, ...]:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DmmError(
            f"classes of {path} must be different names",
            evidence=capped(f"more than once: {printable(name)}" for name in twice),
            hint=hint,
        )
    return tuple(names)


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], list[str], tuple[str, ...]]:
    source = resolve_source(str(path))
    with Checkpoint(source) as file:
        arrays = {name: file.array(name) for name in source.tensors}
    return arrays, list(arrays), class_names(source) or ()


def _folder(path: Path, names: Sequence[str]) -> LabelledData:
    """The images of a directory, see ``image_folder``.

    Raises:
        DmmError: the model takes more than images, or see there.
    """
    if tuple(names) != (IMAGES,):
        raise DmmError(
            f"{path} holds images alone, the model takes {', '.join(map(printable, names))}",
            hint="give a .safetensors or .npz file with an array for each, and labels",
        )
    found = image_folder(path)
    labels = None if found.labels is None else torch.tensor(found.labels)
    names = [class_name(folder) for folder in found.classes]
    classes = _different_names(path, names, "their folders differ in how accents are spelt: put them together")
    return LabelledData(found.files, labels, classes)


@torch.inference_mode()
def predict(
    model: nn.Module,
    data: LabelledData,
    spec: Spec,
    device: torch.device,
    batch: int = 256,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> torch.Tensor:
    """Logits, float32 (N, K), on the CPU.

    Raises:
        DmmError: the model fails, or answers with NaN or infinity.
    """
    place(model, device, example(spec, device))
    batches = data.batches(batch, spec, on_progress, "evaluate")
    logits = torch.cat([answer(model, inputs.to(device)).float().cpu() for inputs in batches])
    require_finite(model, logits)
    return logits


def score(label: str, answers: torch.Tensor, labels: torch.Tensor) -> EvaluationRow:
    """Accuracy and recall per class, in per cent.

    Args:
        answers: logits or probabilities (N, K). labels: (N,).

    Raises:
        DmmError: a label is beyond the model's classes.
    """
    classes = answers.shape[1]
    class_counts(labels, classes, label)
    hits = answers.argmax(1) == labels
    recall: list[float | None] = []
    for value in range(classes):
        members = labels == value
        recall.append(percentage(hits[members]) if members.any() else None)
    return EvaluationRow(label, percentage(hits), tuple(recall))


def labels_for(data: LabelledData, names: Sequence[str], classes: int, label: str) -> torch.Tensor:
    """Labels (N,) as a model numbers its classes.

    Where the data name theirs and the model does, they are matched by name; where no name agrees, or the model has
    none, they are taken in order.

    Args:
        names: of the model's classes, if known. classes: how many it has. label: what the model is called.

    Raises:
        DmmError: the data have a class that the model cannot name, or another number of classes.
    """
    if names and len(names) != classes:
        raise DmmError(f"{printable(label)} has {classes} classes, but dmm.classes in its metadata names {len(names)}")
    if not data.classes:
        return data.labels
    counts = class_counts(data.labels, len(data.classes), "the list of their names")
    if set(names).isdisjoint(data.classes):
        if len(data.classes) != classes:
            raise DmmError(
                f"the data have {len(data.classes)} classes, {printable(label)} has {classes}, and no name agrees",
                evidence=[f"the data: {listed(data.classes)}", f"{printable(label)}: {listed(names) or 'no names'}"],
                hint="name the classes of the data, or the folders of their images, as the model does: dmm inspect",
            )
        return data.labels
    absent = [name for name, count in zip(data.classes, counts, strict=True) if count and name not in names]
    if absent:
        raise DmmError(
            f"the data have classes that {printable(label)} cannot name",
            evidence=capped(map(printable, absent)),
            hint=f"it names {listed(names)}",
        )
    numbers = [names.index(name) if name in names else -1 for name in data.classes]
    return torch.tensor(numbers)[data.labels]


def taken_in_order(data: LabelledData, names: Sequence[str]) -> str | None:
    """What to warn of where ``labels_for`` has taken named classes in order, since no name agrees or there are none."""
    if not names and isinstance(data.images, tuple):
        return _numbers_as_text(data.classes)
    if not names or not data.classes or not set(names).isdisjoint(data.classes):
        return None
    taken = f"{printable(data.classes[0])} of the data as {printable(names[0])}"
    return f"data and checkpoints name no class alike, so they are taken in order: {taken}, and so on"


def _numbers_as_text(folders: Sequence[str]) -> str | None:
    """What to warn of where folders are numbers that text sorts otherwise: networks are trained in either order."""
    if not all(name.isascii() and name.isdigit() for name in folders):
        return None
    wrong = next((i for i, name in enumerate(sorted(folders, key=int)) if name != folders[i]), None)
    if wrong is None:
        return None
    return (
        "classes have no names in the checkpoint, so folders are taken in the order of text, as torchvision does: "
        f"{folders[wrong]} as class {wrong}, and so on; for networks trained in the order of numbers, as timm does, "
        f"rename the folders to have as many digits each, such as {folders[0].zfill(max(map(len, folders)))}"
    )


def class_counts(labels: torch.Tensor, classes: int, label: str) -> tuple[int, ...]:
    """How many of the labels (N,) are of every class.

    Raises:
        DmmError: a label is beyond the classes of the model that is called ``label``.
    """
    if int(labels.max()) >= classes:
        beyond = sorted({int(value) for value in labels[labels >= classes]})
        raise DmmError(
            f"the data have classes that {printable(label)} cannot name: it has {classes}",
            evidence=capped(map(str, beyond)),
        )
    return tuple(torch.bincount(labels, minlength=classes).tolist())


def ensembles(logits: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What models (N, K) answer together, by name: the mean of their probabilities, and of their logits.

    Raises:
        DmmError: the models have different numbers of classes.
    """
    if len({item.shape for item in logits}) > 1:
        raise DmmError("an ensemble needs models with the same classes")
    together = torch.stack(list(map(floored, logits)))  # (models, N, K)
    return {"ensemble": together.softmax(2).mean(0), "ensemble of logits": together.mean(0)}
