"""What may be added to an inversion: each against its definition, and against what it is for.

Legend: B images, K classes.
"""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import DIGITS, dmm, two_generators
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dmm_cli import training
from dmm_cli.architectures import build
from dmm_cli.commands.synthesize import load_teachers, synthesize_sources
from dmm_cli.curves import Recorder
from dmm_cli.examples import Examples
from dmm_cli.images import InputSpec, PixelSpace
from dmm_cli.inputs import resolve_source, resolve_sources
from dmm_cli.loading import load_model
from dmm_cli.report import console
from dmm_cli.runtime import Host
from dmm_cli.savepoint import Savepoint
from dmm_cli.spaces import JointSpec, TokenSpec
from dmm_cli.synthesis import ENGINES
from dmm_cli.synthesis.average import PoolStatistics
from dmm_cli.synthesis.batch import Batch, Job, Pixels
from dmm_cli.synthesis.inversion import synthesize
from dmm_cli.synthesis.jitter import draw_moves, moved
from dmm_cli.synthesis.losses import Observation
from dmm_cli.synthesis.losses.adversarial import adversarial
from dmm_cli.synthesis.losses.total_variation import total_variation
from dmm_cli.synthesis.objective import Objective
from dmm_cli.synthesis.plateau import WINDOW, Plateau
from dmm_cli.synthesis.resolution import why_whole
from dmm_cli.synthesis.settings import Settings
from dmm_cli.synthesis.statistics import LayerStatistics, NormLayer
from dmm_cli.synthesis.task import Task
from dmm_cli.synthesis.teacher import Teacher

CPU = torch.device("cpu")
HOST = Host(CPU)
SITES = {name: str(DIGITS / f"site-{name}.safetensors") for name in "abcde"}
UNIFORM = ",".join("1" * 10)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_image_moves_by_its_own_draw_and_the_gradient_comes_back():
    images = normal(3, 2, 5, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    moves = torch.tensor([[1, 0, -2], [0, 3, -1], [0, 1, 1]])
    spec = InputSpec((2, 5, 7), (0.5,) * 2, (0.5,) * 2)
    got = moved(images, spec, moves)
    expected = torch.stack(
        [images[0].roll(1, 1), images[1].flip(2).roll(3, 2), images[2].flip(2).roll((-2, -1), (1, 2))]
    )
    assert torch.equal(got, expected)
    weights = normal(3, 2, 5, 7, seed=1)
    (grad,) = torch.autograd.grad((got * weights).sum(), images, retain_graph=True)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), images)
    assert torch.equal(grad, wanted)
    both = Examples({"image": images, "vector": normal(3, 4), "tokens": normal(3, 2, 5, 7)})
    joint = JointSpec(tuple(both.parts), (spec, InputSpec((4,), (0.0,), (1.0,)), TokenSpec((2, 5), 7)))
    parts = moved(both, joint, moves).parts
    assert torch.equal(parts["image"], got)
    assert all(parts[name] is both.parts[name] for name in ("vector", "tokens"))


def test_roughness_is_that_of_images_alone():
    """Weights of tokens have as many dimensions where these have two."""
    inputs = Examples({"image": normal(2, 1, 4, 4), "tokens": normal(2, 3, 3, 5)})
    joint = JointSpec(tuple(inputs.parts), (InputSpec((1, 4, 4), (0.5,), (0.5,)), TokenSpec((3, 3), 5)))

    class Blind(torch.nn.Module):
        def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            return image.new_zeros(len(image), 2)

    weights = {"norm": 0.0, "cross_entropy": 0.0, "total_variation": 1.0}
    teacher, targets = Teacher("blind", "0", Blind(), [], 2), torch.zeros(2).long()
    objective = Task([teacher], joint, Settings(weights=weights), HOST).objective()
    alone = Observation(inputs.parts["image"], targets.float(), targets, [])
    assert objective(teacher, inputs, targets)[0] == total_variation(alone)


