"""Interrupted, killed and shared: always the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import DIGITS, Watcher, in_two_processes, two_generators

from dmm_cli import training
from dmm_cli.commands.synthesize import synthesize_sources
from dmm_cli.errors import DmmError
from dmm_cli.inputs import resolve_source, resolve_sources
from dmm_cli.synthesis.settings import Settings

SITES = [str(DIGITS / f"site-{name}.safetensors") for name in "de"]
SHORT = {
    "generator": Settings(12, 8, 4),
    "pixels": Settings(12, 8, 4, engine="pixels"),
    "generator with all options": Settings(12, 16, 4, jitter=1, flip=True, plateau=0.9, norm_average=0.8),
    "pixels with all options": Settings(12, 16, 4, engine="pixels", jitter=1, flip=True, keep_best=True, plateau=0.9),
}


def made(path, settings, watcher=None, **options) -> bytes:
    student = resolve_source(str(DIGITS / "site-b.safetensors")) if settings.plateau else None
    with two_generators():
        synthesize_sources(
            resolve_sources(SITES), path, settings, arch=None, device="cpu", student=student,
            on_progress=watcher or Watcher(), **options,
        )  # fmt: skip
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """What each way makes when nothing comes between."""
    folder = tmp_path_factory.mktemp("whole")
    return {name: made(folder / f"{name}.safetensors", settings) for name, settings in SHORT.items()}


@pytest.mark.parametrize("name", SHORT)
def test_an_interrupted_synthesis_goes_on_to_the_same_bytes(tmp_path, whole, name):
    """Interrupted while the class prior is estimated, and once more while the images are made."""
    out, settings = tmp_path / "p.safetensors", SHORT[name]
    for share in (0.2, 0.7):
        with pytest.raises(KeyboardInterrupt):
            made(out, settings, Watcher(share))
        assert not out.exists() and (tmp_path / "p.safetensors.partial").is_dir()
    rest = Watcher()
    assert made(out, settings, rest) == whole[name]
    assert rest.last == 1 and (rest.steps < settings.steps or settings.engine == "pixels")
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("name", [name for name in SHORT if name.startswith("generator")])
def test_a_state_saved_in_the_midst_counts_after_a_kill(tmp_path, whole, monkeypatch, name):
    """As after SIGKILL: only what was saved at an interval is there."""
    out, settings = tmp_path / "p.safetensors", SHORT[name]
    directory = tmp_path / "p.safetensors.partial"
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    states = {}

    def keep(stage, done, total, **numbers):
        if done >= total // 2 and not states:
            states.update((path.name, path.read_bytes()) for path in directory.glob("generator-*"))

    made(out, settings, keep)
    out.unlink()
    directory.mkdir()
    for file, content in states.items():
        (directory / file).write_bytes(content)
    rest = Watcher()
    assert made(out, settings, rest) == whole[name]
    assert states and rest.steps < 1.5 * settings.steps, "of two generators"


def test_what_was_made_while_an_output_appeared_is_not_lost(tmp_path, whole):
    out = tmp_path / "p.safetensors"

    def write_first(*_, **__):
        out.write_bytes(b"mine")

    with pytest.raises(DmmError, match="the output exists"):
        made(out, SHORT["generator"], write_first)
    assert out.read_bytes() == b"mine" and (tmp_path / "p.safetensors.partial").is_dir()
    rest = Watcher()
    assert made(out, SHORT["generator"], rest, force=True) == whole["generator"]
    assert rest.steps < SHORT["generator"].steps / 2 and list(tmp_path.iterdir()) == [out]


PROGRAM = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])
from test_resume import SHORT, made
from dmm_cli.ranks import joined
with joined() as ranks:
    for engine, settings in SHORT.items():
        made(Path(sys.argv[2]) / (engine + ".safetensors"), settings, ranks=ranks)
"""


def test_two_processes_write_the_bytes_of_one(tmp_path, whole):
    in_two_processes(PROGRAM, Path(__file__).parent, tmp_path)
    assert {path.stem: path.read_bytes() for path in tmp_path.iterdir()} == whole
