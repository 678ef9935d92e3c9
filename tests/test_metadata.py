"""What files tell of themselves in their metadata, and what becomes of files whose metadata are damaged."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import DIGITS, dmm
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from dmm_cli.architectures import build, input_spec
from dmm_cli.errors import DmmError
from dmm_cli.images import InputSpec
from dmm_cli.inputs import resolve_source
from dmm_cli.metadata import class_counts, class_names, stated_input

SITE, TEST = DIGITS / "site-a.safetensors", DIGITS / "test.safetensors"


@pytest.fixture
def told(write):
    """A file with one entry of metadata, if any."""

    def make(key: str = "", text: str = ""):
        return resolve_source(str(write("a", {key: text} if key else {}, w=np.zeros(1, np.float32))))

    return make


def test_the_fixture_says_what_it_is():
    source = resolve_source(str(SITE))
    assert class_names(source) == tuple("0123456789") and class_counts(source) is None
    assert stated_input(source) == {"size": [1, 16, 16], "mean": [0.3], "std": [0.38]}


@pytest.mark.parametrize(
    "text",
    ["", "cat, dog", "[]", '["cat", "cat"]', "null", "3", '"cat"', '{"cat": 0, "dog": 1}', "[" * 100_000],
    ids=["empty", "no JSON", "no names", "twice", "null", "number", "string", "object", "deep"],
)
def test_a_damaged_list_of_classes_is_refused(told, text):
    with pytest.raises(DmmError, match=r"a\.safetensors: dmm\.classes is not a JSON list of different names"):
        class_names(told("dmm.classes", text))


def test_classes_are_named_in_the_order_of_the_rows(told):
    assert class_names(told("dmm.classes", '["b", "a", 7]')) == ("b", "a", "7")
    assert class_names(told()) is class_counts(told()) is None and stated_input(told()) == {}


@pytest.mark.parametrize(
    "text",
    ["[", "5", "[]", '["9"]', "[1, -1]", "[1, true]", "[NaN]", '{"cat": 1}', "[Infinity]", f"[1{'0' * 400}]"],
    ids=lambda text: text[:12],
)
def test_damaged_counts_are_refused(told, text):
    with pytest.raises(DmmError, match=r"a\.safetensors: dmm\.class_counts is not a JSON list of numbers"):
        class_counts(told("dmm.class_counts", text))


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "null",
        "[1]",
        '{"size": "3,8,8"}',
        '{"size": [3, 8.5, 8]}',
        '{"size": [3, 0, 8]}',
        '{"size": []}',
        '{"size": [1, 1000000, 1000001]}',
        f'{{"size": [1, 1{"0" * 30}, 16]}}',
        '{"mean": 0.5}',
        '{"mean": ["a"]}',
        '{"std": [0]}',
        '{"std": [Infinity]}',
        '{"image": {"std": [-1]}}',
        '{"image": {"average": [0.5]}}',
        '{"means": [0.5]}',
    ],
)
def test_a_damaged_input_is_refused(told, text):
    with pytest.raises(DmmError, match=r"a\.safetensors: dmm\.input is not a JSON object like"):
        stated_input(told("dmm.input", text))


def test_of_an_input_that_is_told_in_part_the_rest_is_the_architectures(told):
    model = build("resnet18,num_classes=2")
    own = model.pretrained_cfg
    spec = input_spec(told("dmm.input", '{"size": [3, 32, 32]}'), model)
    assert spec == InputSpec((3, 32, 32), tuple(own["mean"]), tuple(own["std"]))
    spec = input_spec(told("dmm.input", '{"mean": [0.5], "std": [0.25]}'), model)
    assert spec == InputSpec(tuple(own["input_size"]), (0.5,) * 3, (0.25,) * 3)


def test_a_size_of_one_channel_leaves_the_architectures_normalisation_to_it(told):
    model = build("resnet18,num_classes=2,in_chans=1")
    mean, std = (float(np.mean(model.pretrained_cfg[key])) for key in ("mean", "std"))
    spec = input_spec(told("dmm.input", '{"size": [1, 16, 16]}'), model)
    assert (spec.size, spec.mean, spec.std) == ((1, 16, 16), pytest.approx((mean,)), pytest.approx((std,)))
    spec = input_spec(told("dmm.input", '{"size": [1, 16, 16], "mean": [0.3]}'), model)
    assert (spec.mean, spec.std) == ((0.3,), pytest.approx((std,)))
    with pytest.raises(DmmError, match=r"a\.safetensors: 2 means and 1 deviations for 1 channels"):
        input_spec(told("dmm.input", '{"size": [1, 16, 16], "mean": [0.3, 0.4]}'), model)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A directory as timm's hub has it, of a network with four classes, and what its config tells besides."""
    monkeypatch.chdir(tmp_path)
    shape = {"in_chans": 3, "layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}

    def make(**told):
        folder = tmp_path / "hub"
        folder.mkdir()
        config = {"architecture": "resnet18", "num_classes": 4, "model_args": shape, **told}
        (folder / "config.json").write_text(json.dumps(config))
        model = build("resnet18,num_classes=4,in_chans=3,layers=(1,1,1,1),channels=(8,8,8,8)")
        save_file({name: value.numpy() for name, value in model.state_dict().items()}, folder / "model.safetensors")
        return "hub"

    return make


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (
            {"pretrained_cfg": {"input_size": "3,32,32"}},
            'pretrained_cfg.input_size of hub/config.json is not a JSON list of positive integers like [3, 32, 32]: "3',
        ),
        (
            {"pretrained_cfg": {"input_size": [3, 10**30, 8]}},
            "pretrained_cfg.input_size of hub/config.json is not a JSON",
        ),
        ({"pretrained_cfg": {"std": [0]}}, "pretrained_cfg.std of hub/config.json is not a JSON list of numbers above"),
        ({"pretrained_cfg": {"mean": [float("nan")]}}, "pretrained_cfg.mean of hub/config.json is not a JSON list of"),
        ({"pretrained_cfg": {"mean": {"mean": [0.5]}}}, "pretrained_cfg.mean of hub/config.json is not a JSON list of"),
        ({"std": [-1]}, "std of hub/config.json is not a JSON list of numbers above zero"),
        ({"architecture": "a:net"}, "architecture and model_args of hub/config.json asks for code to be run: a:net"),
        (
            {"model_args": {"pretrained": True}},
            "it is architecture and model_args of hub/config.json\nhint: leave it out",
        ),
        ({"architecture": "hf-hub:a", "model_args": {}}, "it is architecture of hub/config.json\nhint: use the plain"),
        (
            {"label_names": ["a", "b"]},
            "hub has 4 classes, but label_names of hub/config.json names 2\nhint: let it name",
        ),
        ({"labels": ["a", "b"]}, "hub has 4 classes, but labels of hub/config.json names 2"),
        (
            {"pretrained_cfg": {"label_names": ["a", "b"]}},
            "hub has 4 classes, but pretrained_cfg.label_names of hub/config.json names 2",
        ),
    ],
)
def test_what_a_config_tells_is_told_as_its_own(hub, told, words):
    folder = hub(**told)
    np.savez("data.npz", images=np.zeros((4, 3, 32, 32), np.uint8), labels=np.arange(4))
    for line in (["synthesize", folder, "-o", "out.safetensors"], ["evaluate", folder, "--data", "data.npz"]):
        result = dmm(*line)
        assert result.exit_code == 2 and words in result.stderr and "\nhint: " in result.stderr, result.stderr
        assert "metadata" not in result.stderr and "dmm." not in result.stderr


