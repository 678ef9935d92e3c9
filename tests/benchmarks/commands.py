"""The commands of dmm, as benchmarks call them: processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def dmm(*words: object) -> str:
    """What a command prints; factories of the benchmarks and the tests can be named in ``--arch``."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "dmm_cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    if done.returncode:
        raise SystemExit(f"dmm {' '.join(map(str, words))}\n{done.stderr}")
    return done.stdout
