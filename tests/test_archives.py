"""Labelled data in files that are missing, damaged, or something else than their name says."""

from __future__ import annotations

import os
import re
import zipfile

import numpy as np
import pytest
from conftest import DIGITS, deadline, dmm

from dmm_cli import evaluation
from dmm_cli.errors import DmmError


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_file_that_is_not_there_is_not_called_damaged(tmp_path, suffix):
    (tmp_path / f"test.{suffix}").touch()
    result = dmm("evaluate", DIGITS / "site-d.safetensors", "--data", tmp_path / f"tset.{suffix}")
    assert result.exit_code == 2 and result.stderr.startswith(f"error: no such file: {tmp_path}/tset.{suffix}\n")
    assert f"did you mean {tmp_path}/test.{suffix}?" in result.stderr and "again" not in result.stderr


def test_archives_that_are_none(tmp_path):
    images, path = np.zeros((1, 1, 2, 2), np.uint8), tmp_path / "a.npz"
    with path.open("wb") as file:
        np.save(file, images)
    with pytest.raises(DmmError, match=r"cannot read .*a\.npz"):
        evaluation.load_labelled(path)


@pytest.mark.parametrize(("place", "value"), [(0, 1), (2, 9), (2, 14)], ids=["encrypted", "packed", "broken"])
def test_archives_of_other_kinds_are_refused(tmp_path, place, value):
    """Two bytes tell of an entry whether it is encrypted, the next two how it is packed."""
    path = tmp_path / "a.npz"
    np.savez(path, images=np.zeros((64, 1, 32, 32), np.uint8), labels=np.zeros(64, np.int64))
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # before an entry, and in the list of all
        for found in re.finditer(mark, bytes(content)):
            content[found.start() + offset + place] = value
    path.write_bytes(content)
    result = dmm("evaluate", DIGITS / "site-d.safetensors", "--data", path)
    assert result.exit_code == 2 and f"cannot read {path}: " in result.stderr and "hint: " in result.stderr


def test_an_archive_that_has_no_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    with deadline(), pytest.raises(DmmError, match=f"not a regular file: {tmp_path}/a.npz"):
        evaluation.load_labelled(tmp_path / "a.npz")


def test_archives_of_what_are_no_arrays_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images", b"hello")
    result = dmm("evaluate", DIGITS / "site-d.safetensors", "--data", path)
    assert result.exit_code == 2 and f"cannot read {path}: images in it is no array of numpy" in result.stderr
