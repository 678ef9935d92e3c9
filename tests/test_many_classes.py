"""Networks of more classes than a line of a table or a picture holds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import dmm
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from dmm_cli.architectures import build
from dmm_cli.images import InputSpec
from dmm_cli.manifest import SynthesisManifest
from dmm_cli.report.figures import ROWS, draw_image_grid
from dmm_cli.report.tables import render, teacher_table
from dmm_cli.synthesis.pseudodata import PseudoData, TeacherRecord

CLASSES = 120
ARCH = f"resnet18,num_classes={CLASSES},in_chans=1,layers=(1,1,1,1),channels=(4,6,8,10)"
SPEC = InputSpec((1, 8, 8), (0.5,), (0.25,))


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A network that names every class about as often: its logits are turned about their mean on random images."""
    torch.manual_seed(0)
    model = build(ARCH).train()
    images = torch.randn(256, *SPEC.size)
    with torch.no_grad():
        for _ in range(60):
            model(images)
        model.eval().fc.bias -= model(images).mean(0)
        model.fc.weight *= 20
        model.fc.bias *= 20
    path = tmp_path_factory.mktemp("many") / "net.safetensors"
    told = json.dumps({"size": list(SPEC.size), "mean": list(SPEC.mean), "std": list(SPEC.std)})
    save_torch({k: v.contiguous() for k, v in model.state_dict().items()}, path, {"dmm.arch": ARCH, "dmm.input": told})
    return path


def test_of_many_classes_pseudo_images_are_drawn(net, tmp_path):
    out = tmp_path / "p.safetensors"
    result = dmm("synthesize", net, "-o", out, "--count", 200, "--steps", 12, "--json", "--loss", "cross_entropy=1")
    assert result.exit_code == 0, result.stderr
    (teacher,) = json.loads(result.stdout)["teachers"]
    prior = np.array(teacher["prior"])
    assert prior.sum() == pytest.approx(1.0, abs=1e-4) and (prior > 0).sum() > 20 and prior.max() < 0.25
    table = render([teacher_table(SynthesisManifest.from_json(json.loads(result.stdout)))], "table")
    assert f"{(prior > 0).sum()} of {CLASSES} classes, {prior[prior > 0].min():.4f} to {prior.max():.4f}" in table


def test_recalls_of_many_classes_are_a_row_each(net, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2 * CLASSES, 1, 8, 8), dtype=np.uint8)
    save_file({"images": images, "labels": np.arange(2 * CLASSES) % CLASSES}, tmp_path / "data.safetensors")
    words = ["evaluate", net, "--data", tmp_path / "data.safetensors"]
    (row,) = json.loads(dmm(*words, "--json").stdout)["rows"]
    lines = dmm(*words, "--format", "tsv").stdout.splitlines()
    assert lines[:3] == ["model\taccuracy", f"net\t{row['accuracy']:.1f}", ""]
    titles = dmm(*words).stdout.splitlines()[0::4]
    assert titles[:2] == [f"accuracy on {2 * CLASSES} samples of {words[-1]}, %", "recall, %"]
    assert lines[3:] == ["class\tnet", *(f"{k}\t{recall:.0f}" for k, recall in enumerate(row["recall"]))]


def of_two_teachers(classes, names=()):
    """Pseudo-data of as many images of every class of each."""
    count = 4 * classes
    return PseudoData(
        images=np.zeros((count, 1, 8, 8), np.uint8),
        targets=np.tile(np.arange(classes), 4),
        teacher_id=np.repeat([0, 1], count // 2).astype(np.int16),
        logits=np.zeros((count, classes), np.float16),
        confidence=np.ones(count, np.float16),
        bn_loss=np.zeros(1, np.float32),
        teachers=tuple(TeacherRecord(name, name, (1 / classes,) * classes, count // 2, 0) for name in "ab"),
        spec=SPEC,
        classes=names,
    )


def captions_of(figure):
    return [axis.get_ylabel() for axis in figure.axes]


@pytest.mark.parametrize("classes", [20, 120])
def test_a_picture_shows_some_of_many_classes_and_says_so(classes):
    """Of two teachers: from the first class of one to the last of the other."""
    figure = draw_image_grid(of_two_teachers(classes))
    captions = captions_of(figure)
    assert len(captions) == len(set(captions)) == min(2 * classes, ROWS)
    assert captions[0].startswith("a: class 0\n") and captions[-1].startswith(f"b: class {classes - 1}\n")
    title = figure.get_suptitle()
    assert title == ("" if classes == 20 else f"{ROWS} of {2 * classes} classes of the teachers")


def test_a_picture_names_the_classes_that_have_names():
    names = ("early $ stage", "\u202elate", "a name that is longer than the margin")
    shown = ["early \\$ stage", "\\u202elate", "a name that... the margin"]
    captions = captions_of(draw_image_grid(of_two_teachers(3, names)))
    assert [caption.partition("\n")[0] for caption in captions] == [
        f"{teacher}: class {name}" for teacher in "ab" for name in shown
    ]
