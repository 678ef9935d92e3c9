"""Checkpoints in several files: how tensors are dealt out, and the index that names them."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path

from .errors import DmmError, printable
from .header import ITEM_SIZE, Layout, file_order

SUFFIX = ".safetensors"
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB.

    Raises:
        DmmError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match.group(2).upper()) if match else None
    if unit is None or not 1 <= float(match.group(1)) * unit < 2**63:
        raise DmmError(f"not a size: {printable(text)}", hint="for example 5GB, 500MB or 2GiB")
    return int(float(match.group(1)) * unit)


def plan_shards(layout: Layout, path: Path, limit: int | None) -> dict[Path, Layout]:
    """Deal tensors out to files, in file order, none above the limit but for a tensor that is larger alone.

    Args:
        path: of the whole checkpoint; shards are named after it, ``NAME-00001-of-00003.safetensors``.
        limit: bytes of tensors in a file; None puts all in one.
    """
    shards: list[dict] = [{}]
    room = limit
    for name in file_order(layout):
        dtype, shape = layout[name]
        size = prod(shape) * ITEM_SIZE[dtype]
        if limit is not None and shards[-1] and size > room:
            shards.append({})
            room = limit
        shards[-1][name] = layout[name]
        room = room - size if limit is not None else None
    if len(shards) == 1:
        return {path: layout}
    stem = path.name.removesuffix(SUFFIX)
    return {
        path.parent / f"{stem}-{number:05}-of-{len(shards):05}{SUFFIX}": shard for number, shard in enumerate(shards, 1)
    }


def bytes_of(layout: Layout) -> int:
    """Of all tensors together."""
    return sum(prod(shape) * ITEM_SIZE[dtype] for dtype, shape in layout.values())


def index_path(path: Path) -> Path:
    """Where the index of a sharded checkpoint lies."""
    return path.parent / f"{path.name}.index.json"


def index_text(shards: dict[Path, Layout]) -> str:
    """The index that transformers and timm read: which file holds which tensor."""
    total = sum(map(bytes_of, shards.values()))
    home = {name: path.name for path, shard in shards.items() for name in shard}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(home.items()))}, indent=2) + "\n"
