from __future__ import annotations

from dmm_cli.errors import CheckFailed, DmmError, capped, printable


def test_ten_items_and_a_count_are_shown():
    assert capped([str(i) for i in range(10)]) == [str(i) for i in range(10)]
    shown = capped([str(i) for i in range(13)])
    assert shown[:10] == [str(i) for i in range(10)]
    assert shown[10:] == ["... and 3 more"]


def test_control_bidi_and_escape_characters_cannot_reach_the_terminal():
    assert printable("a\x1b[31mred\n\u202ekcab\u200b") == "a\\x1b[31mred\\x0a\\u202ekcab\\u200b"
    assert printable("Grüße, 世界") == "Grüße, 世界"


def test_long_text_is_cut():
    assert printable("x" * 200) == "x" * 200
    assert printable("x" * 201) == "x" * 200 + "..."


def test_exit_codes():
    assert DmmError("a").exit_code == 2
    assert CheckFailed("a").exit_code == 1
