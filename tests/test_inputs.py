from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import threading

import numpy as np
import pytest
from conftest import deadline
from safetensors.numpy import save_file

from dmm_cli.errors import DmmError
from dmm_cli.inputs import require_same_tensors, resolve_source, resolve_sources

W = np.zeros((2, 2), np.float32)


def labels(*arguments, stdin=""):
    return [source.label for source in resolve_sources([str(a) for a in arguments], stdin=io.StringIO(stdin))]


def test_files_lists_globs_and_standard_input(write, tmp_path):
    for name in ("b", "a", "c"):
        write(name, w=W)
    listing = tmp_path / "list.txt"
    listing.write_text(f"# sites\n{tmp_path}/c.safetensors\n\n{tmp_path}/a.safetensors\n")
    assert labels(tmp_path / "b.safetensors", tmp_path / "a.safetensors") == ["b", "a"]
    assert labels(f"{tmp_path}/?.safetensors") == ["a", "b", "c"]
    assert labels(f"@{listing}") == ["c", "a"]
    assert labels("-", stdin=f"{tmp_path}/b.safetensors\n") == ["b"]
    record = {"schema": "dmm.merge/1", "sources": [{"label": "x", "path": f"{tmp_path}/b.safetensors"}]}
    assert labels("-", stdin=json.dumps(record)) == ["b"]
    for text in (f"{tmp_path}/b.safetensors\n", json.dumps(record)):  # as some editors save it
        assert labels("-", stdin=f"\ufeff{text}") == ["b"]
        (tmp_path / "list").write_text(text, encoding="utf-8-sig")
        (tmp_path / "list.json").write_text(text, encoding="utf-8-sig")
    assert labels(f"{tmp_path}/list.json") == ["b"]
    (tmp_path / "merge.json").write_text(json.dumps(record))
    assert labels(tmp_path / "merge.json") == ["b"]


def test_labels_are_unique(tmp_path):
    for site in ("north", "south"):
        (tmp_path / site).mkdir()
        save_file({"w": W}, tmp_path / site / "model.safetensors")
    paths = [tmp_path / site / "model.safetensors" for site in ("north", "south")]
    assert labels(*paths) == ["north/model", "south/model"]
    assert labels(tmp_path / "north", tmp_path / "south") == ["north", "south"]
    assert labels(paths[0], paths[0]) == ["model", "model#2"]


def test_shards_are_labelled_by_their_index_unless_its_name_is_that_of_all(tmp_path):
    for folder, name in (("sites", "group-0"), ("sites", "group-1"), ("site", "model")):
        (tmp_path / folder).mkdir(exist_ok=True)
        save_file({"w": W}, tmp_path / folder / f"{name}-00001-of-00001.safetensors")
        record = {"weight_map": {"w": f"{name}-00001-of-00001.safetensors"}}
        (tmp_path / folder / f"{name}.safetensors.index.json").write_text(json.dumps(record))
    assert labels(tmp_path / "sites" / "group-0.safetensors.index.json") == ["group-0"]
    assert labels(f"{tmp_path}/sites/*.index.json") == ["group-0", "group-1"]
    assert labels(tmp_path / "site" / "model.safetensors.index.json") == ["site"]
    (tmp_path / "site" / "model.safetensors.index.json").rename(tmp_path / "site" / ".index.json")
    assert labels(tmp_path / "site" / ".index.json") == ["site"]


def test_labels_do_not_depend_on_the_order(tmp_path):
    paths = [tmp_path / first / "site" / "model.safetensors" for first in ("x", "y")]
    for path in paths:
        path.parent.mkdir(parents=True)
        save_file({"w": W}, path)
    assert labels(*paths) == ["x/site/model", "y/site/model"]
    assert labels(*reversed(paths)) == ["y/site/model", "x/site/model"]
    assert labels(paths[1], *paths) == ["y/site/model", "x/site/model", "y/site/model#2"]


