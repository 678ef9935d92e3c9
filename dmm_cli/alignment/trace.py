"""From a module to its spec: torch.export gives the graph of ATen operations, rules carry labels through it."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ..errors import DmmError, printable
from ..examples import in_trees
from .contractions import convolution
from .rules import RULES, Rule, unknown
from .spec import Spec, build_spec
from .units import Axis, Units, Value

KERNEL = 2  # axes of a convolution's weight from here on are space


def trace(model: nn.Module, size: tuple[int, ...]) -> Spec:
    """The permutations under which a module computes the same function.

    Args:
        model: in eval mode; it takes one tensor.
        size: of one input, without the batch axis.

    Raises:
        DmmError: torch.export cannot trace the module, or no rule follows its units.
    """
    return spec_of(export(model, size), dict(model.state_dict(keep_vars=True)))


def export(model: nn.Module, size: tuple[int, ...]) -> ExportedProgram:
    """The graph of the module's operations on one input.

    Raises:
        DmmError: torch.export cannot trace the module.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings(), _without_tracebacks():
            warnings.simplefilter("ignore")  # about what the module stores on itself
            copied = copy.deepcopy(model)
            copied.register_forward_hook(lambda _, inputs, given: in_trees(given))
            return torch.export.export(copied, (torch.zeros(1, *size),), strict=False)
    except Exception as error:  # whatever the module itself may raise
        raise DmmError(
            f"torch.export cannot trace {type(model).__name__}, so its units cannot be aligned",
            evidence=[printable(f"{type(error).__name__}: {error}".splitlines()[0])],
            hint="of another input size? dmm align --input-size tells it, or dmm.input in the file's metadata; "
            "otherwise control flow that depends on values is the usual cause",
        ) from error


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """While torch logs the tracebacks of what cannot be traced, and its own doubts; the error itself is told.

    To remember where every operation was called, for such tracebacks, takes an eighth of the time (of a ResNet-18).
    """
    loggers = [logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "torch.fx")]
    before = [logger.level for logger in loggers]
    known = hasattr(fx.config, "do_not_emit_stack_traces")  # earlier torch has no such choice
    emitted = known and fx.config.do_not_emit_stack_traces
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        if known:
            fx.config.do_not_emit_stack_traces = True
        yield
    finally:
        if known:
            fx.config.do_not_emit_stack_traces = emitted
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def spec_of(program: ExportedProgram, state: Mapping[str, torch.Tensor]) -> Spec:
    """Carry labels through the graph and gather what it tells about them.

    What leads to no output counts for nothing, and parameters that are read there alone, or by nobody, stay as they
    are: those of a head for training alone, for example.

    Args:
        state: the state dict, not detached, so that tied tensors are one object.

    Raises:
        DmmError: a rule does not take what the graph gives it.
    """
    units = Units()
    groups = dict(_convolution_weights(program.graph))
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target}
    labelled: dict[int, Value] = {}  # by tensor: tied ones have the same labels
    values: dict[fx.Node, Any] = {}
    heard = _heard(program.graph)
    for node in program.graph.nodes:
        if node not in heard:
            values[node] = Value.fixed(_shape(node) or ())
        elif node.op == "placeholder":
            tensor = state.get(targets.get(node.name, ""))
            if tensor is None or not tensor.is_floating_point():
                values[node] = Value.fixed(_shape(node) or ())
                continue
            if id(tensor) not in labelled:
                labelled[id(tensor)] = units.see(_labelled(units, tuple(tensor.shape), groups.get(node)))
            values[node] = labelled[id(tensor)]
        elif node.op == "call_function":
            values[node] = _apply(units, node, values)
        elif node.op == "output":
            unknown(units, (), *(values[item] for item in node.all_input_nodes))
        else:  # a constant, or the body of a control flow operator
            values[node] = Value.fixed(_shape(node) or ())
    parameters = {name: labelled[id(tensor)] for name, tensor in state.items() if id(tensor) in labelled}
    unread = (name for name, tensor in state.items() if id(tensor) not in labelled and _is_parameter(tensor))
    return replace(build_spec(units, parameters), unread=tuple(unread))


