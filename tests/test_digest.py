from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from conftest import dmm, small_net
from safetensors import safe_open

from dmm_cli import digest
from dmm_cli.digest import Hashes, hashing
from dmm_cli.errors import DmmError
from dmm_cli.inputs import Source, combined_digest, file_digest, resolve_source
from dmm_cli.merging.engine import merge
from dmm_cli.merging.recipe import Recipe
from dmm_cli.shards import index_text, plan_shards


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def several_blocks(seed: int) -> dict[str, np.ndarray]:
    """A small network and a tensor of more than two blocks."""
    draw = np.random.default_rng(seed)
    return {
        "a.weight": draw.normal(size=(700, 500)).astype(np.float32),
        "b.bias": draw.normal(size=3).astype(np.float16),
        **small_net(seed),
    }


@pytest.fixture
def paths(write) -> list[Path]:
    return [write(f"m{seed}", **several_blocks(seed)) for seed in range(3)]


def resolved(paths: list[Path]) -> list[Source]:
    return [resolve_source(str(path)) for path in paths]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(digest, "CHUNK", 1000)


def feed(hashes: Hashes, path: Path, start: int, piece: int) -> list[threading.Thread]:
    """Two threads that give a file from ``start`` on, each every other piece; both are begun."""
    data = memoryview(path.read_bytes())

    def give(first: int) -> None:
        for place in range(first, len(data), 2 * piece):
            hashes.feed(path, place, data[place : place + piece])

    threads = [threading.Thread(target=give, args=(first,), daemon=True) for first in (start, start + piece)]
    for thread in threads:
        thread.start()
    return threads


def have_ended(threads: Iterable[threading.Thread]) -> bool:
    """Whether all threads end, given five seconds in all."""
    end = time.monotonic() + 5
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def test_hashes_are_hashlibs(paths):
    sources = resolved(paths)
    with hashing(sources) as hashes:
        hashes.wait(sources)
        assert all(source.is_hashed for source in sources)
    assert [source.sha256 for source in sources] == [sha256(path) for path in paths]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("piece", [2_999, 100_000, 10_000_000])
@pytest.mark.parametrize("start", ["of the file", "of the tensors"])
def test_bytes_that_a_merge_reads_are_hashed_once(paths, piece, start):
    """However far the threads of the hashes have come on their own; a merge reads no header."""
    sources = resolved(paths)
    with hashing(sources) as hashes:
        threads = []
        for source in sources:
            first = source.headers[0].data_start if start == "of the tensors" else 0
            hashes.expect(source.path, first)
            threads += feed(hashes, source.path, first, piece)
        assert have_ended(threads)
        hashes.wait(sources)
    assert [source.sha256 for source in sources] == [sha256(path) for path in paths]


@pytest.mark.usefixtures("small_chunks")
def test_files_that_are_not_fed_are_hashed_beside_those_that_are(paths):
    sources = resolved(paths)
    with hashing(sources) as hashes:
        hashes.feed(Path("another"), 0, memoryview(b"of no interest"))
        hashes.expect(Path("another"), 7)
        hashes.expect(paths[0], 0)
        hashes.wait(sources[1:])
        assert [source.sha256 for source in sources[1:]] == [sha256(path) for path in paths[1:]]
        threads = feed(hashes, paths[0], 0, 5_000)
        assert have_ended(threads)
        hashes.wait(sources)
    assert sources[0].sha256 == sha256(paths[0])


@pytest.mark.usefixtures("small_chunks")
def test_work_that_fails_leaves_no_thread_and_no_open_file_behind(paths):
    threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    with pytest.raises(RuntimeError, match="the merge fails"), hashing(resolved(paths)) as hashes:
        hashes.expect(paths[0], 0)
        late = threading.Thread(target=hashes.feed, args=(paths[0], 1_000_000, memoryview(b"too early")), daemon=True)
        late.start()
        raise RuntimeError("the merge fails")
    assert have_ended(set(threading.enumerate()) - threads)
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.usefixtures("small_chunks")
def test_half_a_hash_is_never_taken_for_a_whole_one(paths):
    sources = resolved(paths)
    with hashing(sources) as hashes:
        hashes.expect(paths[0], 0)
        hashes.stop()
        with contextlib.suppress(DmmError):
            hashes.wait(sources)
    assert [source.sha256 for source in sources] == [sha256(path) for path in paths]


