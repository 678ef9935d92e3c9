"""Where and how tensors are computed: device, precision, seeds, other processes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .devices import cores, require_device_name, require_precision
from .errors import DmmError
from .ranks import Ranks
from .savepoint import Savepoint

Progress = Callable[..., None]

# numbers of malloc.h: M_MMAP_THRESHOLD, at its largest, M_TRIM_THRESHOLD, and one M_ARENA_MAX, as others trim
MALLOPT = {-3: 32 << 20, -1: (1 << 31) - 1, -8: 1}


@dataclass(frozen=True)
class Host:
    """Where a long computation runs; of all this its result depends on the kind of device alone.

    Attributes:
        savepoint: of what is done already; None to begin anew, and to keep it in memory.
        ranks: the processes that share the work.
    """

    device: torch.device
    savepoint: Savepoint | None = None
    ranks: Ranks = field(default_factory=Ranks)
    on_progress: Progress | None = None

    def tell(self, stage: str, done: int, total: int, **numbers: float) -> None:
        """Report progress, where somebody wants to know and this process speaks for all."""
        if self.on_progress and self.ranks.is_first:
            self.on_progress(stage, done, total, **numbers)


def resolve_device(name: str) -> torch.device:
    """The device a user named: ``auto``, ``cpu``, ``cuda`` or ``cuda:n``; under torchrun each process its own GPU.

    Raises:
        DmmError: there is no such device, or not here; it is never replaced by another in silence.
    """
    require_device_name(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and device.index is None and torch.cuda.device_count():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DmmError(
            f"no such device: {name}",
            evidence=[f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"],
            hint="use --device cpu, or install a torch built for your GPU",
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)  # graphs and kernels are launched on the current one
    return device


def describe_device(device: torch.device) -> str:
    """The device in words, for reports."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def generator(seed: int, *salt: int | str) -> torch.Generator:
    """A CPU random stream that depends on the seed and the salt alone.

    Drawing on the CPU and moving the numbers keeps the draws equal on every device.
    """
    text = ":".join(map(str, (seed, *salt)))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextmanager
def seeded(seed: int, *salt: int | str) -> Iterator[None]:
    """Make torch's global streams (used by weight initialisation) depend on seed and salt; restores them after.

    Of GPUs that of the current one, since others are not used; of none where none is yet.
    """
    used = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=used):
        torch.manual_seed(generator(seed, *salt).initial_seed())
        yield


def resolve_precision(name: str, device: torch.device) -> str:
    """The precision a user named; ``auto`` is bfloat16 on CUDA, float32 on the CPU, where few have bfloat16."""
    require_precision(name)
    return ("bfloat16" if device.type == "cuda" else "float32") if name == "auto" else name


@contextmanager
def mixed_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Products and convolutions in ``float32`` or ``bfloat16``; weights and sums stay float32."""
    with torch.autocast(device.type, torch.bfloat16, precision == "bfloat16", cache_enabled=False):
        yield


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Sums in the same order every time, so that the same inputs give the same bytes.

    On the CPU one thread for every operation, for how an operation is split among threads decides the order of its
    sums; the bytes of a result then depend on neither the number of cores nor their load. On a GPU those algorithms
    of cuDNN that leave no order to chance.
    """
    threads, ordered = torch.get_num_threads(), torch.backends.cudnn.deterministic
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = ordered


def workers(device: torch.device, local: int) -> int:
    """Jobs that run at once in each of ``local`` processes on this machine: one a core, or one on a GPU."""
    return max(1, cores() // local) if device.type == "cpu" else 1


def hold_memory() -> None:
    """Let the allocator keep what is freed, for this process and its threads.

    By default glibc gives large blocks back to the system, which maps and clears them again page by page in the next
    step: a fifth of the processor time of small networks on the CPU. Other allocators have no ``mallopt``.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in MALLOPT.items():
            mallopt(option, value)


def parallel(jobs: Sequence[Callable[[Callable[[], bool]], None]], host: Host) -> None:
    """Run jobs that share nothing: one core each on the CPU, one after the other on a GPU.

    Args:
        jobs: each is given a function that tells whether to stop early, to be asked once a step: when
            the user interrupts, or another job fails, nobody waits for the rest.
    """
    if host.device.type != "cpu":
        for job in jobs:
            job(lambda: False)
        return
    hold_memory()
    stop = threading.Event()

    def alone(job: Callable[[Callable[[], bool]], None]) -> None:
        with deterministic(host.device):  # of this worker; other threads keep theirs
            job(stop.is_set)

    with ThreadPoolExecutor(workers(host.device, host.ranks.local)) as pool:
        try:
            for future in as_completed([pool.submit(alone, job) for job in jobs]):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
