"""Recorded statistics against independent sums, and what they are good for: inverting networks without BatchNorm."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS, divergence, dmm
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from dmm_cli.architectures import build
from dmm_cli.norms import norm_inputs
from dmm_cli.runtime import deterministic
from dmm_cli.synthesis.recorded import Moments, measure

CPU = torch.device("cpu")
VIT = (
    "vit_tiny_patch16_224,num_classes=3,in_chans=1,img_size=8,patch_size=4,embed_dim=24,num_heads=2,depth=2,"
    "class_token=False,global_pool=avg"
)
CONVNEXT = "convnext_atto,num_classes=3,in_chans=1,stem_type=patch,patch_size=1,depths=(1,1,1,1),dims=(4,6,8,10)"
RESNET = "resnet18,num_classes=3,in_chans=1,layers=(1,1,1,1),channels=(4,6,8,10)"
INPUT = {"size": [1, 8, 8], "mean": [0.3], "std": [0.4]}

build(RESNET)  # timm can be imported from here on, whatever torchvision is there
timm_layers = importlib.import_module("timm.layers")

KINDS = {  # layer, shape of an input, dimension of its 4 or 6 channels
    "BatchNorm2d": (nn.BatchNorm2d(4), (5, 4, 3, 4), 1),
    "BatchNorm1d": (nn.BatchNorm1d(4), (5, 4), 1),
    "InstanceNorm2d": (nn.InstanceNorm2d(4), (5, 4, 3, 4), 1),
    "GroupNorm": (nn.GroupNorm(2, 4), (5, 4, 4, 4), 1),
    "LayerNorm of tokens": (nn.LayerNorm(4), (5, 4, 4), 2),
    "LayerNorm of NHWC": (nn.LayerNorm(4), (5, 4, 4, 4), 3),
    "LayerNorm of images": (nn.LayerNorm((4, 3, 6)), (5, 4, 3, 6), 1),
    "RMSNorm": (nn.RMSNorm(4), (5, 4, 4), 2),
    "timm BatchNormAct2d": (timm_layers.BatchNormAct2d(4), (5, 4, 3, 4), 1),
    "timm FrozenBatchNormAct2d": (timm_layers.FrozenBatchNormAct2d(4), (5, 4, 3, 4), 1),
    "timm GroupNorm1": (timm_layers.GroupNorm1(4), (5, 4, 4, 4), 1),
    "timm GroupNormAct": (timm_layers.GroupNormAct(4, num_groups=2), (5, 4, 4, 4), 1),
    "timm LayerNorm": (timm_layers.LayerNorm(4), (5, 4, 4), 2),
    "timm LayerNorm2d": (timm_layers.LayerNorm2d(4), (5, 4, 4, 4), 1),
    "timm LayerNormAct2d": (timm_layers.LayerNormAct2d(4), (5, 4, 4, 4), 1),
    "timm RmsNorm": (timm_layers.RmsNorm(4), (5, 4, 4), 2),
    "timm RmsNorm2d": (timm_layers.RmsNorm2d(4), (5, 4, 4, 4), 1),
    "timm SimpleNorm": (timm_layers.SimpleNorm(4), (5, 4, 4), 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_channels_are_where_each_kind_of_layer_has_them(kind):
    layer, shape, axis = KINDS[kind]
    model = nn.Sequential(layer)
    found = norm_inputs(model)["0"]
    assert found.module is layer and found.channels == 4 and found.axis % len(shape) == axis
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 1 + shape[-1])
    values = np.moveaxis(features.double().numpy(), axis, 0).reshape(4, -1)
    moments = measure(model, norm_inputs(model), features.split(2), CPU)["0"]
    assert moments.count == values.shape[1]
    assert np.allclose(moments.mean, values.mean(1), rtol=1e-12, atol=1e-12)
    assert np.allclose(moments.variance, values.var(1), rtol=1e-12)


def test_merging_keeps_what_a_naive_sum_of_squares_loses():
    """float64 has 16 digits; the squares of 1e9 need 18."""
    values = 1e9 + np.random.default_rng(0).normal(size=(1000, 2))
    parts = [Moments.of(torch.from_numpy(part), 1) for part in np.array_split(values, [1, 7, 500])]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    centred = values - 1e9
    assert np.allclose(whole.mean.numpy() - 1e9, centred.mean(0), atol=1e-6)
    assert np.allclose(whole.variance, centred.var(0), rtol=1e-5)
    naive = (values**2).mean(0) - values.mean(0) ** 2
    assert not np.allclose(naive, centred.var(0), rtol=0.1)


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_of_a_batchnorm_network_they_are_what_training_mode_stores():
    """One batch of all images: running statistics are the batch's, with the variance over n - 1."""
    torch.manual_seed(0)
    model, batch = build(RESNET), images(40)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        model.train()(batch)
    layers = norm_inputs(model)
    found = measure(model, layers, batch.split(7), CPU)
    assert list(found) == list(layers)
    for name, moments in found.items():
        module = layers[name].module
        scale = module.running_var.sqrt()
        assert ((moments.mean - module.running_mean).abs() < 0.02 * scale).all(), name
        assert np.allclose(moments.variance * moments.count / (moments.count - 1), module.running_var, rtol=0.05), name
    first = found["bn1"]  # nothing before it depends on the n - 1
    assert np.allclose(first.mean, model.bn1.running_mean, atol=1e-6)
    assert np.allclose(first.variance * first.count / (first.count - 1), model.bn1.running_var, rtol=1e-5)


