"""Shared helpers: checkpoints by the safetensors package, merge methods, the command line in and out of process.

Legend: N tasks, n elements.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from compileall import compile_dir
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer.testing
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from dmm_cli.app import app
from dmm_cli.architectures import input_spec
from dmm_cli.images import PixelSpace
from dmm_cli.inputs import resolve_source
from dmm_cli.loading import load_model
from dmm_cli.merging import CALIBRATIONS, METHODS
from dmm_cli.merging.facts import trim_threshold
from dmm_cli.merging.method import Block, Facts, Layer, effective_parameters
from dmm_cli.norms import norm_inputs
from dmm_cli.synthesis.pseudodata import PseudoData, TeacherRecord, save_pseudo_data
from dmm_cli.synthesis.recorded import measure, to_arrays
from dmm_cli.trust import grant

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "fixtures" / "digits"

SHAPE = (8, 6)  # of the matrices that tasks are, where it does not matter
SPECTRAL = [*(name for name in METHODS if "matrices" in METHODS.traits(name)), *CALIBRATIONS]

Write = Callable[..., Path]

FACTORIES = [
    "halves",
    "networks",
    "test_answers",
    "test_layout",
    "test_least_squares",
    "test_numbers",
]  # modules that tests' files name

grant(FACTORIES)

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start: as many tests as there are cores run at once

compile_dir(ROOT / "dmm_cli", quiet=2)  # once for all of them; by themselves they must not
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # Python leaves half a file where there is no room, and reads it later

typer.testing._get_command = cache(typer.testing._get_command)  # else all commands are built for every line

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the suite in the background ignores it


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """What tests remember of files is not the user's, nor the other way round."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@contextmanager
def two_generators() -> Iterator[None]:
    """Half as many as by default, in half of the time, where their number is not what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmm_cli.synthesis.generator.MEMBERS", 2)
        yield


def divergence(model: torch.nn.Module, batch: torch.Tensor, stored: dict[str, np.ndarray], eps: float = 0.0) -> float:
    """Mean over layers and channels of twice the divergence of the stored from the batch's Gaussian, in numpy."""
    found = to_arrays(measure(model, norm_inputs(model), [batch], torch.device("cpu")))
    values = []
    for name in norm_inputs(model):
        variance, known = found[f"{name}.var"] + eps, stored[f"{name}.var"] + eps
        shift = (found[f"{name}.mean"] - stored[f"{name}.mean"]) ** 2 / known
        values.append((shift + variance / known - 1 - np.log(variance / known)).mean())
    return float(np.mean(values))


