"""One of the networks that draw images, in training.

Legend: K classes, B images per teacher, Z latent size, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ..curves import Recorder, require_finite_terms
from ..examples import Inputs, cat, each
from ..runtime import generator as random_stream
from ..runtime import mixed_precision, seeded
from ..training import Replay, Trainer
from .average import PoolStatistics
from .jitter import draw_moves, moved
from .network import LATENT, drawing
from .objective import UNSOUND, Objective
from .plateau import Plateau
from .prior import draw_targets
from .task import Task
from .teacher import Teacher

LEARNING_RATE, BETAS, WARM_UP = 3e-3, (0.5, 0.99), 0.1
BLOCK = 256  # images drawn at once


class Member:
    """One generator with its optimiser and its own view of the teachers; begins where its savepoint ends.

    Attributes:
        recorder: curves of the mean of the teachers' loss terms.
    """

    def __init__(self, number: int, task: Task) -> None:
        settings = task.settings
        self._number, self._settings, self._host = number, settings, task.host
        self._originals = task.teachers
        copies: dict[nn.Module, nn.Module] = {}
        self._teachers = [_pooling(teacher.view(copies), settings.norm_average) for teacher in task.teachers]
        self._spec, self._space = task.spec, task.space()
        widths = torch.tensor([0, *(teacher.num_classes for teacher in task.teachers)])
        self._offsets = widths.cumsum(0)[:-1].tolist()
        with seeded(settings.seed, "generator weights", number):
            network = drawing(task.spec, int(widths.sum()))
        self._network = network.to(self._host.device, memory_format=torch.channels_last)
        held = nn.ModuleList([self._network, *(t.pool for t in self._teachers if t.pool)])
        stream = random_stream(settings.seed, "generator", number)
        self._trainer = Trainer(held, LEARNING_RATE, settings.steps, stream, BETAS, WARM_UP)
        self._explored: list[torch.Tensor] = []
        self.recorder = Recorder(settings.steps)
        self.plan(task.objective(), settings.steps, None)
        self._resume()

    @property
    def done(self) -> int:
        """Steps taken."""
        return self._trainer.done

    @property
    def total(self) -> int:
        """Steps there will have been in the end, as far as is known."""
        return self.done if self._plateau.reached() else self._settings.steps

    def save(self) -> None:
        """Keep what there is, to go on from."""
        explored = {f"explored.{number}": logits.numpy() for number, logits in enumerate(self._explored)}
        notes = {"curves": self.recorder.state()}
        self._host.savepoint.save(f"generator-{self._number}", {**self._trainer.state(), **explored}, notes)

    def _resume(self) -> None:
        state = self._host.savepoint.load(f"generator-{self._number}")
        if state is not None:
            names = [name for name in state.arrays if name.startswith("explored.")]
            self._explored = [torch.from_numpy(state.arrays.pop(f"explored.{i}")) for i in range(len(names))]
            self._trainer.restore(state.arrays)
            self.recorder.restore(state.notes["curves"])

    def plan(self, objective: Objective, until: int, priors: list[torch.Tensor] | None) -> None:
        """What ``train`` is to do: go on until there are so many steps, on targets drawn from the priors (K,).

        Without priors all classes are equally likely, and no curve is recorded.
        """
        self._objective, self._until, self._priors = objective, until, priors
        self._plateau = Plateau(self.recorder, objective, self._settings)

    def train(self) -> Iterator[dict[str, float]]:
        """Take the planned steps, giving the newest point of the curves after each."""
        self._network.train()
        uniform = [torch.full((teacher.num_classes,), 1 / teacher.num_classes) for teacher in self._teachers]
        turns = max(1, *(len(teacher.witnesses) for teacher in self._teachers))
        steps = Replay.in_turn([partial(self._step, turn) for turn in range(turns)], self._host.device)
        shown: dict[str, float] = {}
        while self.done < min(self._until, self.total):
            targets = [draw_targets(p, self._settings.batch, self._trainer.stream) for p in self._priors or uniform]
            latent = torch.randn(sum(map(len, targets)), LATENT, generator=self._trainer.stream)
            moves = draw_moves(len(latent), self._settings, self._trainer.stream)
            terms = steps[self.done % turns](latent, *moves, *targets)
            self._trainer.advance()
            if self._priors and self.recorder.wants(self.done - 1):
                shown = self.recorder.add(self.done - 1, terms)
                require_finite_terms(shown, self.done, UNSOUND)
            yield shown

    def _step(self, turn: int, latent: torch.Tensor, *drawn: torch.Tensor) -> dict[str, torch.Tensor]:
        """One step on latents (T * B, Z), their moves if any, and every teacher's targets (B,).

        Gives the mean of the teachers' terms; ``turn`` chooses the witnesses.
        """
        moves, targets = drawn[: -len(self._teachers)], drawn[-len(self._teachers) :]
        condition = torch.cat([t + o for t, o in zip(targets, self._offsets, strict=True)])
        images = self._paint(latent, condition)  # in one pass, so that its normalisation sees all teachers
        parts = moved(images, self._spec, *moves).split([len(target) for target in targets])
        outcomes = [self._objective(*batch, turn) for batch in zip(self._teachers, parts, targets, strict=True)]
        loss = torch.stack([total for total, _ in outcomes]).sum()
        self._objective.require_gradient(loss)
        self._trainer.descend(loss)
        return {name: torch.stack([terms[name] for _, terms in outcomes]).mean() for name in outcomes[0][1]}

    def explored(self, count: int) -> list[torch.Tensor]:
        """Every teacher's logits (count, K) on images drawn without regard to class, when first asked."""
        stream = random_stream(self._settings.seed, "explored", self._number)
        for number in range(len(self._explored), len(self._teachers)):
            teacher = self._originals[number]
            targets = torch.randint(teacher.num_classes, (count,), generator=stream)
            latent = torch.randn(count, LATENT, generator=stream)
            self._explored.append(teacher.logits(self._draw(number, latent, targets)).cpu())
        return self._explored

    def candidates(self, teacher: int, latent: torch.Tensor, targets: torch.Tensor) -> Inputs:
        """Images of one teacher, uint8 (B, C, H, W), or all inputs, from latents (B, Z) for targets (B,)."""
        return self._space.to_bytes(self._draw(teacher, latent, targets)).to("cpu")

    @torch.no_grad()
    def _draw(self, teacher: int, latent: torch.Tensor, targets: torch.Tensor) -> Inputs:
        """Images (B, C, H, W), normalised."""
        self._network.eval()
        condition = targets + self._offsets[teacher]
        blocks = zip(latent.split(BLOCK), condition.split(BLOCK), strict=True)
        return cat([self._paint(z.to(self._host.device), c.to(self._host.device)) for z, c in blocks])

    def _paint(self, latent: torch.Tensor, condition: torch.Tensor) -> Inputs:
        with mixed_precision(self._host.device, self._settings.precision):
            parameters = self._network(latent, condition)
        return self._space.draw(each(parameters, torch.Tensor.float))


def _pooling(teacher: Teacher, momentum: float) -> Teacher:
    return replace(teacher, pool=PoolStatistics(teacher.layers, momentum)) if momentum else teacher
