"""Rows of text as Markdown and as aligned columns."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from dmm_cli.report.tables import Table, render

NAMES = [
    "__background__", "<img src=x onerror=alert(1)>", "a|b", "[x](http://evil)", "`c`", "*d*", "<unk>", "~~e~~", "~f~",
    "&lt;", "a\\", "a\\|b", "\\*", "_g_", "**", "a__b", "_", "![h](i)", "<!-- -->", "j_", "&amp;amp;", "漢_字_", "_漢_",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_are_no_markup(name):
    text = render([Table(name, [name, "x"], [["1", name], [name, name]])], "md")
    parsed = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    cells = [token.children for token in parsed if token.type == "inline"]
    title, cells = cells[0], cells[1:]
    assert [child.type for child in title if child.content or child.type.startswith("strong")][1:-1] == ["text"]
    assert "".join(child.content for child in title) == name
    assert {child.type for children in cells for child in children} == {"text"}
    shown = ["".join(child.content for child in children) for children in cells]
    assert shown == [name, "x", "1", name, name, name]


def test_names_within_which_there_is_an_underscore_stay_readable():
    assert render([Table("task_arithmetic", ["a_b"], [["bn1.running_mean"]])], "md") == (
        "**task_arithmetic**\n\n| a_b |\n| --- |\n| bn1.running_mean |\n"
    )


def test_columns_of_wide_letters_are_aligned():
    rows = [["site", "1.5"], ["漢字", "10"], ["cafe\u0301", "2"], ["ＡＢ", "-"]]
    text = render([Table("t", ["name", "x"], rows)], "table")
    assert text == "t\nname    x\nsite  1.5\n漢字   10\ncafe\u0301    2\nＡＢ    -\n"
