"""Image files in directories: which are found, which are told apart, and what their values mean."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import DIGITS, dmm, two_generators
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch import nn

from dmm_cli.errors import DmmError
from dmm_cli.evaluation import load_labelled
from dmm_cli.imagefolder import decode, image_folder

SITE, TEST = DIGITS / "site-d.safetensors", load_file(DIGITS / "test.safetensors")


class Bright(nn.Module):
    """Its logits are the first pixels."""

    num_classes = 12

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 12, bias=False)

    def forward(self, images):
        return self.fc(images.flatten(1))


def folder_of_digits(root: Path, *digits: int, suffix: str = ".png") -> Path:
    """The test images of some digits, a folder for each."""
    for number in np.flatnonzero(np.isin(TEST["labels"], digits)):
        path = root / str(TEST["labels"][number]) / f"{number}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(TEST["images"][number, 0]).save(path)
    return root


def recall(folder: Path) -> list[float | None]:
    result = dmm("evaluate", SITE, "--data", folder, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["rows"][0]["recall"]


def test_links_are_followed_wherever_they_are_but_not_in_circles(tmp_path):
    plain = folder_of_digits(tmp_path / "plain", 7, 8, 9)
    linked = folder_of_digits(tmp_path / "linked", 7)
    away = folder_of_digits(tmp_path / "away", 8, 9)
    (linked / "8").symlink_to(away / "8")  # a class, and a folder within a class
    (linked / "9").mkdir()
    (linked / "9" / "more").symlink_to(away / "9")
    (linked / "9" / "again").symlink_to(linked)
    (away / "9" / "above").symlink_to(linked / "9")
    assert recall(linked) == recall(plain) and recall(plain)[7] > 90
    held = [(path.name, label) for path, label in zip(*image_folder(linked)[:2], strict=True)]
    assert held == [(path.name, label) for path, label in zip(*image_folder(plain)[:2], strict=True)]


def test_images_of_every_kind_count(tmp_path):
    expected = recall(folder_of_digits(tmp_path / "png", 7, 9))
    assert recall(folder_of_digits(tmp_path / "pgm", 7, 9, suffix=".pgm")) == expected
    assert recall(folder_of_digits(tmp_path / "TIF", 7, 9, suffix=".TIF")) == expected


def test_a_class_folder_of_other_files_is_told(tmp_path):
    folder = folder_of_digits(tmp_path / "data", 7, 9)
    (folder / "9" / "notes.txt").write_text("beside images it is passed over")
    assert len(load_labelled(folder)) == int(np.isin(TEST["labels"], [7, 9]).sum())
    for path in list((folder / "9").iterdir()):
        path.rename(path.with_suffix(".xyz"))
    for command in (["evaluate", SITE], ["record", SITE, "-o", tmp_path / "statistics.safetensors"]):
        result = dmm(*command, "--data", folder)
        assert result.exit_code == 2 and f"no images in {folder / '9'}" in result.stderr
        assert f".xyz: {int((TEST['labels'] == 9).sum()) + 1}\n" in result.stderr and ".png" in result.stderr


def test_a_pipe_is_not_waited_for(tmp_path):
    folder = folder_of_digits(tmp_path / "data", 7)
    os.mkfifo(folder / "7" / "a.png")
    result = dmm("evaluate", SITE, "--data", folder)
    assert result.exit_code == 2 and "not a regular file" in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("cut.pgm", b"P5\n9", "Reached EOF while reading header"),
        ("photo.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n", "cannot identify image file"),
    ],
)
def test_a_broken_image_and_one_of_another_kind_are_named(tmp_path, name, content, words):
    path = tmp_path / "data" / "7" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    result = dmm("evaluate", SITE, "--data", tmp_path / "data")
    assert result.exit_code == 2 and f"cannot read image {path}: {words}" in result.stderr, result.stderr


def test_a_damaged_image_is_named_whatever_its_decoder_raises(tmp_path):
    folder = folder_of_digits(tmp_path / "data", 7, suffix=".tif")
    path = next((folder / "7").iterdir())
    content = path.read_bytes().replace(b"\x11\x01\x04\x00", b"\x11\x01\x07\x00")  # the type of an offset: a TypeError
    path.write_bytes(content)
    result = dmm("evaluate", SITE, "--data", folder)
    assert result.exit_code == 2 and f"cannot read image {path}: " in result.stderr, result.stderr


def test_wide_integers_that_may_be_of_eight_bits_are_refused(tmp_path):
    (tmp_path / "dark.pgm").write_bytes(b"P5 2 1 65535\n" + bytes([0, 200, 255, 255]))  # which tells its white
    assert decode(tmp_path / "dark.pgm", 1).ravel().tolist() == [1, 255]
    path = tmp_path / "a.tif"
    Image.fromarray(np.zeros((4, 4), np.int32)).save(path)  # black, whatever white is
    assert not decode(path, 3).any()
    Image.fromarray(np.full((4, 4), 255, np.int32)).save(path)
    with pytest.raises(DmmError, match="white or nearly black"):
        decode(path, 3)


def test_what_changes_behind_a_link_is_judged_anew(tmp_path):
    away, data = folder_of_digits(tmp_path / "away", 7), folder_of_digits(tmp_path / "data", 8)
    (data / "7").symlink_to(away / "7")
    few = ["--count", 8, "--synthesize-steps", 2, "--distill-steps", 1]
    command = ["run", DIGITS / "site-a.safetensors", SITE, "-o", tmp_path / "out", "--data", data, *few]
    with two_generators():
        first, again = dmm(*command), dmm(*command)
    assert first.exit_code == 0, first.stderr
    assert "evaluate: up to date" in again.stderr
    eight = next((data / "8").iterdir()).read_bytes()
    for path in (away / "7").iterdir():
        path.write_bytes(eight)
    changed = dmm(*command, "--json")
    assert "distill: up to date" in changed.stderr and "evaluate: up to date" not in changed.stderr
    rows = {row["label"]: row["recall"] for row in json.loads(changed.stdout)["evaluation"]["rows"]}
    assert rows["site-d"][7] == 0
    (data / "6").mkdir()  # a class of no images
    assert "evaluate: up to date" not in dmm(*command).stderr


def test_folders_that_are_numbers_in_the_order_of_text_are_told(tmp_path, monkeypatch):
    """Class k is a bright pixel number k: as numbers sort them all are right, as text does the first two are."""
    monkeypatch.chdir(tmp_path)
    facts = {"dmm.input": '{"size": [1, 4, 4], "mean": [0], "std": [1]}'}
    save_file({"fc.weight": np.eye(12, 16, dtype=np.float32)}, "net.safetensors", facts)
    for number in range(12):
        for folder in (Path(f"text/{number}"), Path(f"numbers/{number:02}")):
            folder.mkdir(parents=True)
            Image.fromarray((np.arange(16) == number).reshape(4, 4).astype(np.uint8) * 255).save(folder / "a.png")
    command = ["evaluate", "--arch", "test_imagefolder:Bright", "--json"]
    text, numbers = (dmm(*command, "net.safetensors", "--data", data) for data in ("text", "numbers"))
    assert [json.loads(done.stdout)["rows"][0]["accuracy"] for done in (text, numbers)] == [100 / 6, 100]
    assert "10 as class 2, and so on" in text.stderr and "such as 00\n" in text.stderr and not numbers.stderr
    named = {**facts, "dmm.classes": json.dumps([str(number) for number in range(12)])}
    save_file(load_file("net.safetensors"), "named.safetensors", named)
    by_name = dmm(*command, "named.safetensors", "--data", "text")
    assert json.loads(by_name.stdout)["rows"][0]["accuracy"] == 100 and not by_name.stderr