def test_draws_stay_within_what_is_asked_for_and_nothing_is_drawn_for_nothing():
    stream = torch.Generator().manual_seed(0)
    before = stream.get_state()
    assert draw_moves(8, Settings(), stream) == () and torch.equal(stream.get_state(), before)
    (moves,) = draw_moves(4000, Settings(jitter=2), stream)
    assert set(moves[:2].flatten().tolist()) == {-2, -1, 0, 1, 2} and not moves[2].any()
    (moves,) = draw_moves(4000, Settings(flip=True), stream)
    assert not moves[:2].any() and 0.45 < moves[2].float().mean() < 0.55


def test_moved_images_are_matched_in_every_place():
    """Pixels that were seen in many places match the statistics in another place as well as in their own."""
    (owner,), spec = load_teachers(resolve_sources([SITES["d"]]), None, CPU, (0,) * 7 + (1, 1, 0))
    only, gaps = Objective({"cross_entropy": 0.0}), {}
    for jitter in (0, 2):
        settings = Settings(32, 30, 32, engine="pixels", jitter=jitter)
        images = PixelSpace(spec).from_bytes(torch.from_numpy(synthesize([owner], spec, settings, HOST).data.images))
        places = [images.roll((down, 2), (2, 3)) for down in (-2, 2)]
        here, *there = (float(only(owner, part, torch.zeros(len(part)).long())[0]) for part in (images, *places))
        gaps[jitter] = max(there) / here
    assert gaps[2] < gaps[0]


def test_the_images_of_the_lowest_loss_are_kept():
    space = PixelSpace(InputSpec((1, 2, 2), (0.0,), (1.0,)))
    pixels = Pixels(normal(3, 1, 2, 2), space, keep_best=True)
    shown = []
    for step, loss in enumerate((3.0, 1.0, math.nan, 2.0)):
        with torch.no_grad():
            pixels.raw[0].copy_(normal(3, 1, 2, 2, seed=step + 10))
        shown.append(pixels().detach().clone())
        pixels.remember(torch.tensor(loss))
    assert torch.equal(pixels.result(), shown[1]) and float(pixels.lowest) == 1.0


def test_of_noisy_steps_the_best_are_better_than_the_last():
    """Without jitter the loss of what is kept can be computed anew; stopped in the midst, the last are not the best."""
    (owner,), spec = load_teachers(resolve_sources([SITES["d"]]), None, CPU, (0,) * 7 + (1, 1, 0))
    objective, losses = Objective({}), {}
    for keep in (False, True):
        settings = Settings(32, 14, 32, engine="pixels", keep_best=keep, plateau=0.99)
        made = synthesize([owner], spec, settings, HOST)
        totals = [
            objective.total(dict(zip(made.history.curves, point, strict=True)))
            for point in zip(*made.history.curves.values(), strict=True)
        ]
        rows = torch.from_numpy(made.data.images), torch.from_numpy(made.data.targets)
        losses[keep] = float(objective(owner, PixelSpace(spec).from_bytes(rows[0]), rows[1])[0])
        assert made.steps.taken == len(totals) == 12 and made.steps.planned == 14
    assert losses[True] <= losses[False] + 0.02
    assert losses[True] == pytest.approx(min(totals), rel=0.25)


def plateau(values, share, coarse=0.0) -> list[bool]:
    """What is told after each point of a curve."""
    settings = Settings(steps=60, plateau=share, coarse=coarse)
    recorder = Recorder(settings.steps)
    told = Plateau(recorder, Objective({"cross_entropy": 0.5}), settings)
    found = []
    for step, value in enumerate(values):
        recorder.add(step, {"norm": torch.tensor(value), "cross_entropy": torch.tensor(2 * value)})
        found.append(told.reached())
    return found


def test_a_curve_that_falls_goes_on_and_one_that_lies_stops():
    falling = [0.9**step for step in range(30)]
    assert not any(plateau(falling, 0.2))
    assert not any(plateau([1.0] * 30, 0.0)), "unless asked"
    flat = plateau(falling + [falling[-1]] * 30, 0.01)
    assert flat.index(True) == 30 + 2 * WINDOW - 2, "mean of the newest below 0.99 of those before until they are flat"
    assert plateau([1.0] * 30, 0.01).index(True) == 2 * WINDOW - 1
    assert plateau([1.0] * 60, 0.01, coarse=0.5).index(True) == 30 + 2 * WINDOW - 1, "of one resolution"


