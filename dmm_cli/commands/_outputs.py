"""Where a command writes several files: one file, or a directory that holds them."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import DmmError
from ..files import LONGEST, check_output, refuse_dangling, require_writable


def check_files(output: Path | None, picture: Path | None = None, *, inputs: Sequence[Path], force: bool) -> None:
    """Refuse a file for a result, or one for a picture of it, before anything is computed.

    Raises:
        DmmError: one cannot or must not be written, the picture is neither .png nor .svg, or both are one file.
    """
    if picture:
        from ..report.figures import check_drawable

        check_drawable(picture)
    if output and picture and os.path.realpath(output) == os.path.realpath(picture):
        raise DmmError(f"two outputs for one file: {picture}")
    for path in filter(None, (output, picture)):
        check_output(path, inputs=inputs, force=force)


def file_or_directory(
    output: Path | None,
    names: Sequence[str],
    *,
    inputs: Sequence[Path],
    force: bool,
    example: str,
    more: bool = False,
) -> tuple[Path, ...]:
    """A path for every name: the output itself if it is a .safetensors file, else files in that directory.

    The directory need not be there; whoever writes makes it.

    Args:
        names: of the files, without their suffix. example: a file's name, for the hint.
        more: whether there may be others, whose names are not known yet.

    Raises:
        DmmError: there is no output, several names do not fit in one file, one is to go to a file of another kind, two
            have one name, or a path cannot or must not be written.
    """
    if output is None:
        raise DmmError("nowhere to write", hint=f"name a file with -o {example}, or a directory for several")
    if output.suffix == ".safetensors":
        if len(names) > 1:
            raise DmmError(f"{len(names)} checkpoints do not fit in one file: {output}", hint="name a directory")
        check_output(output, inputs=inputs, force=force)
        return (output,)
    if output.suffix and len(names) == 1 and not more and not output.is_dir():
        raise DmmError(f"not the name of a .safetensors file: {output}", hint=f"name one, as in -o {example}")
    refuse_dangling(output)
    if not output.parent.is_dir() or (output.exists() and not output.is_dir()):
        above = next(filter(os.path.lexists, output.parents))
        missing = above.is_dir() and above != output.parent
        hint = f"mkdir -p {shlex.quote(str(output.parent))}" if missing else "name a directory in one that exists"
        raise DmmError(f"cannot make the directory {output}", hint=hint)
    require_writable(output if output.is_dir() else output.parent)
    paths = tuple(output / f"{name}.safetensors" for name in names)
    long = next((path for path in paths if len(os.fsencode(path.name)) > LONGEST), None)
    if long:
        raise DmmError(
            f"the name of an output is too long: {long}", hint="give checkpoints shorter names, by links to them"
        )
    path, times = Counter(paths).most_common(1)[0]
    if times > 1:
        raise DmmError(f"{times} outputs for one file: {path}", hint="write them to different directories, one by one")
    for path in paths if output.is_dir() else ():
        check_output(path, inputs=inputs, force=force)
    return paths
