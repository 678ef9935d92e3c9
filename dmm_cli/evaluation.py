"""Accuracy on labelled data.

Legend: N samples, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .architectures import class_names
from .checkpoint import Checkpoint
from .errors import DmmError, capped, printable
from .images import InputSpec, PixelSpace
from .inputs import resolve_source
from .manifest import EvaluationRow

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}


@dataclass(frozen=True)
class LabelledData:
    """Images and their classes.

    Attributes:
        images: uint8 (N, C, H, W), or paths of image files to decode when they are needed.
        labels: int64 (N,), or None where the data have none and need none.
        classes: names, or empty where the data have none.
    """

    images: torch.Tensor | tuple[Path, ...]
    labels: torch.Tensor | None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, start: int, stop: int, spec: InputSpec) -> torch.Tensor:
        """Images [start, stop) at the model's size, normalised, float32 (B, C, H, W)."""
        if isinstance(self.images, torch.Tensor):
            return prepare(self.images[start:stop], spec)
        return torch.cat([prepare(_decode(path, spec.size[0]), spec) for path in self.images[start:stop]])

    def batches(
        self, size: int, spec: InputSpec, on_progress: Callable[[str, int, int], None] | None = None
    ) -> Iterator[torch.Tensor]:
        """All images in order, at most ``size`` at a time, see ``batch``."""
        for start in range(0, len(self), size):
            yield self.batch(start, start + size, spec)
            if on_progress:
                on_progress("images", min(start + size, len(self)), len(self))


def prepare(images: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """uint8 images (B, C, H, W) resized (bilinear, antialiased) and normalised.

    Raises:
        DmmError: the number of channels is not the model's.
    """
    if images.shape[1] != spec.size[0]:
        raise DmmError(f"the data have {images.shape[1]} channels, the model takes {spec.size[0]}")
    pixels = images.float() / 255.0
    if tuple(pixels.shape[2:]) != tuple(spec.size[1:]):
        pixels = F.interpolate(pixels, size=spec.size[1:], mode="bilinear", antialias=True, align_corners=False)
    return PixelSpace(spec).normalise(pixels)


def load_labelled(path: Path) -> LabelledData:
    """Labelled data from a safetensors or npz file (``images``, ``labels``) or an ImageFolder.

    Raises:
        DmmError: the file lacks an array, or an array has the wrong dtype or shape.
    """
    return _image_folder(path) if path.is_dir() else _arrays(path, ("images", "labels"))


def load_images(path: Path) -> LabelledData:
    """The same where labels may be missing; a directory may also hold the images themselves.

    Raises:
        DmmError: there are no images, or an array has the wrong dtype or shape.
    """
    if not path.is_dir():
        return _arrays(path, ("images",))
    loose = tuple(file for file in sorted(path.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES)
    return LabelledData(loose, None) if loose else _image_folder(path)


def _arrays(path: Path, required: Sequence[str]) -> LabelledData:
    arrays, classes = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    for name in required:
        if name not in arrays:
            raise DmmError(
                f"{path} has no array named {name}",
                evidence=[f"it holds {', '.join(map(printable, arrays)) or 'none'}"],
                hint="images: uint8 [N, C, H, W]; labels: int64 [N]",
            )
    images, labels = arrays["images"], arrays.get("labels")
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise DmmError(f"images of {path} must be uint8 [N, C, H, W], not {images.dtype} {list(images.shape)}")
    if labels is None:
        return LabelledData(torch.from_numpy(images), None, classes)
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DmmError(f"labels of {path} must be integers [{len(images)}], not {labels.dtype} {list(labels.shape)}")
    if labels.min() < 0:
        raise DmmError(f"labels of {path} hold a negative class")
    return LabelledData(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)), classes)


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "labels", "classes") if name in file}
    except (OSError, ValueError) as error:
        raise DmmError(f"cannot read {path}: {printable(str(error))}") from None
    return arrays, tuple(map(str, arrays.pop("classes", ())))


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    source = resolve_source(str(path))
    with Checkpoint(source) as file:
        arrays = {name: file.array(name) for name in source.tensors}
    return arrays, class_names(source) or ()


def _image_folder(path: Path) -> LabelledData:
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((path / name).rglob("*"))
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise DmmError(
            f"no images in {path}",
            hint="an ImageFolder holds one directory per class, with the images in it",
        )
    labels = torch.tensor([label for _, label in files])
    return LabelledData(tuple(file for file, _ in files), labels, tuple(classes))


def _decode(path: Path, channels: int) -> torch.Tensor:
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except OSError as error:
        raise DmmError(f"cannot read image {path}: {printable(str(error))}") from None
    return torch.from_numpy(pixels).reshape(1, *pixels.shape[:2], -1).permute(0, 3, 1, 2)  # (1, C, H, W)


@torch.inference_mode()
def predict(
    model: nn.Module, data: LabelledData, spec: InputSpec, device: torch.device, batch: int = 256
) -> torch.Tensor:
    """Class probabilities, float32 (N, K), on the CPU."""
    model = model.to(device)
    outputs = [
        model(data.batch(start, start + batch, spec).to(device)).float().softmax(1).cpu()
        for start in range(0, len(data.labels), batch)
    ]
    return torch.cat(outputs)


def score(label: str, probabilities: torch.Tensor, labels: torch.Tensor) -> EvaluationRow:
    """Accuracy and recall per class, in per cent.

    Raises:
        DmmError: a label is beyond the model's classes.
    """
    classes = probabilities.shape[1]
    class_counts(labels, classes, label)
    hits = probabilities.argmax(1) == labels
    recall: list[float | None] = []
    for value in range(classes):
        members = labels == value
        recall.append(100.0 * float(hits[members].double().mean()) if members.any() else None)
    return EvaluationRow(label, 100.0 * float(hits.double().mean()), tuple(recall))


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


def ensemble(probabilities: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean of class probabilities, (N, K).

    Raises:
        DmmError: the models have different numbers of classes.
    """
    if len({item.shape for item in probabilities}) > 1:
        raise DmmError("an ensemble needs models with the same classes")
    return torch.stack(list(probabilities)).mean(0)
