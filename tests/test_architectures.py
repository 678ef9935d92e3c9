from __future__ import annotations

import hashlib
import json
import shlex
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
import torch
from conftest import DIGITS, dmm, shell
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmm_cli import architectures as arch
from dmm_cli.errors import DmmError
from dmm_cli.images import InputSpec
from dmm_cli.inputs import resolve_source
from dmm_cli.loading import load_model


def saved(tmp_path, spec: str, metadata=None, name="m"):
    torch.manual_seed(0)
    model = arch.build(spec)
    path = tmp_path / f"{name}.safetensors"
    save_file(model.state_dict(), path, metadata)
    return model, resolve_source(str(path))


def test_specs_are_split_at_the_right_commas():
    text = "resnet18,num_classes=10,layers=(1,1,1,1),act_layer=silu,drop_rate=0.1"
    name, arguments = arch.parse_arch(text)
    assert name == "resnet18"
    assert arguments == {"num_classes": 10, "layers": (1, 1, 1, 1), "act_layer": "silu", "drop_rate": 0.1}
    assert arch.format_arch(name, arguments) == text
    nested = "net,layers=((1,1),(2,2)),cfg={'a':[1,2],'b':\"x,(y\"},stem_type='a,b'"
    assert arch.parse_arch(nested)[1] == {
        "layers": ((1, 1), (2, 2)), "cfg": {"a": [1, 2], "b": "x,(y"}, "stem_type": "a,b"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnet19", "timm has no model resnet19"),
        ("resnet18,10", "cannot read '10' in resnet18,10"),
        ("resnet18,no_such=1", "timm cannot build"),
        ("resnet18,act_layer=foo", "timm cannot build"),
        ("vit_tiny_patch16_224,embed_dim=191", "timm cannot build"),
        ("vit_tiny_patch16_224,patch_size=0", "timm cannot build"),
        ("hf-hub:timm/resnet18", "does not fetch"),
        ("local-dir:/tmp", "does not fetch"),
        ("no.such:thing", "no factory no.such:thing"),
        ("torch.nn:Nothing", "no factory torch.nn:Nothing"),
        (":net", "no factory :net"),
        ("builtins:list", "makes no torch.nn.Module but a list"),
        ("torch.nn:Linear", "torch.nn:Linear fails: TypeError"),
        ("resnet18,checkpoint_path=weights.pth", "no weights to load"),
        ("resnet18,pretrained=True", "no weights to load"),
        ("resnet18,pretrained_cfg=a1_in1k", "no weights to load"),
    ],
)
def test_specs_that_cannot_be_built(spec, words):
    with pytest.raises(DmmError, match=words):
        arch.build(spec)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("net = undefined", "NameError: name 'undefined' is not defined"),
        ("def net(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
    ],
)
def test_modules_that_cannot_be_imported_are_told_as_theirs(code, words, tmp_path, monkeypatch):
    name = f"module_{hashlib.sha256(code.encode()).hexdigest()[:8]}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DmmError, match=f"no factory {name}:net: {words}"):
        arch.build(f"{name}:net")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def net(): raise SystemExit(0)", "{}:net fails: SystemExit: 0"),
        ("def example_inputs(): raise ValueError('a\\nb')", "example_inputs of {} fails: ValueError: a\n"),
        ("def example_inputs(): raise SystemExit(0)", "example_inputs of {} fails: SystemExit: 0"),
    ],
)
def test_factories_and_example_inputs_that_fail_are_told_as_theirs(code, words, tmp_path, monkeypatch):
    name = f"module_{hashlib.sha256(code.encode()).hexdigest()[:8]}"
    (tmp_path / f"{name}.py").write_text(f"from torch.nn import Identity as net\n{code}\n")
    monkeypatch.syspath_prepend(tmp_path)
    save_file({}, tmp_path / "net.safetensors")
    result = dmm("evaluate", tmp_path / "net.safetensors", "--data", tmp_path / "nothing.npz", "--arch", f"{name}:net")
    assert result.exit_code == 2 and f"error: {words.format(name)}" in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("resnet18,num_clases=10", "did you mean num_classes?"),
        ("vit_tiny_patch16_224,img_sise=32", "did you mean img_size?"),
        ("torch.nn:Linear,in_featurs=3", "did you mean in_features?"),
        ("resnet18,zzzzzzzz=1", None),
    ],
)
def test_mistyped_arguments_of_an_architecture(spec, hint):
    with pytest.raises(DmmError, match="unexpected keyword argument") as caught:
        arch.build(spec)
    assert caught.value.hint == hint


