"""Which module a checkpoint belongs to, and how to build it. The only file that imports timm."""

from __future__ import annotations

import ast
import importlib
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import library, nn
from torch.overrides import TorchFunctionMode

from .checkpoint import Checkpoint
from .errors import DmmError, capped, printable
from .header import ITEM_SIZE
from .hub import format_arch
from .inputs import Source
from .metadata import stated_input
from .names import is_head
from .registry import did_you_mean
from .signature import examples_of, joint_spec, single_spec, with_example_inputs
from .spaces import Spec
from .trust import is_granted, module_of
from .widths import WIDTHS, resize

FILLING = {
    getattr(torch.Tensor, name)
    for name in ("normal_", "uniform_", "fill_", "zero_", "clamp_", "erfinv_", "mul_", "add_")
}
LOADS = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
}  # of timm's arguments
LIKELY = 0.4  # share of parts in common with its first network from which a family is looked through
TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A timm name with arguments, or ``package.module:factory``, and why we believe it."""

    spec: str
    evidence: str


@cache
def _imported(name: str) -> ModuleType:
    """A module, timm or one that may use it, although torchvision's compiled operators may not fit this torch build.

    timm uses none of these, but torchvision registers fake kernels for two schemas at import, and fails when they are
    absent.
    """
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    _define_schemas()
    return importlib.import_module(name)


@cache
def _define_schemas() -> library.Library:
    schemas = library.Library("torchvision", "DEF")  # they live as long as it does, in the cache
    for name in ("nms", "qnms"):
        schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return schemas


def _timm() -> ModuleType:
    return _imported("timm")


def parse_arch(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``resnet18,num_classes=10,layers=(1,1,1,1)`` into the name and its arguments.

    Raises:
        DmmError: an argument is not ``name=literal``, or the name points to a hub or a directory.
    """
    name, *arguments = _split(text)
    if name.startswith(("hf-hub:", "local-dir:", "hf_hub:")):
        raise DmmError(f"dmm does not fetch architectures: {printable(name)}", hint="use the plain timm name")
    values = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise DmmError(f"cannot read {printable(argument)!r} in --arch", hint="write name=value")
        values[key.strip()] = _literal(value.strip())
    return name.strip(), values


def _split(text: str) -> list[str]:
    """The parts between commas that stand in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote or character in "'\"":
            quote = "" if character == quote else quote or character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def build(spec: str) -> nn.Module:
    """The module of a spec, with random weights, on the CPU.

    Raises:
        DmmError: no such timm model or factory, or it does not accept the arguments.
    """
    name, arguments = parse_arch(spec)
    if ":" in name:
        return with_example_inputs(_made(name, arguments), name)
    loads = sorted(LOADS & arguments.keys())
    if loads:
        raise DmmError(f"an architecture has no weights to load: {loads[0]} in {printable(spec)}", hint="leave it out")
    timm = _timm()
    if not timm.is_model(name.partition(".")[0]):
        near = did_you_mean(name, timm.list_models())
        raise DmmError(
            f"timm has no model {printable(name)}",
            hint=f"did you mean {near}?" if near else "list them with: python -m timm.models",
        )
    try:
        model = timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # whatever the arguments make of it
        told = f"{type(error).__name__}: {error}"
        raise DmmError(f"timm cannot build {printable(spec)}: {printable(told)}") from error
    if "in_chans" in arguments:
        model.in_chans = arguments["in_chans"]  # its pretrained_cfg tells of three channels all the same
    return model


def _made(name: str, arguments: dict[str, Any]) -> nn.Module:
    """What a factory ``package.module:factory`` makes."""
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(_imported(module), attribute)
    except (Exception, SystemExit) as error:  # whatever it is, it is the module's
        missing = isinstance(error, ModuleNotFoundError)
        raise DmmError(
            f"no factory {printable(name)}: {printable(f'{type(error).__name__}: {error}')}",
            hint="modules are looked for where Python looks: add their folder to PYTHONPATH" if missing else None,
        ) from error
    try:
        made = factory(**arguments)
    except Exception as error:  # whatever it is, it is the factory's
        raise DmmError(f"{printable(name)} fails: {printable(f'{type(error).__name__}: {error}')}") from error
    if not isinstance(made, nn.Module):
        raise DmmError(f"{printable(name)} makes no torch.nn.Module but a {type(made).__name__}")
    return made


def identify(source: Source, arch: str | None = None) -> Architecture:
    """The architecture of a checkpoint: ``arch`` > metadata > config.json > matching names and shapes.

    Raises:
        DmmError: nothing fits, or the file names a factory that the user does not trust.
    """
    if arch:
        return Architecture(arch, "given with --arch")
    if "dmm.arch" in source.metadata:
        _require_trust(source)
        own = "dmm.arch" in source.headers[0].metadata
        evidence = "dmm.arch in the file's metadata" if own else "config.json beside the weights"
        return Architecture(source.metadata["dmm.arch"], evidence)
    return detect(source)


def _require_trust(source: Source) -> None:
    spec = source.metadata["dmm.arch"]
    module = module_of(spec)
    if module and not is_granted(spec):
        raise DmmError(
            f"{source.path} asks for code to be run: {printable(spec)}",
            hint=f"if you know that code, say so: dmm --trust {printable(module)} COMMAND ..., or name it with --arch",
        )


def detect(source: Source) -> Architecture:
    """Match tensor names and shapes with timm's catalogue, built without memory on the meta device.

    The classifier's width and the number of input channels are read from the shapes. Of several networks with the same
    tensors the first in the catalogue is taken.

    Raises:
        DmmError: no catalogue entry fits.
    """
    shapes = {name: info.shape for name, info in source.tensors.items()}
    for family in _likely_families(shapes):
        for name in family:
            spec = _fit(name, shapes)
            if spec:
                return Architecture(spec, f"all {len(shapes)} tensor names and shapes match timm's {name}")
    raise DmmError(
        f"cannot tell the architecture of {source.path}",
        evidence=["no dmm.arch in its metadata, no config.json beside it, no timm model with these tensors"],
        hint="name it: --arch resnet18,num_classes=10 or --arch package.module:factory",
    )


def _likely_families(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Families whose first network has all parts of a checkpoint, then those with many of them, the most first.

    Parts are the first words of tensors' names.
    """
    parts = {name.partition(".")[0] for name in names}
    later = {}
    for family in _families():
        first = {name.partition(".")[0] for name in _meta_shapes(family[0]) or ()}
        if parts <= first:
            yield family  # at once: it takes time to build the others
        else:
            later[family] = len(parts & first) / len(parts | first)
    yield from sorted((family for family in later if later[family] >= LIKELY), key=later.get, reverse=True)


