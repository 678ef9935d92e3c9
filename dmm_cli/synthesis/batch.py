"""A batch of images whose pixels are optimised, and whatever else goes with them into the network.

Legend: B images, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from ..curves import Recorder, require_finite_terms
from ..examples import Inputs, each, joined, named
from ..layout import channels_last
from ..manifest import History
from ..runtime import Host
from ..runtime import generator as random_stream
from ..spaces import Space, each_image, noise
from ..training import Replay, Trainer
from .jitter import draw_moves, moved
from .objective import UNSOUND, Objective
from .plateau import Plateau
from .resolution import blocks, halved
from .task import Task

LEARNING_RATE, BETAS = 0.1, (0.9, 0.99)
WARM_UP = 0.0  # images from noise gain from large steps at once
TARGETS = "targets"  # beside the names of inputs in a savepoint


class Made(NamedTuple):
    """A finished batch: images, uint8 (B, C, H, W), or all inputs, targets (B,), curves of the loss, steps taken."""

    images: Inputs
    targets: torch.Tensor
    history: History
    steps: int


def finished(host: Host, name: str) -> Made | None:
    """The batch of that name, None unless it is finished."""
    state = host.savepoint.load(name)
    if state is None or TARGETS not in state.arrays:
        return None
    recorder = Recorder(0)
    recorder.restore(state.notes["curves"])
    made = {part: torch.from_numpy(array) for part, array in state.arrays.items()}
    targets = made.pop(TARGETS)
    return Made(joined(made), targets, recorder.history(), state.notes["steps"])


class Job(NamedTuple):
    """What a batch is to be: its name, the position of its teacher, how to draw its targets (B,), and its objective."""

    name: str
    teacher: int
    draw: Callable[[torch.Generator], torch.Tensor]
    objective: Objective


class Pixels(nn.Module):
    """Inputs as parameters without bounds, pixels (B, C, H, W) among them; called, it gives what a network takes.

    Args:
        keep_best: remember those of the lowest loss so far.
    """

    def __init__(self, start: Inputs, space: Space, keep_best: bool) -> None:
        super().__init__()
        self._names, self._space = tuple(named(start)), space
        self.raw = nn.ParameterList(named(start).values())
        self._best: list[torch.Tensor] = []
        if keep_best:
            self.register_buffer("lowest", torch.tensor(math.inf, device=self.raw[0].device))
            for number, value in enumerate(self.raw):
                self.register_buffer(f"best_{number}", value.detach().clone())
                self._best.append(self.get_buffer(f"best_{number}"))

    def forward(self) -> Inputs:
        return self._drawn(self.raw)

    @torch.no_grad()
    def remember(self, loss: torch.Tensor) -> None:
        """Keep what there is if its loss (scalar) is the lowest so far; nobody waits for the device to tell."""
        if self._best:
            better = loss < self.lowest
            for best, value in zip(self._best, self.raw, strict=True):
                best.copy_(torch.where(better, value, best))
            self.lowest.copy_(torch.where(better, loss, self.lowest))

    @torch.no_grad()
    def result(self) -> Inputs:
        """The inputs to keep: the best, or else the last."""
        return self._drawn(self._best or [value.detach() for value in self.raw])

    def _drawn(self, raw) -> Inputs:
        return self._space.draw(joined(dict(zip(self._names, raw, strict=True))))


class Batch:
    """Images of one teacher, from noise; begins where its savepoint ends."""

    def __init__(self, task: Task, job: Job) -> None:
        self._name, self._objective = job.name, job.objective
        self._settings, self._host, self._spec, self._space = task.settings, task.host, task.spec, task.space()
        self._teacher = task.teachers[job.teacher].view()
        stream = random_stream(self._settings.seed, "pixels", job.name)
        self._targets = job.draw(stream)
        start = noise(task.spec, len(self._targets), stream)
        if self._settings.coarse:
            start = each_image(start, task.spec, blocks)
        start = each(start, channels_last).to(self._host.device)
        self._pixels = Pixels(start, self._space, self._settings.keep_best)
        self._trainer = Trainer(self._pixels, LEARNING_RATE, self._settings.steps, stream, BETAS, WARM_UP)
        self._recorder = Recorder(self._settings.steps)
        self._plateau = Plateau(self._recorder, self._objective, self._settings)
        state = self._host.savepoint.load(job.name)
        if state is not None:
            self._trainer.restore(state.arrays)
            self._recorder.restore(state.notes["curves"])

    @property
    def done(self) -> int:
        """Steps taken."""
        return self._trainer.done

    @property
    def total(self) -> int:
        """Steps there will have been in the end, as far as is known."""
        return self.done if self._plateau.reached() else self._settings.steps

    def train(self) -> Iterator[dict[str, float]]:
        """Take the steps that are left, giving the newest point of the curves after each."""
        half, turns = None, max(1, len(self._teacher.witnesses))
        shown: dict[str, float] = {}
        while self.done < self.total:
            if half != (self.done < self._settings.coarse_steps):
                half = self.done < self._settings.coarse_steps
                ways = [partial(self._step, half, turn) for turn in range(turns)]
                steps = Replay.in_turn(ways, self._host.device)
            moves = draw_moves(len(self._targets), self._settings, self._trainer.stream)
            terms = steps[self.done % turns](self._targets, *moves)
            self._trainer.advance()
            if self._recorder.wants(self.done - 1):
                shown = self._recorder.add(self.done - 1, terms)
                require_finite_terms(shown, self.done, UNSOUND)
            yield shown

    def save(self) -> None:
        """Keep what there is: the images when they are finished, else all it takes to go on."""
        notes = {"curves": self._recorder.state(), "steps": self.done}
        arrays = self._trainer.state()
        if self.done == self.total:
            images = named(self._space.to_bytes(self._pixels.result()).to("cpu"))
            arrays = {name: part.numpy() for name, part in {**images, TARGETS: self._targets}.items()}
        self._host.savepoint.save(self._name, arrays, notes)

    def _step(self, half: bool, turn: int, targets: torch.Tensor, *moves: torch.Tensor) -> dict[str, torch.Tensor]:
        images = halved(self._pixels(), self._spec) if half else self._pixels()
        total, terms = self._objective(self._teacher, moved(images, self._spec, *moves), targets, turn)
        if not half:
            self._pixels.remember(total.detach())
        self._objective.require_gradient(total)
        self._trainer.descend(total)
        return terms
