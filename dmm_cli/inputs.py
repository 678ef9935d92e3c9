"""From what the user typed to checkpoints whose headers are checked."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, TextIO

from . import strictjson
from .errors import DmmError, EmptyPath, capped, printable
from .header import CONVERSION, MAX_HEADER, UNOPENED, Header, TensorInfo, read_header, require_regular
from .hub import in_metadata, key_of
from .names import is_head
from .recall import recall, remember

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
MARK = "\ufeff"  # which some editors put in front of a text (BOM)
WHOLE = "copy all files of the checkpoint again, from where they came"
ANEW = "it was damaged or edited: write it again with what made it"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # what torch.save writes is called


@dataclass(frozen=True)
class Source:
    """One checkpoint: a label that is unique among the inputs, the path as given, and its checked headers.

    Attributes:
        headers: one per file; several for a sharded checkpoint.
        config: the ``config.json`` beside the weights, as timm's hub writes it, or None.
    """

    label: str
    path: Path
    headers: tuple[Header, ...]
    config: dict[str, Any] | None = None

    @cached_property
    def _home(self) -> dict[str, Header]:
        return {name: header for header in self.headers for name in header.tensors}

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors of all shards, by name in sorted order."""
        return {name: self._home[name].tensors[name] for name in sorted(self._home)}

    def header_of(self, name: str) -> Header:
        """The header of the file that holds a tensor."""
        return self._home[name]

    @cached_property
    def metadata(self) -> dict[str, str]:
        """Metadata of the first file, and what only the ``config.json`` beside it tells."""
        return {**in_metadata(self.config or {}), **self.headers[0].metadata}

    def is_configured(self, entry: str) -> bool:
        """Whether an entry of the metadata comes from the ``config.json`` beside the weights."""
        return entry in self.metadata and entry not in self.headers[0].metadata

    def origin_of(self, entry: str, part: str = "") -> str:
        """Where an entry of the metadata stands, for messages: its key, and the file that has it.

        Args:
            part: of ``dmm.input``: size, mean or std.
        """
        if self.is_configured(entry):
            return f"{key_of(self.config or {}, entry, part)} of {self.files[0].parent / CONFIG}"
        return f"{entry} of {self.path}"

    @property
    def files(self) -> list[Path]:
        """Every file of the checkpoint."""
        return [header.path for header in self.headers]

    @property
    def companions(self) -> list[Path]:
        """Where the index of its shards and its config lie, if it has any, and what would be read in their place."""
        if self.path.is_dir():
            return [self.path / INDEX, self.path / CONFIG, self.path / SINGLE]
        return [self.path, self.path.parent / CONFIG] if self.path.name.endswith(".index.json") else []

    def check_unchanged(self) -> None:
        """Raise DmmError when a file is no longer the one whose header was read."""
        for header in self.headers:
            header.check_unchanged()

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, or of the sorted list of shard names and hashes; computed once."""
        if not self.is_hashed:  # no cached_property: its lock lets one source hash at a time
            self.know_files({path: file_digest(path) for path in self.files})
        return self.__dict__["_sha256"]

    @property
    def is_hashed(self) -> bool:
        """Whether ``sha256`` costs nothing: it was computed, or is remembered from before."""
        if "_sha256" not in self.__dict__:
            known = recall({header.path: header.fingerprint for header in self.headers})
            if len(known) == len(self.headers):
                self.know_sha256(combined_digest(known))
        return "_sha256" in self.__dict__

    def know_files(self, digests: Mapping[Path, str]) -> None:
        """Take the hashes of all files from whoever has just read them, and remember them."""
        self.know_sha256(combined_digest(digests))
        remember({header.path: (header.fingerprint, digests[header.path]) for header in self.headers})

    def know_sha256(self, digest: str) -> None:
        """Take the hash of the checkpoint."""
        self.__dict__["_sha256"] = digest


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    import hashlib  # loads OpenSSL, which help does not need

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def combined_digest(digests: Mapping[Path, str]) -> str:
    """The hash of a checkpoint: that of its file, or of the sorted list of shard names and hashes."""
    import hashlib

    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = sorted(f"{path.name} {digest}" for path, digest in digests.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def resolve_source(argument: str) -> Source:
    """One checkpoint from one file or directory.

    Raises:
        DmmError: it is not a readable safetensors checkpoint.
    """
    if not argument:
        raise EmptyPath("the path of a checkpoint")
    if "\0" in argument:
        raise DmmError(f"no path has a NUL in it: {printable(argument)}")
    path = Path(argument)
    label = os.path.basename(os.path.abspath(path))
    if not path.is_dir():
        if path.name.endswith(".index.json"):
            return Source(_index_label(path), path, _shards(path), _config(path.parent))
        return Source(_stem(path), path, (read_header(path),), None)
    if (path / SINGLE).exists():
        return Source(label, path, (read_header(path / SINGLE),), _config(path))
    if (path / INDEX).exists():
        return Source(label, path, _shards(path / INDEX), _config(path))
    raise _no_checkpoint(path)


def _no_checkpoint(directory: Path) -> DmmError:
    """The error that a directory is no checkpoint, with what it holds in place of one."""
    names = sorted(path.name for path in directory.glob("*"))
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    shards = tuple(f"{name.removesuffix('.safetensors.index.json')}-" for name in indices)
    whole = [name for name in names if name.endswith(".safetensors") and not name.startswith(shards)]
    found = sorted(indices + whole)
    named = " ".join(f"'{directory / name}'" for name in found[:3]) if indices else f"'{directory}/*.safetensors'"
    pickles = [name for name in names if name.endswith(PICKLES)]
    held = [f"it holds {name}" for name in found] or [f"it holds {name}, a pickle; {UNOPENED}" for name in pickles]
    return DmmError(
        f"no {SINGLE} and no {INDEX} in directory {directory}",
        evidence=capped(map(printable, held)),
        hint=f"name the files: {named}" if found else CONVERSION if pickles else f"weights belong into a {SINGLE}",
    )


def resolve_sources(arguments: Sequence[str], *, stdin: TextIO | None = None, minimum: int = 1) -> list[Source]:
    """Checkpoints from files, directories, quoted globs, ``@list.txt``, ``-`` and JSON of earlier stages.

    ``-`` reads ``stdin``: one path a line, or a JSON record of an earlier stage.

    Raises:
        DmmError: an input is unusable, or there are fewer than ``minimum``.
    """
    paths = [path for argument in arguments for path in _expand(argument, stdin)]
    sources = [resolve_source(path) for path in paths]
    if len(sources) < minimum:
        raise DmmError(
            f"this needs {minimum} checkpoints or more, got {len(sources)}",
            evidence=[str(source.path) for source in sources],
        )
    return _with_unique_labels(sources)


def files_of(sources: Iterable[Source]) -> list[Path]:
    """All files of all checkpoints: those with weights, and those that tell how to read them."""
    return [path for source in sources for path in (*source.files, *source.companions)]


def named_files(arguments: Iterable[str]) -> list[Path]:
    """The files that arguments of ``resolve_sources`` name: checkpoints, lists and records of checkpoints."""
    return [Path(argument.removeprefix("@")) for argument in arguments]


def require_same_tensors(sources: Sequence[Source], *, any_shape: Collection[str] = ()) -> None:
    """Raise DmmError unless all checkpoints hold the same names with the same shapes; lists all offenders.

    Args:
        any_shape: names whose shapes may differ.
    """
    first, *others = sources
    problems = []
    for other in others:
        missing, extra = (
            first.tensors.keys() - other.tensors.keys(),
            other.tensors.keys() - first.tensors.keys(),
        )
        problems += [f"{other.path} lacks {printable(name)}" for name in sorted(missing)]
        problems += [f"{other.path} also holds {printable(name)}" for name in sorted(extra)]
        for name in sorted(first.tensors.keys() & other.tensors.keys()):
            here, there = first.tensors[name].shape, other.tensors[name].shape
            if here != there and name not in any_shape:
                problems.append(f"{other.path}: {printable(name)} is {list(there)}, not {list(here)}")
    if problems:
        raise DmmError(
            f"checkpoints do not have the same tensors as {first.path}",
            evidence=capped(problems),
            hint="dmm inspect --tensors lists those of one; only those of one architecture can be merged or compared",
        )


def kinds_of(sources: Sequence[Source]) -> list[tuple[int, ...]]:
    """Indices of the checkpoints that hold the same names and shapes, classifiers aside; in order of appearance."""
    kinds: dict[frozenset, list[int]] = {}
    for number, source in enumerate(sources):
        signature = frozenset((name, None if is_head(name) else info.shape) for name, info in source.tensors.items())
        kinds.setdefault(signature, []).append(number)
    return [tuple(members) for members in kinds.values()]


def paths_in_record(record: dict[str, Any], origin: str) -> list[str]:
    """The checkpoint paths that a JSON record of an earlier stage names.

    Raises:
        DmmError: it names none, or one that is not there.
    """
    entries = record.get("sources")
    ours = str(record.get("schema", "")).startswith("dmm.") and isinstance(entries, list)
    if not ours or not all(isinstance(entry, dict) and "path" in entry for entry in entries):
        raise DmmError(f"{origin} is not a record of a dmm stage that names checkpoints")
    paths = [str(entry["path"]) for entry in entries]
    absent = [printable(path) for path in paths if not Path(path).exists()]
    if absent:
        raise DmmError(
            f"{origin} names checkpoints that are not there",
            evidence=capped(f"no such file: {path}" for path in absent),
            hint="it keeps paths as they were typed: go on in the directory of that stage, or name the files yourself",
        )
    return paths


def read_record(text: str, origin: str, parse: Callable[[str], Any] = strictjson.parse) -> dict[str, Any]:
    """Parse a JSON record.

    Raises:
        DmmError: it is not a JSON object.
    """
    try:
        record = parse(text)
    except strictjson.Repeated as error:
        raise DmmError(f"{origin} {error}") from None
    except (ValueError, RecursionError) as error:  # the latter: of what is nested a thousand deep
        raise DmmError(f"{origin} is not valid JSON: {printable(str(error))}", hint=ANEW) from None
    if not isinstance(record, dict):
        raise DmmError(f"{origin} is not a JSON object", hint=ANEW)
    return record


def read_standard_input(stdin: TextIO | None) -> str:
    """All there is.

    Raises:
        DmmError: there is no standard input, or it is not text.
    """
    if stdin is None:
        raise DmmError(
            "standard input cannot be read: it is closed, shared by processes of torchrun, or not for this argument",
            hint="name a file, or write a list to one: @list.txt",
        )
    try:
        return stdin.read().removeprefix(MARK)
    except (OSError, UnicodeDecodeError) as error:
        raise DmmError(f"cannot read standard input: {printable(str(error))}") from None


def read_text(path: Path) -> str:
    """Text of a file.

    Raises:
        DmmError: it is missing or not text.
    """
    try:
        return path.read_text().removeprefix(MARK)
    except OSError as error:
        raise DmmError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DmmError(f"cannot read {path}: {printable(str(error))}") from None


def _expand(argument: str, stdin: TextIO | None) -> list[str]:
    if argument == "-":
        text = read_standard_input(stdin)
        if text.lstrip().startswith("{"):
            return paths_in_record(read_record(text, "standard input"), "standard input")
        return _lines(text)
    if argument == "@":
        raise EmptyPath("the path of a list of checkpoints")
    if argument.startswith("@"):
        return _lines(read_text(Path(argument[1:])))
    if argument.endswith(".json") and not argument.endswith(".index.json"):
        return paths_in_record(read_record(read_text(Path(argument)), argument), argument)
    if glob.has_magic(argument) and not Path(argument).exists():
        matches = sorted(glob.glob(argument))
        if not matches:
            raise DmmError(f"no file matches {printable(argument)}")
        return matches
    return [argument]


def _lines(text: str) -> list[str]:
    return [line for line in (line.strip() for line in text.splitlines()) if line and not line.startswith("#")]


def _index_label(index: Path) -> str:
    """The directory's name where the index has the name that one in every directory has, else its own."""
    own = "" if index.name == INDEX else _stem(Path(index.name.removesuffix(".index.json")))
    return own or index.parent.name or "model"