def test_a_directory_brings_its_config(tmp_path):
    save_file({"w": W}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    assert resolve_source(str(tmp_path)).metadata == {"dmm.arch": "resnet18"}
    save_file({"w": W}, tmp_path / "model.safetensors", {"dmm.arch": "resnet34", "note": "own"})
    assert resolve_source(str(tmp_path)).metadata == {"dmm.arch": "resnet34", "note": "own"}


@pytest.mark.parametrize(
    "config",
    [{"model_args": 3}, {"pretrained_cfg": [1]}, {"label_names": ["a", "a"]}, {"architectures": ["ViT"]}],
)
def test_a_config_of_something_else_tells_nothing(tmp_path, config):
    save_file({"w": W}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert resolve_source(str(tmp_path)).metadata == {}


@pytest.mark.parametrize(
    "config",
    [
        {"num_classes": 3, "label_names": ["a", "b", "c"], "pretrained_cfg": {"mean": [0.1], "input_size": [1, 8, 8]}},
        {"pretrained_cfg": {"num_classes": 3, "label_names": ["a", "b", "c"], "mean": [0.1], "input_size": [1, 8, 8]}},
        {"num_classes": 3, "labels": ["a", "b", "c"], "mean": [0.1], "input_size": [1, 8, 8]},
        {"num_classes": 3, "label_names": ["a", "b", "c"], "mean": [0.1], "input_size": [1, 8, 8]},
    ],
    ids=["today's", "all in the section", "flat, as timm wrote it once", "flat"],
)
def test_a_config_is_read_as_timm_reads_it(tmp_path, config):
    save_file({"w": W}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", **config}))
    told = resolve_source(str(tmp_path)).metadata
    assert told["dmm.arch"] == "resnet18,num_classes=3" and json.loads(told["dmm.classes"]) == ["a", "b", "c"]
    assert json.loads(told["dmm.input"]) == {"size": [1, 8, 8], "mean": [0.1]}


def test_the_number_of_classes_that_weights_were_trained_for_is_the_arguments(tmp_path):
    save_file({"w": W}, tmp_path / "model.safetensors")
    told = {"architecture": "resnet18", "model_args": {"num_classes": 5}, "pretrained_cfg": {"num_classes": 1000}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert resolve_source(str(tmp_path)).metadata["dmm.arch"] == "resnet18,num_classes=5"


def sharded(tmp_path, weight_map):
    save_file({"a": W}, tmp_path / "s1.safetensors")
    save_file({"b": W + 1}, tmp_path / "s2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return resolve_source(str(tmp_path))


def test_shards_are_one_checkpoint(tmp_path):
    source = sharded(tmp_path, {"b": "s2.safetensors", "a": "s1.safetensors"})
    assert list(source.tensors) == ["a", "b"]
    assert [path.name for path in source.files] == ["s1.safetensors", "s2.safetensors"]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in source.files]
    text = f"s1.safetensors {digests[0]}\ns2.safetensors {digests[1]}"
    assert source.sha256 == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "../s1.safetensors"}, "outside its directory"),
        ({"a": ".."}, "outside its directory"),
        ({"a": "\ud800.safetensors"}, r"or no file: \\ud800\.safetensors"),
        ({"a": "s2.safetensors"}, "shards do not hold"),
        ({"a": "s9.safetensors"}, "no such file"),
        ({}, "no weight_map"),
    ],
)
def test_broken_indexes(tmp_path, weight_map, words):
    with pytest.raises(DmmError, match=words):
        sharded(tmp_path, weight_map)


