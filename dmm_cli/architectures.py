"""Which module a checkpoint belongs to, and how to build it. The only file that imports timm."""

from __future__ import annotations

import importlib
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from types import ModuleType
from typing import Any

import torch
from torch import library, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .archspec import format_arch, parse_arch
from .errors import DmmError, is_out_of_memory, printable
from .examples import IMAGES
from .inputs import CONFIG, Source
from .metadata import NORMALISATION, is_by_name, stated_input
from .names import is_head, is_weight
from .registry import did_you_mean
from .signature import examples_of, joint_spec, single_spec, with_example_inputs
from .spaces import Spec
from .trust import require_defined_in_trust, require_trust

FILLING = {
    getattr(torch.ops.aten, name)
    for name in ("normal_", "uniform_", "fill_", "zero_", "clamp_", "erfinv_", "mul_", "add_")
}
LISTING = """list them with: python -c "import timm; print(*timm.list_models('*resnet*'))\""""
LIKELY = 0.4  # share of parts in common with its first network from which a family is looked through


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
    with torch.device("cpu"):  # what is imported with timm makes tensors, and reads them: not where a network is made
        return _imported("timm")


def build(spec: str, first_weights: bool = True, named_by_file: bool = False) -> nn.Module:
    """The module of a spec, on the CPU.

    Args:
        first_weights: whether timm's networks get random weights; else memory is left as it is found, to be loaded
            into. What a factory makes may depend on its first weights, so it always gets them.
        named_by_file: so that a factory has to be defined where the user trusts code, if it is none of torch's layers:
            what a trusted module only imports may be ``torch.load``.

    Raises:
        DmmError: no such timm model or factory, or it does not accept the arguments.
    """
    name, arguments = parse_arch(spec)
    if ":" in name:
        if named_by_file:
            require_trusted_factory(name)
        return with_example_inputs(_made(name, arguments), name)
    timm = _timm()
    if not timm.is_model(name.partition(".")[0]):
        near = did_you_mean(name, timm.list_models())
        module, _, factory = printable(name).rpartition(".")
        dotted = f"; a factory of a module is named {module}:{factory}" if module and factory.isidentifier() else ""
        raise DmmError(
            f"timm has no model {printable(name)}", hint=f"did you mean {near}?" if near else LISTING + dotted
        )
    try:
        with nullcontext() if first_weights else Unfilled(nn.Parameter):
            model = timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # whatever the arguments make of it
        told = f"{type(error).__name__}: {error}"
        hint = _near_argument(error, lambda: type(_on_meta(name)))
        raise DmmError(f"timm cannot build {printable(spec)}: {printable(told)}", hint=hint) from error
    if "in_chans" in arguments:
        model.in_chans = arguments["in_chans"]  # its pretrained_cfg tells of three channels all the same
    sides, usual = arguments.get("img_size"), getattr(model, "pretrained_cfg", None) or {}
    sides = (sides, sides) if isinstance(sides, int) else sides
    if isinstance(sides, tuple | list) and "input_size" in usual:  # and of the usual size
        model.pretrained_cfg = {**usual, "input_size": (usual["input_size"][0], *sides)}
    return model


def _factory(name: str) -> Callable[..., Any]:
    """What is called ``package.module:factory``."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(_imported(module), attribute)
    except (Exception, SystemExit) as error:  # whatever it is, it is the module's
        missing = isinstance(error, ModuleNotFoundError)
        raise DmmError(
            f"no factory {printable(name)}: {printable(f'{type(error).__name__}: {error}')}",
            hint="modules are looked for where Python looks: add their folder to PYTHONPATH" if missing else None,
        ) from error


def require_trusted_factory(name: str) -> None:
    """Raise DmmError for a factory that a trusted module only imports, unless it is one of torch's layers."""
    factory = _factory(name)
    while isinstance(factory, partial):
        factory = factory.func
    is_layer = isinstance(factory, type) and issubclass(factory, nn.Module)
    if not (is_layer and factory.__module__.startswith("torch.nn.")):
        require_defined_in_trust(name, factory)


