"""How many images a step has room for, against what the layers of a network hold."""

from __future__ import annotations

import os
import resource

import pytest
import torch
from conftest import DIGITS, dmm

from dmm_cli.commands._options import InputFlags
from dmm_cli.commands.synthesize import load_teachers
from dmm_cli.inputs import resolve_sources
from dmm_cli.runtime import workers
from dmm_cli.synthesis import memory
from dmm_cli.synthesis.settings import Settings

CPU = torch.device("cpu")
SITES = [str(DIGITS / f"site-{name}.safetensors") for name in "de"]


@pytest.fixture(scope="module")
def teachers():
    return load_teachers(resolve_sources(SITES), None, CPU, (1.0,) * 10, InputFlags())


def batch(teachers, monkeypatch, free: int, count: int = 4096, engine: str = "pixels") -> int:
    monkeypatch.setattr(memory, "free_memory", lambda _: free)
    return memory.Room(*teachers, Settings(count, 10, None, engine=engine), CPU, 1).fitting_batch()


def test_the_batch_grows_with_the_memory_up_to_a_limit(teachers, monkeypatch):
    found = [batch(teachers, monkeypatch, mib << 20) for mib in (0, 10, 20, 40, 1 << 20)]
    assert found[0] == 2 and found[-1] == memory.LARGEST
    assert found[1] > 2 and found[2] == 2 * found[1] and found[3] == 4 * found[1]
    assert batch(teachers, monkeypatch, 1 << 40, count=40) == 32


def test_a_step_of_that_size_keeps_at_most_its_share(teachers, monkeypatch):
    """Against the sizes of all layers' outputs: each is kept once at least, and BatchNorm's input once more."""
    model, seen = teachers[0][0].model, []
    handles = [
        layer.register_forward_hook(lambda _, __, output: seen.append(output.numel()))
        for layer in model.modules()
        if not list(layer.children())
    ]
    model(torch.zeros(1, 1, 16, 16))
    for handle in handles:
        handle.remove()
    held = 4 * sum(seen)  # bytes of an image
    free = 30 << 20
    images = batch(teachers, monkeypatch, free) * workers(CPU, 1)
    assert 0.1 * memory.SHARE * free < images * held < 2 * memory.SHARE * free


def test_an_engine_that_shows_all_teachers_at_once_takes_smaller_batches(teachers, monkeypatch):
    sizes = [batch(teachers, monkeypatch, 30 << 20, engine=engine) for engine in ("pixels", "generator")]
    assert sizes[0] == 2 * sizes[1]
    assert batch(teachers, monkeypatch, 0, engine="generator") == 8, "an image for each part of a mixture"


def test_free_memory_is_less_than_there_is():
    pages = resource.getpagesize()
    assert 0 < memory.free_memory(CPU) < pages * os.sysconf("SC_PHYS_PAGES")


def test_auto_is_written_down_as_the_number_it_was(tmp_path):
    command = ["synthesize", SITES[0], "--count", 4, "--steps", 2, "--class-prior", ",".join("1" * 10)]
    result = dmm(*command, "--batch", "auto", "--loss", "cross_entropy=50", "-o", tmp_path / "p.safetensors", "--json")
    assert '"batch": 8' in result.stdout or "recognises none" in result.stderr, result.output
    refused = dmm(*command, "--batch", "1", "-o", tmp_path / "q.safetensors")
    assert refused.exit_code == 2 and "2 or more, or auto" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--count", 10**13, "--batch", 8],
            "no room for 10,000,000,000,000 images of each of 2 teachers: they take 4,768,371.6 GiB",
        ),
        (["--count", 8, "--batch", 1_000_000_000], "no room for a step on 1,000,000,000 images"),
    ],
)
def test_what_the_memory_has_no_room_for_is_refused_before_the_first_step(tmp_path, flags, words):
    result = dmm("synthesize", *SITES, *flags, "--steps", 2, "-o", tmp_path / "p.safetensors")
    assert result.exit_code == 2 and words in result.stderr and "are free" in result.stderr
    assert not list(tmp_path.iterdir())
