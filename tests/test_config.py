from __future__ import annotations

import pytest

from dmm_cli.config import load_config
from dmm_cli.errors import DmmError


def words(value: object) -> None:
    if not isinstance(value, str):
        raise ValueError("words are wanted")


OPTIONS = {"merge": {"method": words, "dry_run": bool}, "similarity": {"base": words}}


def write(tmp_path, text):
    path = tmp_path / "dmm.toml"
    path.write_text(text)
    return path


def test_dashes_and_underscores_are_one(tmp_path):
    path = write(tmp_path, '[merge]\nmethod = "slerp"\ndry-run = true\n')
    assert load_config(path, OPTIONS) == {"merge": {"method": "slerp", "dry_run": True}}


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("[mrege]\n", "unknown command: mrege", "did you mean merge?"),
        ("[merge]\nmetod = 1\n", "unknown option of merge: metod", "did you mean method?"),
        ("merge = 1\n", "merge must be a table", "write [merge]"),
        ("[merge]\nmethod = 1\n", "method of merge cannot be 1: words are wanted", None),
        ("[merge]\ndry-run = true\ndry_run = false\n", "dry_run of merge is there twice", "leave one out"),
        ("[merge]\na-b-c = 1\na-b_c = 1\n", "a_b_c of merge is there twice", "leave one out"),
        ("[merge\n", "not valid TOML", None),
        (f"a = {'[' * 9000}\n", "not valid TOML", None),
    ],
    ids=lambda text: text and text[:40],
)
def test_mistakes_are_named(tmp_path, text, what, hint):
    path = write(tmp_path, text)
    with pytest.raises(DmmError) as error:
        load_config(path, OPTIONS)
    assert what in error.value.what and str(path) in error.value.what
    assert error.value.hint == hint


def test_the_working_directory_is_searched_only_without_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(None, OPTIONS) == {}
    write(tmp_path, '[similarity]\nbase = "b"\n')
    assert load_config(None, OPTIONS) == {"similarity": {"base": "b"}}
    with pytest.raises(DmmError, match="cannot read"):
        load_config(tmp_path / "no.toml", OPTIONS)
