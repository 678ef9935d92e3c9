"""A batch of images whose pixels are optimised.

Legend: B images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from ..curves import Recorder
from ..images import InputSpec, PixelSpace
from ..manifest import History
from ..runtime import Host
from ..training import Replay, Trainer
from .objective import Objective
from .settings import Settings
from .teacher import Teacher

LEARNING_RATE, BETAS = 0.1, (0.9, 0.99)
WARM_UP = 0.0  # images from noise gain from large steps at once


class Made(NamedTuple):
    """A finished batch: images, uint8 (B, C, H, W), targets (B,), and the curves of the loss terms."""

    images: torch.Tensor
    targets: torch.Tensor
    history: History


def finished(host: Host, name: str) -> Made | None:
    """The batch of that name, None unless it is finished."""
    state = host.savepoint.load(name)
    if state is None or "images" not in state.arrays:
        return None
    recorder = Recorder(0)
    recorder.restore(state.notes["curves"])
    return Made(*(torch.from_numpy(state.arrays[part]) for part in ("images", "targets")), recorder.history())


class Pixels(nn.Module):
    """Pixels as parameters (B, C, H, W) without bounds; called, it gives them as normalised images."""

    def __init__(self, start: torch.Tensor, space: PixelSpace) -> None:
        super().__init__()
        self.raw = nn.Parameter(start)
        self._space = space

    def forward(self) -> torch.Tensor:
        return self._space.normalise(self.raw.sigmoid())


class Batch:
    """Images of one teacher for targets (B,), from noise; begins where its savepoint ends."""

    def __init__(
        self,
        name: str,
        teacher: Teacher,
        targets: torch.Tensor,
        objective: Objective,
        spec: InputSpec,
        settings: Settings,
        host: Host,
        stream: torch.Generator,
    ) -> None:
        self._name, self._teacher, self._targets, self._objective = name, teacher, targets, objective
        self._settings, self._host = settings, host
        self._space = PixelSpace(spec, host.device)
        start = torch.randn(len(targets), *spec.size, generator=stream).to(host.device)
        self._pixels = Pixels(start.contiguous(memory_format=torch.channels_last), self._space)
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
                images = self._space.to_bytes(self._pixels()).cpu().numpy()
            arrays = {"images": images, "targets": self._targets.numpy()}
        self._host.savepoint.save(self._name, arrays, notes)

    def _step(self, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        total, terms = self._objective(self._teacher, self._pixels(), targets)
        self._trainer.descend(total)
        return terms
