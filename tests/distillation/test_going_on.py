"""Interrupted, the distillation goes on to the same bytes; shared, it learns what one process learns."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import in_two_processes
from safetensors.torch import load_file
from torch import nn

from dmm_cli.distillation.lessons import Lessons
from dmm_cli.distillation.refine import refine
from dmm_cli.distillation.settings import Settings
from dmm_cli.errors import DmmError
from dmm_cli.images import InputSpec, PixelSpace
from dmm_cli.manifest import History
from dmm_cli.norms import norm_layers
from dmm_cli.ranks import Ranks
from dmm_cli.runtime import Host
from dmm_cli.savepoint import Savepoint

CPU = torch.device("cpu")
STEPS, NEVER = 130, 0  # more steps than the curves have points


def student(norm: bool) -> nn.Module:
    """A network with dropout, and with BatchNorm or not."""
    torch.manual_seed(0)
    between = [nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3)] if norm else [nn.ReLU()]
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), *between, nn.Linear(12, 3))
    network[1].auxiliary = nn.Linear(2, 2)  # which no pass uses
    return network


def lessons() -> Lessons:
    """Three classes of two teachers: bright left halves, right halves, and neither."""
    stream = torch.Generator().manual_seed(0)
    targets = torch.arange(90) % 3
    images = torch.randint(0, 120, (90, 1, 8, 8), generator=stream)
    images[targets == 0, :, :, :4] += 120
    images[targets == 1, :, :, 4:] += 120
    return Lessons(
        images.to(torch.uint8), PixelSpace(InputSpec((1, 8, 8), (0.5,), (0.3,))), targets, (targets == 2).long(),
        ("a", "b"), ("left", "right", "none"),
    )  # fmt: skip


def teachers() -> list[nn.Module]:
    """One looks at the left half, one at the right."""
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).requires_grad_(False) for _ in range(2)]
    for (_, layer), columns in zip(networks, (slice(0, 4), slice(4, 8)), strict=True):
        layer.weight.zero_().view(3, 8, 8)[columns.start // 4, :, columns] = 0.2
        layer.bias.zero_()
    return networks


def taught(norm: bool, host: Host, noise: float = 0.25) -> tuple[dict[str, torch.Tensor], History]:
    """Weights and curves after refinement."""
    model = student(norm)
    layers = [layer for _, layer in norm_layers(model)]
    history, _ = refine(model, layers, lessons(), teachers(), Settings(steps=STEPS, batch=8, noise=noise), host)
    return model.state_dict(), history


class Interrupt:
    """Interrupts after some steps."""

    def __init__(self, after: int) -> None:
        self._after, self.first = after, 0

    def __call__(self, stage: str, done: int, total: int, **numbers: float) -> None:
        assert stage == "distill" and total == STEPS
        self.first = self.first or done
        if done == self._after:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.3)  # no step until the main thread has asked to stop


def test_an_interrupted_distillation_goes_on_to_the_same_bytes(tmp_path):
    """Weights, moments, statistics, schedule, batches and dropout are those of one that ran through."""
    weights, history = taught(True, Host(CPU))
    for after in (40, 91):
        with pytest.raises(KeyboardInterrupt):
            taught(True, Host(CPU, Savepoint(tmp_path / "states"), on_progress=Interrupt(after)))
    rest = Interrupt(NEVER)
    again, curves = taught(True, Host(CPU, Savepoint(tmp_path / "states"), on_progress=rest))
    assert rest.first == 92 and curves == history
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


@pytest.mark.parametrize("count", [3, 8])
def test_a_batch_that_cannot_be_shared_is_refused(count):
    """Nor one of which a process would get one image, of which BatchNorm takes no statistics."""
    with pytest.raises(DmmError, match=f"a batch of 8 images cannot be shared by {count} processes"):
        taught(False, Host(CPU, ranks=Ranks(0, count)))


class Drawing(nn.Module):
    """Notes what it draws, as dropout would."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[float, ...]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.drawn.append(tuple(torch.rand(3).tolist()))
        return images


class Echo(Ranks):
    """Hears itself from every process."""

    def gather(self, value: object) -> list[object]:
        return [value] * self.count


def test_every_process_draws_dropout_of_its_own(monkeypatch):
    monkeypatch.setattr("dmm_cli.distillation.refine._shared", lambda student: student)
    drawn = []
    for ranks in (Echo(0, 1), Echo(0, 2), Echo(1, 2), Echo(1, 2)):
        layer = Drawing()
        model = nn.Sequential(nn.Flatten(), layer, nn.Linear(64, 3))
        refine(model, [], lessons(), teachers(), Settings(steps=3, batch=8), Host(CPU, ranks=ranks))
        drawn.append(layer.drawn)
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3], "the first draws what one alone does"
    assert len({*drawn[1], *drawn[2]}) == 6


PROGRAM = """
import sys
sys.path.append(sys.argv[1])
from safetensors.torch import save_file
from test_going_on import CPU, Host, taught
from dmm_cli.ranks import joined
with joined() as ranks:
    weights, _ = taught(False, Host(CPU, ranks=ranks))
    save_file(weights, f"{sys.argv[2]}/{ranks.rank}.safetensors")
"""


def test_two_processes_take_the_steps_of_one(tmp_path):
    """Where no layer looks at the whole batch, the mean of two gradients is the gradient; only rounding differs."""
    in_two_processes(PROGRAM, Path(__file__).parent, tmp_path)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    one, _ = taught(False, Host(CPU))
    start = student(False).state_dict()
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], value, atol=1e-5), name
        assert torch.allclose(start[name], value, atol=1e-3) == ("auxiliary" in name), name
