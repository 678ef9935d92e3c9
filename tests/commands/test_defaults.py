"""Where the values of options come from: the line, the environment, dmm.toml."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import DIGITS, dmm

SITES = [DIGITS / f"site-{name}.safetensors" for name in "ab"]


def test_defaults_come_from_file_then_environment_then_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["merge", *SITES[:2], "--force", "--json", "-o", "x.safetensors"]
    (tmp_path / "dmm.toml").write_text('[merge]\nmethod = "slerp"\n')
    assert json.loads(dmm(*command).stdout)["method"] == "slerp"
    monkeypatch.setenv("DMM_MERGE_METHOD", "linear")
    assert json.loads(dmm(*command).stdout)["method"] == "linear"
    assert json.loads(dmm(*command, "--method", "slerp").stdout)["method"] == "slerp"
    (tmp_path / "dmm.toml").write_text('[merge]\nmetod = "slerp"\n')
    result = dmm(*command)
    assert result.exit_code == 2 and "did you mean method?" in result.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('loss = "norm=2"', "loss of synthesize cannot be 'norm=2': a list is wanted, as in [\"norm=2\"]"),
        ("count = [1, 2]", "one value is wanted"),
        ("seed = true", "a number or a string is wanted"),
    ],
)
def test_values_of_a_file_that_an_option_cannot_have_are_named(tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dmm.toml").write_text(f"[synthesize]\n{line}\n")
    result = dmm("synthesize", SITES[0], "-o", "p.safetensors", "--dry-run")
    assert result.exit_code == 2 and f"dmm.toml: {line.partition(' ')[0]}" in result.stderr and words in result.stderr
    good = 'count = 9\nloss = ["norm=2"]\nquiet = true\nseed = 3\nstatistics = []\nprecision = "float32"\n'
    (tmp_path / "dmm.toml").write_text(f"[synthesize]\n{good}")
    assert dmm("synthesize", SITES[0], "-o", "p.safetensors", "--dry-run").exit_code == 0


def test_of_format_and_json_the_one_nearer_to_the_line_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["inspect", SITES[0]]
    (tmp_path / "dmm.toml").write_text("[inspect]\njson = true\n")
    assert dmm(*command).stdout.startswith("{")
    assert dmm(*command, "--format", "md").stdout.startswith("**site-a**")
    monkeypatch.setenv("DMM_INSPECT_FORMAT", "md")
    assert dmm(*command).stdout.startswith("**site-a**")
    assert dmm(*command, "--json").stdout.startswith("{")
    assert dmm(*command, "--format", "md", "--json").stdout.startswith("{")


def test_a_wrong_value_that_is_not_on_the_line_is_told_with_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["synthesize", SITES[0], "-o", "p.safetensors", "--dry-run"]
    (tmp_path / "dmm.toml").write_text('[synthesize]\nsteps = "few"\n')
    result = dmm(*command)
    assert result.exit_code == 2 and "'--steps'" in result.stderr and "(from dmm.toml)" in result.stderr
    result = dmm(*command, "--steps", "many")
    assert result.exit_code == 2 and "'--steps'" in result.stderr and "(from" not in result.stderr
    (tmp_path / "dmm.toml").unlink()
    monkeypatch.setenv("DMM_SYNTHESIZE_COUNT", "-3")
    result = dmm(*command)
    assert result.exit_code == 2 and "(from DMM_SYNTHESIZE_COUNT in the environment)" in result.stderr


def test_what_is_refused_tells_which_options_were_not_on_the_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["merge", *SITES[:2], "-o", "x.safetensors", "--dry-run"]
    (tmp_path / "dmm.toml").write_text('[merge]\nmethod = "slerpp"\n')
    monkeypatch.setenv("DMM_MERGE_WEIGHTS", "1,2,3")
    result = dmm(*command)
    assert result.exit_code == 2 and "slerpp" in result.stderr and "--method is from dmm.toml" in result.stderr
    result = dmm(*command, "--method", "slerp")
    assert result.exit_code == 2 and "--weights is from DMM_MERGE_WEIGHTS in the environment" in result.stderr
    assert "--method is from" not in result.stderr
    assert dmm(*command, "--method", "slerp", "--weights", "1,2").exit_code == 0


def test_however_much_is_refused_what_was_not_on_the_line_is_told(write, tmp_path, monkeypatch):
    monkeypatch.setenv("DMM_MERGE_SEED", "3")
    paths = [
        write(name, **{f"{prefix}{i}": np.ones(1, np.float32) for i in range(30)})
        for name, prefix in (("a", "x"), ("b", "y"))
    ]
    result = dmm("merge", *paths, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2 and "more\n" in result.stderr
    assert "--seed is from DMM_MERGE_SEED in the environment" in result.stderr


def test_a_misspelt_variable_of_the_environment_is_refused(tmp_path, monkeypatch):
    command = ["merge", *SITES, "-o", tmp_path / "x.safetensors", "--dry-run"]
    monkeypatch.setenv("DMM_SYNTHESIZE_METOD", "of another command")
    assert dmm(*command).exit_code == 0
    monkeypatch.setenv("DMM_MERGE_CHECKPOINTS", "a.safetensors")  # an argument has no variable
    assert "DMM_MERGE_CHECKPOINTS in the environment: no option" in dmm("merge").stderr
    monkeypatch.delenv("DMM_MERGE_CHECKPOINTS")
    monkeypatch.setenv("DMM_MERGE_METOD", "slerp")
    result = dmm(*command)
    assert result.exit_code == 2 and "DMM_MERGE_METOD in the environment" in result.stderr
    assert "did you mean DMM_MERGE_METHOD?" in result.stderr


@pytest.fixture
def automatic(tmp_path, monkeypatch):
    """Writes code, and a dmm.toml that names a factory of it."""

    def write(module: str, code: str, factory: str) -> None:
        (tmp_path / f"{module}.py").write_text(code)
        (tmp_path / "dmm.toml").write_text(f'[inspect]\narch = "{module}:{factory}"\n')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DMM_TRUST", "")
    monkeypatch.syspath_prepend(tmp_path)
    return write


def test_an_automatic_file_of_defaults_runs_no_code(automatic, tmp_path, monkeypatch):
    automatic("code_of_defaults", "open('mark', 'w').close()\nfrom torch.nn import Identity as net\n", "net")
    result = dmm("inspect", SITES[0])
    assert result.exit_code == 2 and "dmm.toml asks for code to be run: code_of_defaults:net" in result.stderr
    assert "dmm --trust code_of_defaults" in result.stderr and not (tmp_path / "mark").exists()
    for words in (["--trust", "code_of_defaults"], ["--config", "dmm.toml"]):
        monkeypatch.setenv("DMM_TRUST", "")
        assert "does not fit" in dmm(*words, "inspect", SITES[0]).stderr
    assert (tmp_path / "mark").exists()


def test_an_automatic_file_of_defaults_calls_nothing_that_a_trusted_module_only_imports(automatic, tmp_path):
    automatic("imports_of_defaults", "from os import mkdir\n", "mkdir,path='mark'")
    result = dmm("--trust", "imports_of_defaults", "inspect", SITES[0])
    assert result.exit_code == 2 and "is defined in posix, which is not trusted" in result.stderr
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("VERSION", "1"), ("VERSION", "1.0.0"), ("HELP", "1"), ("INSTALL_COMPLETION", "?"), ("SHOW_COMPLETION", "?")],
)
def test_what_only_prints_words_is_asked_for_on_the_line_alone(name, value, monkeypatch):
    monkeypatch.setenv(f"DMM_{name}", value)
    result = dmm("inspect", SITES[0], "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["label"] == "site-a", result.stderr
