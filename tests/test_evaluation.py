from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS, dmm
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from sklearn.metrics import accuracy_score, recall_score

from dmm_cli import evaluation
from dmm_cli.architectures import input_spec
from dmm_cli.errors import DmmError
from dmm_cli.images import InputSpec
from dmm_cli.inputs import resolve_source
from dmm_cli.loading import load_model
from dmm_cli.metadata import class_names
from dmm_cli.report import console
from dmm_cli.spaces import JointSpec, TokenSpec

SPEC = InputSpec((1, 2, 2), (0.0,), (1.0,))


def test_scores_match_scikit_learn():
    draw = torch.Generator().manual_seed(0)
    probabilities = torch.rand(200, 4, generator=draw).softmax(1)
    labels = torch.randint(0, 4, (200,), generator=draw)
    row = evaluation.score("x", probabilities, labels)
    predicted = probabilities.argmax(1)
    assert row.accuracy == pytest.approx(100 * accuracy_score(labels, predicted))
    assert row.recall == pytest.approx(100 * recall_score(labels, predicted, average=None))


def test_accuracies_are_rounded_once():
    for hits in range(101):
        row = evaluation.score("x", torch.eye(2)[[0] * hits + [1] * (100 - hits)], torch.zeros(100, dtype=torch.int64))
        assert row.accuracy == row.recall[0] == hits


def test_an_accuracy_at_the_bound_of_a_check_passes_it(tmp_path):
    site, every = DIGITS / "site-a.safetensors", load_file(DIGITS / "test.safetensors")
    source = resolve_source(str(site))
    model, _ = load_model(source)
    data = evaluation.load_labelled(DIGITS / "test.safetensors")
    hits = evaluation.predict(model, data, input_spec(source, model), torch.device("cpu")).argmax(1) == data.labels
    rows = torch.cat([hits.nonzero()[:58], (~hits).nonzero()[:42]]).flatten().numpy()
    save_file({name: array[rows] for name, array in every.items()}, tmp_path / "test.safetensors")
    command = ["evaluate", site, "--data", tmp_path / "test.safetensors", "-q", "--fail-under"]
    assert [dmm(*command, bound).exit_code for bound in (58, 58.01)] == [0, 1]


def test_a_class_without_samples_has_no_recall():
    row = evaluation.score("x", torch.eye(3)[[0, 0]], torch.tensor([0, 1]))
    assert row.recall == (100.0, 0.0, None) and row.accuracy == 50.0
    with pytest.raises(DmmError, match="it has 3"):
        evaluation.score("x", torch.eye(3), torch.tensor([0, 1, 5]))


def test_an_ensemble_is_the_mean_of_probabilities_or_of_logits():
    sure, mild = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0]])
    found = evaluation.ensembles([sure, mild, mild])
    assert torch.allclose(found["ensemble of logits"], torch.tensor([[3.0, 4 / 3, 0.0]]))
    shares = np.exp(2) / (np.exp(2) + 2)  # what a mild model gives its class; two of them outvote a sure one
    assert found["ensemble"][0, 1] == pytest.approx((2 * shares + 1 / (np.exp(9) + 2)) / 3)
    assert found["ensemble"].argmax(1) == 1 and found["ensemble of logits"].argmax(1) == 0
    with pytest.raises(DmmError, match="same classes"):
        evaluation.ensembles([sure, torch.ones(1, 4)])


def test_models_that_rule_out_classes_of_one_another_have_an_ensemble_of_logits():
    first, second = torch.tensor([[1.0, 2.0, -np.inf]]), torch.tensor([[-np.inf, 5.0, 6.0]])
    together = evaluation.ensembles([first, second])["ensemble of logits"]
    assert together.isfinite().all() and together.argmax(1) == 1


