"""What the README shows is what the program does."""

from __future__ import annotations

import re
import shlex

import pytest
from conftest import ROOT
from typer.main import get_command
from typer.testing import CliRunner

from dmm_cli.app import COMMANDS, app
from dmm_cli.merging import METHODS
from dmm_cli.merging.method import effective_parameters

README = (ROOT / "README.md").read_text()
HELP = re.findall(r"```console\n\$ dmm (\w* ?)--help\n(.*?)```", README, re.S)
LINES = [
    part.strip()
    for line in re.findall(r"^\$ (dmm .*)$", README, re.M) + re.findall(r"^ +\$ (dmm .*)$", README, re.M)
    for part in line.split("|")
    if part.strip().startswith("dmm")
]


@pytest.mark.parametrize(("command", "shown"), HELP, ids=[name.strip() or "dmm" for name, _ in HELP])
def test_help_blocks_are_the_help(command, shown):
    got = CliRunner().invoke(app, [*command.split(), "--help"], prog_name="dmm", terminal_width=78)
    assert got.stdout.rstrip() == shown.rstrip()


def test_every_command_is_in_the_reference():
    assert {name.strip() for name, _ in HELP} == {"", *COMMANDS}


@pytest.mark.parametrize("line", sorted(set(LINES)))
def test_every_command_line_is_understood(line):
    words = shlex.split(line)[1:]
    group = get_command(app)
    if "--help" in words:
        return
    context = group.make_context("dmm", words[:1], resilient_parsing=True)
    group.commands[words[0]].make_context(words[0], words[1:], parent=context)


def test_the_two_setup_lines_are_whole():
    lines = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert len(lines) == 2 and all("-c tests/constraints.txt" in line for line in lines)
    assert "bin/dmm run fixtures/digits/" in lines[0] and "pytest" in lines[1]


def test_the_picture_is_there():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file()


def test_the_table_of_merge_methods_is_the_programs():
    rows = {
        name: (dict(re.findall(r"`(\w+)=([^`]+)`", parameters)), needs.strip())
        for name, parameters, needs in re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|([^|]*)\|$", README, re.M)
    }
    assert list(rows) == METHODS.names()
    for name, (parameters, needs) in rows.items():
        defaults = effective_parameters(METHODS.load(name), {})
        assert {key: float(value) for key, value in parameters.items()} == defaults
        words = {"base": "base", "pair": "two", "features": "pseudo-data"}
        assert needs == "".join(words.get(trait, "") for trait in METHODS.traits(name))


def test_every_help_shows_examples_and_exit_codes():
    for name in COMMANDS:
        text = CliRunner().invoke(app, [name, "--help"], prog_name="dmm", terminal_width=78).stdout
        assert text.count("  $ dmm ") >= 2 and "Exit codes: 0 done" in text, name