def test_the_manifest_tells_the_steps_taken(tmp_path):
    out = tmp_path / "p.safetensors"
    flags = ["--count", 40, "--batch", 20, "--steps", 40, "--class-prior", UNIFORM, "--plateau", 99, "--json"]
    for engine, planned in (("pixels", 80), ("generator", 160)):
        result = dmm("synthesize", SITES["a"], "--engine", engine, *flags, "-o", out, "--force")
        manifest = json.loads(result.stdout)
        assert manifest["steps"]["planned"] == planned and manifest["history"]["step"][-1] == 11
        assert manifest["steps"]["taken"] == planned * 12 // 40
        assert f", {planned * 12 // 40} of {planned} steps" in result.stderr
        told = [line for line in result.stderr.splitlines() if line.startswith("synthesize ")]
        assert not told or " 100%" in told[-1]


@pytest.mark.parametrize("engine", ["pixels", "generator"])
def test_the_progress_of_a_stage_never_goes_back(tmp_path, monkeypatch, engine):
    monkeypatch.setattr(console, "PATIENCE", -1.0)
    sizes = ["--count", 8, "--batch", 8, "--steps", 8, "--loss", "cross_entropy=20"]
    told = dmm("synthesize", SITES["a"], "--engine", engine, *sizes, "-o", tmp_path / "p.safetensors").stderr
    shares: dict[str, list[int]] = {}
    for stage, share in re.findall(r"^(\w+) +(\d+)%", told, re.M):
        shares.setdefault(stage, []).append(int(share))
    assert list(shares) == (["estimate", "synthesize"] if engine == "pixels" else ["synthesize"])
    assert all(found == sorted(found) and found[-1] == 100 for found in shares.values()), shares


def test_an_average_over_batches_is_that_of_the_pool():
    """Against means and variances of weighted samples, whose batches differ in mean."""
    momentum, batches = 0.8, [normal(50, 3, seed=i) * (i + 1) + i for i in range(4)]
    stored = torch.tensor([0.5, -1.0, 2.0])
    pool = PoolStatistics([NormLayer(torch.nn.BatchNorm1d(3), stored, stored.abs())] * 2, momentum)
    for batch in batches:
        batch.requires_grad_()
        own = LayerStatistics(batch.mean(0) - stored, batch.var(0, correction=0), stored.abs(), 1e-5)
        (got,) = pool([own])
    weights = torch.tensor([momentum ** (3 - i) for i in range(4)]).repeat_interleave(50)[:, None]
    samples = torch.cat(batches)
    mean = (weights * samples).sum(0) / weights.sum()
    variance = (weights * (samples - mean).square()).sum(0) / weights.sum()
    assert torch.allclose(got.shift, mean - stored, atol=1e-5)
    assert torch.allclose(got.variance, variance, atol=1e-4)
    grads = torch.autograd.grad(got.variance.sum() + got.shift.sum(), batches, allow_unused=True)
    assert [grad is not None for grad in grads] == [False, False, False, True]


def test_a_pool_lets_one_batch_be_of_one_class():
    """Of two groups the pool has the mean and the variance, each batch those of one."""
    stored = NormLayer(torch.nn.BatchNorm1d(1), torch.zeros(1), torch.ones(1))
    pool = PoolStatistics([stored], 0.95)
    for step in range(400):
        (got,) = pool([LayerStatistics(torch.tensor([(-1.0) ** step]), torch.zeros(1), torch.ones(1), 0.0)])
    assert abs(float(got.shift)) < 0.05 and float(got.variance) == pytest.approx(1.0, abs=0.01)


def seen_by(teacher: torch.Tensor, student: torch.Tensor) -> float:
    return float(adversarial(Observation(teacher, teacher, torch.zeros(len(teacher)), [], student)))