def test_npz_safetensors_and_folders_hold_the_same(tmp_path, write):
    images = np.arange(24, dtype=np.uint8).reshape(6, 1, 2, 2) * 10
    labels = np.array([0, 0, 1, 1, 2, 2])
    np.savez(tmp_path / "a.npz", images=images, labels=labels.astype(np.int32), classes=["x", "y", "z"])
    st = write("a", {"dmm.classes": json.dumps(["x", "y", "z"])}, images=images, labels=labels)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "folder" / "xyz"[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(folder / f"{number}.png")
    for path in (tmp_path / "a.npz", st, tmp_path / "folder"):
        data = evaluation.load_labelled(path)
        assert data.classes == ("x", "y", "z") and data.labels.tolist() == labels.tolist()
        assert torch.allclose(data.batch(0, 6, SPEC), torch.from_numpy(images).float() / 255)


def labelled(*classes: str) -> evaluation.LabelledData:
    return evaluation.LabelledData(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 1]), classes)


@pytest.mark.parametrize(
    ("data", "model", "expected"),
    [
        (("owl", "cat"), ("cat", "dog", "owl"), [2, 0, 0]),  # some of the model's, in another order
        (("n01", "n02", "n03"), ("cat", "dog", "owl"), [0, 1, 1]),  # other names, as many
        (("n01", "n02", "n03"), (), [0, 1, 1]),
        ((), ("cat", "dog", "owl"), [0, 1, 1]),
        (("owl", "cat", "eel"), ("cat", "dog", "owl"), [2, 0, 0]),  # nothing shows an eel
    ],
)
def test_classes_are_found_by_their_names(data, model, expected):
    assert evaluation.labels_for(labelled(*data), model, 3, "x").tolist() == expected


@pytest.mark.parametrize(
    ("data", "model", "words"),
    [
        (("owl", "eel"), ("cat", "dog", "owl"), "classes that x cannot name"),
        (("n01", "n02"), ("cat", "dog", "owl"), "the data have 2 classes, x has 3, and no name agrees"),
        (("n01", "n02"), (), "the data have 2 classes, x has 3"),
        (("owl",), ("cat", "dog", "owl"), "it has 1"),  # of its two labels one has no name
        (("owl", "cat"), ("cat", "owl"), "x has 3 classes, but dmm.classes in its metadata names 2"),
    ],
)
def test_classes_that_the_model_does_not_have_are_refused(data, model, words):
    with pytest.raises(DmmError, match=words):
        evaluation.labels_for(labelled(*data), model, 3, "x")


