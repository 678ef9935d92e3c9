"""What an earlier merge left where another one writes: a later command would read it in place of the new.

A directory with a whole checkpoint and an index of shards is read as the former, and 'merged/group-*.safetensors'
takes what is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from ..errors import DmmError
from ..header import read_header
from ..inputs import read_record, read_text
from ..shards import SUFFIX, index_path


def earlier_files(paths: Sequence[Path], record: Path | None) -> list[Path]:
    """Files in the place of the checkpoints that a merge is to write, and those it wrote when it wrote ``merge.json``.

    A file at one of the paths is in the way whoever wrote it. Any other counts only if its metadata say that it comes
    from dmm merge, and an index only if all its shards do.

    Args:
        record: that ``merge.json``, whether or not it is there.
    """
    found = [path for path in paths if path.is_file()]
    for path in (*paths, *_recorded(record)):
        found += _written(path)
    return list(dict.fromkeys(found))


def remove_earlier(earlier: Iterable[Path], written: Iterable[Path]) -> None:
    """Remove what has not been written anew."""
    kept = set(written)
    for path in earlier:
        if path not in kept:
            path.unlink(missing_ok=True)


def _recorded(record: Path | None) -> list[Path]:
    """The checkpoints a ``merge.json`` tells of; they lie beside it, wherever its paths were relative to."""
    from ..manifest import MergeManifest

    if record is None or not record.is_file():
        return []
    try:
        outputs = MergeManifest.from_json(read_record(read_text(record), str(record))).outputs
    except DmmError:  # not ours
        return []
    names = [PurePath(output).name.removesuffix(".index.json") for output in outputs]
    return [record.parent / name for name in names if re.fullmatch(r"group-\d+\.safetensors", name)]


def _written(path: Path) -> list[Path]:
    """A checkpoint that dmm merge wrote: its file, or an index, before there are no shards for it, and the shards."""
    name = re.compile(rf"{re.escape(path.name.removesuffix(SUFFIX))}-\d+-of-\d+{re.escape(SUFFIX)}")
    beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    shards = [file for file in beside if name.fullmatch(file.name) and _is_merged(file)]
    index = index_path(path)
    listed = _listed(index)
    whole = [path] if path in beside and _is_merged(path) else []
    return [*whole, *([index] if listed and listed <= {shard.name for shard in shards} else []), *shards]


def _is_merged(path: Path) -> bool:
    try:
        return read_header(path).metadata.get("dmm.command") == "merge"
    except DmmError:
        return False


def _listed(index: Path) -> set[str]:
    """The shards an index names; none where it is not there, or not an index."""
    try:
        homes = read_record(read_text(index), str(index)).get("weight_map")
    except DmmError:
        return set()
    return set(map(str, homes.values())) if isinstance(homes, dict) else set()
