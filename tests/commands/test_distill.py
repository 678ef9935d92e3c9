"""dmm distill, as users call it."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch
from conftest import DIGITS, dmm, two_generators
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmm_cli.architectures import build
from dmm_cli.checkpoint import save_arrays
from dmm_cli.inputs import resolve_source
from dmm_cli.loading import load_model

INPUT = json.dumps({"size": [1, 16, 16], "mean": [0.3], "std": [0.38]})
NARROW = "resnet18,in_chans=1,layers=(1,1,1,1),channels=(8,16,32,32)"  # the sites have (16,32,64,64)
SITES = [DIGITS / "site-a.safetensors", DIGITS / "site-d.safetensors"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Pseudo-data of two sites."""
    path = tmp_path_factory.mktemp("drawn") / "pseudo.safetensors"
    with two_generators():
        result = dmm("synthesize", *SITES, "--count", 128, "--steps", 60, "--batch", 32, "-o", path)
    assert result.exit_code == 0, result.stderr
    return path


def load_metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def fresh(path, arch):
    """A checkpoint of random weights."""
    torch.manual_seed(0)
    arrays = {name: value.numpy() for name, value in build(arch).state_dict().items()}
    save_arrays(path, arrays, {"dmm.arch": arch, "dmm.input": INPUT})
    return path


def test_a_student_of_another_architecture_learns_from_all(drawn, tmp_path):
    student = fresh(tmp_path / "s.safetensors", f"{NARROW},num_classes=10")
    out = tmp_path / "out.safetensors"
    result = dmm("distill", student, *SITES, "--data", drawn, "--steps", 250, "--batch", 64, "-o", out)
    assert result.exit_code == 0, result.stderr
    before, after = (
        float(dmm("evaluate", path, "--data", DIGITS / "test.safetensors", "-q").stdout) for path in (student, out)
    )
    assert before < 20 and after > 45


def test_of_several_students_the_one_that_knows_most_starts(drawn, tmp_path):
    folder = tmp_path / "students"
    folder.mkdir()
    for number, site in enumerate(reversed(SITES)):  # five digits against two: the second is to be chosen
        (folder / f"{number}.safetensors").write_bytes(site.read_bytes())
    rest = [*SITES, "--data", drawn, "--steps", 2]
    chosen = dmm("distill", folder / "*.safetensors", *rest, "-o", tmp_path / "several.safetensors", "--json")
    assert chosen.exit_code == 0, chosen.stderr
    record = json.loads(chosen.stdout)
    assert record["student"]["label"] == "1" and [start["label"] for start in record["starts"]] == ["0", "1"]
    data = load_file(drawn)
    known = [float(classes) for classes in balanced_agreement(data)]
    assert [start["retained"] for start in record["starts"]] == pytest.approx(known[::-1])
    alone = dmm("distill", folder / "1.safetensors", *rest, "-o", tmp_path / "alone.safetensors")
    assert alone.exit_code == 0, alone.stderr
    several, one = (load_file(tmp_path / f"{name}.safetensors") for name in ("several", "alone"))
    assert all(several[name].equal(one[name]) for name in one)


def balanced_agreement(data):
    """Mean over the classes of how many of their images each site names, in per cent."""
    images = (data["images"].float() / 255 - 0.3) / 0.38
    targets = data["targets"].long()
    for site in SITES:
        model = build(load_metadata(site)["dmm.arch"])
        model.load_state_dict(load_file(site))
        with torch.no_grad():
            hits = model.eval()(images).argmax(1) == targets
        yield 100 * torch.stack([hits[targets == label].double().mean() for label in targets.unique()]).mean()