@pytest.mark.parametrize(("here", "there"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_classes_are_found_however_their_accents_are_spelt(tmp_path, write, here, there):
    ours, theirs = ([unicodedata.normalize(form, "café"), "owl"] for form in (here, there))
    arrays = {"images": np.zeros((2, 1, 8, 8), np.uint8), "labels": np.array([1, 0])}
    np.savez(tmp_path / "a.npz", **arrays, classes=ours)
    path = write("a", {"dmm.classes": json.dumps(ours)}, **arrays)
    folder = folder_of_images(tmp_path / "folder", f"{ours[0]}/x.png", "owl/x.png")
    names = class_names(resolve_source(str(write("m", {"dmm.classes": json.dumps(theirs[::-1])}, **arrays))))
    labels = [
        evaluation.labels_for(evaluation.load_labelled(data), names, 2, "m").tolist()
        for data in (tmp_path / "a.npz", path, folder)
    ]
    assert labels == [[0, 1], [0, 1], [1, 0]]


def test_folders_that_are_one_class_spelt_in_two_ways_are_refused(tmp_path):
    folder = folder_of_images(tmp_path, *(f"{unicodedata.normalize(form, 'café')}/x.png" for form in ("NFC", "NFD")))
    with pytest.raises(DmmError, match="must be different names") as caught:
        evaluation.load_labelled(folder)
    assert "how accents are spelt" in caught.value.hint


def test_folders_of_some_classes_are_judged_as_the_same_images_in_a_file(tmp_path):
    file = load_file(DIGITS / "test.safetensors")
    shown = np.isin(file["labels"], [7, 9])
    for number, (image, label) in enumerate(zip(file["images"][shown], file["labels"][shown], strict=True)):
        (tmp_path / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image[0]).save(tmp_path / str(label) / f"{number}.png")
    result = dmm("evaluate", DIGITS / "site-d.safetensors", "--data", tmp_path, "--json")
    whole = dmm("evaluate", DIGITS / "site-d.safetensors", "--data", DIGITS / "test.safetensors", "--json")
    some, every = (json.loads(found.stdout)["rows"][0]["recall"] for found in (result, whole))
    assert [some[7], some[9]] == [every[7], every[9]] and some[7] > 90
    assert all(recall is None for digit, recall in enumerate(some) if digit not in (7, 9))


@pytest.fixture
def looked_at(tmp_path):
    """What evaluate and record, in this order, make of a folder."""
    site, stats = DIGITS / "site-d.safetensors", tmp_path / "stats.safetensors"
    return lambda folder: [
        dmm("evaluate", site, "--data", folder, "--json"),
        dmm("record", site, "--data", folder, "-o", stats, "--force", "--json"),
    ]


def folder_of_images(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / name, "png")
    return root


def test_images_beside_class_folders_are_refused(tmp_path, looked_at):
    folder = folder_of_images(tmp_path / "data", "7/a.png", "9/b.png", "preview.png")
    for result in looked_at(folder):
        assert result.exit_code == 2 and f"{folder} holds class folders, and images" in result.stderr
        assert str(folder / "preview.png") in result.stderr and "hint: move" in result.stderr
    (folder / "preview.png").rename(folder / "9" / "preview.png")
    evaluated, recorded = looked_at(folder)
    assert json.loads(evaluated.stdout)["samples"] == json.loads(recorded.stdout)["networks"][0]["images"] == 3


def test_hidden_files_are_no_images_and_hidden_folders_no_classes(tmp_path, looked_at):
    folder = folder_of_images(tmp_path / "data", "7/a.png", "9/b.png", ".cache/c.png", "9/.cache/d.png")
    for name in ("._preview.png", ".DS_Store", "Thumbs.db", "7/._a.png"):
        (folder / name).write_bytes(b"no image")
    evaluated, recorded = looked_at(folder)
    assert json.loads(evaluated.stdout)["samples"] == 2
    assert json.loads(recorded.stdout)["networks"][0]["class_counts"] == [0] * 7 + [1, 0, 1]


def test_loose_images_are_recorded_and_have_no_classes_to_evaluate(tmp_path, looked_at):
    folder = folder_of_images(tmp_path / "data", "a.png", "b.png")
    (folder / "notes").mkdir()
    evaluated, recorded = looked_at(folder)
    assert evaluated.exit_code == 2 and f"the images in {folder} have no classes" in evaluated.stderr
    assert "one directory per class" in evaluated.stderr
    assert json.loads(recorded.stdout)["networks"][0]["images"] == 2


def test_models_of_different_classes_are_not_put_in_one_table(tmp_path):
    other = tmp_path / "other.safetensors"
    path = DIGITS / "site-d.safetensors"
    with safe_open(path, "np") as file:
        metadata = {**file.metadata(), "dmm.classes": json.dumps(list("1234567890"))}
    save_file(load_file(path), other, metadata)
    silent = tmp_path / "silent.safetensors"
    save_file(load_file(path), silent, {name: text for name, text in metadata.items() if name != "dmm.classes"})
    test = DIGITS / "test.safetensors"
    named = {**load_file(test)}
    data = tmp_path / "named.npz"
    np.savez(data, **named, classes=np.array(list("0123456789"), "S1"))
    unnamed = tmp_path / "unnamed.npz"
    np.savez(unnamed, **named)
    for models, images in (([path, other], unnamed), ([silent, other], data), ([other, silent], data)):
        result = dmm("evaluate", *models, "--data", images)
        assert result.exit_code == 2 and "do not have the same classes" in result.stderr
    assert dmm("evaluate", path, silent, "--data", data).exit_code == 0, "in one order all the same"


def test_classes_in_another_order_are_found_by_name(tmp_path):
    """The head's rows and its names permuted together: the same network."""
    path, data = DIGITS / "site-b.safetensors", DIGITS / "test.safetensors"
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    names, order = json.loads(metadata["dmm.classes"]), np.random.default_rng(0).permutation(10)
    tensors = load_file(path)
    head = {name: tensors[name][order] for name in ("fc.weight", "fc.bias")}
    other = tmp_path / "other.safetensors"
    save_file({**tensors, **head}, other, {**metadata, "dmm.classes": json.dumps([names[n] for n in order])})
    command = ["evaluate", DIGITS / "site-a.safetensors"]
    expected, found = (
        json.loads(dmm(*command, last, "--data", data, "--ensemble", "--json").stdout) for last in (path, other)
    )
    assert found["classes"] == expected["classes"] == names
    for mine, theirs in zip(found["rows"], expected["rows"], strict=True):
        assert mine["accuracy"] == theirs["accuracy"] and mine["recall"] == theirs["recall"]


def test_images_are_resized_and_normalised():
    images = torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)
    got = evaluation.prepare(images, InputSpec((1, 8, 8), (0.5,), (0.25,)))
    assert got.shape == (1, 1, 8, 8) and torch.allclose(got, torch.full_like(got, 2.0))
    with pytest.raises(DmmError, match="the data have 1 channels, the model takes 3"):
        evaluation.prepare(images, InputSpec((3, 4, 4), (0.0,) * 3, (1.0,) * 3))
    assert evaluation.prepare(torch.ones(2, 4, dtype=torch.uint8), TokenSpec((4,), 3), "words").dtype == torch.int64
    with pytest.raises(DmmError, match=r"words of the data must be tokens, int64, not torch.float32 \[4\]"):
        evaluation.prepare(torch.zeros(2, 4), TokenSpec((4,), 3), "words")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((1, 1, 2, 2), np.uint8)}, "no array named labels"),
        ({"images": np.zeros((1, 2, 2), np.uint8), "labels": np.zeros(1, int)}, "must be uint8"),
        ({"images": np.zeros((1, 1, 2, 2), np.float32), "labels": np.zeros(1, int)}, "must be uint8"),
        ({"images": np.zeros((1, 1, 2, 2), np.uint8), "labels": np.zeros(2, int)}, "must be integers"),
        ({"images": np.zeros((1, 1, 2, 2), np.uint8), "labels": np.zeros(1)}, "must be integers"),
        ({"images": np.zeros((1, 1, 2, 2), np.uint8), "labels": np.full(1, -1)}, "negative class"),
    ],
)
def test_data_that_are_not_labelled_images(tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DmmError, match=words):
        evaluation.load_labelled(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", ["csv", "npy"])
def test_of_a_table_it_is_told_what_to_write_in_its_place(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    path.write_text("area,label\n1.5,0\n")
    commands = [
        (["evaluate"], "images=..., labels=..."),
        (["record", "-o", tmp_path / "stats.safetensors"], "images=..."),
    ]
    for command, arrays in commands:
        told = dmm(*command, DIGITS / "site-d.safetensors", "--data", path)
        assert told.exit_code == 2 and f"hint: write an .npz file: numpy.savez(FILE, {arrays})\n" in told.stderr
        missing = dmm(*command, DIGITS / "site-d.safetensors", "--data", tmp_path / f"nowhere.{suffix}")
        assert missing.exit_code == 2 and "no such file: " in missing.stderr


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((4, 1, 0, 8), np.uint8)}, "images of {} are empty: uint8 [4, 1, 0, 8]"),
        ({"images": np.zeros((4, 0, 8, 8), np.uint8)}, "images of {} are empty: uint8 [4, 0, 8, 8]"),
        ({"labels": np.full(4, 2**63, np.uint64)}, "labels of {} hold class 9223372036854775808"),
        ({"labels": np.array([0, 1, 2, -1])}, "labels of {} hold a negative class"),
    ],
)
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_empty_images_and_numbers_that_are_no_classes_are_refused(tmp_path, arrays, words, suffix):
    path = tmp_path / f"data.{suffix}"
    held = {"images": np.zeros((4, 1, 8, 8), np.uint8), "labels": np.zeros(4, np.int64), **arrays}
    np.savez(path, **held) if suffix == "npz" else save_file(held, path)
    result = dmm("evaluate", DIGITS / "site-d.safetensors", "--data", path)
    assert result.exit_code == 2 and words.format(path) in result.stderr and "hint: " in result.stderr


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (list("0123456788"), "more than once: 8"),
        (np.array([b"7", b"8", b"7"]), "more than once: 7"),
        (np.array([], "U1"), "not <U1 [0]"),
        (np.array("cat"), "not <U3 []"),
        (np.arange(10.0), "not float64 [10]"),
        (np.array([True, False]), "not bool [2]"),
        (np.zeros(10, [("name", int)]), "[10]"),
    ],
)
def test_classes_that_are_no_list_of_different_names_are_refused(tmp_path, classes, words):
    path = tmp_path / "data.npz"
    np.savez(path, images=np.zeros((2, 1, 8, 8), np.uint8), labels=np.array([7, 8]), classes=classes)
    result = dmm("evaluate", DIGITS / "site-d.safetensors", "--data", path)
    assert result.exit_code == 2 and f"classes of {path} must be " in result.stderr
    assert words in result.stderr and "hint: write it anew" in result.stderr


