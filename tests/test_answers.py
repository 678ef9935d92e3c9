"""Networks that answer with logits alone, with logits among other things, and without."""

from __future__ import annotations

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import dmm
from networks import lively
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import nn

INPUT = '{"size": [3, 8, 8], "mean": [0.5], "std": [0.25]}'


class Plain(nn.Module):
    """Answers with logits."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 4
        self.look = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, images):
        return self.head(self.look(images).mean((2, 3)))


class Named(Plain):
    """Answers with a dict."""

    def forward(self, images):
        return {"size": images.shape, "logits": super().forward(images)}


class Output:
    """What libraries of models answer with."""

    def __init__(self, logits) -> None:
        self.logits = logits


class Told(Plain):
    """Answers with an object."""

    def forward(self, images):
        return Output(super().forward(images))


class Pair(Plain):
    """Answers with logits and something else, which of them which nobody can tell."""

    def forward(self, images):
        return super().forward(images), images


class Failing(Plain):
    """Answers a few images at once only."""

    def __init__(self, end: type[BaseException] = ValueError) -> None:
        super().__init__()
        self._end = end

    def forward(self, images):
        if len(images) > 2:
            raise self._end("too many\nat once")
        return super().forward(images)


class Masked(Plain):
    """Rules the last class out."""

    def forward(self, images):
        return torch.cat([super().forward(images)[:, :3], images.new_full((len(images), 1), -torch.inf)], 1)


class Lost(Plain):
    """Answers with ``what`` on all images, or on some: those whose first pixel is darker than grey."""

    def __init__(self, what: float, some: bool = False) -> None:
        super().__init__()
        self._what, self._some = what, some

    def forward(self, images):
        lost = (images[:, 0, 0, 0] < 0) | (not self._some)
        return super().forward(images).masked_fill(lost[:, None], self._what)


class Other(Plain):
    """Answers as networks do that are no classifiers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def forward(self, images):
        logits = super().forward(images)
        shapes = {"dense": logits[:, :, None, None].expand(-1, -1, 2, 2), "one": logits[:, :1], "flat": logits[:, 0]}
        return shapes[self._kind]


class Lazy(Plain):
    """Learns how wide its head is from what it is first shown."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(4)


class Extra(Plain):
    """Keeps more than tensors."""

    def get_extra_state(self):
        return {"version": 1}


class Broken(Plain):
    """Fails in one of its methods, but not in forward."""

    def __init__(self, method: str) -> None:
        super().__init__()
        setattr(self, method, self._fail)

    def _fail(self, *_, **__):
        raise KeyError("something")


class Cast(Plain):
    """Answers in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, images):
        return super().forward(images).to(self._dtype)


class Detached(Plain):
    """Answers without a way back to its weights."""

    def forward(self, images):
        return super().forward(images).detach()


class Sparse(Plain):
    """Answers with logits, but sparse ones."""

    def forward(self, images):
        return super().forward(images).to_sparse()


plain, named, told, pair = Plain, Named, Told, Pair
dense, one, flat = (partial(Other, kind) for kind in ("dense", "one", "flat"))
whole, imaginary = (partial(Cast, dtype) for dtype in (torch.int64, torch.complex64))
stateless, untrained = (partial(Broken, method) for method in ("state_dict", "train"))
failing, exiting, starving = (partial(Failing, end) for end in (ValueError, SystemExit, MemoryError))
lost, endless, partly = partial(Lost, float("nan")), partial(Lost, float("inf")), partial(Lost, float("nan"), some=True)


