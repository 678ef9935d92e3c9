from __future__ import annotations

import pytest
import torch

from dmm_cli.devices import require_device_name
from dmm_cli.errors import DmmError


@pytest.mark.parametrize("name", ["cpu", "cpu:0", "cuda", "cuda:0", "cuda:10", "cuda:99"])
def test_names_that_torch_knows_pass(name):
    require_device_name(name)
    assert torch.device(name).type == name.partition(":")[0]


@pytest.mark.parametrize("name", ["", "gpu", "mps", "meta", "CPU", "cuda:", "cuda:x", "cuda:-1", "cuda:01", "cuda:0\n"])
def test_other_names_are_refused(name):
    with pytest.raises(DmmError, match=r"unknown device: .*; dmm computes on cpu or cuda"):
        require_device_name(name)
