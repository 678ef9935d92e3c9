from __future__ import annotations

import errno
import math
import os

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file as save_torch

from dmm_cli.checkpoint import Checkpoint, encode_floats, require_finite, save_arrays, save_like
from dmm_cli.errors import DmmError
from dmm_cli.header import ITEM_SIZE, encode_header
from dmm_cli.inputs import resolve_source


def test_values_of_every_dtype_come_back(tmp_path):
    tensors = {
        name: torch.arange(-3, 9).reshape(3, 4).to(dtype)
        for name, dtype in {
            "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
            "i64": torch.int64, "i32": torch.int32, "i8": torch.int8,
        }.items()
    }  # fmt: skip
    save_torch(tensors, tmp_path / "a.safetensors")
    with Checkpoint(resolve_source(str(tmp_path / "a.safetensors"))) as file:
        for name, tensor in tensors.items():
            assert file.array(name).tolist() == tensor.tolist(), name
            if tensor.is_floating_point():
                assert file.floats(name, 2, 7).tolist() == tensor.flatten()[2:7].tolist()
        with pytest.raises(DmmError, match="not a float tensor"):
            file.floats("i64")


def test_rounding_to_bfloat16_and_float16_is_torchs():
    values = np.concatenate([np.random.default_rng(0).normal(size=5000), [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8]])
    for tag, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)):
        expected = torch.from_numpy(values).to(torch.float32).to(dtype).view(torch.uint8).numpy()
        assert (encode_floats(values.astype(np.float32), tag, "w") == expected.reshape(-1)).all(), tag


LARGEST = {  # of every dtype, and the unit in its last place
    "F16": (torch.finfo(torch.float16).max, 2.0**5),
    "BF16": (torch.finfo(torch.bfloat16).max, 2.0**120),
    "F32": (torch.finfo(torch.float32).max, 2.0**104),
}


@pytest.mark.parametrize("tag", LARGEST)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_would_be_rounded_to_infinity_is_an_error_that_names_the_tensor(tag, sign):
    largest, unit = LARGEST[tag]
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[tag]
    fits, beyond = sign * (largest + 0.499 * unit), sign * (largest + 0.5 * unit)
    got = torch.from_numpy(encode_floats(np.array([0.0, fits]), tag, "w")).view(dtype)
    assert got.tolist() == [0.0, sign * largest]
    with pytest.raises(DmmError, match=f"tensor w has values beyond the range of {str(dtype)[6:]}"):
        encode_floats(np.array([0.0, beyond]), tag, "w")


@pytest.mark.parametrize("tag", [*LARGEST, "F64"])
@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_nan_and_infinity_are_not_encoded(tag, bits):
    with pytest.raises(DmmError, match="tensor w would hold NaN or infinity"):
        encode_floats(np.array([0, bits], np.uint32).view(np.float32), tag, "w")


def test_saved_arrays_are_read_by_the_reference(tmp_path):
    arrays = {"b": np.arange(3.0), "a": np.array([[1, 2]], np.uint8), "s": np.array(4, np.int64)}
    path = tmp_path / "x.safetensors"
    save_arrays(path, arrays, {"k": "v"})
    got = load_file(path)
    assert all(np.array_equal(got[name], arrays[name]) and got[name].dtype == arrays[name].dtype for name in arrays)
    first = path.read_bytes()
    save_arrays(path, dict(reversed(arrays.items())), {"k": "v"}, force=True)
    assert path.read_bytes() == first


def test_a_copy_keeps_the_dtypes_of_its_model(tmp_path):
    source = tmp_path / "a.safetensors"
    save_torch({"w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16), "n": torch.tensor(3)}, source)
    values = {"w": np.array([1.5, -2.25], np.float32), "n": np.array(9, np.int64)}
    save_like(tmp_path / "b.safetensors", resolve_source(str(source)), values, {})
    with Checkpoint(resolve_source(str(tmp_path / "b.safetensors"))) as file:
        assert file.source.tensors["w"].dtype == "BF16"
        assert file.array("w").tolist() == [1.5, -2.25] and file.array("n") == 9
    values["w"][1] = 3.4e38
    with pytest.raises(DmmError, match="tensor w has values beyond the range of bfloat16"):
        save_like(tmp_path / "c.safetensors", resolve_source(str(source)), values, {})
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize("shape", [(1,) * 65, (2**70, 0), (2**40, 2**40, 0)])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_shape_that_no_array_has_is_an_error_of_its_tensor(tmp_path, shape, dtype):
    path, layout = tmp_path / "a.safetensors", {"w": (dtype, shape)}
    path.write_bytes(encode_header(layout, {}) + bytes(math.prod(shape) * ITEM_SIZE[dtype]))
    with pytest.raises(DmmError, match="no array has the shape of w"), Checkpoint(resolve_source(str(path))) as file:
        file.array("w")


def test_a_file_cut_while_open_is_an_error_not_a_crash(write):
    path = write("a", w=np.ones(100_000, np.float32))
    with pytest.raises(DmmError, match="truncated while tensor w"), Checkpoint(resolve_source(str(path))) as file:
        os.truncate(path, 1000)
        file.floats("w")


def test_a_disk_that_fails_is_an_error_of_the_file_that_was_read(write, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    source = resolve_source(str(write("a", w=np.ones(4, np.float32))))
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(DmmError, match=r"cannot read .*a\.safetensors: Input/output error"):
        save_like(tmp_path / "b.safetensors", source, {}, {})


def test_a_file_replaced_while_open_is_noticed(write):
    path = write("a", w=np.ones(4, np.float32))
    with pytest.raises(DmmError, match="changed while"), Checkpoint(resolve_source(str(path))):
        write("a", w=np.zeros(5, np.float32))


def test_a_copy_of_a_file_that_changes_meanwhile_is_not_written(write, tmp_path):
    path, copy = write("a", w=np.ones(4, np.float32)), tmp_path / "b.safetensors"
    source = resolve_source(str(path))
    save_like(copy, source, {}, {})
    before = copy.read_bytes()
    os.utime(path)
    with pytest.raises(DmmError, match="changed while"):
        save_like(copy, source, {}, {"another": "file"}, force=True)
    path.unlink()
    with pytest.raises(DmmError, match=r"cannot read .*a\.safetensors: No such file"):
        save_like(copy, source, {}, {"another": "file"}, force=True)
    assert copy.read_bytes() == before and list(tmp_path.iterdir()) == [copy]


def test_nan_names_file_and_tensor(write):
    source = resolve_source(str(write("a", w=np.ones(2, np.float32))))
    require_finite(source, "w", np.array([1e38, 1e38], np.float32))
    for bad in (np.nan, np.inf):
        with pytest.raises(DmmError, match=r"tensor w of .*a.safetensors"):
            require_finite(source, "w", np.array([1, bad]))
