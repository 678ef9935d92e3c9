from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
from conftest import dmm, small_net
from safetensors import safe_open

from dmm_cli import recall
from dmm_cli.inputs import resolve_source


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of its own, where files that were just written are remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(recall, "SETTLED", 0.0)
    return tmp_path / "cache" / "dmm" / "sha256.json"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hashed(path: Path) -> str:
    return resolve_source(str(path)).sha256


def forge(cache: Path) -> str:
    """Put a wrong hash in the place of every remembered one: whoever gives it has recalled it."""
    forged = "0123456789abcdef" * 4
    cache.write_text(json.dumps({path: [*entry[:-1], forged] for path, entry in json.loads(cache.read_text()).items()}))
    return forged


def sources_of(path: Path) -> list[str]:
    with safe_open(path, "np") as file:
        return [source["sha256"] for source in json.loads(file.metadata()["dmm.sources"])]


def test_a_file_is_hashed_once(cache, three):
    assert hashed(three[0]) == sha256(three[0])
    forged = forge(cache)
    assert hashed(three[0]) == forged
    assert hashed(three[1]) == sha256(three[1])


@pytest.mark.parametrize("named", ["relative", ""])
def test_a_relative_cache_directory_is_ignored(cache, three, tmp_path, monkeypatch, named):
    """As the XDG specification says: it would be another one in every working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    hashed(three[0])
    assert (tmp_path / "home" / ".cache" / "dmm" / "sha256.json").exists() and not (tmp_path / "relative").exists()


def test_a_merge_remembers_and_recalls(cache, three, tmp_path):
    command = ["merge", *three, "--align", "never", "-o"]
    dmm(*command, tmp_path / "first.safetensors")
    dmm(*command, tmp_path / "again.safetensors")
    assert sources_of(tmp_path / "first.safetensors") == [sha256(path) for path in three]
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    forged = forge(cache)
    dmm(*command, tmp_path / "third.safetensors")
    assert sources_of(tmp_path / "third.safetensors") == [forged] * 3


def test_a_changed_file_is_hashed_again_even_if_its_times_are_set_back(cache, three):
    before = three[0].stat()
    hashed(three[0])
    forge(cache)
    content = bytearray(three[0].read_bytes())
    content[-1] ^= 1
    time.sleep(0.02)  # a tick of the clock of the file system
    three[0].write_bytes(content)
    os.utime(three[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hashed(three[0]) == sha256(three[0])


def test_another_file_in_its_place_is_hashed_again(cache, three):
    hashed(three[0])
    forge(cache)
    os.replace(three[1], three[0])
    assert hashed(three[0]) == sha256(three[0])


def test_a_file_written_a_moment_ago_is_not_remembered(cache, three, monkeypatch):
    monkeypatch.setattr(recall, "SETTLED", 60.0)
    hashed(three[0])
    assert json.loads(cache.read_text()) == {}


def test_the_oldest_are_forgotten(cache, write, monkeypatch):
    monkeypatch.setattr(recall, "ENTRIES", 2)
    paths = [write(f"n{seed}", **small_net(seed)) for seed in range(3)]
    for path in paths:
        hashed(path)
    assert list(json.loads(cache.read_text())) == [str(path) for path in paths[1:]]


@pytest.mark.parametrize(
    "content",
    ["", "[1]", "{", '{"a": 1}', '{"PATH": [1, 2, 3, 4, 5, "short"]}', "\udcff", "[" * 9000],
    ids=lambda text: text[:40],
)
def test_a_damaged_cache_is_replaced(cache, three, content):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content.replace("PATH", str(three[0])).encode(errors="surrogateescape"))
    assert hashed(three[0]) == sha256(three[0])
    assert hashed(three[0]) == sha256(three[0])
    assert list(json.loads(cache.read_text())) == [str(three[0])]


def test_without_a_place_to_write_files_are_hashed_each_time(three, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert hashed(three[0]) == sha256(three[0])


def test_where_the_cache_cannot_be_replaced_nothing_stays_beside_it(cache, three):
    (cache / "a").mkdir(parents=True)
    assert hashed(three[0]) == sha256(three[0]) and list(cache.parent.iterdir()) == [cache]


def test_without_a_home_nothing_is_remembered(three, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "nowhere")  # as ~ stays where the system knows none
    there = set(tmp_path.iterdir())
    assert hashed(three[0]) == sha256(three[0]) and set(tmp_path.iterdir()) == there


def test_shards_are_remembered_one_by_one(cache, three, tmp_path):
    dmm("merge", *three, "--align", "never", "--max-shard-size", "300", "-o", tmp_path / "m.safetensors")
    whole = hashed(tmp_path / "m.safetensors.index.json")
    shards = [path for path in json.loads(cache.read_text()) if "-of-" in path]
    assert len(shards) > 1
    assert all(json.loads(cache.read_text())[path][-1] == sha256(Path(path)) for path in shards)
    assert hashed(tmp_path / "m.safetensors.index.json") == whole