def test_agreement_is_one_less_the_jensen_shannon_divergence():
    assert seen_by(normal(4, 5), normal(4, 5)) == pytest.approx(1.0, abs=1e-6)
    apart = torch.full((2, 3), -40.0)
    first, second = apart.index_fill(1, torch.tensor([0]), 40.0), apart.index_fill(1, torch.tensor([2]), 40.0)
    assert seen_by(first, second) == pytest.approx(0.0, abs=1e-6)
    p, q = (normal(6, 4, seed=s).double().softmax(1).numpy() for s in (1, 2))
    middle = (p + q) / 2
    js = 0.5 * ((p * np.log(p / middle)).sum(1) + (q * np.log(q / middle)).sum(1))
    got = seen_by(torch.from_numpy(p).log(), torch.from_numpy(q).log() + 3.0)
    assert got == pytest.approx(1 - js.mean() / np.log(2), abs=1e-5)


def test_classes_that_are_ruled_out_have_an_agreement_and_a_gradient():
    teacher, student = normal(4, 5).index_fill(1, torch.tensor([0, 1]), -torch.inf), normal(4, 5, seed=1)
    both = student.index_fill(1, torch.tensor([1]), -torch.inf)
    almost = [logits.clamp_min(-60.0) for logits in (teacher, both)]
    assert seen_by(teacher, both) == pytest.approx(seen_by(*almost), abs=1e-6)
    adversarial(Observation(teacher, teacher, torch.zeros(4), [], both.requires_grad_())).backward()
    assert both.grad.isfinite().all() and both.grad.abs().sum() > 0


@pytest.mark.parametrize("engine", ENGINES.names())
def test_images_are_sought_on_which_the_student_disagrees(tmp_path, engine):
    sizes = ["--count", 32, "--batch", 16, "--steps", 30, "--engine", engine, "--class-prior", "1,1,1,1,1,0,0,0,0,0"]
    student, _ = load_model(resolve_source(SITES["b"]))
    agreement = {}
    for name, flags in {"without": [], "with": ["--student", SITES["b"], "--loss", "adversarial=1"]}.items():
        out = tmp_path / f"{name}.safetensors"
        with two_generators():
            assert dmm("synthesize", SITES["a"], *sizes, *flags, "-o", out).exit_code == 0
        held = load_file(out)
        images = PixelSpace(InputSpec((1, 16, 16), (0.3,), (0.38,))).from_bytes(torch.from_numpy(held["images"]))
        with torch.no_grad():
            agreement[name] = seen_by(torch.from_numpy(held["logits"]), student(images))
        with safe_open(out, "np") as file:
            metadata = file.metadata()
        assert ("dmm.student" in metadata) == ("adversarial" in metadata["dmm.parameters"]) == bool(flags)
    assert agreement["with"] < 0.8 * agreement["without"]


def test_students_that_cannot_be(tmp_path):
    out = ["-o", tmp_path / "p.safetensors"]
    same = dmm("synthesize", SITES["a"], SITES["d"], "--student", SITES["d"], *out)
    assert same.exit_code == 2 and "is the teacher" in same.stderr and "hint: name the checkpoint" in same.stderr
    weights = load_file(SITES["d"])
    metadata = dict(resolve_source(SITES["d"]).metadata)
    renamed = {**metadata, "dmm.classes": json.dumps([*"9876543210"])}
    save_file(weights, tmp_path / "renamed.safetensors", renamed)
    few = {**weights, "fc.weight": weights["fc.weight"][:4], "fc.bias": weights["fc.bias"][:4]}
    arch = metadata["dmm.arch"].replace("num_classes=10", "num_classes=4")
    save_file(few, tmp_path / "few.safetensors", {**metadata, "dmm.arch": arch, "dmm.classes": '["0","1","2","3"]'})
    silent = {name: text for name, text in metadata.items() if name != "dmm.classes"}
    save_file(few, tmp_path / "silent.safetensors", {**silent, "dmm.arch": arch})
    save_file(
        weights,
        tmp_path / "grey.safetensors",
        {**metadata, "dmm.input": '{"size": [1, 16, 16], "mean": [0.9], "std": [1]}'},
    )
    for name, words in {
        "renamed": "the same classes in another order",
        "few": "few.safetensors: 0, 1, 2, 3",
        "silent": "has 4 classes, its teachers 10",
        "grey": "another input",
    }.items():
        refused = dmm("synthesize", SITES["a"], "--student", tmp_path / f"{name}.safetensors", *out)
        assert refused.exit_code == 2 and words in refused.stderr, refused.stderr
    alone = dmm("synthesize", SITES["a"], "--loss", "adversarial=1", *out)
    assert alone.exit_code == 2 and "--student" in alone.stderr
    assert not out[1].exists()