def _stem(path: Path) -> str:
    return path.name.removesuffix(".safetensors")


def twins(sources: Sequence[Source]) -> list[tuple[Source, Source]]:
    """Checkpoints with the bytes of one named before them, with the first of those; whatever their paths."""
    first: dict[str, Source] = {}
    return [(one, source) for source in sources if (one := first.setdefault(source.sha256, source)) is not source]


def _with_unique_labels(sources: list[Source]) -> list[Source]:
    """Labels with as much of the path in front as tells them apart, and a number where a checkpoint is there twice.

    Where no path does, for a file beside a directory of the same name, the suffix stays. Later stages find checkpoints
    by label, so it must not depend on the order they are named in, nor on what links point to.
    """
    places = [Path(os.path.abspath(source.path)) for source in sources]
    short, long = [source.label for source in sources], [place.name for place in places]
    labels = short
    for depth, names in product(range(max(len(place.parts) for place in places)), (short, long)):
        labels = [str(Path(*_last(place.parent, depth), name)) for place, name in zip(places, names, strict=True)]
        if len(set(labels)) == len(set(places)):
            break
    seen: Counter[str] = Counter()
    unique = []
    for source, label in zip(sources, labels, strict=True):
        seen[label] += 1
        suffix = f"#{seen[label]}" if seen[label] > 1 else ""
        unique.append(Source(label + suffix, source.path, source.headers, source.config))
    return unique


