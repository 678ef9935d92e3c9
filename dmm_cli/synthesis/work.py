"""Training loops side by side, each saved now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

from ..runtime import Host, parallel

SAVE_EVERY = 10.0  # seconds


class Worker(Protocol):
    """Something that is trained step by step and can be put aside.

    Attributes:
        done: steps taken.
    """

    done: int

    def train(self) -> Iterator[dict[str, float]]:
        """Take the steps that are left, giving the newest point of the curves after each."""

    def save(self) -> None:
        """Keep what there is, to go on from."""


def work_through(jobs: Sequence[Callable[[], Worker]], steps: int, host: Host) -> None:
    """Train every worker, saving it every ``SAVE_EVERY`` seconds, at its end, and when the user interrupts.

    Args:
        jobs: make the workers, each just before its turn. steps: of each, for the progress.
    """
    lock = threading.Lock()
    done = [0] * len(jobs)

    def work(number: int, stop: Callable[[], bool]) -> None:
        worker = jobs[number]()
        saved = time.monotonic()
        done[number] = worker.done
        for shown in worker.train():
            done[number] = worker.done
            with lock:
                host.tell("synthesize", sum(done), len(jobs) * steps, **shown)
            if stop():
                break
            if time.monotonic() - saved > SAVE_EVERY:
                worker.save()
                saved = time.monotonic()
        worker.save()

    parallel([partial(work, number) for number in range(len(jobs))], host)