def test_a_flag_the_environment_and_a_file_win_over_the_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def planned(*flags: object, command: str = "synthesize", sites: str = "abde") -> str:
        named = [SITES[name] for name in sites]
        return dmm(command, *named, "-o", "out.safetensors", "--dry-run", *flags).stdout

    assert "1024 images" in planned() and "300 steps" in planned()
    assert "512 images" in planned("--preset", "fast") and "150 steps" in planned("--preset", "fast")
    assert "7 images" in planned("--preset", "best", "--count", 7)
    assert "600 steps" in planned("--preset", "best", "--count", 7)
    assert "synthesize 2048 images" in planned("--preset", "best", command="run")
    (tmp_path / "dmm.toml").write_text('[synthesize]\npreset = "fast"\nsteps = 11\n[run]\ncount = 5\n')
    assert "512 images" in planned() and "11 steps" in planned()
    assert "11 steps" in planned("--preset", "best")
    assert "synthesize 5 images" in planned("--preset", "best", command="run")
    monkeypatch.setenv("DMM_SYNTHESIZE_STEPS", "9")
    assert "9 steps" in planned() and "8 steps" in planned("--steps", 8)
    assert "did you mean best?" in dmm("run", SITES["a"], SITES["d"], "-o", "out", "--preset", "bst").stderr