def _made(name: str, arguments: dict[str, Any]) -> nn.Module:
    """What a factory ``package.module:factory`` makes."""
    factory = _factory(name)
    try:
        made = factory(**arguments)
    except (Exception, SystemExit) as error:  # whatever it is, it is the factory's
        if is_out_of_memory(error):
            raise
        told = f"{type(error).__name__}: {error}"
        hint = _near_argument(error, lambda: factory)
        raise DmmError(f"{printable(name)} fails: {printable(told)}", hint=hint) from error
    if not isinstance(made, nn.Module):
        raise DmmError(f"{printable(name)} makes no torch.nn.Module but a {type(made).__name__}")
    return made


def _near_argument(error: BaseException, taker: Callable[[], Callable[..., Any]]) -> str | None:
    """Which argument an unknown one was meant to be.

    Args:
        taker: gives what takes the arguments.
    """
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    near = did_you_mean(unknown[1], signature(taker()).parameters) if unknown else None
    return f"did you mean {near}?" if near else None


def identify(source: Source, arch: str | None = None) -> Architecture:
    """The architecture of a checkpoint: ``arch`` > metadata > config.json > matching names and shapes.

    Raises:
        DmmError: nothing fits, or the file names a factory that the user does not trust.
    """
    if arch:
        return Architecture(arch, "given with --arch")
    configured = source.is_configured("dmm.arch")
    if source.metadata.get("dmm.arch") == "":
        where = source.origin_of("dmm.arch") if configured else f"dmm.arch in the metadata of {source.path}"
        raise DmmError(f"{where} is empty", hint="name the architecture with --arch")
    if "dmm.arch" in source.metadata:
        require_trust(source)
        evidence = "config.json beside the weights" if configured else "dmm.arch in the file's metadata"
        return Architecture(source.metadata["dmm.arch"], evidence)
    return detect(source)


def detect(source: Source) -> Architecture:
    """Match tensor names and shapes with timm's catalogue, built without memory on the meta device.

    The classifier's width and the number of input channels are read from the shapes. Of several networks with the same
    tensors the first in the catalogue is taken. Where there are no weights but a head's, none is looked for.

    Raises:
        DmmError: no catalogue entry fits.
    """
    shapes = {name: info.shape for name, info in source.tensors.items()}
    for family in _likely_families(shapes) if any(map(is_weight, source.tensors.values())) else ():
        for name in family:
            spec = _fit(name, shapes)
            if spec:
                return Architecture(spec, f"all {len(shapes)} tensor names and shapes match timm's {name}")
    raise DmmError(
        f"cannot tell the architecture of {source.path}",
        evidence=["no dmm.arch in its metadata", _in_config(source), "no timm model with these tensors"],
        hint="name it: --arch resnet18,num_classes=10 or --arch package.module:factory",
    )


def _in_config(source: Source) -> str:
    """Why the config.json beside the weights does not tell the architecture."""
    if source.config is not None:
        return f"{CONFIG} beside it names no timm architecture"
    if (source.files[0].parent / CONFIG).is_file():
        return f"{CONFIG} beside it is read where the directory is named, not the file"
    return f"no {CONFIG} beside it"


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


class Unfilled(TorchDispatchMode):
    """Leaves out what only fills a tensor, which takes most of the time that a network is built in.

    Args:
        kind: of the tensors that need not be filled.
    """

    def __init__(self, kind: type[torch.Tensor]) -> None:
        super().__init__()
        self._kind = kind

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        idle = function.overloadpacket in FILLING and isinstance(args[0], self._kind)
        return args[0] if idle else function(*args, **(kwargs or {}))


def _on_meta(name: str, **arguments: Any) -> nn.Module:
    """One of timm's networks, without memory for its weights."""
    with torch.device("meta"), Unfilled(torch.Tensor):
        return _timm().create_model(name, pretrained=False, **arguments)