@pytest.mark.parametrize("kind", ["U1", "S1", np.uint8])
def test_classes_are_named_by_strings_bytes_or_integers(tmp_path, kind):
    test = load_file(DIGITS / "test.safetensors")
    np.savez(
        tmp_path / "data.npz",
        images=test["images"],
        labels=9 - test["labels"],
        classes=np.arange(10)[::-1].astype(kind),
    )
    site = DIGITS / "site-d.safetensors"
    rows = [
        json.loads(dmm("evaluate", site, "--data", data, "--json").stdout)["rows"]
        for data in (tmp_path / "data.npz", DIGITS / "test.safetensors")
    ]
    assert rows[0] == rows[1]


def test_empty_folders_and_broken_images(tmp_path):
    with pytest.raises(DmmError, match="no images in"):
        evaluation.load_labelled(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"not a picture")
    with pytest.raises(DmmError, match=r"cannot read image .*x\.png"):
        evaluation.load_labelled(tmp_path).batch(0, 1, SPEC)
    np.savez_compressed(tmp_path / "whole.npz", images=np.zeros((9, 1, 64, 64), np.uint8), labels=np.zeros(9, int))
    whole = (tmp_path / "whole.npz").read_bytes()
    torn = bytearray(whole)
    torn[60:90] = bytes(30)  # within the images
    for content in (b"junk", b"", whole[:100], bytes(torn)):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(DmmError, match="cannot read"):
            evaluation.load_labelled(tmp_path / "a.npz")
    Image.fromarray(np.arange(64 * 64).reshape(64, 64).astype(np.uint8)).save(tmp_path / "a" / "x.png")
    picture = bytearray((tmp_path / "a" / "x.png").read_bytes())
    picture[45:60] = bytes(15)
    (tmp_path / "a" / "x.png").write_bytes(picture)
    with pytest.raises(DmmError, match=r"cannot read image .*x\.png"):
        evaluation.load_labelled(tmp_path).batch(0, 1, SPEC)


