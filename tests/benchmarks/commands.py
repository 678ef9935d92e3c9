"""The commands of dmm, as benchmarks call them: processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


class OutOfTime(Exception):
    """The time that a benchmark was given is over; what it has done is kept."""


def dmm(*words: object, seconds: float | None = None) -> str:
    """What a command prints; factories of the benchmarks and the tests can be named in ``--arch``.

    Raises:
        OutOfTime: the command took longer than ``seconds``, and was killed.
    """
    paths = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "dmm_cli", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": paths}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise OutOfTime from None
    if done.returncode:
        raise SystemExit(f"dmm {' '.join(map(str, words))}\n{done.stderr}")
    return done.stdout