@cache
def _meta_shapes(name: str, **arguments: Any) -> dict[str, tuple[int, ...]] | None:
    try:
        model = _on_meta(name, **arguments)
    except Exception:  # some catalogue entries cannot be built on the meta device or with these arguments
        return None
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _fit(name: str, shapes: dict[str, tuple[int, ...]]) -> str | None:
    default = _meta_shapes(name)
    if default is None or default.keys() - shapes.keys():
        return None
    heads = shapes.keys() - default.keys()  # a network that comes without a classifier can be given one
    if not all(is_head(name) and shapes[name] for name in heads):
        return None
    arguments: dict[str, Any] = {"num_classes": shapes[min(heads)][0]} if heads else {}
    other = [key for key in default if shapes[key] != default[key]]
    if not other and not heads:
        return name
    for key in other:
        here, there = shapes[key], default[key]
        if len(here) != len(there):
            return None
        if here[1:] == there[1:]:
            arguments["num_classes"] = here[0]
        elif here[:1] + here[2:] == there[:1] + there[2:]:
            arguments["in_chans"] = here[1]
        else:
            return None
    return format_arch(name, arguments) if _meta_shapes(name, **arguments) == shapes else None


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
    gets their mean normalisation, unless they have a value for each. Of a model with example inputs, they tell the
    sizes, and ``dmm.input`` has mean and std by name; of images alone it need not name them.

    Raises:
        DmmError: the size is none of images, mean and std do not fit the number of channels, or ``dmm.input`` tells
            of other inputs.
    """
    label, given = str(source.path), stated_input(source)
    examples = examples_of(model)
    if examples is not None:
        if size:
            raise DmmError("--input-size is for models that take images alone", hint="example_inputs tell the sizes")
        return joint_spec(label, model, examples, _parts_of(given, source, tuple(examples.parts)), mean, std)
    own = dict(getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {})
    usual = tuple(own.get("input_size", (3, 224, 224)))
    told = tuple(given.get("size", usual))
    if source.is_configured("dmm.input") and "size" in given and not size:  # timm writes it for images alone
        _require_image_size(source, told, _input_channels(model) or usual[0])
    channels = _input_channels(model) or told[0]
    known = _per_channel(own, usual[0], channels) | _per_channel(given, told[0], channels)
    return single_spec(
        label,
        size or (channels, *told[1:]),
        mean or known.get("mean", (0.0,)),
        std or known.get("std", (1.0,)),
    )


def _require_image_size(source: Source, size: Sequence[int], channels: int) -> None:
    if len(size) != 3:
        raise DmmError(
            f"{source.path}: the size of its input is not channels, height and width: {list(size)}",
            evidence=[f"it is {source.origin_of('dmm.input', 'size')}"],
            hint=f"say it with --input-size, such as {channels},{size[-1]},{size[-1]}",
        )


def _per_channel(told: dict[str, Any], count: int, channels: int) -> dict[str, Sequence[float]]:
    """Mean and std as far as they are told of ``count`` channels: where there are others, one of all for each.

    Values that are as many as the channels hold for these, whatever the size tells.
    """
    values = {key: told[key] for key in NORMALISATION if key in told}
    return {
        key: value if channels in (count, len(value)) else (statistics.fmean(value),) for key, value in values.items()
    }


def _parts_of(given: dict[str, Any], source: Source, names: tuple[str, ...]) -> dict[str, Any]:
    named = is_by_name(given)
    parts = given if named else {IMAGES: given}
    if not parts.keys() <= set(names):
        told = ", ".join(map(printable, sorted(parts.keys() - set(names)))) if named else "one input without a name"
        configured = source.is_configured("dmm.input")
        where = source.origin_of("dmm.input", min(given)) if configured else f"{source.path}: dmm.input"
        named_one = f'name what it tells of: {{"{names[0]}": {{"mean": [0.5], "std": [0.25]}}}}'
        raise DmmError(
            f"{where} tells of {told}; the model takes {', '.join(names)}",
            hint="leave it out: it cannot name what it tells of" if configured else named_one,
        )
    return parts


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