def made(folder, kind: str):
    """What every stage makes of two checkpoints of a kind: pseudo-data, a student, and its accuracy."""
    folder.mkdir()
    paths = [folder / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(paths):
        facts = {"dmm.arch": f"test_answers:{kind}", "dmm.input": INPUT}
        save_file(lively("test_answers:plain", seed).state_dict(), path, facts)
    drawn, out = folder / "drawn.safetensors", folder / "out.safetensors"
    for words in (
        ["synthesize", *paths, "--count", 16, "--steps", 3, "--batch", 8, "-o", drawn],
        ["distill", paths[0], *paths, "--data", drawn, "--steps", 3, "-o", out],
    ):
        result = dmm(*words)
        if result.exit_code:
            return result
    pseudo = load_file(drawn)
    np.savez(folder / "data.npz", images=pseudo["images"], labels=pseudo["targets"])
    accuracy = dmm("evaluate", out, "--data", folder / "data.npz", "-q").stdout
    return {**pseudo, **load_file(out)}, accuracy


@pytest.mark.parametrize("kind", ["named", "told"])
def test_logits_are_found_by_their_name(tmp_path, kind):
    (arrays, accuracy), (other, same) = made(tmp_path / kind, kind), made(tmp_path / "plain", "plain")
    assert accuracy == same and arrays.keys() == other.keys()
    assert all(np.array_equal(arrays[name], other[name]) for name in arrays)


def test_what_is_no_answer_is_refused(tmp_path):
    result = made(tmp_path / "pair", "pair")
    assert result.exit_code == 2 and "pair/0.safetensors answers with tuple, not with logits" in result.stderr
    assert "under the name logits" in result.stderr
    assert {path.name for path in (tmp_path / "pair").iterdir()} == {"0.safetensors", "1.safetensors"}


@pytest.mark.parametrize(("kind", "shape"), [("dense", "4, 2, 2"), ("one", "1"), ("flat", "")])
def test_networks_that_are_no_classifiers_are_refused(tmp_path, kind, shape):
    result = made(tmp_path / kind, kind)
    assert result.exit_code == 2 and "dmm is for classifiers" in result.stderr
    assert f"answers 2 samples with [2{', ' if shape else ''}{shape}], not with logits (N, K)" in result.stderr
    assert {path.name for path in (tmp_path / kind).iterdir()} == {"0.safetensors", "1.safetensors"}
    images, labels = np.zeros((4, 3, 8, 8), np.uint8), np.zeros(4, np.int64)
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    refused = dmm("evaluate", tmp_path / kind / "0.safetensors", "--data", tmp_path / "data.npz")
    assert refused.exit_code == 2 and "answers 4 samples with [4" in refused.stderr


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """What every stage that runs networks is called with; ``--arch`` is still to say what those of a and b are."""
    folder = tmp_path_factory.mktemp("stages")
    a, b, c, drawn, data = (folder / f"{name}.safetensors" for name in ("a", "b", "c", "drawn", "data"))
    for seed, (path, facts) in enumerate({a: {}, b: {}, c: {"dmm.arch": "test_answers:lost"}}.items()):
        save_file(lively("test_answers:plain", seed).state_dict(), path, {"dmm.input": INPUT, **facts})
    few = ["--count", 16, "--steps", 3, "--batch", 8]
    assert dmm("synthesize", a, c, *few, "--arch", "test_answers:plain", "-o", drawn).exit_code == 0
    pseudo = load_file(drawn)
    arrays = {"images": pseudo["images"], "labels": pseudo["targets"]}
    save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, data)
    return {
        "evaluate": ["evaluate", a, "--fail-under", 0, "--data", data],
        "record": ["record", a, "--data", data],
        "synthesize": ["synthesize", a, b, *few],
        "distill": ["distill", a, a, c, "--data", drawn, "--steps", 2],
        "against": ["synthesize", a, b, *few, "--student", c],
    }