@pytest.mark.parametrize("value", ["{[]:1}", f"{'(' * 9000}1{')' * 9000}"], ids=["a list as a key", "deep"])
def test_what_is_no_literal_is_text(value):
    name, arguments = arch.parse_arch(f"resnet18,x={value}")
    assert name == "resnet18" and arguments == {"x": value}


def test_a_factory_is_called():
    assert isinstance(arch.build("torch.nn:Identity"), torch.nn.Identity)


def test_a_file_does_not_choose_what_code_runs(tmp_path, monkeypatch):
    mark, module = tmp_path / "mark", tmp_path / "chosen_by_a_file.py"
    module.write_text(f"open({str(mark)!r}, 'w').close()\nfrom torch.nn import Identity as net\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DMM_TRUST", "chosen_by chosen_by_a_file.more")
    _, source = saved(tmp_path, "resnet18", {"dmm.arch": "chosen_by_a_file:net"})
    with pytest.raises(DmmError, match="asks for code to be run: chosen_by_a_file:net"):
        load_model(source)
    directory = tmp_path / "hub"
    directory.mkdir()
    save_file({}, directory / "model.safetensors")
    (directory / "config.json").write_text('{"architecture": "chosen_by_a_file:net", "model_args": {"a": 1}}')
    with pytest.raises(DmmError, match="asks for code to be run: chosen_by_a_file:net,a=1"):
        load_model(resolve_source(str(directory)))
    assert not mark.exists()
    monkeypatch.setenv("DMM_TRUST", "other,chosen_by_a_file")
    with pytest.raises(DmmError, match="does not fit"):
        load_model(source)
    assert mark.exists()


def test_what_a_trusted_module_only_imports_is_not_called(tmp_path, monkeypatch):
    """A pickle runs what it likes when it is loaded."""
    mark, pickled, module = (tmp_path / name for name in ("mark", "evil.pt", "networks_of_a_user.py"))

    class Evil:
        def __reduce__(self):
            return open, (str(mark), "w")

    torch.save(Evil(), pickled)
    (tmp_path / "networks_elsewhere.py").write_text(
        "from torch import load, nn\n\nclass Loading(nn.Module):\n    def __init__(self, f, weights_only):\n"
        "        super().__init__()\n        load(f, weights_only=weights_only)\n"
    )
    module.write_text(
        "from functools import partial\nfrom networks_elsewhere import Loading\nfrom torch import load, nn\n"
        "from torch.nn import Identity\n"
        "loads = partial(load, weights_only=False)\n\ndef net():\n    return nn.Identity()\n\n"
        "nets, same = partial(net), partial(Identity)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DMM_TRUST", "networks_of_a_user")
    for name, home in (("load", "torch.serialization"), ("loads", "torch.serialization"), ("Loading", "networks_e")):
        spec = f"networks_of_a_user:{name},f='{pickled}',weights_only=False"
        _, source = saved(tmp_path, "resnet18", {"dmm.arch": spec})
        with pytest.raises(DmmError, match=f"is defined in {home}.*, which is not trusted"):
            load_model(source)
        assert not mark.exists()
    for name in ("net", "nets", "Identity", "same"):
        _, source = saved(tmp_path, "resnet18", {"dmm.arch": f"networks_of_a_user:{name}"})
        with pytest.raises(DmmError, match="does not fit"):
            load_model(source)


