from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dmm_cli.errors import DmmError
from dmm_cli.inputs import resolve_source
from dmm_cli.shards import index_path, index_text, parse_size, plan_shards

LAYOUT = {"a": ("F32", (10,)), "b": ("I64", (3,)), "c": ("F32", (4, 5)), "d": ("F16", ()), "e": ("BF16", (7,))}
BYTES = {"a": 40, "b": 24, "c": 80, "d": 2, "e": 14}
ORDER = ["b", "a", "c", "d", "e"]  # wider items first, then by name
WHOLE = Path("dir/model.safetensors")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000), ("500MB", 500_000_000), ("2GiB", 2 * 1024**3), ("1.5kb", 1500), ("0.5KiB", 512),
        (" 7 MB ", 7_000_000), ("1024", 1024), ("3B", 3), ("1tb", 10**12), ("0.001KB", 1),
    ],
)  # fmt: skip
def test_a_size_in_bytes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5XB", "-5GB", "0", "0GB", "0.1B", "5GB6", "1,5GB", "nan", "inf", "1e3", "5 G B", "9" * 400]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(DmmError, match="not a size"):
        parse_size(text)


def test_without_a_limit_or_with_room_for_all_there_is_one_file():
    for limit in (None, sum(BYTES.values())):
        assert plan_shards(LAYOUT, WHOLE, limit) == {WHOLE: LAYOUT}


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (159, [["b", "a", "c", "d"], ["e"]]),
        (144, [["b", "a", "c"], ["d", "e"]]),
        (96, [["b", "a"], ["c", "d", "e"]]),
        (40, [["b"], ["a"], ["c"], ["d", "e"]]),
        (1, [["b"], ["a"], ["c"], ["d"], ["e"]]),
    ],
)
def test_tensors_are_dealt_out_in_file_order_below_the_limit(limit, expected):
    shards = plan_shards(LAYOUT, WHOLE, limit)
    assert [list(shard) for shard in shards.values()] == expected
    assert [name for shard in shards.values() for name in shard] == ORDER
    assert all(shard[name] == LAYOUT[name] for shard in shards.values() for name in shard)
    for shard in shards.values():
        assert len(shard) == 1 or sum(BYTES[name] for name in shard) <= limit
    count = len(expected)
    assert list(shards) == [Path(f"dir/model-{i:05}-of-{count:05}.safetensors") for i in range(1, count + 1)]


def test_a_layout_without_tensors_is_one_file():
    assert plan_shards({}, WHOLE, 5) == {WHOLE: {}}


def test_the_index_says_which_file_holds_which_tensor():
    shards = plan_shards(LAYOUT, WHOLE, 100)
    record = json.loads(index_text(shards))
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert record["weight_map"] == {"a": first, "b": first, "c": second, "d": second, "e": second}
    assert record["metadata"] == {"total_size": 160}
    assert index_path(WHOLE) == Path("dir/model.safetensors.index.json")


def test_shards_and_index_are_read_back_as_one_checkpoint(tmp_path):
    arrays = {f"w{i}": np.full((4, i + 1), i, np.float32) for i in range(5)}
    layout = {name: ("F32", array.shape) for name, array in arrays.items()}
    whole = tmp_path / "model.safetensors"
    shards = plan_shards(layout, whole, 100)
    assert len(shards) > 2
    for path, shard in shards.items():
        save_file({name: arrays[name] for name in shard}, path)
    index_path(whole).write_text(index_text(shards))
    source = resolve_source(str(tmp_path))
    assert {name: info.shape for name, info in source.tensors.items()} == {n: a.shape for n, a in arrays.items()}
    assert source.files == list(shards)