def test_an_index_that_has_no_end_is_not_read(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    os.mkfifo(index)
    for named in (tmp_path, index):
        with deadline(), pytest.raises(DmmError, match=f"not a regular file: {index}"):
            resolve_source(str(named))
    index.unlink()
    index.symlink_to("/dev/zero")
    with deadline(), pytest.raises(DmmError, match=f"not a regular file: {index}"):
        resolve_source(str(tmp_path))
    index.unlink()
    with index.open("wb") as file:
        file.truncate(10**9)
    with deadline(), pytest.raises(DmmError, match="too large to be an index: 1000000000 bytes"):
        resolve_source(str(tmp_path))


def test_lists_and_records_may_come_through_pipes(tmp_path, write):
    path, pipe = write("a", w=W), tmp_path / "pipe.json"
    os.mkfifo(pipe)
    record = json.dumps({"schema": "dmm.merge/1", "sources": [{"path": str(path)}]})
    for argument, text in ((f"@{pipe}", str(path)), (str(pipe), record)):
        writer = threading.Thread(target=pipe.write_text, args=[text])
        writer.start()
        with deadline():
            assert [source.path for source in resolve_sources([argument])] == [path]
        writer.join()


def test_sha256_is_the_hash_of_the_file(write):
    path = write("a", w=W)
    assert resolve_source(str(path)).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-*.safetensors"], "no file matches"),
        (["@nothing.txt"], "cannot read nothing.txt: No such file or directory$"),
        (["nothing.json"], "cannot read nothing.json: No such file or directory$"),
        (["."], "no model.safetensors and no"),
    ],
)
def test_inputs_that_are_not_there(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DmmError, match=words):
        resolve_sources(arguments)


@pytest.mark.parametrize(
    ("name", "text", "what", "hint"),
    [
        ("config.json", "{}", "no model.safetensors and no", "weights belong into a model.safetensors"),
        ("config.json", "{", "config.json is not valid JSON", "write it again"),
        ("model.safetensors.index.json", "[]", "is not a JSON object", "write it again"),
        ("model.safetensors.index.json", "{}", "has no weight_map", "copy all files of the checkpoint again"),
        ("model.safetensors.index.json", '{"weight_map": {"ghost": "m.safetensors"}}', "do not hold", "copy all files"),
    ],
)
def test_directories_that_are_damaged_are_told_with_a_way_out(write, tmp_path, name, text, what, hint):
    shard = write("m", w=W)
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    if "weight_map" in text:
        shutil.copy(shard, directory / shard.name)
    if text == "{":
        shutil.copy(shard, directory / "model.safetensors")
    (directory / name).write_text(text)
    with pytest.raises(DmmError) as error:
        resolve_source(str(directory)).metadata  # noqa: B018
    assert what in error.value.what and hint in error.value.hint


def test_records_that_are_not_ours(tmp_path):
    torn = '{"schema": "dmm.merge/1", "sources": [{"label": "a"}]}'
    ours = "not a record of a dmm stage"
    for text, words in (("{", "not valid JSON"), ("[]", "not a JSON object"), ("{}", ours), (torn, ours)):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(DmmError, match=words):
            resolve_sources([str(tmp_path / "r.json")])


def test_a_record_that_is_read_elsewhere_says_whose_paths_are_missing(write, tmp_path, monkeypatch):
    write("a", w=W)
    record = {"schema": "dmm.merge/1", "sources": [{"label": "a", "path": "a.safetensors"}]}
    (tmp_path / "merge.json").write_text(json.dumps(record))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(DmmError, match=r"\.\./merge\.json names checkpoints that are not there") as caught:
        resolve_sources(["../merge.json"])
    assert caught.value.evidence == ("no such file: a.safetensors",)
    assert "directory of that stage" in caught.value.hint


def test_too_few(write):
    with pytest.raises(DmmError, match="2 checkpoints or more, got 1"):
        resolve_sources([str(write("a", w=W))], minimum=2)


def test_every_difference_is_listed(write):
    paths = [write("a", w=W, v=W), write("b", w=W[:1], u=W), write("c", w=W, v=W)]
    sources = resolve_sources([str(path) for path in paths])
    with pytest.raises(DmmError) as error:
        require_same_tensors(sources)
    assert list(error.value.evidence) == [
        f"{paths[1]} lacks v",
        f"{paths[1]} also holds u",
        f"{paths[1]}: w is [1, 2], not [2, 2]",
    ]
    require_same_tensors([sources[0], sources[2]])