def test_a_site_knows_its_own_digits_and_no_others():
    source = resolve_source(str(DIGITS / "site-d.safetensors"))
    model, _ = load_model(source)
    data = evaluation.load_labelled(DIGITS / "test.safetensors")
    logits = evaluation.predict(model, data, input_spec(source, model), torch.device("cpu"), batch=64)
    assert logits.shape == (450, 10)
    row = evaluation.score("d", logits, data.labels)
    assert min(row.recall[7:9]) > 90 and max(row.recall[:7] + row.recall[9:]) == 0


@pytest.mark.parametrize(("count", "shares"), [(1, [57, 100]), (3, [19, 33, 52, 67, 86, 100])])
def test_evaluate_tells_every_batch_of_all_checkpoints(monkeypatch, count, shares):
    """Of 450 images, 256 at a time."""
    monkeypatch.setattr(console, "PATIENCE", -1.0)
    sites = [DIGITS / f"site-{name}.safetensors" for name in "abc"]
    told = dmm("evaluate", *sites[:count], "--data", DIGITS / "test.safetensors").stderr.splitlines()
    assert [line[:13] for line in told] == [f"evaluate {share:3}%" for share in shares]


def test_classes_of_which_none_has_the_same_name_are_taken_in_order_with_a_warning(tmp_path):
    images = np.zeros((10, 1, 8, 8), np.uint8)
    told = []
    for classes in (list("abcdefghij"), list("0123456789")):
        np.savez(tmp_path / "test.npz", images=images, labels=np.arange(10), classes=np.array(classes))
        result = dmm("evaluate", DIGITS / "site-a.safetensors", "--data", tmp_path / "test.npz", "-q")
        assert result.exit_code == 0, result.stderr
        recorded = dmm(
            "record", DIGITS / "site-a.safetensors", "--data", tmp_path / "test.npz", "-o", tmp_path / "s.safetensors",
            "--force", "-q",
        )  # fmt: skip
        told += [result.stderr, recorded.stderr]
    for words in told[:2]:
        assert "data and checkpoints name no class alike" in words and "a of the data as 0" in words
    assert not told[2] and not told[3]


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, kind):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels.astype(kind) * kind(257)).save(tmp_path / "a" / "x.tif")
    found = evaluation.load_labelled(tmp_path).batch(0, 1, InputSpec((1, 16, 16), (0.0,), (1.0,)))
    assert (found[0, 0] * 255).round().numpy().astype(np.uint8).tolist() == pixels.tolist()


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.full((2, 2), 0.5, np.float32), "are floating-point numbers, whose white is not known"),
        (np.full((2, 2), 70000, np.int32), r"are not in 0\.\.65535"),
    ],
)
def test_images_of_other_numbers_are_refused(tmp_path, pixels, words):
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "x.tif")
    with pytest.raises(DmmError, match=rf"x\.tif {words}"):
        evaluation.load_labelled(tmp_path).batch(0, 1, SPEC)


