"""Shared helpers: checkpoints written by the safetensors package, and the command line in and out of process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from dmm_cli.app import app

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "fixtures" / "digits"

Write = Callable[..., Path]


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """What tests remember of files is not the user's, nor the other way round."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _few_threads():
    import torch

    torch.set_num_threads(2)


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
    """Random tensors under the names a small network has."""
    draw = np.random.default_rng(seed)
    return {
        "conv1.weight": draw.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "bn1.weight": np.ones(4, np.float32),
        "bn1.running_mean": draw.normal(size=4).astype(np.float32),
        "bn1.running_var": draw.uniform(0.5, 2.0, 4).astype(np.float32),
        "bn1.num_batches_tracked": np.array(10 * (seed + 1), np.int64),
        "fc.weight": draw.normal(size=(10, 4)).astype(np.float32),
    }


def find(fact, blocks: Sequence[np.ndarray]) -> np.ndarray:
    """What a merge finds out about a tensor that comes in these blocks."""
    for _ in range(fact.rounds):
        for rows in blocks:
            fact.add(fact.measure(rows))
        fact.end_round()
    return fact.result()


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
