"""Options that several commands share, and what they mean together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer

from ..archspec import name_of
from ..config import DEFAULT
from ..errors import DmmError, EmptyPath, printable
from ..metadata import is_input_size
from ..registry import did_you_mean, mistyped
from ..synthesis import ENGINES, presets
from ..trust import grant, is_granted, module_of

FORMATS = ("table", "json", "tsv", "md")
SOURCES = ("COMMANDLINE", "ENVIRONMENT", "DEFAULT_MAP", "DEFAULT")  # of an option's value, nearest to the user first
READ = {"against", "base", "data", "owner", "recalibrate", "statistics", "student"}  # parameters: paths of inputs
WRITTEN = {"figure", "grid", "output"}  # and of outputs
LARGEST = 2**53  # integers up to here are exact in every reader's JSON


def option(*names: str, help: str, **details: Any) -> Any:
    """A Typer option; its environment variable works but stays out of the help, where it would double every line."""
    return typer.Option(*names, help=help, show_envvar=False, **details)


def require_paths(parameters: Iterable[Any], line: Sequence[str]) -> None:
    """Raise DmmError for an option whose path is empty, while the words of the line still tell that.

    Of an empty path Typer makes that of the current directory.
    """
    flags = {flag for parameter in parameters if parameter.name in READ | WRITTEN for flag in parameter.opts}
    for word, following in zip_longest(line, line[1:]):
        flag, equals, value = word.partition("=")
        if re.fullmatch(r"-\w\w+", word):
            flag = f"-{word[-1]}"  # -qo is -q -o
        if flag in flags and not value and (equals or following == ""):
            raise EmptyPath(flag)


def gate(help: str, low: int = 0, high: int = 100) -> Any:
    """``--fail-under``, in per cent unless bounds are given; Typer's own tell NaN that it is too large."""

    def within(value: float | None) -> float | None:
        if value is not None and not _beyond_reason(value) and not low <= value <= high:
            raise typer.BadParameter(f"{value:g} is not in the range {low}<=x<={high}")
        return value

    shown = {"help": f"{help}  [{low}<=x<={high}]", "metavar": "<float range>"}
    return option("--fail-under", callback=within, **shown)


def require_numbers(context: typer.Context, parameters: Iterable[Any]) -> None:
    """Raise BadParameter for an option whose number is NaN, infinite, or beyond what JSON keeps exactly.

    All at once: for Typer to look at a callback of every option takes as long as a third of building them.
    """
    for parameter in parameters:
        problem = _beyond_reason(context.params.get(parameter.name))
        if problem:
            raise typer.BadParameter(problem, ctx=context, param=parameter)