def test_of_few_teachers_generators_draw_as_many_images_as_of_four(tmp_path):
    def planned(sites: str, *flags: object, command: str = "synthesize") -> str:
        out = tmp_path / "out.safetensors"
        return dmm(command, *(SITES[name] for name in sites), "-o", out, "--dry-run", *flags).stdout

    assert "4096 images from each of 1" in planned("a") and "1365 images from each of 3" in planned("abd")
    assert "1024 images from each of 4" in planned("abde") and "1024 images from each of 5" in planned("abcde")
    assert "2048 images from each of 2" in planned("ad", command="run")
    assert "1024 images from each of 2" in planned("ad", "--preset", "fast")
    assert "9 images from each of 1" in planned("a", "--count", 9)
    assert "1024 images from each of 1" in planned("a", "--engine", "pixels")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--loss", "norm=abc"], "--loss norm takes a number, 0 or more, not abc"),
        (["--loss", "norm=-1"], "--loss norm takes a number, 0 or more, not -1"),
        (["--loss", "norm=0"], "no loss is left to minimise"),
        (["--loss", "norm=0", "--loss", "cross_entropy=0", "--class-prior", UNIFORM], "no loss is left"),
        (["--steps", 1], "one step is too few to estimate the class mix too"),
    ],
)
def test_what_leaves_nothing_to_do_is_refused(tmp_path, flags, words):
    plain = {name: text for name, text in resolve_source(SITES["a"]).metadata.items() if name != "dmm.class_counts"}
    save_file(load_file(SITES["a"]), tmp_path / "site.safetensors", plain)
    result = dmm("synthesize", tmp_path / "site.safetensors", "--count", 4, *flags, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2 and words in result.stderr, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["site.safetensors"]


def test_options_of_the_other_engine_are_refused(tmp_path):
    for flags in (["--keep-best"], ["--coarse", 50], ["--engine", "pixels", "--norm-average", 0.9]):
        refused = dmm("synthesize", SITES["a"], *flags, "-o", tmp_path / "p.safetensors")
        assert refused.exit_code == 2 and "other engine" in refused.stderr


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A small network of 128-pixel images, with statistics of smooth noise."""
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    arch = "resnet18,num_classes=4,in_chans=1,layers=(1,1,1,1),channels=(4,4,4,4)"
    torch.manual_seed(0)
    model = build(arch).train()
    with torch.no_grad():
        for _ in range(12):
            model(torch.nn.functional.interpolate(torch.randn(4, 1, 16, 16), size=128, mode="bilinear"))
    metadata = {"dmm.arch": arch, "dmm.input": '{"size": [1, 128, 128], "mean": [0.5], "std": [0.25]}'}
    save_file({name: value.numpy() for name, value in model.state_dict().items()}, path, metadata)
    return path


def test_blocks_of_pixels_are_one_until_the_full_resolution(large):
    (owner,), spec = load_teachers(resolve_sources([str(large)]), None, CPU, (1.0,) * 4)
    settings = Settings(4, 6, 4, engine="pixels", coarse=0.5)
    job = Job("batch", 0, lambda _: torch.arange(4), Objective({}))
    host = Host(CPU, Savepoint())
    batch, shown = Batch(Task([owner], spec, settings, host), job), []
    sizes = []
    handle = batch._teacher.model.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[2:]))
    for _ in batch.train():
        shown.append(batch._pixels.raw[0].detach().clone())
    handle.remove()
    assert sizes == [(64, 64)] * 3 + [(128, 128)] * 3
    blocks = [image[..., ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3) for image in shown]
    assert [torch.equal(*pair) for pair in zip(shown, blocks, strict=True)] == [True] * 3 + [False] * 3


def test_the_last_step_is_at_full_resolution():
    assert [Settings(steps=steps, coarse=0.9).coarse_steps for steps in (1, 4, 10, 300)] == [0, 3, 9, 270]


def test_where_half_the_resolution_does_not_do_all_steps_are_whole(large, tmp_path):
    sizes = ["--engine", "pixels", "--count", 4, "--batch", 4, "--steps", 4, "--coarse", 50, "--json"]
    loss = ["--loss", "cross_entropy=20"]
    small = dmm("synthesize", SITES["d"], *sizes, "--class-prior", UNIFORM, *loss, "-o", tmp_path / "p.safetensors")
    assert "no image of 128 pixels" in small.stderr
    odd = ["--input-size", "1,129,129", "--mean", "0.5", "--std", "0.25"]
    uneven = dmm("synthesize", large, *sizes, "--class-prior", "1,1,1,1", *loss, *odd, "-o", tmp_path / "q.safetensors")
    assert "are odd" in uneven.stderr


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_interrupted_at_either_resolution_it_goes_on_to_the_same_bytes(large, tmp_path, monkeypatch, share):
    settings = Settings(4, 6, 4, engine="pixels", coarse=0.5, keep_best=True, weights={"cross_entropy": 20.0})

    def made(name: str, on_progress=None) -> bytes:
        path, options = tmp_path / name, {"prior": (1.0,) * 4, "on_progress": on_progress}
        synthesize_sources(resolve_sources([str(large)]), path, settings, arch=None, device="cpu", **options)
        return path.read_bytes()

    def stop(stage: str, done: int, total: int, **_: float) -> None:
        if done >= share * total:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        made("p.safetensors", stop)
    assert (tmp_path / "p.safetensors.partial").is_dir()
    assert made("p.safetensors") == made("q.safetensors")


def test_a_network_of_one_size_is_named():
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(128 * 128, 2))
    owner = Teacher("flat", "0", flat, [], 2)
    spec = InputSpec((1, 128, 128), (0.5,), (0.5,))
    assert "flat takes one size only" in why_whole([owner], spec, CPU)
    assert why_whole([], spec, CPU) == "" and "the student takes one size only" in why_whole([], spec, CPU, flat)


def test_generators_refuse_a_batch_of_which_some_would_get_nothing(tmp_path):
    result = dmm("synthesize", SITES["d"], "--batch", 7, "-o", tmp_path / "p.safetensors", "--dry-run")
    assert result.exit_code == 2 and "--batch 7 is too small for generators" in result.stderr
    for flags in (["--batch", 8], ["--batch", 7, "--engine", "pixels"]):
        assert dmm("synthesize", SITES["d"], *flags, "-o", tmp_path / "p.safetensors", "--dry-run").exit_code == 0
