"""Image files in a directory, as a rule one directory for each class. Importing this loads no array library.

Legend: C channels, H height, W width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .errors import DmmError, capped, is_out_of_memory, printable

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SUFFIXES = {".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # of these; EPS would start a program
IMAGE_FOLDER = "an ImageFolder holds one directory per class, with the images in it"


class ImageFolder(NamedTuple):
    """The images of a directory.

    Attributes:
        files: of images, in the order of their classes and names.
        labels: of every file the number of its class; None where there are no classes.
        classes: names of the directories, in order.
    """

    files: tuple[Path, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]


def image_folder(path: Path) -> ImageFolder:
    """The images in the class folders of a directory, or the loose ones where no folder holds any.

    Hidden files are passed over, and so is what is no image beside images.

    Raises:
        DmmError: there are both, or none, or a class folder holds files and none of them is an image.
    """
    visible = [entry for entry in sorted(path.iterdir()) if not _is_hidden(entry)]
    folders = [entry for entry in visible if entry.is_dir()]
    loose = [entry for entry in visible if _is_image(entry) and entry not in folders]
    inside = [list(files_below(folder, (path.resolve(),))) for folder in folders]
    files = [(file, label) for label, found in enumerate(inside) for file in found if _is_image(file)]
    if files and loose:
        raise DmmError(
            f"{path} holds class folders, and images beside them",
            evidence=[f"in a folder: {files[0][0]}", f"beside the folders: {loose[0]}"],
            hint="move the images beside the folders elsewhere, or the folders",
        )
    if loose:
        return ImageFolder(tuple(loose), None, ())
    held = {label for _, label in files}
    strange = next((number for number, found in enumerate(inside) if found and number not in held), None)
    if strange is not None or not files:
        others = Counter(file.suffix or "no suffix" for file in (inside[strange] if strange is not None else ()))
        raise DmmError(
            f"no images in {path if strange is None else folders[strange]}",
            evidence=capped(f"{printable(suffix)}: {count}" for suffix, count in others.most_common()),
            hint=f"{IMAGE_FOLDER}; images are {' '.join(sorted(SUFFIXES))}",
        )
    return ImageFolder(
        tuple(file for file, _ in files), tuple(label for _, label in files), tuple(folder.name for folder in folders)
    )


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All visible files at any depth, in order of their names; links are followed, but for those that lead in circles.

    Args:
        above: the directories on the way to this one, without links.
    """
    here = folder.resolve()
    if here in above:
        return
    for entry in sorted(folder.iterdir()):
        if _is_hidden(entry):
            continue
        if entry.is_dir():
            yield from files_below(entry, (*above, here))
        else:
            yield entry


def _is_hidden(entry: Path) -> bool:
    return entry.name.startswith(".")


def _is_image(entry: Path) -> bool:
    return entry.suffix.lower() in SUFFIXES


def decode(path: Path, channels: int) -> np.ndarray:
    """An image file in grey, for one channel, or red, green and blue; uint8 (1, C, H, W).

    Raises:
        DmmError: it cannot be read, or does not tell how light its values are.
    """
    import numpy as np
    from PIL import Image

    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise DmmError(f"cannot read image {path}: not a regular file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            pixels = np.array(_in_bytes(image, path).convert("L" if channels == 1 else "RGB"))
    except Exception as error:  # any kind, by format, of broken files
        if isinstance(error, DmmError) or is_out_of_memory(error):
            raise
        raise DmmError(f"cannot read image {path}: {printable(str(error))}") from None
    return pixels.reshape(1, *pixels.shape[:2], -1).transpose(0, 3, 1, 2)  # (1, C, H, W)


def _in_bytes(image: Image.Image, path: Path) -> Image.Image:
    """An image of 16 bits in 8, which Pillow would clip instead of scaling; others as they are."""
    import numpy as np
    from PIL import Image

    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F":
        wrong = "are floating-point numbers, whose white is not known"
    elif values.min() < 0 or values.max() > 65535:
        wrong = "are not in 0..65535"
    elif image.mode == "I" and image.format != "PPM" and 0 < values.max() < 256:  # 32 bits that hold 16, or 8
        wrong = "are 32-bit integers up to 255, which may be white or nearly black"
    else:
        return Image.fromarray((values.astype(np.int64) / 257).round().astype(np.uint8))
    raise DmmError(f"the values of image {path} {wrong}", hint="save it in 8 or 16 bits")
