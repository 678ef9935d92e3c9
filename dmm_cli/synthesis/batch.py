"""A batch of images whose pixels are optimised, and whatever else goes with them into the network.

Legend: B images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from ..curves import Recorder
from ..examples import Inputs, each, joined, named
from ..manifest import History
from ..runtime import Host
from ..spaces import Space, Spec, space_of
from ..training import Replay, Trainer
from .objective import Objective
from .settings import Settings
from .teacher import Teacher

LEARNING_RATE, BETAS = 0.1, (0.9, 0.99)
WARM_UP = 0.0  # images from noise gain from large steps at once
TARGETS = "targets"  # beside the names of inputs in a savepoint


class Made(NamedTuple):
    """A finished batch: images, uint8 (B, C, H, W), or all inputs, targets (B,), and the curves of the loss terms."""

    images: Inputs
    targets: torch.Tensor
    history: History


def finished(host: Host, name: str) -> Made | None:
    """The batch of that name, None unless it is finished."""
    state = host.savepoint.load(name)
    if state is None or TARGETS not in state.arrays:
        return None
    recorder = Recorder(0)
    recorder.restore(state.notes["curves"])
    made = {part: torch.from_numpy(array) for part, array in state.arrays.items()}
    targets = made.pop(TARGETS)
    return Made(joined(made), targets, recorder.history())


class Pixels(nn.Module):
    """Inputs as parameters without bounds, pixels (B, C, H, W) among them; called, it gives what a network takes."""

    def __init__(self, start: Inputs, space: Space) -> None:
        super().__init__()
        self._names, self._space = tuple(named(start)), space
        self.raw = nn.ParameterList(named(start).values())

    def forward(self) -> Inputs:
        return self._space.draw(joined(dict(zip(self._names, self.raw, strict=True))))


class Batch:
    """Images of one teacher for targets (B,), from noise; begins where its savepoint ends."""

    def __init__(
        self,
        name: str,
        teacher: Teacher,
        targets: torch.Tensor,
        objective: Objective,
        spec: Spec,
        settings: Settings,
        host: Host,
        stream: torch.Generator,
    ) -> None:
        self._name, self._teacher, self._targets, self._objective = name, teacher, targets, objective
        self._settings, self._host = settings, host
        self._space = space_of(spec, host.device)
        self._pixels = Pixels(_noise(spec, len(targets), stream).to(host.device), self._space)
        self._trainer = Trainer(self._pixels, LEARNING_RATE, settings.steps, stream, BETAS, WARM_UP)
        self._recorder = Recorder(settings.steps)
        state = host.savepoint.load(name)
        if state is not None:
            self._trainer.restore(state.arrays)
            self._recorder.restore(state.notes["curves"])

    @property
    def done(self) -> int:
        """Steps taken."""
        return self._trainer.done

    def train(self) -> Iterator[dict[str, float]]:
        """Take the steps that are left, giving the newest point of the curves after each."""
        step = Replay(self._step, self._host.device)
        shown: dict[str, float] = {}
        while self.done < self._settings.steps:
            terms = step(self._targets)
            self._trainer.advance()
            if self._recorder.wants(self.done - 1):
                shown = self._recorder.add(self.done - 1, terms)
            yield shown

    def save(self) -> None:
        """Keep what there is: the images when they are finished, else all it takes to go on."""
        notes = {"curves": self._recorder.state()}
        arrays = self._trainer.state()
        if self.done == self._settings.steps:
            with torch.no_grad():
                images = named(self._space.to_bytes(self._pixels()).to("cpu"))
            arrays = {name: part.numpy() for name, part in {**images, TARGETS: self._targets}.items()}
        self._host.savepoint.save(self._name, arrays, notes)

    def _step(self, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        total, terms = self._objective(self._teacher, self._pixels(), targets)
        self._trainer.descend(total)
        return terms


def _noise(spec: Spec, count: int, stream: torch.Generator) -> Inputs:
    """Standard normal numbers in the shapes of all inputs."""
    noise = {name: torch.randn(count, *part.free, generator=stream) for name, part in named(spec).items()}
    return each(joined(noise), _channels_last)


def _channels_last(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values
