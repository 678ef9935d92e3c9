"""The refinement loop: a student learns from its teachers' pseudo-data.

Legend: N images, B images of a batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from ..curves import Recorder, require_finite_terms
from ..errors import DmmError
from ..examples import ORIGIN, Inputs, answer, called, percentage
from ..manifest import ClassRetention, History, Retention
from ..recalibration import reset_statistics
from ..runtime import Host, deterministic, mixed_precision, seeded
from ..runtime import generator as random_stream
from ..savepoint import Savepoint, State
from ..training import Replay, Trainer, work_through
from .augment import add_noise
from .biases import calibrate_biases
from .lessons import Lessons
from .losses import distillation
from .settings import Settings
from .start import agreement
from .views import draw_views

BETAS, WARM_UP = (0.9, 0.999), 0.1
STATE = "student"
VIEWED = "agreement_on_views"  # lower than with the images as they are: these are deformed, patched and noisy
SHOWN = ("loss", VIEWED)  # while it learns
VIEWS = 4  # of an image, on average; 16 teach the same


def refine(
    student: nn.Module,
    layers: list[nn.Module],
    lessons: Lessons,
    teachers: Sequence[nn.Module],
    settings: Settings,
    host: Host,
    stored: Mapping[str, torch.dtype] | None = None,
) -> tuple[History, tuple[Retention, ...]]:
    """Distil pseudo-data into the student, in place; the last step is the result.

    Statistics of ``layers`` are reset on class-balanced pseudo-data before and after; where no step is to be taken, on
    every teacher's images in their own mix of classes, as those of a merge are (``merge --recalibrate``). In the end
    the student's biases are set right, see ``calibrate_biases``. Processes share each batch: they average their
    gradients, and each normalises by the statistics of its own part, so that the result depends on how many there are.

    Args:
        student: on the host's device, as all else is. teachers: frozen; not needed where no step is to be taken.
        stored: dtypes that tensors will be stored in. The student is rounded to them before it is measured.

    Returns:
        Curves of the loss and of the agreement with the targets of views, and agreement per teacher.

    Raises:
        DmmError: the batch cannot be shared evenly, or the student answers without a gradient.
    """
    if host.ranks.count > 1 and (settings.batch % host.ranks.count or settings.batch < 2 * host.ranks.count):
        raise DmmError(
            f"a batch of {settings.batch} images cannot be shared by {host.ranks.count} processes",
            hint=f"--batch must be a multiple of {host.ranks.count}, with two images or more for each",
        )
    with deterministic(host.device), seeded(settings.seed, "distill"):  # the global stream feeds dropout
        before = agreement(student, lessons)
        _reset(student, layers, lessons, settings, "before")
        recorder = Recorder(settings.steps)
        if settings.steps:
            committee = lessons.committee(teachers, settings)
            pupil = Pupil(student, lessons, committee, settings, host, recorder)
            work_through([lambda: pupil], "distill", settings.steps, host)
        student.requires_grad_(False)
        _reset(student, layers, lessons, settings, "after")
        if settings.steps:
            calibrate_biases(student, lessons, committee)
        for name, tensor in student.state_dict().items():
            tensor.copy_(tensor.to((stored or {}).get(name, tensor.dtype)))
        after = agreement(student, lessons)
    return recorder.history(), _retention(lessons, before, after)


class Pupil:
    """A student in training; begins where its savepoint ends."""

    def __init__(
        self,
        student: nn.Module,
        lessons: Lessons,
        committee: nn.Module,
        settings: Settings,
        host: Host,
        recorder: Recorder,
    ) -> None:
        self._targets, self._settings, self._host, self._recorder = lessons.targets, settings, host, recorder
        self._savepoint = host.savepoint or Savepoint()
        count = min(VIEWS * len(lessons.targets), settings.steps * settings.batch)
        self._views = draw_views(lessons, committee, count, settings.pose, random_stream(settings.seed, "views"))
        self._labels = (self._views.answers / settings.temperature).softmax(1)  # (M, K)
        student.train().requires_grad_(True)
        self._model = _shared(student) if host.ranks.count > 1 else student
        stream = random_stream(settings.seed, "batches")
        self._trainer = Trainer(student, settings.learning_rate, settings.steps, stream, BETAS, WARM_UP)
        state = host.ranks.fetch(0, lambda: self._savepoint.load(STATE))
        if state is not None:
            self._restore(state)

    @property
    def done(self) -> int:
        """Steps taken."""
        return self._trainer.done

    @property
    def total(self) -> int:
        """Steps there will be."""
        return self._settings.steps

    def train(self) -> Iterator[dict[str, float]]:
        """Take the steps that are left, giving the newest point of the curves after each."""
        # processes exchange gradients, which a graph does not hold
        step = self._step if self._host.ranks.count > 1 else Replay(self._step, self._host.device)
        rate = self._settings.learning_rate
        hint = f"the student diverged: try --learning-rate below {rate:g}"
        shown: dict[str, float] = {}
        while self.done < self._settings.steps:
            self._separate_dropout()
            terms = step(*self._batch())
            self._trainer.advance()
            if self._recorder.wants(self.done - 1):
                shown = self._recorder.add(self.done - 1, terms)
                require_finite_terms(shown, self.done, hint)
            yield {name: value for name, value in shown.items() if name in SHOWN}

    def save(self) -> None:
        """Keep all it takes to go on; processes are in step, so the first keeps it for all."""
        if self._host.ranks.is_first:
            arrays = {**self._trainer.state(), "dropout": torch.get_rng_state().numpy()}
            if self._host.device.type == "cuda":
                arrays["dropout_cuda"] = torch.cuda.get_rng_state(self._host.device).numpy()
            self._savepoint.save(STATE, arrays, {"curves": self._recorder.state()})

    def _restore(self, state: State) -> None:
        self._trainer.restore(state.arrays)
        self._recorder.restore(state.notes["curves"])
        torch.set_rng_state(torch.from_numpy(state.arrays["dropout"]))
        if self._host.device.type == "cuda":
            torch.cuda.set_rng_state(torch.from_numpy(state.arrays["dropout_cuda"]), self._host.device)

    def _separate_dropout(self) -> None:
        """Draw other masks than the first process, which goes on with the global stream, as one alone does.

        By the number of the step, so that what the first keeps is all it takes to go on.
        """
        if not self._host.ranks.is_first:
            stream = random_stream(self._settings.seed, "dropout", self._host.ranks.rank, self.done)
            torch.manual_seed(stream.initial_seed())

    def _batch(self) -> tuple[torch.Tensor, Inputs]:
        """This process's part of a batch: numbers of views (B,) and their images under noise (B, C, H, W)."""
        stream = self._trainer.stream
        drawn = torch.randint(len(self._labels), (self._settings.batch,), generator=stream)
        numbers = drawn.to(self._labels.device)
        images = add_noise(self._views.show(numbers), self._settings.noise, stream)
        return self._host.ranks.deal(numbers), self._host.ranks.deal(images)

    def _step(self, numbers: torch.Tensor, images: Inputs) -> dict[str, torch.Tensor]:
        with mixed_precision(self._host.device, self._settings.precision):
            logits = answer(self._model, images)
        if not logits.requires_grad:
            raise DmmError(
                f"the answer of {called(self._model)} has no gradient, so it cannot be taught",
                hint="let its forward neither detach its answer nor make it under torch.no_grad",
            )
        loss = distillation(logits.float(), self._labels[numbers], self._settings.temperature)
        self._trainer.descend(loss)
        hits = logits.argmax(1) == self._targets[self._views.rows[numbers, 0]]
        return {"loss": loss.detach(), VIEWED: 100.0 * hits.float().mean()}


def _shared(student: nn.Module) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    shared = DistributedDataParallel(student, static_graph=True)  # which may leave parameters unused
    setattr(shared, ORIGIN, called(student))
    return shared


def _reset(student: nn.Module, layers: list[nn.Module], lessons: Lessons, settings: Settings, when: str) -> None:
    batches = lessons.balanced if settings.steps else lessons.mixed
    reset_statistics(student, layers, batches(random_stream(settings.seed, "reset", when)))


def _retention(lessons: Lessons, before: torch.Tensor, after: torch.Tensor) -> tuple[Retention, ...]:
    def measured(rows: torch.Tensor) -> tuple[int, float, float]:
        return int(rows.sum()), *(percentage(hits[rows]) for hits in (before, after))

    found = []
    for number, label in enumerate(lessons.labels):
        mine = lessons.teacher_id == number
        present = lessons.targets[mine].unique().tolist()
        classes = tuple(
            ClassRetention(lessons.classes[target], *measured(mine & (lessons.targets == target))) for target in present
        )
        found.append(Retention(label, *measured(mine), classes))
    return tuple(found)