def test_students_and_teachers_that_name_other_classes_are_refused(drawn, tmp_path):
    student = tmp_path / "s.safetensors"
    names = [*"9876543210"]
    metadata = {**load_metadata(SITES[0]), "dmm.classes": json.dumps(names)}
    save_file(load_file(SITES[0]), student, metadata)
    result = dmm("distill", student, *SITES, "--data", drawn, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2 and not (tmp_path / "out.safetensors").exists()
    assert "classes in another order" in result.stderr and "9, 8, 7" in result.stderr and str(SITES[1]) in result.stderr
    # the student is to change: pseudo-data know a teacher by its file
    words = shlex.split(
        re.search(r"hint: .*: dmm (.*)", result.stderr)[1].replace("in-order", str(tmp_path / "in-order"))
    )
    assert dmm(*words).exit_code == 0
    command = ["distill", tmp_path / "in-order.safetensors", *SITES, "--data", drawn, "--steps", 1]
    assert dmm(*command, "-o", tmp_path / "out.safetensors").exit_code == 0


def test_teachers_of_other_classes_are_refused(drawn, tmp_path):
    student = fresh(tmp_path / "s.safetensors", f"{NARROW},num_classes=7")
    result = dmm("distill", student, *SITES, "--data", drawn, "-o", tmp_path / "out.safetensors")
    assert (
        result.exit_code == 2
        and "has 7 classes, the pseudo-data 10" in result.stderr
        and not (tmp_path / "out.safetensors").exists()
    )


@pytest.mark.parametrize("told", ['{"mean": [0.9], "std": [0.1]}', None])
def test_a_student_tells_the_input_it_was_taught_in(drawn, tmp_path, told):
    student, out = tmp_path / "s.safetensors", tmp_path / "out.safetensors"
    metadata = {name: text for name, text in load_metadata(SITES[0]).items() if name != "dmm.input"}
    save_file(load_file(SITES[0]), student, metadata | ({"dmm.input": told} if told else {}))
    assert dmm("distill", student, *SITES, "--data", drawn, "--steps", 2, "-o", out).exit_code == 0
    assert json.loads(load_metadata(out)["dmm.input"]) == json.loads(INPUT)


def test_a_student_that_diverged_is_not_written(drawn, tmp_path):
    out = tmp_path / "out.safetensors"
    result = dmm("distill", *SITES[:1], *SITES, "--data", drawn, "--steps", 3, "--learning-rate", 1e38, "-o", out)
    assert result.exit_code == 2 and "the student diverged" in result.stderr and not out.exists()


@pytest.mark.parametrize(("teachers", "words"), [([0, 1, 0], "among the teachers twice"), ([0, 1], "hold no image of")])
def test_every_teacher_has_lessons_of_its_own(drawn, tmp_path, teachers, words):
    data, out = tmp_path / "data.safetensors", tmp_path / "out.safetensors"
    arrays = load_file(drawn)
    arrays["teacher_id"] *= words.endswith("twice")
    save_file(arrays, data, load_metadata(drawn))
    result = dmm("distill", SITES[0], *(SITES[number] for number in teachers), "--data", data, "-o", out)
    assert result.exit_code == 2 and words in result.stderr and not out.exists()


@pytest.mark.parametrize(("name", "value"), [("targets", 10), ("targets", -1), ("targets", 0.5), ("teacher_id", 2)])
def test_pseudo_data_of_no_class_or_teacher_are_refused(drawn, tmp_path, name, value):
    data, arrays = tmp_path / "data.safetensors", load_file(drawn)
    arrays[name] = torch.full((len(arrays[name]),), value)
    save_file(arrays, data, load_metadata(drawn))
    result = dmm("distill", SITES[0], *SITES, "--data", data, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2 and f"{name} of pseudo-data file {data} are not numbers" in result.stderr


def test_without_a_step_weights_stay_to_the_last_bit(drawn, tmp_path):
    """Also those of a file that stores more digits than networks are run with."""
    student, out = tmp_path / "wide.safetensors", tmp_path / "out.safetensors"
    tensors = {
        name: t.double() * (1 + 1e-12) if t.is_floating_point() else t for name, t in load_file(SITES[0]).items()
    }
    save_file(tensors, student, load_metadata(SITES[0]))
    result = dmm("distill", student, *SITES, "--data", drawn, "--steps", 0, "-o", out)
    assert result.exit_code == 0, result.stderr
    written = load_file(out)
    assert {name for name in tensors if not written[name].equal(tensors[name])} == {
        name for name in tensors if name.endswith(("running_mean", "running_var"))
    }
    assert {str(tensor.dtype) for tensor in written.values()} == {"torch.float64", "torch.int64"}


def test_a_student_in_a_dtype_that_is_not_written_is_refused_before_it_is_taught(drawn, tmp_path):
    student = tmp_path / "small.safetensors"
    tensors = load_file(SITES[0])
    save_file({**tensors, "fc.weight": tensors["fc.weight"].to(torch.float8_e4m3fn)}, student, load_metadata(SITES[0]))
    result = dmm("distill", student, *SITES, "--data", drawn, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2 and "a student is not written in F8_E4M3" in result.stderr
    assert "fc.weight" in result.stderr and not (tmp_path / "out.safetensors").exists()


def test_what_a_student_retains_is_what_its_file_does(drawn, tmp_path):
    student, out = tmp_path / "s.safetensors", tmp_path / "out.safetensors"
    tensors = load_file(SITES[0])
    tensors["fc.bias"] += 1000  # all classes alike; bfloat16 rounds what a class has of its own away
    halves = {name: v.bfloat16() if v.is_floating_point() else v for name, v in tensors.items()}
    save_file(halves, student, load_metadata(SITES[0]))
    result = dmm("distill", student, *SITES, "--data", drawn, "--steps", 20, "-o", out, "--json")
    told = [site["after"] for site in json.loads(result.stdout)["retention"]]
    assert load_file(out)["conv1.weight"].dtype == torch.bfloat16
    model, data = load_model(resolve_source(str(out)))[0], load_file(drawn)
    with torch.no_grad():
        images = (data["images"] / 255 - 0.3) / 0.38
        hits = (model(images).argmax(1) == data["targets"]).double()
    own = [hits[data["teacher_id"] == number] for number in range(len(SITES))]
    found = [100 * float(mine.mean()) for mine in own]
    assert told == pytest.approx(found, abs=0.01)


@pytest.mark.parametrize(("told", "expected"), [((True, True), [9, 9, 9, 9, 9, 0, 0, 5, 5, 0]), ((True, False), None)])
def test_a_student_has_seen_what_its_teachers_saw(drawn, tmp_path, told, expected):
    """What it was trained on before says nothing of it any more: the next synthesis would draw no other classes."""
    counts = [[9] * 5 + [0] * 5, [0] * 7 + [5, 5, 0]]
    teachers = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for site, path, own, tells in zip(SITES, teachers, counts, told, strict=True):
        extra = {"dmm.class_counts": json.dumps(own)} if tells else {}
        save_file(load_file(site), path, load_metadata(site) | extra)
    result = dmm("synthesize", *teachers, "--count", 8, "--steps", 2, "--batch", 8, "-o", tmp_path / "p.safetensors")
    assert result.exit_code == 0, result.stderr
    for steps, kept in ((2, expected), (0, counts[0])):
        out, rest = tmp_path / f"out{steps}.safetensors", ["--data", tmp_path / "p.safetensors", "--steps", steps]
        assert dmm("distill", teachers[0], *teachers, *rest, "-o", out).exit_code == 0
        assert json.loads(load_metadata(out).get("dmm.class_counts", "null")) == kept