def _beyond_reason(value: Any) -> str:
    """What is wrong with the value of an option; NaN would pass every bound, since it compares as false."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"{value} is larger than {LARGEST}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    return ""


Checkpoints = Annotated[
    list[str],
    typer.Argument(
        metavar="CKPT...",
        help="Checkpoints: .safetensors files, model directories, quoted globs, @list.txt, the JSON of a stage (for "
        "the checkpoints it was given), or -.",
    ),
]
Output = Annotated[Path | None, option("--output", "-o", help="Write to this file.")]
NEEDED = "  [required]"  # said here, and checked by commands: Typer's own message would name no file as an example
NeededOutput = Annotated[Path | None, option("--output", "-o", help=f"Write to this file.{NEEDED}")]
Force = Annotated[bool, option("--force", help="Replace outputs that exist.")]
Format = Annotated[str, option("--format", help="table, json, tsv or md.")]


def _json_unless_formatted(context: typer.Context, value: bool) -> bool:
    """Whether ``--json`` holds: a ``--format`` said nearer to the user than it goes before it."""

    def distance(name: str) -> int:
        source = context.get_parameter_source(name)
        return SOURCES.index(source.name) if source else len(SOURCES)

    return value and distance("json") <= distance("format")


Json = Annotated[bool, option("--json", callback=_json_unless_formatted, help="Short for --format json.")]
JsonAlone = Annotated[bool, option("--json", help="Print the result as JSON.")]  # of commands without --format
Quiet = Annotated[bool, option("--quiet", "-q", help="Print only the essential, one item a line.")]
DryRun = Annotated[bool, option("--dry-run", help="Check the inputs, print the plan, write nothing.")]


def _trusted(context: typer.Context, arch: str | None) -> str | None:
    """Whoever names a factory by hand trusts its module in the files too; who only has a dmm.toml does not."""
    module = module_of(arch or "")
    source = context.get_parameter_source("arch")
    found = source is not None and source.name == "DEFAULT_MAP" and context.parent.params["config"] is None
    if module and found and not is_granted(arch):
        raise DmmError(
            f"arch of {context.info_name} in {DEFAULT} asks for code to be run: {printable(arch)}",
            hint=f"if you know that code, say so: dmm --trust {printable(module)} COMMAND ..., "
            f"or name the file: dmm --config {DEFAULT} COMMAND ...",
        )
    if module and found:
        from ..architectures import require_trusted_factory

        require_trusted_factory(name_of(arch))
    elif module:
        grant([module])
    return arch


Arch = Annotated[
    str | None,
    option(
        "--arch",
        callback=_trusted,
        help="timm name with arguments (resnet18,num_classes=10) or package.module:factory.",
    ),
]
Statistics = Annotated[
    list[str] | None,
    option(
        "--statistics",
        help="Statistics that dmm record stored, in place of BatchNorm's or, with its --owner, beside them. "
        "Repeatable.",
    ),
]
InputSize = Annotated[str | None, option("--input-size", help="Channels, height, width of the input: 3,32,32.")]
Mean = Annotated[str | None, option("--mean", help="Normalisation of pixels in 0..1: one number, or one per channel.")]
Std = Annotated[str | None, option("--std", help="Normalisation of pixels in 0..1: one number, or one per channel.")]
Device = Annotated[str, option("--device", help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[
    str,
    option(
        "--precision",
        help="float32, bfloat16 (faster where the device computes in it), or auto: bfloat16 on CUDA.",
    ),
]
Preset = Annotated[
    str,
    option(
        "--preset",
        help=f"How much to synthesize of each teacher. {presets.in_words()}. Of fewer than four teachers a generator "
        "draws as many images as of four.",
    ),
]
Grid = Annotated[Path | None, option("--grid", help="Draw the pseudo-images to a .png or .svg file, a row per class.")]
Seed = Annotated[int, option("--seed", help="Seed of every random draw.", min=0)]


def preset(name: str, count: int | None, steps: int | None, engine: str = "generator") -> presets.Preset:
    """What a preset stands for, but for what is given; where every image takes steps, few teachers get no more.

    Raises:
        DmmError: there is no such preset, or no such engine.
    """
    if name not in presets.PRESETS:
        raise mistyped(f"unknown preset: {printable(name)}", name, presets.PRESETS)
    chosen = presets.PRESETS[name]
    if count is not None or "draws" not in ENGINES.traits(engine):
        chosen = chosen._replace(each=count or chosen.each, together=0)
    return chosen if steps is None else chosen._replace(steps=steps)


def batch_size(text: str) -> int | None:
    """Parse ``--batch``: images, or None where they are to be as many as there is room for.

    Raises:
        DmmError: neither ``auto`` nor a number of 2 or more.
    """
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 2:
        raise DmmError(f"--batch takes a number of images, 2 or more, or auto, not {printable(text)}")
    return int(text)


@dataclass(frozen=True)
class InputFlags:
    """What the user said about the models' input; empty where the files are to tell."""

    size: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def input_flags(size: str | None, mean: str | None, std: str | None) -> InputFlags:
    """Parse ``--input-size``, ``--mean`` and ``--std``.

    Raises:
        DmmError: not numbers, or a size that is not three positive integers, or a deviation of zero or less.
    """
    parts = numbers(size, "--input-size")
    sides = tuple(map(int, parts))
    if parts and (len(parts) != 3 or sides != parts or not is_input_size(sides)):
        raise DmmError(f"--input-size takes channels,height,width, not {size}", hint="for example 3,32,32")
    flags = InputFlags(sides, numbers(mean, "--mean"), numbers(std, "--std"))
    if any(value <= 0 for value in flags.std):
        raise DmmError(f"--std must be above zero, not {std}")
    return flags


def chosen_format(name: str, as_json: bool) -> str:
    """The output format.

    Raises:
        DmmError: there is no such format.
    """
    if as_json:
        return "json"
    if name not in FORMATS:
        raise mistyped(f"unknown format: {name}", name, FORMATS)
    return name


def key_values(pairs: list[str], option: str) -> dict[str, float | str]:
    """``name=value`` options as a dict, numbers as floats.

    Raises:
        DmmError: a pair has no equals sign, or a number is NaN or infinite.
    """
    values: dict[str, float | str] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise DmmError(f"{option} takes name=value, not {pair}")
        try:
            values[name] = float(text)
        except ValueError:
            values[name] = text
        else:
            _require_finite((values[name],), f"{option} {name}", text)
    return values


def numbers(text: str | None, option: str) -> tuple[float, ...]:
    """Comma-separated numbers.

    Raises:
        DmmError: one is not a number, or not finite.
    """
    try:
        values = () if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise DmmError(f"{option} takes numbers separated by commas, not {text or 'nothing'}") from None
    _require_finite(values, option, text)
    return values


def _require_finite(values: Sequence[float], option: str, text: str | None) -> None:
    if not all(map(math.isfinite, values)):
        raise DmmError(f"{option} takes finite numbers, not {text}")


def group_rule(text: str, *, records: bool = True) -> str | float:
    """``auto``, ``all`` or a cosine threshold in [-1, 1].

    Args:
        records: whether the command takes groups from JSON, too.

    Raises:
        DmmError: none of them.
    """
    if text in ("auto", "all"):
        return text
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not -1.0 <= value <= 1.0:
        near = did_you_mean(text, ("auto", "all"))
        cosine = "a cosine between -1 and 1"
        last = f"{cosine}, a JSON file, or - for standard input" if records else f"or {cosine}"
        taken = f"--group takes auto, all, {last}"
        raise DmmError(
            f"cannot group by {printable(text)}",
            evidence=[taken] if near else [],
            hint=f"did you mean {near}?" if near else taken,
        )
    return value