def test_a_file_that_is_cut_short_is_an_error_and_keeps_nobody_waiting(paths, monkeypatch):
    monkeypatch.setattr(digest, "CHUNK", 10)
    sources, threads = resolved(paths[:1]), set(threading.enumerate())
    with hashing(sources) as hashes:
        os.truncate(paths[0], 1000)
        assert have_ended(set(threading.enumerate()) - threads)
        late = threading.Thread(target=hashes.expect, args=(paths[0], 0), daemon=True)
        late.start()
        assert have_ended([late])
        with pytest.raises(DmmError, match=r"m0\.safetensors was truncated"):
            hashes.wait(sources)


@pytest.mark.usefixtures("small_chunks")
def test_what_was_promised_and_did_not_come_is_read_where_it_is_waited_for(paths):
    sources = resolved(paths)
    with hashing(sources) as hashes:
        for path in paths:
            hashes.expect(path, 0)
        hashes.feed(paths[1], 0, memoryview(paths[1].read_bytes())[:5_000])
        late = threading.Thread(target=hashes.wait, args=(sources,), daemon=True)
        late.start()
        assert have_ended([late])
    assert [source.sha256 for source in sources] == [sha256(path) for path in paths]


class Counting(Hashes):
    """Counts the bytes that it is given."""

    def __init__(self, sources: list[Source]) -> None:
        super().__init__(sources)
        self.given: list[int] = []

    def feed(self, path: Path, position: int, data: memoryview) -> None:
        self.given.append(len(data))
        super().feed(path, position, data)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_a_merge_gives_every_byte_it_promised(paths, tmp_path, density):
    """Also where nothing is measured: a density of 0 or 1 needs no threshold."""
    base, *parents = sources = resolved(paths)
    hashes, recipe = Counting(sources), Recipe("ties", base=base, parameters={"density": density})
    merge(parents, tmp_path / "out.safetensors", recipe, {}, hashes=hashes)
    sizes = [source.path.stat().st_size - source.headers[0].data_start for source in parents]
    assert sum(hashes.given) == sum(sizes)  # running statistics of the base are not read
    late = threading.Thread(target=hashes.wait, args=(sources,), daemon=True)
    late.start()
    assert have_ended([late])
    assert [source.sha256 for source in sources] == [sha256(path) for path in paths]


def test_nothing_to_hash_is_nothing_to_wait_for(paths):
    sources = resolved(paths[:1])
    sources[0].know_sha256("known")
    for given in ([], sources):
        with hashing(given) as hashes:
            hashes.wait(given)
    assert sources[0].sha256 == "known"


def test_one_file_given_twice_is_hashed_for_both(paths):
    sources = resolved([paths[0], paths[0]])
    with hashing(sources) as hashes:
        hashes.wait(sources)
    assert [source.sha256 for source in sources] == [sha256(paths[0])] * 2


def test_a_file_that_is_gone_is_an_error_that_names_it(paths):
    sources = resolved(paths)
    paths[1].unlink()
    with pytest.raises((DmmError, OSError), match=r"m1\.safetensors"), hashing(sources) as hashes:
        hashes.wait(sources)


def test_a_checkpoint_of_shards_has_the_hash_of_its_sorted_list(write, tmp_path):
    arrays = {f"w{i}": np.full(i + 1, i, np.float32) for i in range(3)}
    layout = {name: ("F32", array.shape) for name, array in arrays.items()}
    shards = plan_shards(layout, tmp_path / "model.safetensors", 8)
    files = [write(path.name.removesuffix(".safetensors"), **{n: arrays[n] for n in shards[path]}) for path in shards]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index_text(shards))
    lines = "\n".join(f"{path.name} {sha256(path)}" for path in sorted(files))
    expected = hashlib.sha256(lines.encode()).hexdigest()
    beside, alone = resolve_source(str(index)), resolve_source(str(index))
    with hashing([beside]) as hashes:
        hashes.wait([beside])
    assert beside.is_hashed and beside.sha256 == alone.sha256 == expected
    assert combined_digest({path: file_digest(path) for path in reversed(files)}) == expected


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_linear", "iso_c"])
def test_a_merged_file_names_the_hashes_of_its_parents(write, tmp_path, paths, method):
    base = write("base", **several_blocks(9))
    output = tmp_path / "out.safetensors"
    given = ["--align", "never"] if method in ("linear", "slerp") else ["--base", base]
    result = dmm("merge", *paths[:2], "-o", output, "--method", method, *given)
    assert result.exit_code == 0, result.output
    with safe_open(output, "numpy") as file:
        metadata = file.metadata()
    assert [entry["sha256"] for entry in json.loads(metadata["dmm.sources"])] == [sha256(path) for path in paths[:2]]
    if "--base" in given:
        assert [entry["sha256"] for entry in json.loads(metadata["dmm.base"])] == [sha256(base)]