def _last(directory: Path, depth: int) -> tuple[str, ...]:
    """The last parts of a path, the root not among them."""
    return directory.parts[1:][-depth:] if depth else ()


def _config(directory: Path) -> dict[str, Any] | None:
    path = directory / CONFIG
    # others write NaN and Infinity into theirs, which are no JSON
    return read_record(read_text(path), str(path), json.loads) if path.is_file() else None


def _shards(index: Path) -> tuple[Header, ...]:
    require_regular(index)
    if index.stat().st_size > MAX_HEADER:
        raise DmmError(f"{index} is too large to be an index: {index.stat().st_size} bytes", hint=WHOLE)
    record = read_record(read_text(index), str(index))
    listed = record.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise DmmError(f"{index} has no weight_map", hint=WHOLE)
    _require_basenames(index, listed.values())
    headers = {name: read_header(index.parent / name) for name in sorted(set(listed.values()))}
    absent = [
        f"{printable(tensor)} is not in {name}"
        for tensor, name in listed.items()
        if tensor not in headers[name].tensors
    ]
    held = Counter(name for header in headers.values() for name in header.tensors)
    absent += [f"{printable(name)} is in {count} shards" for name, count in held.items() if count > 1]
    if absent:
        raise DmmError(f"shards do not hold what {index} lists", evidence=capped(absent), hint=WHOLE)
    return tuple(headers.values())


def _require_basenames(index: Path, names: Iterable[Any]) -> None:
    for name in names:
        if not isinstance(name, str) or not _is_basename(name):
            raise DmmError(
                f"{index} names a shard outside its directory, or no file: {printable(str(name))}",
                hint="shard names must be plain file names",
            )


def _is_basename(name: str) -> bool:
    try:
        os.fsencode(name)  # JSON can hold half a surrogate pair, which no file name can
    except UnicodeEncodeError:
        return False
    return Path(name).name == name and name not in ("", ".", "..") and "\0" not in name