@cache
def _families() -> tuple[tuple[str, ...], ...]:
    timm = _timm()
    modules = sorted(timm.list_modules(), key=lambda module: (module != "resnet", module))
    return tuple(tuple(names) for names in (timm.list_models(module=m) for m in modules) if names)


class _Unfilled(TorchFunctionMode):
    """Leaves out what only fills a tensor: without memory there is nothing to fill, yet it takes most of the time."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0] if function in FILLING else function(*args, **(kwargs or {}))


@cache
def _meta_shapes(name: str, **arguments: Any) -> dict[str, tuple[int, ...]] | None:
    try:
        with torch.device("meta"), _Unfilled():
            model = _timm().create_model(name, pretrained=False, **arguments)
    except Exception:  # some catalogue entries cannot be built on the meta device or with these arguments
        return None
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _fit(name: str, shapes: dict[str, tuple[int, ...]]) -> str | None:
    default = _meta_shapes(name)
    if default is None or default.keys() - shapes.keys():
        return None
    heads = shapes.keys() - default.keys()  # a network that comes without a classifier can be given one
    if not all(map(is_head, heads)):
        return None
    arguments: dict[str, Any] = {"num_classes": shapes[min(heads)][0]} if heads else {}
    other = [key for key in default if shapes[key] != default[key]]
    if not other and not heads:
        return name
    for key in other:
        here, there = shapes[key], default[key]
        if here[1:] == there[1:]:
            arguments["num_classes"] = here[0]
        elif here[:1] + here[2:] == there[:1] + there[2:]:
            arguments["in_chans"] = here[1]
        else:
            return None
    return format_arch(name, arguments) if _meta_shapes(name, **arguments) == shapes else None


def _hint(held: Iterable[str], wanted: Iterable[str]) -> str:
    """What to do where names do not fit; those of DataParallel are the network's own, all behind one word."""
    parts = [name.partition(".") for name in held]
    words, inner = {word for word, *_ in parts}, {rest for *_, rest in parts}
    if len(words) == 1 and inner == set(wanted):
        return f"every name begins with {printable(words.pop())}, as those of a wrapper do: save what it wraps"
    return "name the right one with --arch"


