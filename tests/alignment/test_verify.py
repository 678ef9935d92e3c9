from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from networks import KINDS, lively
from torch import nn

from dmm_cli.alignment.apply import identity, random_image
from dmm_cli.alignment.spec import Group, Spec, TensorAxis
from dmm_cli.alignment.trace import trace
from dmm_cli.alignment.verify import verify
from dmm_cli.errors import DmmError


@pytest.mark.parametrize("kind", ["residual", "heads", "flattened"])
def test_a_right_spec_passes(kind):
    name, size = KINDS[kind]
    model = lively(name)
    spec = trace(model, size)
    image = random_image(spec, np.random.default_rng(0))
    assert 0 < verify("x", model, spec, image, size) < 1e-12


def without_an_axis(spec: Spec, name: str, axis: int) -> Spec:
    kept = tuple(a for a in spec.tensors[name] if a.axis != axis)
    return replace(spec, tensors={**spec.tensors, name: kept})


@pytest.mark.parametrize(
    ("kind", "name", "axis"),
    [("residual", "layer2.0.conv2.weight", 1), ("heads", "blocks.0.attn.proj.weight", 1), ("flattened", "1.bias", 0)],
)
def test_a_spec_that_forgets_an_axis_is_refused(kind, name, axis):
    arch, size = KINDS[kind]
    model = lively(arch)
    spec = trace(model, size)
    image = random_image(spec, np.random.default_rng(0))
    with pytest.raises(DmmError, match="x would not compute the same function"):
        verify("x", model, without_an_axis(spec, name, axis), image, size)


def test_weights_that_happen_to_be_zero_hide_nothing():
    model = lively("networks:gated")
    with torch.no_grad():
        model.out.weight.zero_()  # whatever comes before, the output is the same
    inner = np.arange(20)
    wrong = Spec(20, {"out.weight": (TensorAxis(1, (), inner),)}, (Group("out", np.array([-1]), (inner[None],)),))
    with pytest.raises(DmmError, match="would not compute the same function"):
        verify("x", model, wrong, random_image(wrong, np.random.default_rng(0)), (6,))


class Root(nn.Module):
    """Its function is none where a parameter is negative; the head starts at zero."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift
        self.scale = nn.Parameter(torch.linspace(0.001, 3.0, 6))
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.first(x * (self.scale - self.shift).sqrt())))


@pytest.mark.parametrize("shift", [0.0, 0.001])
def test_outputs_that_are_no_numbers_do_not_pass(shift):
    """Near weights at a border of what is allowed are allowed, too, or the function is not known to be the same."""
    model = Root(shift).eval()
    spec = trace(model, (6,))
    wrong = replace(spec, tensors={name: axes for name, axes in spec.tensors.items() if name != "head.weight"})
    image = random_image(spec, np.random.default_rng(0))
    with pytest.raises(DmmError, match="would not compute the same function"):
        verify("x", model, wrong, image, (6,))
    if not shift:
        assert verify("x", Root(shift).eval(), spec, image, (6,)) < 1e-12


def test_nothing_moved_is_nothing_changed():
    model = lively("networks:gated")
    spec = trace(model, (6,))
    assert verify("x", model, spec, identity(spec), (6,)) == 0


class Beside(nn.Module):
    """Answers with logits, and with nothing where there could be more."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
        return {"logits": self.layers(x), "auxiliary": None}


def test_outputs_that_are_nothing_are_passed_over():
    model = Beside().eval()
    spec = trace(model, (6,))
    assert verify("x", model, spec, random_image(spec, np.random.default_rng(0)), (6,)) < 1e-12


@dataclass
class Told:
    """What torch knows no tree of."""

    logits: torch.Tensor


class Objective(Beside):
    """Answers with an object that has logits."""

    def forward(self, x: torch.Tensor) -> Told:
        return Told(self.layers(x))


def test_of_an_object_that_has_logits_these_are_what_is_compared():
    model = Objective().eval()
    spec = trace(model, (6,))
    image = random_image(spec, np.random.default_rng(0))
    assert [group.size for group in spec.groups] == [8] and verify("x", model, spec, image, (6,)) < 1e-12
    with pytest.raises(DmmError, match="would not compute the same function"):
        verify("x", model, without_an_axis(spec, "layers.2.weight", 1), image, (6,))


class Narrow(nn.Sequential):
    """Fails with an error of its own on anything but float32."""

    def __init__(self, error: Exception) -> None:
        super().__init__(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("error", [TypeError("float32 alone"), AssertionError()])
def test_a_network_of_float32_alone_is_refused_whatever_it_raises(error):
    model = Narrow(error).eval()
    spec = trace(model, (6,))
    with pytest.raises(DmmError, match="x does not run in float64") as refused:
        verify("x", model, spec, identity(spec), (6,))
    assert type(error).__name__ in refused.value.evidence[0]


def test_a_lack_of_memory_is_no_fault_of_the_network():
    model = Narrow(MemoryError()).eval()
    spec = trace(model, (6,))
    with pytest.raises(MemoryError):
        verify("x", model, spec, identity(spec), (6,))