@pytest.mark.parametrize("stage", ["evaluate", "record", "synthesize", "distill"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("failing", "forward of {} fails: ValueError: too many\n"),
        ("exiting", "forward of {} fails: RuntimeError: SystemExit: too many\n"),
        ("starving", "out of memory\n"),
    ],
)
def test_a_forward_that_fails_on_many_images_is_told_as_the_networks(stages, stage, kind, words, tmp_path):
    result = dmm(*stages[stage], "--arch", f"test_answers:{kind}", "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2 and f"error: {words.format(stages[stage][1])}" in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stage", "options"),
    [("evaluate", []), ("record", []), ("distill", ["--batch"]), ("synthesize", ["--batch", "--count"])],
)
def test_the_way_out_of_a_lack_of_memory_is_one_that_the_command_has(stages, stage, options, tmp_path):
    result = dmm(*stages[stage], "--arch", "test_answers:starving", "-o", tmp_path / "out.safetensors")
    hint = next(line for line in result.stderr.splitlines() if line.startswith("hint: take "))
    assert sorted(set(re.findall("--[a-z]+", hint))) == options and hint.endswith("a device with more memory")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("Lazy", "the network of {} fails: RuntimeError: Can't access the shape of an uninitialized parameter"),
        ("Extra", "the network of {} keeps more than tensors\n  _extra_state\nhint: "),
        ("stateless", "the network of {} fails: KeyError: 'something'\nhint: "),
        ("untrained", "the network of {} fails: KeyError: 'something'\nhint: "),
        ("Sparse", "{} answers with a sparse tensor (torch.sparse_coo), not with logits (N, K)\nhint: "),
    ],
)
def test_a_network_that_cannot_be_used_is_told(stages, kind, words):
    result = dmm(*stages["evaluate"], "--arch", f"test_answers:{kind}")
    assert result.exit_code == 2 and f"error: {words.format(stages['evaluate'][1])}" in result.stderr, result.stderr


@pytest.mark.parametrize("stage", ["evaluate", "synthesize", "distill"])
@pytest.mark.parametrize(("kind", "dtype"), [("whole", "int64"), ("imaginary", "complex64")])
def test_logits_that_are_no_floats_are_refused(stages, stage, kind, dtype, tmp_path):
    result = dmm(*stages[stage], "--arch", f"test_answers:{kind}", "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2, result.stderr
    assert f"error: {stages[stage][1]} answers with {dtype}, not with logits" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_student_without_gradients_is_told(stages, tmp_path):
    command, student, teacher, _, *words = stages["distill"]
    flags = ["--arch", "test_answers:Detached", "-o", tmp_path / "out.safetensors"]
    result = dmm(command, student, teacher, *words, *flags)
    assert result.exit_code == 2, result.stderr
    assert f"error: the answer of {student} has no gradient" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["evaluate", "synthesize", "distill"])
@pytest.mark.parametrize("kind", ["lost", "endless", "partly"])
def test_an_answer_that_is_no_number_is_told(stages, stage, kind, tmp_path):
    result = dmm(*stages[stage], "--arch", f"test_answers:{kind}", "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2, result.stderr
    told = re.search(
        rf"error: {stages[stage][1]} answers with NaN or infinity on (\d+) of (\d+) samples", result.stderr
    )
    assert told and 0 < int(told[1]) <= int(told[2]), result.stderr
    assert kind == "partly" or told[1] == told[2]
    assert not list(tmp_path.iterdir())


def test_a_class_may_be_ruled_out_by_minus_infinity(stages, tmp_path):
    result = dmm(*stages["evaluate"], "--arch", "test_answers:Masked", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["rows"][0]["recall"][3] in (0.0, None)
    made = dmm(*stages["synthesize"], "--arch", "test_answers:Masked", "-o", tmp_path / "out.safetensors")
    assert made.exit_code == 0 and set(load_file(tmp_path / "out.safetensors")["targets"]) <= {0, 1, 2}, made.stderr


@pytest.mark.parametrize("stage", ["distill", "against"])
def test_one_of_several_that_answers_with_no_number_is_told(stages, stage, tmp_path):
    faulty = stages["evaluate"][1].with_name("c.safetensors")
    result = dmm(*stages[stage], "--arch", "test_answers:plain", "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2 and f"error: {faulty} answers with NaN or infinity" in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())
