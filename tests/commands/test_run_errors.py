"""What the wrapper around every command makes of errors that are not dmm's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from dmm_cli.commands._run import guard

HUGE = 1 << 46  # elements


@pytest.mark.parametrize(("allocate", "words"), [(torch.empty, "281474976710656 bytes"), (np.empty, "512. TiB")])
def test_running_out_of_memory_is_an_error_with_a_way_out(allocate, words):
    app = typer.Typer()

    @app.command()
    def command() -> None:
        with guard():
            allocate(HUGE)

    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2 and result.stderr.startswith("error: out of memory\n  "), result.stderr
    assert words in result.stderr and "--batch auto" in result.stderr