@pytest.mark.parametrize("module", ["(a,b", "'a,b", " a_b "])
def test_whatever_the_name_of_a_module_it_is_not_imported_without_trust(module, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    (tmp_path / f"{module.strip()}.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nfrom torch.nn import Identity as net\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    save_file({}, tmp_path / "net.safetensors", {"dmm.arch": f"{module}:net"})
    result = dmm("evaluate", tmp_path / "net.safetensors", "--data", tmp_path / "nothing.npz")
    assert result.exit_code == 2 and "asks for code to be run" in result.stderr and not mark.exists()


def test_the_flag_beats_metadata_beats_config(tmp_path):
    _, source = saved(tmp_path, "resnet18,num_classes=3", {"dmm.arch": "resnet18,num_classes=3"})
    assert arch.identify(source, "resnet34").spec == "resnet34"
    assert arch.identify(source).evidence == "dmm.arch in the file's metadata"
    directory = tmp_path / "hub"
    directory.mkdir()
    save_file(arch.build("resnet18,num_classes=3").state_dict(), directory / "model.safetensors")
    config = {
        "architecture": "resnet18",
        "num_classes": 3,
        "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.1] * 3, "std": [0.2] * 3},
    }
    (directory / "config.json").write_text(json.dumps({**config, "num_classes": float("nan")}))  # as others write it
    assert arch.identify(resolve_source(str(directory))).spec == "resnet18"
    (directory / "config.json").write_text(json.dumps({**config, "architecture": 5}))
    assert "dmm.arch" not in resolve_source(str(directory)).metadata
    (directory / "config.json").write_text(json.dumps(config))
    hub = resolve_source(str(directory))
    assert arch.identify(hub).spec == "resnet18,num_classes=3"
    model, _ = load_model(hub)
    assert arch.input_spec(hub, model) == InputSpec((3, 64, 64), (0.1,) * 3, (0.2,) * 3)
    assert arch.input_spec(hub, model, size=(3, 8, 8), mean=[0.5], std=[1.0]).mean == (0.5,) * 3


@pytest.mark.parametrize(("told", "size"), [(24, (3, 24, 24)), ("(16,24)", (3, 16, 24)), ("None", (3, 224, 224))])
def test_the_size_that_a_network_is_built_for_is_that_of_its_images(tmp_path, told, size):
    spec = f"vit_tiny_patch16_224,img_size={told},patch_size=8,embed_dim=24,depth=1,num_heads=2,num_classes=3"
    _, source = saved(tmp_path, spec, {"dmm.arch": spec})
    model, _ = load_model(source)
    assert arch.input_spec(source, model).size == size


@pytest.mark.parametrize("spec", ["resnet18,num_classes=7,in_chans=1", "resnet34"])
def test_detection_by_names_and_shapes(tmp_path, spec):
    _, source = saved(tmp_path, spec)
    found = arch.identify(source)
    assert arch.parse_arch(found.spec) == arch.parse_arch(spec)
    assert "tensor names and shapes match" in found.evidence


@pytest.mark.parametrize(
    ("name", "odd"), [("resnet18", "fc.bias"), ("resnet18", "bn1.bias"), ("vit_small_patch14_dinov2", "head.bias")]
)
def test_a_number_where_a_vector_should_be_is_of_no_network(tmp_path, name, odd, monkeypatch):
    monkeypatch.setattr(arch, "_families", lambda: ((name,),))
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in arch.build(name).state_dict().items()}
    tensors = {key: torch.zeros(shape, dtype=torch.float16) for key, shape in shapes.items()}
    save_file({**tensors, odd: torch.zeros(())}, tmp_path / "m.safetensors")
    with pytest.raises(DmmError, match="cannot tell the architecture"):
        arch.detect(resolve_source(str(tmp_path / "m.safetensors")))


@pytest.mark.parametrize("tensors", [{}, {"head.weight": torch.ones(5, 64), "head.bias": torch.ones(5)}])
def test_where_no_weights_are_no_network_is_looked_for(tmp_path, tensors, monkeypatch):
    """Every network has all parts of a file that has none."""
    monkeypatch.setattr(arch, "_meta_shapes", lambda *_, **__: pytest.fail("a network of the catalogue is built"))
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for number, path in enumerate(paths):
        save_file({name: value + number for name, value in tensors.items()}, path)
    assert "cannot tell the architecture" in dmm("inspect", paths[0]).stdout
    merged = dmm("merge", *paths, "-o", tmp_path / "m.safetensors")
    assert merged.exit_code == 0 and "starts" not in merged.stderr, merged.stderr


def test_the_fixture_says_what_it_is():
    source = resolve_source(str(DIGITS / "site-a.safetensors"))
    model, _ = load_model(source)
    assert arch.input_spec(source, model) == InputSpec((1, 16, 16), (0.3,), (0.38,))


def test_the_network_tells_how_many_channels_it_takes(write):
    source = resolve_source(str(write("a", w=np.zeros(1, np.float32))))
    model = arch.build("resnet18,num_classes=5,in_chans=1,layers=(1,1,1,1)")
    mean, std = np.mean(model.pretrained_cfg["mean"]), np.mean(model.pretrained_cfg["std"])
    assert arch.input_spec(source, model) == InputSpec((1, 224, 224), (mean,), (std,))
    assert arch.input_spec(source, model, size=(2, 8, 8)).mean == (mean, mean)
    own = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 3))
    assert arch.input_spec(source, own) == InputSpec((4, 224, 224), (0.0,) * 4, (1.0,) * 4)
    with torch.device("meta"):
        rearranged = arch.build("tresnet_m,num_classes=5")  # its first convolution takes 48
    assert arch.input_spec(source, rearranged).size[0] == 3


def test_a_value_for_each_channel_is_kept_where_the_size_tells_of_others(tmp_path):
    spec = "resnet18,num_classes=4,in_chans=3,layers=(1,1,1,1)"
    save_file(arch.build(spec).state_dict(), tmp_path / "model.safetensors")
    told = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
    config = {"architecture": "resnet18", "model_args": {"in_chans": 3, "layers": [1, 1, 1, 1]}, "num_classes": 4}
    config["pretrained_cfg"] = {"input_size": [1, 32, 32], **told}
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(8) % 4)
    out = tmp_path / "statistics.safetensors"
    recorded = dmm("record", tmp_path, "--data", tmp_path / "data.npz", "-o", out)
    assert recorded.exit_code == 0, recorded.stderr
    with safe_open(out, "np") as file:
        assert json.loads(file.metadata()["dmm.input"]) == {**told, "size": [3, 32, 32]}


