"""What goes to which stream, and the line that tells how far a long computation is."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest
import torch
from conftest import DIGITS, dmm
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


@pytest.mark.parametrize(
    ("encoding", "name", "shown"), [("utf-8", b"\xff", b"\xff"), ("latin1", "模".encode(), b"\\u6a21")]
)
def test_results_reach_a_stream_that_cannot_hold_their_letters(tmp_path, monkeypatch, encoding, name, shown):
    monkeypatch.chdir(tmp_path)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        with console.results_alone():
            console.emit(os.fsdecode(name) + ".safetensors")
    stdout.flush()
    assert stdout.buffer.getvalue() == shown + b".safetensors\n"


def test_names_from_outside_are_escaped_in_plans_and_progress(tmp_path, monkeypatch):
    odd = tmp_path / "a\x1b[31m.safetensors"
    odd.write_bytes((DIGITS / "site-a.safetensors").read_bytes())
    monkeypatch.setattr(console, "PATIENCE", -1.0)
    data = tmp_path / "data.safetensors"
    save_file({"images": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)}, data)
    command = ["record", odd, "--data", data, "-o", tmp_path / "o.safetensors"]
    plan = dmm(*command, "--dry-run")
    assert plan.exit_code == 0 and "a\\x1b[31m" in plan.stdout and "\x1b" not in plan.stdout
    done = dmm(*command)
    assert done.exit_code == 0 and "a\\x1b[31m 100%" in done.stderr and "\x1b" not in done.stderr, done.stderr
