"""The schedule of a training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dmm_cli.runtime import Host
from dmm_cli.training import Trainer, work_through


@pytest.mark.parametrize("steps", [*range(1, 13), 30, 199])
@pytest.mark.parametrize("warm_up", [0.0, 0.1])
def test_the_learning_rate_rises_once_and_falls_to_nothing(steps, warm_up):
    """Any number of steps will do; torch's schedule divides by zero where a rise takes exactly one."""
    module = nn.Linear(1, 1)
    trainer = Trainer(module, 0.5, steps, torch.Generator(), (0.9, 0.999), warm_up)
    rates = []
    for _ in range(steps):
        rates.append(float(trainer.state()["rate"]))
        trainer.descend(module(torch.ones(1, 1)).sum())
        trainer.advance()
    last, peak = float(trainer.state()["rate"]), rates.index(max(rates))
    assert 0.24 < max(rates) <= 0.5 and (steps < 30 or max(rates) > 0.49)
    assert peak == pytest.approx(warm_up * steps, abs=1)
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert last < 1e-3 * max(rates)


class Counter:
    """A worker that only counts."""

    def __init__(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    def train(self):
        while self.done < self.total:
            self.done += 1
            yield {}

    def save(self) -> None:
        """Nothing to keep."""


def test_progress_begins_where_the_workers_are():
    told = []
    host = Host(torch.device("cpu"), on_progress=lambda stage, done, total: told.append((stage, done, total)))
    workers = [Counter(3, 5) for _ in range(4)]
    work_through([lambda w=worker: w for worker in workers], "count", 5, host, [worker.done for worker in workers])
    assert sorted(told) == [("count", done, 20) for done in range(13, 21)]
