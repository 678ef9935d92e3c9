from __future__ import annotations

import pytest

from dmm_cli.commands._parameters import Parameters, parse_parameters
from dmm_cli.errors import DmmError
from dmm_cli.merging.recipe import Override


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], Parameters()),
        (["scale=0.3"], Parameters(method={"scale": 0.3})),
        (["scale=0", "density=1e-2"], Parameters(method={"scale": 0.0, "density": 0.01})),
        (["scale=0.3", "scale=0.5"], Parameters(method={"scale": 0.5})),
        (["scale=much"], Parameters(method={"scale": "much"})),
        (["svc.alpha=0"], Parameters(calibration={"alpha": 0.0})),
        (["svc.alpha=1", "alpha=2"], Parameters(method={"alpha": 2.0}, calibration={"alpha": 1.0})),
        (["svc=1"], Parameters(method={"svc": 1.0})),
        (["tsv.alpha=1"], Parameters(method={"tsv.alpha": 1.0})),
        (["blocks.0.*:scale=0"], Parameters(overrides=[Override("blocks.0.*", {"scale": 0.0})])),
        (["fc.*:weights=1,0"], Parameters(overrides=[Override("fc.*", weights=(1.0, 0.0))])),
        (["fc.*:weights=3"], Parameters(overrides=[Override("fc.*", weights=(3.0,))])),
        (["svc.*:scale=1"], Parameters(overrides=[Override("svc.*", {"scale": 1.0})])),
        (["a:b:scale=1"], Parameters(overrides=[Override("a:b", {"scale": 1.0})])),
        (
            ["*:scale=1", "scale=2", "fc:weights=1,2"],
            Parameters({"scale": 2.0}, {}, [Override("*", {"scale": 1.0}), Override("fc", weights=(1.0, 2.0))]),
        ),
    ],
)
def test_what_a_parameter_is_for_is_told_by_its_name(pairs, expected):
    assert parse_parameters(pairs, "svc") == expected


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("scale", "--param takes name=value, not scale"),
        ("", "--param takes name=value, not "),
        ("svc.alpha", "--param takes name=value"),
        ("fc.*:scale", "--param takes name=value"),
        ("fc.*:weights", "--param"),
        ("fc.*:weights=", "--param"),
        ("fc.*:weights=1;0", r"--param fc\.\*:weights takes numbers separated by commas, not 1;0"),
        ("fc.*:weights=1,", "takes numbers separated by commas"),
    ],
)
def test_what_is_no_parameter_is_refused(pair, words):
    with pytest.raises(DmmError, match=words):
        parse_parameters([pair], "svc")


def test_a_parameter_of_a_calibration_that_is_not_asked_for_is_refused():
    with pytest.raises(DmmError, match=r"--param svc\.alpha=1 is for --calibrate svc") as error:
        parse_parameters(["svc.alpha=1"], None)
    assert error.value.hint == "add --calibrate svc"
