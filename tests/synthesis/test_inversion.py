"""Inversion against teachers whose data are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import DIGITS, two_generators
from safetensors.numpy import load_file, save_file

from dmm_cli.commands.synthesize import load_teachers
from dmm_cli.errors import DmmError
from dmm_cli.images import InputSpec, PixelSpace
from dmm_cli.inputs import resolve_source, resolve_sources
from dmm_cli.runtime import Host
from dmm_cli.savepoint import Savepoint
from dmm_cli.synthesis import ENGINES
from dmm_cli.synthesis.inversion import storable, synthesize
from dmm_cli.synthesis.objective import Objective
from dmm_cli.synthesis.pseudodata import load_pseudo_data, save_pseudo_data
from dmm_cli.synthesis.settings import Settings
from dmm_cli.synthesis.statistics import NormLayer
from dmm_cli.synthesis.task import Task
from dmm_cli.synthesis.teacher import Teacher, require_statistics

CPU = torch.device("cpu")
HOST = Host(CPU)
QUICK = {"generator": Settings(64, 60, 16), "pixels": Settings(32, 80, 32, engine="pixels")}


def teachers(*names: str):
    return load_teachers(resolve_sources([str(DIGITS / f"site-{name}.safetensors") for name in names]), None, CPU)


@pytest.fixture(scope="module")
def drawn():
    """Pseudo-data of two sites, by each engine."""
    with two_generators():
        return {name: synthesize(*teachers("d", "e"), settings, HOST) for name, settings in QUICK.items()}


@pytest.mark.parametrize("engine", ENGINES.names())
def test_every_image_is_recognised_and_labelled_by_its_owner(drawn, engine):
    data = drawn[engine].data
    owners, spec = teachers("d", "e")
    images = PixelSpace(spec).from_bytes(torch.from_numpy(data.images))
    for number, owner in enumerate(owners):
        mine = torch.from_numpy(data.teacher_id == number)
        logits = owner.logits(images[mine])
        assert torch.equal(logits.argmax(1), torch.from_numpy(data.targets)[mine])
        assert torch.allclose(logits, torch.from_numpy(data.logits)[mine].float(), atol=0.05, rtol=0.01)
        sure = logits.softmax(1).max(1).values
        assert torch.allclose(sure, torch.from_numpy(data.confidence)[mine].float(), atol=1e-3)
        record = data.teachers[number]
        assert record.accepted == int(mine.sum()) and sum(record.prior) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("engine", ENGINES.names())
def test_priors_tell_the_classes_each_site_was_trained_on(drawn, engine):
    """Planted truth: site d holds 7 and 8 in about equal shares, site e holds 9 alone."""
    both, alone = (torch.tensor(teacher.prior) for teacher in drawn[engine][0].teachers)
    assert both[7:9].sum() > 0.95 and 0.25 < both[7] < 0.75
    assert alone[9] > 0.95


@pytest.mark.parametrize("engine", ENGINES.names())
def test_the_images_match_the_statistics_better_than_noise(drawn, engine):
    data, history, _ = drawn[engine]
    (owner, _), spec = teachers("d", "e")
    only = Objective({"cross_entropy": 0.0})
    images = PixelSpace(spec).from_bytes(torch.from_numpy(data.images[data.teacher_id == 0]))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    losses = [float(only(owner, batch, torch.zeros(len(batch), dtype=torch.int64))[0]) for batch in (images, noise)]
    assert losses[0] < 0.3 * losses[1]
    assert history.curves["norm"][-1] < history.curves["norm"][0]


@pytest.mark.parametrize("engine", ENGINES.names())
def test_same_seed_same_bytes_and_another_seed_other_images(tmp_path, engine):
    settings = replace(QUICK[engine], count=8, steps=5, batch=8)
    files = []
    for number, seed in enumerate((0, 0, 1)):
        owners, spec = teachers("d")
        torch.set_num_threads(1 + number)
        data, *_ = synthesize(owners, spec, replace(settings, seed=seed), HOST)
        files.append(tmp_path / f"{number}.safetensors")
        save_pseudo_data(files[-1], data, {})
    first, second, other = (file.read_bytes() for file in files)
    assert first == second, "whatever the number of threads"
    assert first != other


@pytest.mark.parametrize(("count", "sizes"), [(17, [8, 9]), (32, [16, 16]), (33, [11, 11, 11]), (5, [5])])
def test_no_batch_is_of_a_few_images_left_over(count, sizes):
    owners, spec = teachers("e")
    owners = [replace(owners[0], prior=torch.eye(10)[9])]
    engine = ENGINES.load("pixels")(Task(owners, spec, Settings(count, 1, 16, engine="pixels"), Host(CPU, Savepoint())))
    engine.fit([owners[0].prior])
    assert [len(targets) for _, targets in engine.candidates(0, owners[0].prior)] == sizes


@pytest.mark.parametrize("engine", ENGINES.names())
def test_half_the_bits_tell_the_same_loss_but_for_rounding(engine):
    losses = {}
    for precision in ("float32", "bfloat16"):
        owners = [replace(teacher, precision=precision, prior=torch.eye(10)[9]) for teacher in teachers("e")[0]]
        settings = Settings(8, 2, 8, engine=engine, precision=precision)
        losses[precision] = synthesize(owners, teachers("e")[1], settings, HOST)[1].curves["norm"][0]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)


def test_a_view_in_half_the_bits_computes_what_autocast_does_and_leaves_its_teacher_whole():
    (owner,), spec = teachers("e")
    owner = replace(owner, precision="bfloat16")
    before = [value.clone() for value in owner.model.parameters()]
    images, targets = torch.randn(4, *spec.size, generator=torch.Generator().manual_seed(0)), torch.zeros(4).long()
    expected, seen = owner.observe(images, targets), owner.view().observe(images, targets)
    assert torch.equal(seen.logits, expected.logits)
    assert all(torch.equal(a.variance, b.variance) for a, b in zip(seen.layers, expected.layers, strict=True))
    after = list(owner.model.parameters())
    assert all(
        value.dtype == torch.float32 and torch.equal(value, old) for value, old in zip(after, before, strict=True)
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_are_computed_from_others_are_no_plain_ones():
    model = torch.nn.Sequential(torch.nn.utils.weight_norm(torch.nn.Linear(6, 4)), torch.nn.Linear(4, 3))
    model.requires_grad_(False)(torch.zeros(1, 6))
    view = Teacher("normed", "0" * 64, model, [], 3, precision="bfloat16").view()
    found = {name: value.dtype for name, value in view.model.named_parameters()}
    assert {name for name, dtype in found.items() if dtype == torch.bfloat16} == {"1.weight", "1.bias"}


def test_a_known_prior_is_kept():
    (owner,), spec = teachers("d")
    given = replace(owner, prior=torch.tensor([0.0] * 7 + [0.25, 0.75, 0.0]), prior_from="--class-prior")
    with two_generators():
        data, *_ = synthesize([given], spec, Settings(40, 20, 16), HOST)
    assert data.teachers[0].prior[7:9] == (0.25, 0.75)


def test_a_teacher_that_recognises_nothing_is_told_with_the_class_mix_it_was_given():
    owners, spec = teachers("e")
    never = replace(owners[0], prior=torch.eye(10)[3], prior_from="--class-prior")  # site e knows 9 alone
    with pytest.raises(DmmError, match="recognises none of its") as error:
        synthesize([never], spec, Settings(4, 2, 8, engine="pixels"), HOST)
    assert "is its class mix, by --class-prior, another" in error.value.hint
    with pytest.raises(DmmError, match="recognises none of its") as error:
        synthesize([replace(never, prior_from="estimated")], spec, Settings(4, 2, 8, engine="pixels"), HOST)
    assert "class mix" not in error.value.hint


def test_the_file_comes_back(tmp_path, drawn):
    data = drawn["generator"].data
    path = tmp_path / "p.safetensors"
    save_pseudo_data(path, data, {"dmm.seed": "0"})
    got = load_pseudo_data(resolve_source(str(path)))
    for name in ("images", "targets", "teacher_id", "logits", "confidence", "bn_loss"):
        assert (getattr(got, name) == getattr(data, name)).all()
        assert getattr(got, name).dtype == getattr(data, name).dtype
    assert (got.teachers, got.spec) == (data.teachers, data.spec)
    assert got.classes == data.classes == tuple("0123456789")  # as the sites name them
    assert got.teacher_index(data.teachers[1].sha256) == 1 and got.teacher_index("0") is None


def test_classes_without_names_go_by_number(tmp_path, drawn):
    path = tmp_path / "p.safetensors"
    save_pseudo_data(path, replace(drawn["pixels"].data, classes=()), {})
    source = resolve_source(str(path))
    assert "dmm.classes" not in source.metadata
    assert load_pseudo_data(source).name_of(7) == "7"


def test_names_of_other_than_all_classes_are_an_error(tmp_path, drawn):
    path = tmp_path / "p.safetensors"
    save_pseudo_data(path, replace(drawn["pixels"].data, classes=("cat", "dog")), {})
    with pytest.raises(DmmError, match=r"has 10 classes, but dmm\.classes in its metadata names 2"):
        load_pseudo_data(resolve_source(str(path)))


def test_numbers_of_another_kind_are_read_as_those_we_write(tmp_path, drawn):
    data, path = drawn["pixels"].data, tmp_path / "p.safetensors"
    others = {"targets": data.targets.astype(np.int32), "teacher_id": data.teacher_id.astype(np.uint8)}
    save_pseudo_data(path, replace(data, **others), {})
    got = load_pseudo_data(resolve_source(str(path)))
    for name in others:
        assert (getattr(got, name) == getattr(data, name)).all()
        assert getattr(got, name).dtype == getattr(data, name).dtype


def test_logits_beyond_float16_are_stored_by_their_differences():
    logits = torch.tensor([[9e4, 8e4, -9e4], [3.0, -torch.inf, -65510.0], [65504.0, 0.1, 2.0]])
    held = storable(logits).numpy().astype(np.float16)
    assert held[0].tolist() == [0.0, -10000.0, -65504.0]
    assert np.array_equal(held[1:], logits[1:].numpy().astype(np.float16))


def test_files_that_are_not_pseudo_data():
    with pytest.raises(DmmError, match="not a pseudo-data file"):
        load_pseudo_data(resolve_source(str(DIGITS / "test.safetensors")))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input", None),
        ("input", "{}"),
        ("input", "[1]"),
        ("input", '{"size": [1, 16, 16]}'),
        ("input", '{"image": {"size": "x"}}'),
        ("input", '{"images": {"images": {"size": [1, 16, 16], "mean": [0.5], "std": [0.2]}}}'),
        ("input", '{"images": ' * 900 + "{}" + "}" * 900),
        ("input", '{"size": [], "mean": [0.5], "std": [0.2]}'),
        ("input", '{"size": [1, 16, 16], "mean": [], "std": [0.2]}'),
        ("input", '{"size": [1, 16, 16], "mean": [0.5, 0.5], "std": [0.2]}'),
        ("input", '{"size": [1, 16, 16], "mean": ["a"], "std": [0.2]}'),
        ("input", '{"size": [1, 16, 16], "mean": [0.5], "std": [0]}'),
        ("input", '{"size": [1, 16, 16], "mean": [0.5], "std": [null]}'),
        ("teachers", "{"),
        ("teachers", '[{"label": "a"}]'),
    ],
)
def test_damaged_metadata_are_an_error(tmp_path, drawn, key, value):
    path = tmp_path / "p.safetensors"
    save_pseudo_data(path, drawn["pixels"][0], {})
    metadata = {**resolve_source(str(path)).metadata, f"dmm.{key}": value}
    save_file(load_file(path), path, {name: text for name, text in metadata.items() if text is not None})
    with pytest.raises(DmmError, match=r"metadata of pseudo-data file .* are damaged"):
        load_pseudo_data(resolve_source(str(path)))


def test_losses_are_named():
    with pytest.raises(DmmError, match="unknown inversion loss: batch_norm"):
        Objective({"batch_norm": 1.0})


@pytest.mark.parametrize("engine", ENGINES.names())
def test_losses_that_no_input_changes_are_refused(engine):
    """How rough images are, where there are none."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)).eval()
    layers = [NormLayer(model[1], model[1].running_mean, model[1].running_var)]
    teacher = Teacher("vectors", "0" * 64, model.requires_grad_(False), layers, 3, torch.ones(3) / 3)
    weights = {"norm": 0.0, "cross_entropy": 0.0, "total_variation": 1.0}
    with pytest.raises(DmmError, match="depends on what teachers are shown"):
        synthesize([teacher], InputSpec((6,), (0.0,), (1.0,)), Settings(4, 2, 4, engine=engine, weights=weights), HOST)


def test_teachers_without_statistics_are_refused():
    with pytest.raises(DmmError, match="0 BatchNorm layers"):
        require_statistics("vit", [])
    with pytest.raises(DmmError, match="never updated"):
        require_statistics("fresh", [NormLayer(torch.nn.BatchNorm2d(3), torch.zeros(3), torch.ones(3))])
