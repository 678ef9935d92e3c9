"""States beside an output."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from dmm_cli.errors import DmmError
from dmm_cli.savepoint import Savepoint, savepoint


def saved(out, **inputs) -> None:
    """Leave a state behind, as a computation that was interrupted does."""
    with pytest.raises(KeyboardInterrupt), savepoint(out, **inputs) as states:
        states.save("part", {"x": np.arange(3)}, {"done": 2})
        raise KeyboardInterrupt


def test_a_state_comes_back_until_the_output_is_made(tmp_path):
    out = tmp_path / "out.safetensors"
    saved(out, seed=0)
    with savepoint(out, seed=0) as states:
        state = states.load("part")
        assert state.arrays["x"].tolist() == [0, 1, 2] and state.notes == {"done": 2}
        assert states.load("other") is None
    assert list(tmp_path.iterdir()) == []


def test_what_other_inputs_left_is_not_found(tmp_path):
    out = tmp_path / "out.safetensors"
    saved(out, seed=0, steps=3)
    with savepoint(out, seed=1, steps=3) as states:
        assert states.load("part") is None
        states.save("part", {"x": np.ones(1)})
        assert states.load("part").arrays["x"].tolist() == [1.0]


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_damaged_state_is_not_found(tmp_path, keep):
    out = tmp_path / "out.safetensors"
    saved(out)
    (path,) = (tmp_path / "out.safetensors.partial").iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    with savepoint(out) as states:
        assert states.load("part") is None


def test_a_state_whose_bits_changed_is_not_found(tmp_path):
    out = tmp_path / "out.safetensors"
    saved(out)
    (path,) = (tmp_path / "out.safetensors.partial").iterdir()
    whole = path.read_bytes()
    for place in (whole.index(b'"dmm.notes":"{') + 22, len(whole) - 1):  # of the notes' 2, and of an array
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(KeyboardInterrupt), savepoint(out) as states:
            assert states.load("part") is None
            raise KeyboardInterrupt
    path.write_bytes(whole)
    with savepoint(out) as states:
        assert states.load("part").notes == {"done": 2}


@pytest.mark.parametrize("looks", ["listdir", "scandir"])
def test_another_process_may_have_removed_it_meanwhile(tmp_path, monkeypatch, looks):
    """Just before this one looks into the directory: those of torchrun end together."""
    out, look = tmp_path / "out.safetensors", getattr(os, looks)

    def removed(path):
        shutil.rmtree(path, ignore_errors=True)
        return look(path)

    with savepoint(out, seed=0) as states:
        states.save("part", {"x": np.arange(3)}, {})
        monkeypatch.setattr(os, looks, removed)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_what_is_told_to_be_kept_is_what_the_same_inputs_go_on_from(tmp_path):
    out = tmp_path / "out.safetensors"
    saved(out, seed=0)
    (tmp_path / "out.safetensors.partial" / "notes.txt").write_text("mine")
    with pytest.raises(KeyboardInterrupt), savepoint(out, seed=1) as other:
        assert not other.is_kept
        raise KeyboardInterrupt
    with savepoint(out, seed=0) as states:
        assert states.is_kept
    assert not states.is_kept and not Savepoint().is_kept


def test_files_of_somebody_else_stay(tmp_path):
    out = tmp_path / "out.safetensors"
    saved(out, seed=0)
    directory = tmp_path / "out.safetensors.partial"
    (directory / "notes.txt").write_text("mine")
    save_file({"x": np.ones(1)}, directory / "mine.safetensors")
    (directory / ".dmm-00.tmp").write_bytes(b"of a killed process")
    with savepoint(out, seed=0) as states:
        states.save("part", {"x": np.ones(1)})
    assert sorted(path.name for path in directory.iterdir()) == ["mine.safetensors", "notes.txt"]


def test_a_file_in_the_place_of_the_directory_is_refused_first(tmp_path):
    (tmp_path / "out.safetensors.partial").write_text("mine")
    with pytest.raises(DmmError, match="is in the way"), savepoint(tmp_path / "out.safetensors"):
        raise AssertionError("it began")
    assert (tmp_path / "out.safetensors.partial").read_text() == "mine"


def test_a_link_to_nothing_in_its_place_is_refused_first(tmp_path):
    (tmp_path / "out.safetensors.partial").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DmmError, match="is in the way"), savepoint(tmp_path / "out.safetensors"):
        raise AssertionError("it began")


def test_the_longest_name_has_room_beside_it(tmp_path):
    out = tmp_path / f"{'x' * 243}.safetensors"
    saved(out)
    assert [len(path.name) for path in tmp_path.iterdir()] == [72]


@pytest.mark.parametrize(
    ("cause", "stays"), [(None, False), (OSError("no space left"), True), (RuntimeError("CUDA error"), True)]
)
def test_errors_that_would_come_again_leave_nothing(tmp_path, cause, stays):
    with pytest.raises(DmmError), savepoint(tmp_path / "out.safetensors") as states:
        states.save("part", {"x": np.ones(1)})
        raise DmmError("it failed") from cause
    assert bool(list(tmp_path.iterdir())) == stays


def test_without_a_directory_states_are_in_memory():
    states = Savepoint()
    states.save("part", {"x": np.ones(2)}, {"done": 1})
    assert states.load("part").notes == {"done": 1} and states.load("other") is None
