"""Checkpoints as modules of torch, with their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from .architectures import Architecture, build, identify
from .checkpoint import Checkpoint
from .errors import DmmError, blamed_on, capped, printable, told_by
from .examples import ORIGIN
from .header import FLOAT8, ITEM_SIZE
from .inputs import Source
from .widths import WIDTHS, resize

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def load_state_dict(source: Source) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, in their own dtypes."""
    with Checkpoint(source) as file:
        return {name: _tensor(file, name) for name in source.tensors}


def _tensor(file: Checkpoint, name: str) -> torch.Tensor:
    info = file.source.tensors[name]
    flat = torch.from_numpy(file.raw(name)).view(TORCH_DTYPES[info.dtype])
    assert flat.element_size() == ITEM_SIZE[info.dtype]
    return flat.reshape(info.shape)


def load_model(source: Source, arch: str | None = None) -> tuple[nn.Module, Architecture]:
    """The module of a checkpoint with its weights, in eval mode and float32, on the CPU.

    Where the metadata tell of widths, layers are as wide as the tensors, see ``widths``. A tensor that the module has
    under several names, tied weights, may stand in the file under one of them, as ``safetensors`` saves it.

    Raises:
        DmmError: the architecture is unknown, tensors do not fit it, or hold what no network computes with, or the
            module fails.
    """
    architecture = identify(source, arch)
    with told_by(f"the architecture of {source.path}: {architecture.evidence}"):
        model = build(architecture.spec, first_weights=False, named_by_file=not arch)
    network = f"the network of {source.path}"
    with blamed_on(network):
        if WIDTHS in source.metadata:
            resize(model, {name: info.shape for name, info in source.tensors.items()})
        own = model.state_dict(keep_vars=True)  # the tensors themselves
        _require_tensors(network, own)
        wanted = {name: tuple(value.shape) for name, value in own.items()}
    same = _same_tensor(own, source)
    _require_fit(source, architecture, wanted, same)
    _require_floats(source, own, same)
    tensors = load_state_dict(source)
    with blamed_on(network):
        model.load_state_dict(tensors | {name: tensors[other] for name, other in same.items()})
        model.float().eval()
        setattr(model, ORIGIN, str(source.path))
        _require_sound(source, model.state_dict())
    return model, architecture


def _require_tensors(network: str, own: Mapping[str, object]) -> None:
    """Raise DmmError where a state dict holds something else, which no safetensors file has the values of."""
    strange = [name for name, value in own.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise DmmError(
            f"{network} keeps more than tensors",
            evidence=capped(map(printable, strange)),
            hint="build it without get_extra_state, whose values the file does not hold",
        )


def _same_tensor(own: Mapping[str, torch.Tensor], source: Source) -> dict[str, str]:
    """Names that a file leaves out, to that under which it holds the same tensor."""
    held = {id(own[name]): name for name in source.tensors if name in own}
    return {name: held[id(own[name])] for name in own if name not in source.tensors and id(own[name]) in held}


def _require_fit(
    source: Source, architecture: Architecture, wanted: Mapping[str, tuple[int, ...]], same: Mapping[str, str]
) -> None:
    """Raise DmmError where a file has other names or shapes than its network.

    Args:
        same: names that the file leaves out, to those it has in their place.
    """
    held = {name: source.tensors[same.get(name, name)].shape for name in (*source.tensors, *same)}
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


def _hint(held: Iterable[str], wanted: Iterable[str]) -> str:
    """What to do where names do not fit; those of DataParallel are the network's own, all behind one word."""
    parts = [name.partition(".") for name in held]
    words, inner = {word for word, *_ in parts}, {rest for *_, rest in parts}
    if len(words) == 1 and inner == set(wanted):
        return f"every name begins with {printable(words.pop())}, as those of a wrapper do: save what it wraps"
    return "name the right one with --arch"


def _require_floats(source: Source, wanted: Mapping[str, torch.Tensor], same: Mapping[str, str]) -> None:
    """Raise DmmError for whole numbers where a network computes with others: without their scale they are no weights.

    Args:
        same: names that the file leaves out, to those it has in their place.
    """
    held = {name: source.tensors[same.get(name, name)] for name in wanted if wanted[name].is_floating_point()}
    problems = [
        f"{printable(name)} is {info.dtype}, the model has {str(wanted[name].dtype).removeprefix('torch.')}"
        for name, info in held.items()
        if not (info.is_float or info.dtype in FLOAT8)
    ]
    if problems:
        raise DmmError(
            f"{source.path} holds whole numbers where the network has weights",
            evidence=capped(problems),
            hint="a quantised checkpoint has to be exported with its weights as they were, in float16 or wider",
        )


def _require_sound(source: Source, tensors: dict[str, torch.Tensor]) -> None:
    """Raise DmmError where tensors, in the precision that they are used in, hold NaN or infinity, or variances < 0."""
    values = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    problems = [f"{printable(name)} holds NaN or infinity" for name in values if not _is_finite(values[name])]
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


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; a sum, the fast way, tells of them, and may overflow without any."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
