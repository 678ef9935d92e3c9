from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load

from dmm_cli.errors import DmmError
from dmm_cli.header import ITEM_SIZE, encode_header, file_order, read_header


def raw(path: Path, header: dict | str, data: bytes = b"") -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data)
    return path


def entry(dtype: str = "F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def message(path: Path) -> str:
    with pytest.raises(DmmError) as error:
        read_header(path)
    text = "\n".join([error.value.what, *error.value.evidence, error.value.hint or ""])
    assert str(path.name) in text
    return text


def test_reads_what_the_reference_writer_wrote(write):
    path = write("a", {"note": "hi"}, x=np.arange(6, dtype=np.float32).reshape(2, 3), y=np.array(7, np.int64))
    header = read_header(path)
    assert header.metadata == {"note": "hi"}
    assert {n: (i.dtype, i.shape, i.numel, i.nbytes) for n, i in header.tensors.items()} == {
        "x": ("F32", (2, 3), 6, 24),
        "y": ("I64", (), 1, 8),
    }
    info = header.tensors["x"]
    data = path.read_bytes()[header.data_start + info.start : header.data_start + info.end]
    assert np.frombuffer(data, np.float32).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "header",
    [
        {"a.\ud800weight": entry()},
        {"a": entry(), "__metadata__": {"note": "x\ud800"}},
        {"a": entry(), "__metadata__": {"\udfff": "x"}},
    ],
)
def test_half_a_surrogate_pair_is_refused_and_told_in_print(tmp_path, header):
    text = message(raw(tmp_path / "a.safetensors", header, bytes(4)))
    assert "not Unicode text" in text and ("\\ud800" in text or "\\udfff" in text)
    text.encode()
    whole = read_header(raw(tmp_path / "b.safetensors", {"\U0001f600": entry()}, bytes(4)))
    assert list(whole.tensors) == ["\U0001f600"]


def test_the_reference_reader_reads_what_we_encode(tmp_path):
    layout = {"b.weight": ("F16", (3,)), "a.count": ("I64", ()), "c": ("F32", (2, 1))}
    head = encode_header(layout, {"z": "1", "a": 'quote " and ü'})
    values = {"a.count": np.array(5, np.int64), "c": np.array([[1.0], [2.0]], np.float32)}
    values["b.weight"] = np.array([1, 2, 3], np.float16)
    path = tmp_path / "x.safetensors"
    path.write_bytes(head + b"".join(values[name].tobytes() for name in file_order(layout)))
    got = load(path.read_bytes())
    assert all((got[name] == values[name]).all() and got[name].dtype == values[name].dtype for name in values)
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"z": "1", "a": 'quote " and ü'}
    assert len(head) % 8 == 0
    assert read_header(path).metadata == {"z": "1", "a": 'quote " and ü'}


