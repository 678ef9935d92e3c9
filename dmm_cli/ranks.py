"""Processes that work together, as torchrun starts them."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import DmmError, printable, summary

LOST = re.compile(r"gloo/.*(closed by peer|reset by peer|Broken pipe)|ncclRemoteError", re.DOTALL)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process among ``count`` of them, ``local`` on this machine; alone unless ``joined`` says otherwise."""

    rank: int = 0
    count: int = 1
    local: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def deal(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's share of items that all processes know."""
        return items[self.rank :: self.count]

    def collect(self, share: Sequence[Item]) -> list[Item]:
        """All items in their order, from the shares that ``deal`` made; waits for every process."""
        shares = self.gather(list(share))
        return [shares[i % self.count][i // self.count] for i in range(sum(map(len, shares)))]

    def fetch(self, index: int, get: Callable[[], Item]) -> Item:
        """What the process that ``deal`` gave the ``index``-th item gets for it; waits for every process."""
        return self.gather(get() if index % self.count == self.rank else None)[index % self.count]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order of rank; waits for every one of them."""
        if self.count == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until every process is here."""
        self.gather(None)

    def require_same(self, **facts: Any) -> None:
        """Refuse to share work that the processes were told differently; waits for every one of them.

        Args:
            facts: everything, as JSON, that the bytes of the output depend on; before anything else is exchanged.

        Raises:
            DmmError: some facts differ, in every process.
        """
        told = self.gather({name: json.dumps(value, sort_keys=True, default=str) for name, value in facts.items()})
        names = dict.fromkeys(name for own in told for name in own)
        odd = {name: [own.get(name, "nothing") for own in told] for name in names}
        lines = [
            f"{name}: {printable(values[0])} in process 0, {printable(value)} in process {rank}"
            for name, values in odd.items()
            for rank, value in enumerate(values)
            if value != values[0]
        ]
        if lines:
            raise DmmError(
                "the processes of torchrun were given different inputs or parameters",
                evidence=lines,
                hint="give all of them the same command; only the directories of the inputs may differ",
            )


def process_count() -> int:
    """How many processes torchrun started, 1 where it did not.

    Raises:
        DmmError: the environment tells no number.
    """
    told = os.environ.get("WORLD_SIZE") or "1"
    if not told.isdecimal() or int(told) < 1:
        raise DmmError(
            f"WORLD_SIZE is not a number of processes: {printable(told)}", hint="unset it, unless torchrun set it"
        )
    return int(told)


def speaks_for_all() -> bool:
    """Whether this process is the only one, or the first that torchrun started."""
    return process_count() == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes torchrun started, connected with gloo, and their GPUs with nccl; just this one where it did not.

    Raises:
        DmmError: the environment is not torchrun's; the processes do not find one another; another one is gone before
            the work was done.
    """
    count = process_count()
    if count == 1:
        yield Ranks()
        return
    # a second of start-up that one process does without. Optimisers import nn, whose default arguments are the group of
    # that moment: after this one it is none, and gloo's threads end with theirs, not while the interpreter is torn down
    import torch.distributed.nn

    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Python would hear of it only when all are here
    try:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except ValueError as error:
        raise DmmError(
            f"the environment is not as torchrun makes it: {printable(str(error))}",
            hint="unset WORLD_SIZE, unless torchrun set it",
        ) from None
    except torch.distributed.DistError as error:
        raise DmmError(
            "the processes of torchrun do not find one another",
            evidence=[summary(error)],
            hint="another program may have that port: name a free one with torchrun --master-port",
        ) from error
    finally:
        signal.signal(signal.SIGTERM, previous)
    try:
        yield Ranks(torch.distributed.get_rank(), count, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except (RuntimeError, DmmError) as error:
        if LOST.search(str(error.__cause__ or error)):  # in a forward too, which is told as the network's
            raise DmmError("another process of torchrun failed", hint="see its message") from error
        raise
    finally:
        torch.distributed.destroy_process_group()
