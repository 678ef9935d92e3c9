"""The line that tells how far a long computation is."""

from __future__ import annotations

import io

import pytest

from dmm_cli.report import console


class Terminal(io.StringIO):
    """A stream that a terminal shows."""

    def isatty(self) -> bool:
        """Always."""
        return True


@pytest.mark.parametrize("columns", [20, 40, 200])
def test_a_line_that_rewrites_itself_never_wraps(monkeypatch, columns):
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    monkeypatch.setenv("COLUMNS", str(columns))
    progress = console.Progress()
    for done in (1, 2):
        progress("synthesize", done, 2, loss=1234.5, norm=0.123456, cross_entropy=2.345678)
    lines = [line.removeprefix("\x1b[2K").rstrip("\n") for line in shown.getvalue().split("\r")[1:]]
    whole = ["synthesize  50%  loss 1234  norm 0.1235  cross_entropy 2.346  0 s"]
    whole += [whole[0].replace(" 50%", "100%")]
    assert lines == [line[: columns - 1] for line in whole]
