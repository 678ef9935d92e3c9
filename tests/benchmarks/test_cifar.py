"""The parts of the CIFAR-10 benchmark that its table rests on."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmarks.cifar import split
from benchmarks.cifar.cells import PROFILES, Cell, Images
from benchmarks.cifar.training import SPEC, Learner, Recipe, Task
from conftest import ROOT
from PIL import Image
from scipy import ndimage

from dmm_cli.images import PixelSpace
from dmm_cli.inputs import resolve_source
from dmm_cli.loading import load_model

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 500))
TINY = Recipe("resnet18,num_classes=2,layers=(1,1,1,1),channels=(4,4,4,4)", epochs=1, batch=16, rate=1e-2)


def photographs(count: int) -> np.ndarray:
    """Smooth images in colour, uint8 (N, 3, 32, 32)."""
    noise = np.random.default_rng(1).normal(size=(count, 3, 32, 32))
    smooth = ndimage.gaussian_filter(noise, (0, 0, 2, 2))
    return (128 + 60 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("clients", "alpha", "seed"), [(5, 0.01, 0), (5, 100.0, 1), (10, 0.1, 2), (20, 0.5, 3)])
def test_every_image_goes_to_one_client(clients, alpha, seed):
    parts = split.dirichlet(LABELS, clients, alpha, seed)
    assert len(parts) == clients and min(map(len, parts)) >= split.SMALLEST
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))
    again, other = (split.dirichlet(LABELS, clients, alpha, number) for number in (seed, seed + 1))
    assert all(map(np.array_equal, parts, again)) and not all(map(np.array_equal, parts, other))


def test_alpha_says_how_much_clients_differ():
    def largest_shares(alpha: float) -> np.ndarray:
        counts = [np.bincount(LABELS[own], minlength=10) for own in split.dirichlet(LABELS, 5, alpha, 0)]
        return np.max(counts, 0) / 500  # (10,), of the client that has most of a class

    assert largest_shares(0.01).mean() > 0.85 and largest_shares(split.EVEN).max() < 0.35


def test_a_common_start_sees_what_no_client_has():
    base, rest = split.base_and_rest(LABELS, 0)
    assert np.bincount(LABELS[base]).tolist() == [25] * 10
    assert np.array_equal(np.sort(np.concatenate([base, rest])), np.arange(len(LABELS)))


def test_renderings_are_what_they_say():
    images = photographs(1010)
    grey, inverted, blurred, noisy, rotated = (split.rendered(images, name, 0) for name in split.RENDERINGS)
    luma = np.array(Image.fromarray(images[7].transpose(1, 2, 0)).convert("L"), int)
    assert np.abs(grey[7].astype(int) - luma).max() <= 1
    assert np.array_equal(inverted, 255 - images)
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    assert np.abs(blurred[1005, 2] - ndimage.convolve(images[1005, 2].astype(float), kernel, mode="nearest")).max() < 1
    assert np.array_equal(rotated[:, 1], images[:, 0]) and np.array_equal(rotated[:, 0], images[:, 2])
    between = (images > 100) & (images < 156)  # four deviations from either end
    noise = (noisy.astype(float) - images)[between]
    assert noise.std() == pytest.approx(25, rel=0.01) and abs(noise.mean()) < 0.3
    assert np.array_equal(noisy, split.rendered(images, "noisy", 0))
    assert not np.array_equal(noisy, split.rendered(images, "noisy", 1))


def test_a_cell_renders_what_clients_see_and_what_they_are_judged_by(tmp_path):
    images = photographs(2000)
    data = Images(images, np.arange(2000) % 10, images[:50], np.arange(50) % 10, tuple("abcdefghij"))
    cell = Cell(tmp_path, PROFILES["small"], "renderings-shared", 3, data, False)
    seen, labels = cell.seen(1)
    assert np.array_equal(seen, 255 - images[cell.shares[1]]) and np.array_equal(labels, cell.shares[1] % 10)
    cell.write_images()
    test = np.load(cell.test)["images"]
    assert np.array_equal(test[1::5], 255 - images[1:50:5]) and np.array_equal(test[4::5, 1], images[4:50:5, 0])
    (base,) = cell.starts(pooled=False)
    assert len(base.labels) == 100 and sum(map(len, cell.shares)) == 1900
    assert [task.start for task in cell.trainings()] == [cell.base] * 5


def test_training_that_was_interrupted_ends_in_the_same_bytes(tmp_path):
    """Two classes, one of darker images."""
    torch.set_num_threads(1)  # as clients are trained
    labels = np.arange(200) % 2
    images = (photographs(200) // 2 + 90 * labels[:, None, None, None]).astype(np.uint8)
    task = Task(tmp_path / "a.safetensors", TINY, images, labels, ("dark", "bright"), 0)
    finish(Learner(task, torch.device("cpu")))
    other = replace(task, output=tmp_path / "b.safetensors")
    first = Learner(other, torch.device("cpu"))
    steps = first.train()
    for _ in range(60):
        next(steps)
    first.save()
    assert not other.output.exists()
    second = Learner(other, torch.device("cpu"))
    assert second.done == 60
    finish(second)
    assert other.output.read_bytes() == task.output.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "a.seconds", "b.safetensors", "b.seconds"}
    source = resolve_source(str(task.output))
    model, _ = load_model(source)
    answers = model(PixelSpace(SPEC).from_bytes(torch.from_numpy(images))).argmax(1)
    assert (answers.numpy() == labels).mean() > 0.95
    assert json.loads(source.metadata["dmm.classes"]) == ["dark", "bright"]
    assert "dmm.class_counts" not in source.metadata


def finish(learner: Learner) -> None:
    list(learner.train())
    learner.save()


BENCHMARK = """
from dataclasses import replace
import cifar_clients
from cifar.training import Recipe
arch = "timm.models.mlp_mixer:MlpMixer,num_classes=2,img_size=32,patch_size=8,embed_dim=8,num_blocks=1"
full = cifar_clients.PROFILES["full"]
cifar_clients.PROFILES["full"] = replace(full, clients=2, own=Recipe(arch, epochs=1, batch=4))
cifar_clients.main()
"""


READ = """
from pathlib import Path
import numpy as np
from cifar_clients import load_images
np.savez("read.npz", **vars(load_images(Path("packed"), Path())))
"""


def test_packed_images_are_those_of_the_folder(tmp_path):
    images, program = photographs(6), ROOT / "tests" / "benchmarks" / "pack_cifar10.py"
    for part, label, number in itertools.product(("train", "test"), range(2), range(3)):
        place = tmp_path / part / ("cat", "dog")[label]
        place.mkdir(parents=True, exist_ok=True)
        picture = images[3 * label + number].transpose(1, 2, 0)
        Image.fromarray(picture).save(place / f"{number}.png")  # without loss, as JPEG is not
    subprocess.run([sys.executable, program, tmp_path, tmp_path / "packed"], check=True, capture_output=True)
    paths = {"PYTHONPATH": str(ROOT / "tests" / "benchmarks")}
    subprocess.run([sys.executable, "-c", READ], check=True, cwd=tmp_path, env=os.environ | paths)
    with np.load(tmp_path / "read.npz") as read:
        assert read["classes"].tolist() == ["cat", "dog"]
        for part in ("train", "test"):
            assert np.array_equal(read[part], images) and read[f"{part}_labels"].tolist() == [0, 0, 0, 1, 1, 1]


def test_the_whole_benchmark_on_clients_whose_files_name_a_factory(tmp_path):
    """As in the full profile: what their files name is trusted, here and in the commands that are called."""
    labels = np.arange(200) % 2
    images = (photographs(200) // 2 + 90 * labels[:, None, None, None]).astype(np.uint8)
    work = tmp_path / "work"
    work.mkdir()
    np.savez(tmp_path / "train.npz", classes=np.array(["dark", "bright"]))
    for part in ("train", "test"):
        np.savez(work / f"cifar10-{part}.npz", images=images, labels=labels)
    flags = f"--cifar10 {tmp_path} --work {work} --profile full --settings 100-own --seeds 0 --rows linear"

    def table() -> list[str]:
        command = [sys.executable, "-c", BENCHMARK, *flags.split()]
        environment = {name: value for name, value in os.environ.items() if name != "DMM_TRUST"}
        paths = {"PYTHONPATH": str(ROOT / "tests" / "benchmarks")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment | paths, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    first = table()
    (merge,) = [line for line in first if line.startswith("| linear, analytic variances |")]
    assert 0 <= float(merge.split("|")[2]) <= 100
    made = {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}
    assert len(made) == 3 and table() == first  # two clients and their merge, which are kept
    assert made == {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}
