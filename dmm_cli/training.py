"""Modules in training that can be put aside at any step, side by side, and a step that a GPU replays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from .examples import Inputs
from .runtime import Host, parallel

SAVE_EVERY = 10.0  # seconds
EAGER = 3  # steps before a GPU captures one: libraries allocate and choose kernels in the first ones

Result = TypeVar("Result")


class Trainer:
    """Fused Adam on a one-cycle schedule (Smith and Topin, 2018), with the random stream that feeds the module.

    Args:
        rate: the highest learning rate. warm_up: share of the steps in which it rises to it; a cosine brings it down.

    Attributes:
        done: steps taken.
    """

    def __init__(
        self,
        module: nn.Module,
        rate: float,
        steps: int,
        stream: torch.Generator,
        betas: tuple[float, float],
        warm_up: float,
    ) -> None:
        self.module, self.stream, self.done = module, stream, 0
        device = next(module.parameters()).device
        on_gpu = device.type == "cuda"
        first = torch.tensor(rate, device=device) if on_gpu else rate  # a captured step reads it from the device
        self._optimiser = torch.optim.Adam(module.parameters(), first, betas, fused=True, capturable=on_gpu)
        rising = warm_up if warm_up * (steps + 1) > 1.0 else 0.0  # torch divides by the steps of a rise, less one
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimiser, rate, total_steps=steps + 1, pct_start=rising, cycle_momentum=False
        )

    def descend(self, loss: torch.Tensor) -> None:
        """One step down the gradient of a scalar; a GPU may capture it."""
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self._optimiser.step()

    def advance(self) -> None:
        """Count a step and set the learning rate of the next."""
        self.done += 1
        self._schedule.step()

    def state(self) -> dict[str, np.ndarray]:
        """Weights, buffers, moments, random stream, and where in the schedule they belong."""
        moments = self._optimiser.state_dict()["state"]
        tensors = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= {f"moment.{i}.{name}": value for i, entry in moments.items() for name, value in entry.items()}
        arrays = {name: value.detach().cpu().numpy().copy() for name, value in tensors.items()}
        rate = float(self._optimiser.param_groups[0]["lr"])
        place = {"done": np.array(self.done), "rate": np.array(rate), "stream": self.stream.get_state().numpy()}
        return {**arrays, **place}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on from a ``state``."""
        tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
        weights = {name.removeprefix("module."): t for name, t in tensors.items() if name.startswith("module.")}
        self.module.load_state_dict(weights)
        state = self._optimiser.state_dict()
        for name, value in tensors.items():
            if name.startswith("moment."):
                _, number, part = name.split(".")
                state["state"].setdefault(int(number), {})[part] = value
        for number, parameter in enumerate(self.module.parameters()):
            entry = state["state"].get(number, {})
            for part in entry.keys() - {"step"}:  # in the layout of the weights, as the fused kernel reads them
                entry[part] = torch.empty_like(parameter, requires_grad=False).copy_(entry[part])
        group = state["param_groups"][0]
        rate = float(tensors["rate"])
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], torch.Tensor) else rate
        self._optimiser.load_state_dict(state)
        self.stream.set_state(tensors["stream"])
        self.done = self._schedule.last_epoch = int(tensors["done"])


class Replay(Generic[Result]):
    """A function of inputs of fixed shapes: captured once in a CUDA graph and replayed, without a word from Python.

    The result of a replay is overwritten by the next. On the CPU the function is simply called.

    Args:
        pool: memory that the graph shares with others, all of which are replayed in the order of their first calls.
    """

    def __init__(self, function: Callable[..., Result], device: torch.device, pool: object = None) -> None:
        self._function, self._device, self._pool, self._calls = function, device, pool, 0
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Inputs, ...] = ()
        self._result: Result

    def __call__(self, *inputs: Inputs) -> Result:
        inputs = tuple(value.to(self._device, non_blocking=True) for value in inputs)
        if self._device.type != "cuda":
            return self._function(*inputs)
        self._calls += 1
        if self._calls <= EAGER:
            return self._aside(inputs)
        if self._graph is None:
            self._capture(inputs)
        for held, value in zip(self._inputs, inputs, strict=True):
            held.copy_(value)
        self._graph.replay()
        return self._result

    @classmethod
    def in_turn(cls, functions: Sequence[Callable[..., Result]], device: torch.device) -> list[Replay[Result]]:
        """One for each function, to be called one after the other, over and over; they need the memory of one."""
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        return [cls(function, device, pool) for function in functions]

    def _aside(self, inputs: tuple[Inputs, ...]) -> Result:
        """Called on a stream of its own, as capture demands of the steps before it; memory belongs to a stream."""
        stream = self._stream = self._stream or torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            result = self._function(*inputs)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return result

    def _capture(self, inputs: tuple[Inputs, ...]) -> None:
        self._inputs = tuple(value.clone() for value in inputs)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=self._pool):
            self._result = self._function(*self._inputs)


class Worker(Protocol):
    """Something that is trained step by step and can be put aside.

    Attributes:
        done: steps taken. total: and how many it will have been in the end, as far as is known.
    """

    done: int
    total: int

    def train(self) -> Iterator[dict[str, float]]:
        """Take the steps that are left, giving the newest point of the curves after each."""

    def save(self) -> None:
        """Keep what there is, to go on from."""


def work_through(
    jobs: Sequence[Callable[[], Worker]], stage: str, steps: int, host: Host, begun: Sequence[int] = ()
) -> None:
    """Train every worker, saving it every ``SAVE_EVERY`` seconds and at its end.

    When the user interrupts it is saved as well, but not on a GPU, where that comes in the midst of a step.

    Args:
        jobs: make the workers, each just before its turn. stage: its name, and steps of each, for the progress.
        begun: steps that each has taken, where that is known before its turn.
    """
    lock = threading.Lock()
    done, totals = list(begun) or [0] * len(jobs), [steps] * len(jobs)

    def work(number: int, stop: Callable[[], bool]) -> None:
        worker = jobs[number]()
        saved = time.monotonic()
        done[number] = worker.done
        for shown in worker.train():
            done[number], totals[number] = worker.done, worker.total
            with lock:
                host.tell(stage, sum(done), sum(totals), **shown)
            if stop():
                break
            if time.monotonic() - saved > SAVE_EVERY:
                worker.save()
                saved = time.monotonic()
        worker.save()

    parallel([partial(work, number) for number in range(len(jobs))], host)
