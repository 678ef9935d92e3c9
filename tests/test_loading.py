"""Checkpoints as modules: what was saved is what computes, whatever a network does when it is built."""

from __future__ import annotations

import pytest
import torch
from networks import Called, Tied
from safetensors.torch import load_file, save_file, save_model

from dmm_cli import architectures as arch
from dmm_cli.errors import DmmError
from dmm_cli.inputs import resolve_source
from dmm_cli.loading import load_model, load_state_dict
from dmm_cli.norms import norm_layers

ODD = """
import torch
from torch import nn


class Frozen(nn.Module):
    \"\"\"A part that checkpoints leave out, and a table that is drawn when it is built.\"\"\"

    def __init__(self):
        super().__init__()
        self.frozen = nn.Parameter(torch.empty(4, 4))
        nn.init.constant_(self.frozen, 0.5)
        self.free = nn.Linear(4, 2)
        self.register_buffer("table", torch.empty(4).fill_(3.0), persistent=False)
        self.register_state_dict_post_hook(lambda module, held, *_: [held.pop("frozen")] and None)

    def forward(self, x):
        return self.free(x @ self.frozen + self.table)

    def load_state_dict(self, held, **words):
        return super().load_state_dict({**held, "frozen": self.frozen}, **words)
"""


def saved(tmp_path, model: torch.nn.Module):
    path = tmp_path / "m.safetensors"
    save_file(model.state_dict(), path)
    return resolve_source(str(path))


def test_a_loaded_model_computes_what_the_saved_one_did(tmp_path):
    model = arch.build("resnet18,num_classes=5")
    source = saved(tmp_path, model)
    images = torch.randn(2, 3, 32, 32)
    loaded, _ = load_model(source, "resnet18,num_classes=5")
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
    assert not loaded.training and arch.num_classes(loaded) == 5
    assert len(norm_layers(loaded)) == 20
    assert norm_layers(arch.build("vit_tiny_patch16_224")) == []


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    source = saved(tmp_path, arch.build("resnet18,num_classes=5"))
    with pytest.raises(DmmError) as error:
        load_model(source, "resnet18,num_classes=6")
    assert list(error.value.evidence) == [
        "fc.bias is [5], the model has [6]",
        "fc.weight is [5, 512], the model has [6, 512]",
    ]


def test_names_of_a_wrapper_are_told(tmp_path):
    path, spec = tmp_path / "wrapped.safetensors", "resnet18,num_classes=5"
    wrapped = torch.nn.DataParallel(arch.build(spec))
    save_file(wrapped.state_dict(), path)
    with pytest.raises(DmmError) as caught:
        load_model(resolve_source(str(path)), spec)
    assert caught.value.hint == "every name begins with module, as those of a wrapper do: save what it wraps"
    with pytest.raises(DmmError) as caught:
        load_model(resolve_source(str(path)), "resnet34,num_classes=5")
    assert "--arch" in caught.value.hint


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_buffers_may_hold_unsigned_integers(tmp_path, dtype):
    model = Called()
    model.register_buffer("table", torch.arange(4).to(dtype))
    state = load_state_dict(saved(tmp_path, model))
    assert state["table"].dtype == dtype and state["table"].tolist() == [0, 1, 2, 3]


def test_half_precision_is_loaded_exactly(tmp_path):
    torch.manual_seed(0)
    state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in arch.build("resnet18").state_dict().items()}
    save_file(state, tmp_path / "h.safetensors")
    source = resolve_source(str(tmp_path / "h.safetensors"))
    got = load_state_dict(source)
    assert all(torch.equal(got[name], value) and got[name].dtype == value.dtype for name, value in state.items())
    model, _ = load_model(source, "resnet18")
    assert torch.equal(model.conv1.weight, state["conv1.weight"].float())


@pytest.mark.parametrize("spec", ["resnet18,num_classes=5", "vit_tiny_patch16_224,num_classes=5,img_size=32"])
def test_no_first_weights_are_drawn(tmp_path, spec):
    source = saved(tmp_path, arch.build(spec))
    before = torch.get_rng_state()
    load_model(source, spec)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_factory_keeps_first_weights_that_checkpoints_leave_out(tmp_path, monkeypatch):
    (tmp_path / "odd_network.py").write_text(ODD)
    monkeypatch.syspath_prepend(tmp_path)
    model = arch.build("odd_network:Frozen")
    loaded, _ = load_model(saved(tmp_path, model), "odd_network:Frozen")
    images = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_tied_weights_may_stand_in_the_file_under_one_name(tmp_path):
    torch.manual_seed(0)
    model, path = Tied(), tmp_path / "tied.safetensors"
    save_model(model, str(path))
    assert len(load_file(path)) < len(model.state_dict())
    loaded, _ = load_model(resolve_source(str(path)), "networks:tied")
    numbers = torch.randn(3, 6)
    with torch.no_grad():
        assert torch.equal(loaded(numbers), model.eval()(numbers))


def test_large_values_are_not_infinite(tmp_path):
    model = Called()
    with torch.no_grad():
        model.head.weight[0] = torch.finfo(torch.float32).max  # their sum is
    loaded, _ = load_model(saved(tmp_path, model), "networks:called")
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_whole_numbers_are_no_weights(tmp_path):
    path, spec = tmp_path / "quantised.safetensors", "resnet18,num_classes=5"
    state = arch.build(spec).state_dict()
    save_file({**state, "fc.weight": (state["fc.weight"] * 127).to(torch.int8)}, path)
    with pytest.raises(DmmError, match=r"quantised\.safetensors holds whole numbers") as caught:
        load_model(resolve_source(str(path)), spec)
    assert list(caught.value.evidence) == ["fc.weight is I8, the model has float32"]