def test_header_bytes_do_not_depend_on_the_order_given():
    layout = {"a": ("F32", (2,)), "b": ("I64", ())}
    turned = dict(reversed(layout.items()))
    assert encode_header(layout, {"x": "1", "y": "2"}) == encode_header(turned, {"y": "2", "x": "1"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"abc", "only 3 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(60), "pickle"),
        (b"GGUF\x03\x00\x00\x00" + bytes(60), "a GGUF file"),
        (b"\x80\x02ctorch\n" + bytes(60), "pickle"),
        (b"<!DOCTYPE html><html></html>", "failed download"),
        (struct.pack("<Q", 10**12) + b"{}", "truncated or another format"),
        (struct.pack("<Q", 2**63) + b"{}", "truncated or another format"),
    ],
)
def test_files_that_are_something_else(tmp_path, content, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert words in message(path)


def test_archives_of_numpy_are_not_taken_for_those_of_torch(tmp_path):
    path = tmp_path / "x.safetensors"
    torch.save({"w": torch.ones(3)}, path)
    with pytest.raises(DmmError) as of_torch:
        read_header(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 99  # damage at its end changes nothing
    path.write_bytes(content)
    with pytest.raises(DmmError) as damaged:
        read_header(path)
    assert damaged.value.evidence == of_torch.value.evidence
    with path.open("wb") as file:
        np.savez(file, w=np.ones(3))
    with pytest.raises(DmmError) as of_numpy:
        read_header(path)
    assert "a pickle" in of_torch.value.evidence[0] and "torch.load" in of_torch.value.hint
    assert of_numpy.value.evidence == ("it is an .npz archive of numpy",) and "torch" not in of_numpy.value.hint


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ("[1]", b"", "does not start with '{'"),
        (' {"a":1}', b"", "does not start with '{'"),
        ('{"a": NaN}', b"", "not valid JSON"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, b"", "not valid JSON"),
        ('{"w":%s,"w":%s}' % ((json.dumps(entry()),) * 2), bytes(4), "w twice"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        ({"w": {"dtype": "F32", "shape": [1]}}, bytes(4), "tensor w lacks"),
        ({"w": {**entry(), "extra": 1}}, bytes(4), "tensor w lacks"),
        ({"w": entry(dtype="F31")}, bytes(4), "dtype dmm does not read: F31"),
        ({"w": entry(shape=[True])}, bytes(4), "no valid shape"),
        ({"w": entry(shape=[-1], offsets=(0, -4))}, bytes(4), "no valid shape"),
        ({"w": entry(shape=[1.0])}, bytes(4), "no valid shape"),
        ({"w": entry(offsets=(0, 8))}, bytes(8), "does not fit data_offsets"),
        ({"w": entry(offsets=(4, 8))}, bytes(8), "a gap in the data before tensor w"),
        ({"v": entry(), "w": entry(offsets=(2, 6))}, bytes(8), "an overlap in the data before tensor w"),
        ({"w": entry()}, bytes(3), "truncated"),
        ({"w": entry()}, bytes(5), "the file holds 5"),
    ],
)
def test_headers_that_break_the_format(tmp_path, header, data, words):
    assert words in message(raw(tmp_path / "x.safetensors", header, data))


def test_truncation_names_the_tensor(write):
    path = write("a", first=np.zeros(10, np.float32), second=np.zeros(10, np.float32))
    path.write_bytes(path.read_bytes()[:-4])
    text = message(path)
    assert "truncated" in text and "second" in text


def test_missing_file_suggests_a_neighbour(write):
    path = write("model", w=np.zeros(1, np.float32))
    assert "did you mean" in message(path.with_name("modle.safetensors"))


def test_a_file_that_cannot_be_read_is_named(write, monkeypatch):
    """It opens, and the disk fails."""

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = write("a", w=np.zeros(1, np.float32))
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DmmError, match=r"cannot read .*a\.safetensors: Input/output error"):
        read_header(path)


def test_a_fifo_is_refused_at_once(tmp_path):
    path = tmp_path / "pipe.safetensors"
    os.mkfifo(path)
    assert "not a regular file" in message(path)
    with pytest.raises(DmmError, match="not a regular file"):
        read_header(Path("/dev/zero"))


def test_a_hundred_thousand_tensors_take_linear_work(tmp_path):
    header = {f"t{i}": entry(offsets=(4 * i, 4 * i + 4)) for i in range(100_000)}
    path = raw(tmp_path / "many.safetensors", header, bytes(400_000))
    assert len(read_header(path).tensors) == 100_000


def test_a_change_after_reading_is_noticed(write):
    header = read_header(write("a", w=np.zeros(2, np.float32)))
    header.check_unchanged()
    os.utime(header.path, ns=(1, 1))
    with pytest.raises(DmmError, match="changed while it was being read"):
        header.check_unchanged()


def test_item_sizes_match_numpy():
    names = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1"}
    assert all(ITEM_SIZE[tag] == np.dtype(code).itemsize for tag, code in names.items())
