from __future__ import annotations

import math

import pytest

from dmm_cli.errors import DmmError
from dmm_cli.registry import Registry, did_you_mean

TABLE = Registry("function", {"sine": ("math:sin", "a wave"), "root": ("math:sqrt", "a root", "positive")})


def test_pieces_load_when_asked_for():
    assert TABLE.load("sine") is math.sin
    assert TABLE.names() == list(TABLE) == ["sine", "root"]
    assert TABLE.summary("root") == "a root"
    assert TABLE.traits("root") == ("positive",)
    assert TABLE.traits("sine") == ()


def test_a_mistyped_name_gets_a_suggestion():
    with pytest.raises(DmmError) as error:
        TABLE.load("sien")
    assert error.value.what == "unknown function: sien"
    assert error.value.evidence == ("known: sine, root",)
    assert error.value.hint == "did you mean sine?"
    assert did_you_mean("zzz", TABLE) is None