def test_input_and_class_mistakes(tmp_path, write):
    source = resolve_source(str(write("a", w=np.zeros(1, np.float32))))
    with pytest.raises(DmmError, match="2 means and 1 deviations for 1 channels"):
        arch.input_spec(source, torch.nn.Identity(), size=(1, 2, 2), mean=(0.0, 1.0), std=(1.0,))
    with pytest.raises(DmmError, match="does not say how many classes"):
        arch.num_classes(torch.nn.Identity())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("conv1.weight", np.nan, "conv1.weight holds NaN or infinity"),
        ("bn1.running_mean", np.inf, "bn1.running_mean holds NaN or infinity"),
        ("bn1.running_var", -1.0, "bn1.running_var holds a negative variance"),
    ],
)
def test_tensors_that_cannot_be_computed_with_are_named(tmp_path, name, value, words):
    arrays, path = load_file(DIGITS / "site-a.safetensors"), tmp_path / "bad.safetensors"
    arrays[name].reshape(-1)[0] = value
    with safe_open(DIGITS / "site-a.safetensors", "np") as file:
        save_file(arrays, path, file.metadata())
    result = dmm("evaluate", path, "--data", DIGITS / "test.safetensors", "-q")
    assert result.exit_code == 2 and words in result.stderr and str(path) in result.stderr and not result.stdout


def test_why_a_config_does_not_tell_the_architecture(tmp_path):
    save_file({"head.weight": torch.ones(5, 64)}, tmp_path / "model.safetensors")

    def evidence(path) -> str:
        with pytest.raises(DmmError, match="cannot tell the architecture") as caught:
            arch.identify(resolve_source(str(path)))
        return caught.value.evidence[1]

    assert evidence(tmp_path) == "no config.json beside it"
    (tmp_path / "config.json").write_text('{"architectures": ["ViTForImageClassification"], "model_type": "vit"}')
    assert evidence(tmp_path) == "config.json beside it names no timm architecture"
    told = evidence(tmp_path / "model.safetensors")
    assert told == "config.json beside it is read where the directory is named, not the file"


def test_a_factory_named_with_a_dot_is_told_how_it_is_named():
    with pytest.raises(DmmError, match=r"timm has no model clinic\.nets\.wine") as caught:
        arch.build("clinic.nets.wine")
    assert caught.value.hint.startswith("list them with: ")
    assert caught.value.hint.endswith("; a factory of a module is named clinic.nets:wine")


def test_an_unknown_architecture_is_told_with_its_file_and_a_command_that_lists_names(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(2)}, path, {"dmm.arch": "zzz"})
    with pytest.raises(DmmError, match="timm has no model zzz") as caught:
        load_model(resolve_source(str(path)))
    assert caught.value.evidence == (f"the architecture of {path}: dmm.arch in the file's metadata",)
    program = shlex.split(caught.value.hint.removeprefix("list them with: "))
    assert program[:2] == ["python", "-c"]
    arch._timm()  # which imports timm where torchvision does not fit torch
    printed = StringIO()
    with redirect_stdout(printed):
        exec(program[2], {})
    assert "resnet18" in printed.getvalue().split()


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "mobilenetv4_conv_small", "eva02_tiny_patch14_224"],
)
def test_networks_unlike_the_first_of_their_family_are_detected(tmp_path, name, monkeypatch):
    family = next(family for family in arch._families() if name in family)
    around = family[: 1 + family.index(name)][-3:]  # the whole family takes a minute
    monkeypatch.setattr(arch, "_families", lambda: (("resnet18",), tuple(dict.fromkeys([family[0], *around]))))
    _, source = saved(tmp_path, f"{name},num_classes=7")
    assert arch.detect(source).spec == f"{name},num_classes=7"


def test_a_network_can_be_built_on_meta_although_timm_was_not_imported_yet():
    """What is imported with timm (torchvision, torch._dynamo) may read the tensors it makes."""
    code = """
import sys, torch
from dmm_cli.architectures import build
class Reads:
    def find_spec(self, name, path=None, target=None):
        if name == "timm":
            float(torch.ones(1))
sys.meta_path.insert(0, Reads())
with torch.device("meta"):
    print({parameter.device.type for parameter in build("resnet10t").parameters()})
"""
    done = shell(code=code)
    assert done.stdout == "{'meta'}\n", done.stderr