def _is_parameter(tensor: torch.Tensor) -> bool:
    """Whether it holds several weights that are trained, unlike statistics and counters."""
    return isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and tensor.numel() > 1


def _convolution_weights(graph: fx.Graph) -> Iterator[tuple[fx.Node, int]]:
    """What convolution weights are made of, and the number of groups."""
    for node in graph.nodes:
        if node.op == "call_function" and RULES.get(_name(node)) is convolution:
            x, w = (argument.meta["val"].shape for argument in node.args[:2])
            for source in _sources(node.args[1]):
                if source.meta["val"].shape == w:
                    yield source, x[1] // w[1]


def _heard(graph: fx.Graph) -> set[fx.Node]:
    """What the output depends on; in-place operations may change it under another name."""
    ends = [
        node
        for node in graph.nodes
        if node.op == "output" or (node.op == "call_function" and _own_name(node).endswith("_"))
    ]
    return {*ends, *(before for node in ends for before in _before(node))}


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """The inputs of the graph that a node depends on."""
    return (before for before in _before(node) if before.op == "placeholder")


def _before(node: fx.Node) -> Iterator[fx.Node]:
    """A node and all that it depends on."""
    left, met = [node], {node}
    while left:
        node = left.pop()
        yield node
        new = [before for before in node.all_input_nodes if before not in met]
        met.update(new)
        left += new


def _labelled(units: Units, shape: tuple[int, ...], groups: int | None) -> Value:
    """Labels for the axes of a parameter; for the kernel of a convolution only where channels are.

    Args:
        groups: of the convolution it belongs to, None for others.
    """
    fixed = KERNEL if groups else len(shape)
    axes = [Axis(units.fresh(size)) if size > 1 and k < fixed else None for k, size in enumerate(shape)]
    if groups and groups > 1 and shape[1] > 1:  # every group of outputs has inputs of its own
        inputs = units.fresh(groups, shape[1]).repeat(shape[0] // groups, axis=0)
        axes[1] = Axis(inputs, (0,))  # (O, I)
    return Value(shape, tuple(axes))


def _apply(units: Units, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """The result of one operation: a value, or a list of them."""
    arguments = fx.map_arg(list(node.args), lambda item: values[item])
    named = fx.map_arg(dict(node.kwargs), lambda item: values[item])
    if _name(node) == "getitem":
        return arguments[0][arguments[1]] if isinstance(arguments[0], list) else Value.fixed(_shape(node) or ())
    rule = RULES.get(_name(node), unknown)
    shape = _shape(node)
    if shape is None and rule is not unknown and not isinstance(node.meta.get("val"), (list, tuple)):
        return Value.fixed(())  # an assertion: no tensor comes out
    try:
        result = _checked(rule, node)(units, shape or (), *arguments, **named)
    except Exception as error:  # of what a rule was not written for
        raise DmmError(
            f"the units of the network cannot be followed through {_name(node)}",
            evidence=[printable(f"{type(error).__name__}: {error}".splitlines()[0])],
            hint="merge it as it is with --align never",
        ) from error
    for value in result if isinstance(result, list) else [result]:
        units.see(value)
    return result


def _checked(rule: Rule, node: fx.Node) -> Rule:
    """The rule, unless an operation without one returns several tensors."""
    outputs = node.meta.get("val")
    if rule is not unknown or not isinstance(outputs, (list, tuple)):
        return rule

    def several(units: Units, shape: Any, *arguments: Any, **named: Any) -> list[Value]:
        unknown(units, (), *arguments, **named)
        return [Value.fixed(getattr(output, "shape", ())) for output in outputs]

    return several


def _name(node: fx.Node) -> str:
    """The operation's name without its overload; in-place ones are called as the others."""
    return _own_name(node).removesuffix("_")


def _own_name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else target.__name__


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of the tensor that comes out, None where there is not exactly one."""
    shape = getattr(node.meta.get("val"), "shape", None)
    return None if shape is None else tuple(int(size) for size in shape)