def test_of_several_uses_in_a_pass_the_last_counts_and_unused_layers_are_left_out():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.idle = nn.LayerNorm(4), nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(self.norm(x) + 3)

    model, x = Twice(), torch.randn(6, 4)
    found = measure(model, norm_inputs(model), x.split(4), CPU)
    assert list(found) == ["norm"] and found["norm"].count == 6
    assert np.allclose(found["norm"].mean, (model.norm(x) + 3).detach().mean(0), atol=1e-6)


def small_digits() -> tuple[np.ndarray, np.ndarray]:
    """Real digits 0, 1 and 2, uint8 (135, 1, 8, 8), and labels (135,)."""
    data = load_file(DIGITS / "test.safetensors")
    chosen = data["labels"] < 3
    return data["images"][chosen], data["labels"][chosen]


def trained(spec: str, size: int, steps: int) -> nn.Module:
    """A network that knows the digits 0, 1 and 2."""
    torch.manual_seed(0)
    model = build(spec)
    pixels, labels = small_digits()
    x = F.interpolate((torch.from_numpy(pixels).float() / 255 - 0.3) / 0.4, size=(size, size))
    y = torch.from_numpy(labels)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    with deterministic(CPU):
        for _ in range(steps):
            rows = torch.randint(len(x), (32,))
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert (model(x).argmax(1) == y).float().mean() > 0.95
    return model.eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A ViT trained on real digits, a ConvNeXt and a ResNet as they are built, the data, and recorded statistics."""
    root = tmp_path_factory.mktemp("recorded")
    for name, spec, model in (
        ("vit", VIT, trained(VIT, 8, 100)),
        ("convnext", CONVNEXT, build(CONVNEXT).eval()),
        ("resnet", RESNET, build(RESNET).eval()),
    ):
        metadata = {
            "dmm.arch": spec,
            "dmm.input": json.dumps(INPUT if name == "vit" else {**INPUT, "size": [1, 16, 16]}),
        }
        save_file(
            {key: value.numpy() for key, value in model.state_dict().items()}, root / f"{name}.safetensors", metadata
        )
    pixels, labels = small_digits()
    save_file({"images": pixels, "labels": labels}, root / "data.safetensors")
    save_file({"images": pixels}, root / "unlabelled.safetensors")
    result = dmm(
        "record",
        root / "vit.safetensors",
        "--data",
        root / "data.safetensors",
        "-o",
        root / "stats.safetensors",
        "--json",
    )
    assert result.exit_code == 0, result.output
    return root, json.loads(result.stdout)


def test_a_file_holds_what_hooks_see_in_the_whole_data(world):
    root, manifest = world
    model = build(VIT).eval()
    model.load_state_dict({k: torch.from_numpy(v) for k, v in load_file(root / "vit.safetensors").items()})
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].numpy()}))
    pixels, labels = small_digits()
    with torch.no_grad():
        model((torch.from_numpy(pixels).float() / 255 - 0.3) / 0.4)
    stored = load_file(root / "stats.safetensors")
    assert set(stored) == {f"{name}.{part}" for name in seen for part in ("mean", "var", "count")}
    for name, features in seen.items():
        flat = features.reshape(-1, 24).astype(np.float64)
        assert np.allclose(stored[f"{name}.mean"], flat.mean(0), rtol=1e-4, atol=1e-5)
        assert np.allclose(stored[f"{name}.var"], flat.var(0), rtol=1e-3)
        assert stored[f"{name}.count"] == len(flat) and stored[f"{name}.mean"].dtype == np.float32
    (network,) = manifest["networks"]
    assert manifest["schema"] == "dmm.record/2" and network["images"] == 135
    assert network["class_counts"] == np.bincount(labels).tolist()
    assert [layer["name"] for layer in network["layers"]] == [n for n, _ in model.named_modules() if n in seen]


@pytest.mark.parametrize("name", ["convnext", "resnet"])
def test_unlabelled_data_and_either_layout_record_alike(world, tmp_path, name):
    root, _ = world
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file, data in zip(files, ("data", "unlabelled"), strict=True):
        done = dmm("record", root / f"{name}.safetensors", "--data", root / f"{data}.safetensors", "-o", file, "-q")
        assert done.exit_code == 0 and done.stdout == f"{file}\n", done.output
    first, second = map(load_file, files)
    assert first.keys() == second.keys() and all((first[key] == second[key]).all() for key in first)
    layers = norm_inputs(build(CONVNEXT if name == "convnext" else RESNET))
    assert {key: value.shape[0] for key, value in first.items() if key.endswith("mean")} == {
        f"{key}.mean": layer.channels for key, layer in layers.items()
    }


@pytest.fixture(scope="module")
def drawn(world):
    """Pseudo-data of the ViT, drawn from what was recorded of it."""
    root, _ = world
    result = dmm(
        "synthesize", root / "vit.safetensors", "--statistics", root / "stats.safetensors",
        "-o", root / "p.safetensors", "--count", 96, "--steps", 150, "--batch", 48, "--engine", "pixels", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return root, json.loads(result.stdout)


def test_a_vit_is_inverted_from_recorded_statistics(drawn):
    root, manifest = drawn
    teacher = manifest["teachers"][0]
    assert teacher["accepted"] > 80 and teacher["prior_from"] == "dmm.class_counts"
    assert teacher["prior"] == pytest.approx([1 / 3] * 3, abs=1e-5)
    assert teacher["statistics"] == str(root / "stats.safetensors")
    pseudo = load_file(root / "p.safetensors")
    model = build(VIT).eval()
    model.load_state_dict({k: torch.from_numpy(v) for k, v in load_file(root / "vit.safetensors").items()})
    shown = (torch.from_numpy(pseudo["images"]).float() / 255 - 0.3) / 0.4
    noise = torch.rand(shown.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(shown).argmax(1), torch.from_numpy(pseudo["targets"]))
    distances = [
        divergence(model, batch, load_file(root / "stats.safetensors")) for batch in (shown, (noise - 0.3) / 0.4)
    ]
    assert distances[0] < 0.2 * distances[1]


def test_a_fresh_vit_learns_from_the_pseudo_data(drawn, tmp_path):
    root, _ = drawn
    torch.manual_seed(1)
    state = {key: value.numpy() for key, value in build(VIT).state_dict().items()}
    save_file(state, tmp_path / "fresh.safetensors", {"dmm.arch": VIT, "dmm.input": json.dumps(INPUT)})
    out = tmp_path / "out.safetensors"
    result = dmm(
        "distill", tmp_path / "fresh.safetensors", root / "vit.safetensors", "--data", root / "p.safetensors",
        "-o", out, "--steps", 250, "--batch", 32, "--fail-under", 100, "--json",
    )  # fmt: skip
    assert result.exit_code in (0, 1), result.output
    (retention,) = json.loads(result.stdout)["retention"]
    assert retention["before"] < 60 and retention["after"] > 80
    targets = load_file(root / "p.safetensors")["targets"]
    assert [item["images"] for item in retention["classes"]] == np.bincount(targets).tolist()
    low = [item for item in retention["classes"] if item["after"] < 100]
    assert ("retained agreement below 100.0" in result.stderr) == (result.exit_code == 1) == bool(low)
    for item in retention["classes"]:
        line = f"class {item['name']} of vit: {item['after']:.1f} on {item['images']} images"
        assert (line in result.stderr) == (item in low)
    with safe_open(out, "np") as file:
        assert json.loads(file.metadata()["dmm.retention"]) == [retention]
    judged = dmm("evaluate", tmp_path / "fresh.safetensors", out, "--data", root / "data.safetensors", "--json")
    fresh, taught = (row["accuracy"] for row in json.loads(judged.stdout)["rows"])
    assert fresh < 40 and taught > 50  # on real digits, which neither stage saw


def test_recorded_statistics_win_over_running_ones(world, tmp_path):
    """A BatchNorm network whose own statistics were never updated can be inverted from recorded ones."""
    root, _ = world
    net, stats, out = root / "resnet.safetensors", tmp_path / "s.safetensors", tmp_path / "p.safetensors"
    command = ["synthesize", net, "-o", out, "--count", 4, "--steps", 2, "--batch", 8, "--loss", "cross_entropy=0"]
    refused = dmm(*command)
    assert refused.exit_code == 2 and "never updated" in refused.stderr
    assert dmm("record", net, "--data", root / "unlabelled.safetensors", "-o", stats).exit_code == 0
    accepted = dmm(*command, "--statistics", stats, "--class-prior", "1,1,1")
    assert accepted.exit_code == 0 or "recognises none" in accepted.stderr


def rewrite(source, target, change=None, **metadata):
    """A copy of a file of statistics with other arrays or metadata."""
    with safe_open(source, "np") as file:
        arrays, known = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    if change:
        change(arrays)
    told = {**known, **{f"dmm.{name}": value for name, value in metadata.items()}}
    save_file(arrays, target, {name: value for name, value in told.items() if value is not None})


@pytest.mark.parametrize(
    ("change", "metadata", "words"),
    [
        (lambda a: a.pop("blocks.0.norm1.var"), {}, "blocks.0.norm1.var is missing"),
        (
            lambda a: a.update({"blocks.0.norm1.mean": np.zeros(5, np.float32)}),
            {},
            "blocks.0.norm1.mean is [5], the layer has 24 channels",
        ),
        (
            lambda a: a.update({"block.norm.mean": a.pop("blocks.0.norm1.mean")}),
            {},
            "no normalisation layer block.norm",
        ),
        (
            lambda a: a.update({"blocks.0.norm1.var": np.full(24, -1, np.float32)}),
            {},
            "NaN, infinity or a negative variance",
        ),
        (
            lambda a: a.update({"blocks.0.norm1.var": np.full(24, 1e300)}),  # float64, infinite in float32
            {},
            "NaN, infinity or a negative variance",
        ),
        (None, {"kind": "dmm.pseudo-data/1"}, "not a file of recorded statistics"),
        (None, {"model": '{"label": "other", "sha256": "abc"}'}, "they are of other (sha256 abc...)"),
        (None, {"model": "["}, "is not valid JSON"),
        (None, {"model": "{}"}, "does not name a checkpoint by label and sha256"),
        (lambda a: a.clear(), {}, "it holds none"),
        (lambda a: a.update({"mean": np.zeros(24, np.float32)}), {}, "mean is not of a layer's statistics"),
        (None, {"input": '{"size": "a"}'}, "hint: record them again"),
        (None, {"input": None}, "do not tell which input they are of"),
        (None, {"input": json.dumps({**INPUT, "std": [0.5]})}, "--input-size 1,8,8 --mean 0.3 --std 0.5"),
    ],
)
def test_files_that_do_not_fit_are_refused(world, tmp_path, change, metadata, words):
    root, _ = world
    file, out = tmp_path / "s.safetensors", tmp_path / "p.safetensors"
    rewrite(root / "stats.safetensors", file, change, **metadata)
    result = dmm("synthesize", root / "vit.safetensors", "--statistics", file, "-o", out)
    assert result.exit_code == 2 and words in result.stderr and str(file) in result.stderr, result.stderr
    assert result.stderr.count("error:") == 1 and not out.exists()


def test_statistics_that_tell_of_some_layers_or_of_none_are_told(world, tmp_path):
    root, record = world
    file, out = tmp_path / "s.safetensors", tmp_path / "p.safetensors"
    command = ["synthesize", root / "vit.safetensors", "--statistics", file, "-o", out, "--force"]
    brief = ["--count", 8, "--steps", 8, "--batch", 8, "--class-prior", "1,1,1", "--json"]
    rewrite(root / "stats.safetensors", file, lambda a: [a.pop(name) for name in list(a) if name.startswith("blocks.")])
    result = dmm(*command, *brief)
    assert result.exit_code == 0, result.stderr
    known = [layer["name"] for layer in record["networks"][0]["layers"]]
    told = f"{file} leaves out layers of vit: {', '.join(name for name in known if name.startswith('blocks.'))}"
    assert f"warning: {told}" in result.stderr and json.loads(result.stdout)["warnings"] == [told]

    def reset(arrays: dict[str, np.ndarray]) -> None:
        arrays |= {name: np.full_like(value, name.endswith(".var")) for name, value in arrays.items()}

    rewrite(root / "stats.safetensors", file, reset)
    result = dmm(*command, *brief)
    assert result.exit_code == 2 and f"in {file} were never updated" in result.stderr
    assert "record them again" in result.stderr


def test_a_loss_that_is_not_finite_ends_the_synthesis(world, tmp_path):
    """Statistics that no data have: their distance from those of any image is infinite."""
    root, _ = world
    file, out = tmp_path / "s.safetensors", tmp_path / "p.safetensors"
    rewrite(root / "stats.safetensors", file, lambda a: a.update({"fc_norm.mean": np.full(24, 3e38, np.float32)}))
    for engine in ("generator", "pixels"):
        flags = ["--engine", engine, "--count", 8, "--steps", 8, "--batch", 8, "--class-prior", "1,1,1"]
        result = dmm("synthesize", root / "vit.safetensors", "--statistics", file, "-o", out, *flags)
        assert result.exit_code == 2 and "error: norm is inf in step 1" in result.stderr, result.stderr
        assert not out.exists()


def test_what_cannot_be_recorded_is_refused(world, tmp_path):
    root, _ = world
    vit, data, out = root / "vit.safetensors", root / "data.safetensors", tmp_path / "s.safetensors"
    save_file({"images": np.zeros((2, 1, 8, 8), np.uint8), "labels": np.array([0, 3])}, tmp_path / "four.safetensors")
    for arguments, words in (
        ([vit, "--data", data], "name a file with -o"),
        ([vit, "--data", tmp_path / "none", "-o", out], "no such file"),
        ([vit, "--data", tmp_path / "four.safetensors", "-o", out], "it has 3"),
        ([vit, "--data", data, "-o", data, "--force"], "one of the inputs"),
        ([vit, "--data", data, "-o", tmp_path / "s.npz"], "not the name of a .safetensors file"),
        ([vit, "--data", data, "-o", tmp_path / "none" / "stats"], "cannot make the directory"),
        ([vit, "--data", data, "-o", out, "--device", "gpu"], "gpu"),
        ([vit, "--data", vit, "-o", out], "no array named images"),
    ):
        result = dmm("record", *arguments)
        assert result.exit_code == 2 and words in result.stderr, result.stderr
    (tmp_path / "copy.safetensors").write_bytes((root / "stats.safetensors").read_bytes())
    flags = ["--statistics", root / "stats.safetensors", "--statistics", tmp_path / "copy.safetensors"]
    twice = dmm("synthesize", vit, *flags, "-o", out)
    assert twice.exit_code == 2 and "two files hold statistics of one checkpoint" in twice.stderr
    (tmp_path / "link.safetensors").symlink_to(root / "stats.safetensors")
    flags[3] = tmp_path / "link.safetensors"
    assert dmm("synthesize", vit, *flags, "-o", out, "--dry-run").exit_code == 0  # one file, by two names
    assert not out.exists()