@pytest.mark.parametrize("size", [[3, 32], [32], [1, 3, 32, 32]])
def test_a_size_that_no_image_has_is_told_as_the_fault(hub, size):
    folder = hub(pretrained_cfg={"input_size": size, "mean": [0.5] * 3, "std": [0.25] * 3})
    np.savez("data.npz", images=np.zeros((4, 3, 32, 32), np.uint8), labels=np.arange(4))
    command = ["evaluate", folder, "--data", "data.npz"]
    refused = dmm(*command)
    assert refused.exit_code == 2 and f"is not channels, height and width: {size}" in refused.stderr, refused.stderr
    assert "it is pretrained_cfg.input_size of hub/config.json" in refused.stderr
    assert "hint: say it with --input-size, such as 3,32,32" in refused.stderr
    assert dmm(*command, "--input-size", "3,32,32").exit_code == 0


def test_a_config_cannot_tell_of_several_inputs(hub):
    source = resolve_source(hub(pretrained_cfg={"mean": [0.5]}))
    with pytest.raises(DmmError, match=r"pretrained_cfg\.mean of hub/config\.json tells of one input without a name"):
        input_spec(source, with_examples("image", "mask"))


def with_examples(*names: str) -> nn.Module:
    model = nn.Module()
    model.example_inputs = {name: torch.zeros(2, 3, 8, 8) for name in names}
    return model


def test_of_several_inputs_each_is_told_by_its_name(told):
    image = '{"mean": [0.5], "std": [0.25]}'
    model = with_examples("image", "mask")
    spec = input_spec(told("dmm.input", f'{{"mask": {image}}}'), model)
    assert [part.mean for part in spec.specs] == [(0.0,) * 3, (0.5,) * 3]
    for text, words in ((f'{{"imgae": {image}}}', "tells of imgae"), (image, "tells of one input without a name")):
        with pytest.raises(DmmError, match=rf"a\.safetensors: dmm\.input {words}; the model takes image, mask"):
            input_spec(told("dmm.input", text), model)


def test_images_alone_need_no_name_also_where_a_model_has_examples(told):
    for text in ('{"mean": [0.5], "std": [0.25]}', '{"images": {"mean": [0.5], "std": [0.25]}}'):
        spec = input_spec(told("dmm.input", text), with_examples("images"))
        assert spec == InputSpec((3, 8, 8), (0.5,) * 3, (0.25,) * 3)
    assert input_spec(told(), with_examples("images")).mean == (0.0,) * 3


@pytest.mark.parametrize(
    ("key", "lines"),
    [
        ("dmm.classes", [["evaluate", "--data", TEST], ["merge", "-o", "out"]]),
        ("dmm.class_counts", [["synthesize", "-o", "out"], ["merge", "-o", "out"]]),
        ("dmm.input", [["evaluate", "--data", TEST], ["record", "--data", TEST, "-o", "out.safetensors"]]),
    ],
)
def test_commands_name_the_damaged_file_and_inspect_shows_it(tmp_path, monkeypatch, key, lines):
    monkeypatch.chdir(tmp_path)
    with safe_open(SITE, "np") as file:
        save_file(load_file(SITE), "bad.safetensors", {**file.metadata(), key: "[7"})
    for command, *words in lines:
        others = [SITE] if command == "merge" else []
        result = dmm(command, "bad.safetensors", *others, *words)
        assert result.exit_code == 2 and result.stderr.startswith(f"error: bad.safetensors: {key} is not "), (
            result.stderr
        )
        assert not list(tmp_path.glob("out*"))
    shown = dmm("inspect", "bad.safetensors", "--json")
    assert shown.exit_code == 0 and json.loads(shown.stdout)["provenance"][key] == "[7"