def load_state_dict(source: Source) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, in their own dtypes."""
    with Checkpoint(source) as file:
        return {name: _tensor(file, name) for name in source.tensors}


def _tensor(file: Checkpoint, name: str) -> torch.Tensor:
    info = file.source.tensors[name]
    if info.dtype not in TORCH_DTYPES:
        raise DmmError(f"{file.source.path}: torch has no {info.dtype} ({printable(name)})")
    flat = torch.from_numpy(file.raw(name)).view(TORCH_DTYPES[info.dtype])
    assert flat.element_size() == ITEM_SIZE[info.dtype]
    return flat.reshape(info.shape)


def load_model(source: Source, arch: str | None = None) -> tuple[nn.Module, Architecture]:
    """The module of a checkpoint with its weights, in eval mode and float32, on the CPU.

    Where the metadata tell of widths, layers are as wide as the tensors, see ``widths``.

    Raises:
        DmmError: the architecture is unknown, tensors do not fit it, or hold what no network computes with.
    """
    architecture = identify(source, arch)
    model = build(architecture.spec)
    if WIDTHS in source.metadata:
        resize(model, {name: info.shape for name, info in source.tensors.items()})
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    held = {name: info.shape for name, info in source.tensors.items()}
    problems = [f"missing {printable(name)}" for name in wanted.keys() - held.keys()]
    problems += [f"unknown {printable(name)}" for name in held.keys() - wanted.keys()]
    problems += [
        f"{printable(name)} is {list(held[name])}, the model has {list(wanted[name])}"
        for name in wanted.keys() & held.keys()
        if wanted[name] != held[name]
    ]
    if problems:
        raise DmmError(
            f"{source.path} does not fit {printable(architecture.spec)} ({architecture.evidence})",
            evidence=capped(sorted(problems)),
            hint=_hint(held, wanted),
        )
    model.load_state_dict(load_state_dict(source))
    model.float().eval()
    _require_sound(source, model.state_dict())
    return model, architecture


def _require_sound(source: Source, tensors: dict[str, torch.Tensor]) -> None:
    """Raise DmmError where tensors, in the precision that they are used in, hold NaN or infinity, or variances < 0."""
    values = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    problems = [f"{printable(name)} holds NaN or infinity" for name in values if not values[name].isfinite().all()]
    problems += [
        f"{printable(name)} holds a negative variance"
        for name in values
        if name.rpartition(".")[2] == "running_var" and (values[name] < 0).any()
    ]
    if problems:
        raise DmmError(
            f"{source.path} cannot be computed with",
            evidence=capped(problems),
            hint="train or export it again: its training diverged, or the file was changed",
        )


def input_spec(
    source: Source,
    model: nn.Module,
    *,
    size: Sequence[int] = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Spec:
    """Size and normalisation: the arguments > ``dmm.input`` metadata > config.json > timm's defaults.

    Where the last three tell another number of channels than the module takes, the module is right, and every channel
    gets their mean normalisation. Of a model with example inputs, they tell the sizes, and ``dmm.input`` has mean and
    std by name.

    Raises:
        DmmError: mean and std do not fit the number of channels.
    """
    given = stated_input(source)
    examples = examples_of(model)
    if examples is not None:
        if size:
            raise DmmError("--input-size is for models that take images alone", hint="example_inputs tell the sizes")
        return joint_spec(model, examples, given, mean, std)
    known = dict(getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {})
    known |= {"input_size" if key == "size" else key: value for key, value in given.items()}
    told = tuple(known.get("input_size", (3, 224, 224)))
    channels = _input_channels(model) or told[0]
    if channels != told[0]:
        known |= {key: (statistics.fmean(known[key]),) for key in ("mean", "std") if key in known}
    return single_spec(
        size or (channels, *told[1:]),
        mean or known.get("mean", (0.0,)),
        std or known.get("std", (1.0,)),
    )


def _input_channels(model: nn.Module) -> int | None:
    """How many channels a module takes: what it was built with, or its first convolution's; timm's, as they tell."""
    if isinstance(getattr(model, "in_chans", None), int):
        return model.in_chans
    if getattr(model, "pretrained_cfg", None):
        return None  # a first convolution may follow a rearrangement of pixels into channels
    return next((layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)


def num_classes(model: nn.Module) -> int:
    """Width of the classifier.

    Raises:
        DmmError: the model does not say.
    """
    count = getattr(model, "num_classes", None)
    if not isinstance(count, int) or count < 1:
        raise DmmError(
            f"{type(model).__name__} does not say how many classes it has",
            hint="give the module an attribute num_classes",
        )
    return count