@pytest.mark.parametrize("kind", ["int8", "int16", "uint16", "int32", "int64", "uint64", ">i4", "uint8"])
def test_tokens_may_be_integers_of_any_kind(tmp_path, kind):
    tokens = np.array([[0, 2], [1, 1]])
    np.savez(tmp_path / "data.npz", words=tokens.astype(kind), labels=np.zeros(2, np.int64))
    data = evaluation.load_labelled(tmp_path / "data.npz", ["words"])
    batch = data.batch(0, 2, JointSpec(("words",), (TokenSpec((2,), 3),)))
    assert batch.parts["words"].dtype == torch.int64 and np.array_equal(batch.parts["words"], tokens)


@pytest.mark.parametrize("kind", ["float16", ">f4", "float64"])
def test_numbers_may_be_floats_of_any_kind(tmp_path, kind):
    values = np.array([[0.5, 2.0], [1.0, -1.0]])
    np.savez(tmp_path / "data.npz", values=values.astype(kind), labels=np.zeros(2, np.int64))
    data = evaluation.load_labelled(tmp_path / "data.npz", ["values"])
    batch = data.batch(0, 2, JointSpec(("values",), (InputSpec((2,), (0.5,), (2.0,)),)))
    assert np.allclose(batch.parts["values"], (values - 0.5) / 2)
