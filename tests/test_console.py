"""What goes to which stream, and the line that tells how far a long computation is."""

from __future__ import annotations

import io
import json

import pytest
import torch
from conftest import dmm
from networks import lively
from safetensors.torch import save_file

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


LOUD = """
import torch
from test_answers import Plain

print("at import")

class Net(Plain):
    def forward(self, images):
        print("in forward")
        return super().forward(images)

def net():
    print("in the factory")
    return Net()

def example_inputs():
    print("in example_inputs")
    return {"images": torch.zeros(2, 3, 8, 8)}
"""


def test_what_networks_print_does_not_mix_with_the_result(tmp_path, monkeypatch):
    (tmp_path / "loud.py").write_text(LOUD)
    monkeypatch.syspath_prepend(tmp_path)
    net, data = tmp_path / "net.safetensors", tmp_path / "data.safetensors"
    save_file(lively("test_answers:plain").state_dict(), net)
    save_file({"images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "labels": torch.arange(4)}, data)
    command = ["evaluate", net, "--data", data, "--arch", "loud:net"]
    whole, short, rows = (dmm(*command, *flags) for flags in (["--json"], ["-q"], ["--format", "tsv"]))
    assert json.loads(whole.stdout)["rows"][0]["accuracy"] == 25.0
    assert short.stdout == "25.0000\n" and rows.stdout.count("\t") and "in " not in rows.stdout
    for place in ("at import", "in the factory", "in example_inputs", "in forward"):
        assert place in whole.stderr
