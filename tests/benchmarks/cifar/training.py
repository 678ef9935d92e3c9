"""Networks trained on labelled images: at any step they can be put aside, and gone on with later.

Legend: N images, B images of a batch, H height, W width.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dmm_cli.architectures import build
from dmm_cli.checkpoint import save_arrays
from dmm_cli.images import InputSpec, PixelSpace
from dmm_cli.inputs import resolve_source
from dmm_cli.layout import place
from dmm_cli.loading import load_state_dict
from dmm_cli.runtime import Host, generator, mixed_precision, resolve_precision, seeded
from dmm_cli.savepoint import Savepoint
from dmm_cli.spaces import example
from dmm_cli.training import Replay, Trainer, work_through

SPEC = InputSpec((3, 32, 32), (0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
BETAS, WARM_UP = (0.9, 0.999), 0.2
PADDING, SIDE = 4, 32
FEWEST = 100  # steps, of a client with few images


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: Adam on a one-cycle schedule, crops with a border of four pixels, and flips.

    Attributes:
        rate: the highest learning rate.
    """

    arch: str
    epochs: int
    batch: int = 128
    rate: float = 3e-3

    def steps(self, images: int) -> int:
        """Of a training set of this size."""
        return max(FEWEST, self.epochs * images // self.batch)


@dataclass(frozen=True)
class Task:
    """A checkpoint to train.

    Attributes:
        images: uint8 (N, 3, H, W). labels: int64 (N,). names: of the classes.
        seed: of the batches and, without ``start``, of the first weights.
        start: a checkpoint to go on from.
        counted: whether the file tells how often each class was seen.
    """

    output: Path
    recipe: Recipe
    images: np.ndarray
    labels: np.ndarray
    names: Sequence[str]
    seed: int
    start: Path | None = None
    counted: bool = False


class Learner:
    """A network in training; begins where its savepoint ends, and leaves a checkpoint."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task, self._device = task, device
        self._steps = task.recipe.steps(len(task.labels))
        with seeded(task.seed, "weights"):
            model = build(task.recipe.arch)
        if task.start:
            model.load_state_dict(load_state_dict(resolve_source(str(task.start))))
        place(model, device, example(SPEC, device))
        self._model = model.train()
        self._space, self._precision = PixelSpace(SPEC, device), resolve_precision("auto", device)
        padded = F.pad(torch.from_numpy(task.images), [PADDING] * 4, mode="reflect")
        self._images, self._labels = padded.to(device), torch.from_numpy(task.labels).to(device)
        stream = generator(task.seed, "batches")
        self._trainer = Trainer(self._model, task.recipe.rate, self._steps, stream, BETAS, WARM_UP)
        self._partial = task.output.with_suffix(".partial")
        self._savepoint = Savepoint(self._partial, json.dumps([asdict(task.recipe), task.seed, len(task.labels)]))
        self._clock = time.thread_time if device.type == "cpu" else time.monotonic
        self._began = self._clock()
        state = self._savepoint.load("state")
        if state:
            self._trainer.restore(state.arrays)
            self._began -= state.notes["seconds"]

    @property
    def done(self) -> int:
        """Steps taken."""
        return self._trainer.done

    @property
    def total(self) -> int:
        """Steps there will be."""
        return self._steps

    def train(self) -> Iterator[dict[str, float]]:
        """Take the steps that are left."""
        step = Replay(self._step, self._device)
        while self.done < self._steps:
            step(*self._batch())
            self._trainer.advance()
            yield {}

    def save(self) -> None:
        """Keep all it takes to go on, or the checkpoint if it is done."""
        seconds = self._clock() - self._began
        if self.done < self._steps:
            self._savepoint.save("state", self._trainer.state(), {"seconds": seconds})
            return
        tensors = {name: value.contiguous().cpu().numpy() for name, value in self._model.state_dict().items()}
        seconds_file(self._task.output).write_text(f"{seconds:.1f}")
        save_arrays(self._task.output, tensors, self._metadata(), force=True)
        shutil.rmtree(self._partial, ignore_errors=True)

    def _metadata(self) -> dict[str, str]:
        task = self._task
        counts = np.bincount(task.labels, minlength=len(task.names)).tolist() if task.counted else None
        return {
            "dmm.arch": task.recipe.arch,
            "dmm.input": json.dumps(asdict(SPEC)),
            "dmm.classes": json.dumps(list(task.names)),
            **({"dmm.class_counts": json.dumps(counts)} if counts else {}),
        }

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images, uint8 (B, 3, H, W), each cropped and flipped by its own draw, and their labels (B,)."""
        size, stream = self._task.recipe.batch, self._trainer.stream
        rows = torch.randint(len(self._labels), (size,), generator=stream)
        top, left = torch.randint(2 * PADDING + 1, (2, size, 1), generator=stream)  # (B, 1) each
        across = torch.arange(SIDE).expand(size, SIDE)
        across = torch.where(torch.rand(size, 1, generator=stream) < 0.5, across, across.flip(1)) + left
        down = torch.arange(SIDE) + top  # (B, H)
        rows, down, across = (drawn.to(self._device, non_blocking=True) for drawn in (rows, down, across))
        cut = self._images[rows[:, None, None], :, down[:, :, None], across[:, None]]  # (B, H, W, 3)
        return cut.permute(0, 3, 1, 2), self._labels[rows]  # (B, 3, H, W)

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with mixed_precision(self._device, self._precision):
            logits = self._model(self._space.from_bytes(images))
        loss = F.cross_entropy(logits.float(), labels)
        self._trainer.descend(loss)
        return loss.detach()


def seconds_file(output: Path) -> Path:
    """Where it is noted what an output has taken: processor seconds, on a GPU seconds, interruptions left out."""
    return output.with_suffix(".seconds")


def train(tasks: Sequence[Task], host: Host) -> None:
    """Train every checkpoint, one a core, or one after the other on a GPU."""
    if tasks:
        most = max(task.recipe.steps(len(task.labels)) for task in tasks)
        work_through([lambda task=task: Learner(task, host.device) for task in tasks], "train", most, host)