@contextmanager
def deadline(seconds: int = 10) -> Iterator[None]:
    """End what would wait for ever."""

    def end(*_: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


class Watcher:
    """Notes the progress, and interrupts at a share of it."""

    def __init__(self, until: float = 2.0) -> None:
        self._until = until
        self.last, self.steps = 0.0, 0

    def __call__(self, stage: str, done: int, total: int, **numbers: float) -> None:
        self.last, self.steps = done / total, self.steps + 1
        if self.last >= self._until:
            self._until = 2.0
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.5)  # the others wait for their turn to tell, so that none is done before all are stopped


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write arrays with the reference implementation: ``write("a", w=array, metadata={...})``."""

    def save(name: str, metadata: dict[str, str] | None = None, **arrays: np.ndarray) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_file({key.replace("__", "."): value for key, value in arrays.items()}, path, metadata)
        return path

    return save


@pytest.fixture
def three(write: Write) -> list[Path]:
    """Three small checkpoints with a convolution, its BatchNorm layer and a classifier."""
    return [write(f"m{seed}", **small_net(seed)) for seed in range(3)]


def small_net(seed: int) -> dict[str, np.ndarray]:
    """Random tensors under the names a small network has, of one start, so that no network is looked for to align."""
    draw, start = np.random.default_rng(seed), np.random.default_rng(0)
    return {
        "conv1.weight": (start.normal(size=(4, 3, 3, 3)) + 0.1 * draw.normal(size=(4, 3, 3, 3))).astype(np.float32),
        "bn1.weight": np.ones(4, np.float32),
        "bn1.running_mean": draw.normal(size=4).astype(np.float32),
        "bn1.running_var": draw.uniform(0.5, 2.0, 4).astype(np.float32),
        "bn1.num_batches_tracked": np.array(10 * (seed + 1), np.int64),
        "fc.weight": (start.normal(size=(10, 4)) + 0.1 * draw.normal(size=(10, 4))).astype(np.float32),
    }


def find(fact, blocks: Sequence[np.ndarray]) -> np.ndarray:
    """What a merge finds out about a tensor that comes in these blocks."""
    for _ in range(fact.rounds):
        for rows in blocks:
            fact.add(fact.measure(rows))
        fact.end_round()
    return fact.result()


def traits(name: str) -> tuple[str, ...]:
    return METHODS.traits(name) if name in METHODS else ("calibration",)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def merged(name: str, tasks: np.ndarray, weights=None, shape=SHAPE, seed: int = 0, **parameters) -> np.ndarray:
    """What a method makes of tasks (N, n), called as its trait says; a calibration gets their sum.

    The rows of a task stand for the features of its own layer.
    """
    weights = np.ones(len(tasks)) if weights is None else np.array(weights, float)
    whole = name in SPECTRAL or "features" in traits(name)
    matrices = torch.from_numpy(tasks.copy()).reshape(len(tasks), *shape) if whole else None
    if name in CALIBRATIONS:
        return CALIBRATIONS.load(name)(matrices.sum(0), matrices, **parameters).numpy().reshape(-1)
    method = METHODS.load(name)
    if "coefficients" in traits(name):
        coefficients = method(Facts(weights, tasks @ tasks.T if "gram" in traits(name) else None), **parameters)
        assert coefficients.shape == (len(tasks),)
        return coefficients @ tasks
    if "features" in traits(name):
        wide = matrices.double()
        shares = torch.from_numpy(weights / weights.sum())
        grams = wide.mT @ wide
        return method(Layer(wide, grams, shares, wide @ grams), **parameters).numpy().reshape(-1)
    if "matrices" in traits(name):
        weighted = matrices * torch.from_numpy(weights)[:, None, None]
        return method(weighted, **parameters).numpy().reshape(-1)
    block = Block(
        tasks.copy(),
        weights.astype(tasks.dtype),
        thresholds(tasks, effective_parameters(method, parameters)["density"]) if "trim" in traits(name) else None,
        np.random.Generator(np.random.SFC64(seed)) if "random" in traits(name) else None,
    )
    return method(block, **parameters)


def thresholds(tasks: np.ndarray, density: float) -> np.ndarray:
    return find(trim_threshold(density, *tasks.shape, tasks.dtype), [tasks])


def digits_as_pseudo_data(path: Path, teachers: Sequence[tuple[Path, Sequence[int]]]) -> Path:
    """Real digits of the classes that each checkpoint knows, with its answers, in place of images drawn from it."""
    digits = load_file(DIGITS / "test.safetensors")
    small = torch.from_numpy(digits["images"]).float()
    large = F.interpolate(small, size=(16, 16), mode="bilinear").round().to(torch.uint8).numpy()
    images, logits, owners, records = [], [], [], []
    for number, (file, classes) in enumerate(teachers):
        pixels = large[np.isin(digits["labels"], classes)]
        source = resolve_source(str(file))
        model, _ = load_model(source)
        spec = input_spec(source, model)
        with torch.no_grad():
            answers = model(PixelSpace(spec).from_bytes(torch.from_numpy(pixels)))
        sure = (answers.softmax(1).amax(1) > 0.95).numpy()
        images.append(pixels[sure])
        logits.append(answers.numpy()[sure].astype(np.float16))
        owners.append(np.full(sure.sum(), number, np.int16))
        records.append(TeacherRecord(file.stem, source.sha256, (0.1,) * 10))
    answers = np.concatenate(logits)
    data = PseudoData(
        images=np.concatenate(images),
        targets=answers.argmax(1),
        teacher_id=np.concatenate(owners),
        logits=answers,
        confidence=np.ones(len(answers), np.float16),
        bn_loss=np.zeros(1, np.float32),
        teachers=tuple(records),
        spec=spec,
    )
    save_pseudo_data(path, data, {})
    return path


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def rotation(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(normal(size, size, seed=seed))[0]


def dmm(*arguments: object, text: str | None = None) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)


def shell(*arguments: object, code: str | None = None, **options) -> subprocess.CompletedProcess[str]:
    """Run the command line, or a piece of Python, in a process of its own."""
    command = ["-c", code] if code else ["-m", "dmm_cli"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        **options,
    )


def under_torchrun(*arguments: object, cwd: Path) -> str:
    """What two processes of torchrun print together that run the command line."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dmm_cli"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launch, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(rank: int, port: int, *arguments: object) -> subprocess.Popen[str]:
    """Python with these arguments, as one of two processes of torchrun."""
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **together, **own, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def in_two_processes(program: str, *arguments: object) -> list[str]:
    """What each of two processes prints that run a program of Python together, as under torchrun."""
    port = free_port()
    started = [start(rank, port, "-c", program, *arguments) for rank in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    return printed