def test_links_of_one_name_have_labels_by_their_own_paths(tmp_path):
    """As stores keep data: the name is the link's, and what it points to has another."""
    (tmp_path / "store").mkdir()
    for number in range(3):
        save_file({"w": np.full(2, number, np.float32)}, tmp_path / "store" / f"{number}{number}.safetensors")
        (tmp_path / f"site{number}").mkdir()
        (tmp_path / f"site{number}" / "m.safetensors").symlink_to(f"../store/{number}{number}.safetensors")
    paths = [tmp_path / f"site{number}" / "m.safetensors" for number in (2, 0, 1)]
    assert labels(*paths) == ["site2/m", "site0/m", "site1/m"]
    (tmp_path / "latest").symlink_to(tmp_path / "site1")
    assert labels(tmp_path / "latest" / "m.safetensors", paths[2]) == ["latest/m", "site1/m"]


def test_a_file_beside_a_directory_of_its_name(tmp_path):
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "a.safetensors", tmp_path / "a" / "model.safetensors"):
        save_file({"w": np.ones(2, np.float32)}, path)
    assert labels(tmp_path / "a.safetensors", tmp_path / "a") == ["a.safetensors", "a"]
    assert labels(tmp_path / "a", tmp_path / "a.safetensors") == ["a", "a.safetensors"]


@pytest.mark.parametrize("text", ["[" * 100_000, "{" + '"a":{' * 100_000])
def test_json_that_is_nested_too_deep_is_refused(tmp_path, text):
    (tmp_path / "deep.json").write_text(text)
    with pytest.raises(DmmError, match=r"deep\.json is not valid JSON"):
        resolve_sources([str(tmp_path / "deep.json")])


def test_a_nul_in_a_path_is_refused(tmp_path):
    (tmp_path / "list.txt").write_text("a\0b.safetensors\n")
    with pytest.raises(DmmError, match="NUL"):
        resolve_sources([f"@{tmp_path}/list.txt"])


def test_a_standard_input_that_is_closed_is_refused():
    with pytest.raises(DmmError, match="standard input cannot be read"):
        resolve_sources(["-"], stdin=None)


def test_a_link_to_nothing_is_told_with_where_it_points(tmp_path):
    (tmp_path / "x.safetensors").symlink_to("blobs/7")
    with pytest.raises(DmmError, match=r"a link to nothing: .*x\.safetensors") as caught:
        resolve_source(str(tmp_path / "x.safetensors"))
    assert caught.value.evidence == ("it points to blobs/7, which is not there",)
    assert "did you mean" not in caught.value.hint


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_a_directory_of_pickles_has_the_hint_of_a_pickle(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(100))
    errors = []
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(DmmError) as caught:
            resolve_source(str(path))
        errors.append(caught.value)
    assert errors[0].evidence == (f"it holds {name}, a pickle; dmm never opens pickles",)
    assert errors[0].hint == errors[1].hint and "safetensors.torch.save_file" in errors[0].hint
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(DmmError) as caught:
        resolve_source(str(tmp_path))
    assert caught.value.evidence == ("it holds a.safetensors",) and "name the files" in caught.value.hint


def test_a_directory_of_shards_under_another_name_names_their_index(tmp_path):
    for name in ("group-0-00001-of-00002", "group-0-00002-of-00002", "other"):
        save_file({name: W}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "group-0.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"other": "other.safetensors"}}))
    with pytest.raises(DmmError) as caught:
        resolve_source(str(tmp_path))
    assert caught.value.evidence == (f"it holds {index.name}", "it holds other.safetensors")
    assert caught.value.hint == f"name the files: '{index}' '{tmp_path / 'other.safetensors'}'"
    assert [source.path for source in resolve_sources([str(index)])] == [index]
