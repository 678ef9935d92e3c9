"""The spec of a network: what may move, what may not, and that the function stays the same."""

from __future__ import annotations

import os

import networks
import numpy as np
import pytest
import torch
from conftest import ROOT, shell
from networks import KINDS, arrays, lively

from dmm_cli.alignment.apply import identity, permute, random_image
from dmm_cli.alignment.trace import trace
from dmm_cli.errors import DmmError


def spec_of(kind: str):
    name, size = KINDS[kind]
    return trace(lively(name), size)


def shapes(kind: str) -> list[tuple[int, list[tuple[int, ...]]]]:
    """Of every group: the number of blocks and the shape of every role."""
    return [(len(group.blocks), [role.shape for role in group.roles]) for group in spec_of(kind).groups]


def plain(*sizes: int) -> list[tuple[int, list[tuple[int, int]]]]:
    return [(1, [(1, size)]) for size in sizes]


def outputs(model: torch.nn.Module, tensors, size) -> torch.Tensor:
    model.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    with torch.no_grad():
        return model.double()(torch.randn(2, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_any_permutation_of_the_spec_keeps_the_function(kind):
    name, size = KINDS[kind]
    model = lively(name)
    spec, before = trace(model, size), arrays(model.double())
    image = random_image(spec, np.random.default_rng(0))
    after = permute(before, spec, image)
    moved = [key for key in before if (after[key] != before[key]).any()]
    assert len(moved) > len(before) / 2
    a, b = outputs(model, before, size), outputs(model, after, size)
    assert float((a - b).abs().max()) < 1e-10 * float(a.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_nearly_all_weights_are_covered(kind):
    name, size = KINDS[kind]
    model = lively(name)
    spec = trace(model, size)
    sizes = {key: value.numel() for key, value in model.named_parameters()}
    assert sum(sizes[key] for key in sizes if key in spec.tensors) > 0.95 * sum(sizes.values())


def test_channels_of_a_residual_network():
    # the stem; then of every stage the inner channels of each block, and the stream
    assert shapes("residual") == plain(64, 8, 8, 12, 12, 12, 16, 16, 20, 20)


def test_heads_and_the_units_in_them():
    attention, hidden = (3, [(3, 12), (3, 12)]), (1, [(1, 144)])
    assert shapes("heads") == [(1, [(1, 36)]), attention, hidden, attention, hidden]


def test_groups_of_a_convolution_move_with_their_inputs_and_outputs():
    grouped = [roles for blocks, roles in shapes("grouped") if blocks > 1]
    assert len(grouped) == 4 and all(role[0] == 4 for roles in grouped for role in roles)
    assert all(len(roles) == 2 for roles in grouped)


def test_segments_of_a_concatenation_are_groups_of_their_own():
    # the stem, two dense layers of a bottleneck and its output each, the transition, two dense layers
    assert shapes("concatenated") == plain(12, 24, 6, 24, 6, 12, 24, 6, 24, 6)


def test_windows_and_merged_patches_leave_the_stream_whole():
    assert [group for group in shapes("windows") if group[0] > 1] == [
        (2, [(2, 12), (2, 12)]), (2, [(2, 12), (2, 12)]), (3, [(3, 16), (3, 16)]), (3, [(3, 16), (3, 16)]),
    ]  # fmt: skip


def test_halves_that_meet_are_one_and_parts_of_unlike_use_are_two():
    assert shapes("gated") == plain(12, 8, 12)


def test_groups_of_a_normalisation_bound_what_may_move():
    assert shapes("flattened") == [(2, [(2, 5)]), (1, [(1, 16)])]


def test_tied_weights_move_together():
    model = lively("networks:tied")
    spec, before = trace(model, (6,)), arrays(model)
    assert [group.size for group in spec.groups] == [10]
    after = permute(before, spec, random_image(spec, np.random.default_rng(3)))
    assert (after["inner.weight"] == after["again.weight"]).all()
    assert (after["inner.weight"] != before["inner.weight"]).any()


def test_an_unknown_operation_fixes_the_units_it_touches_and_no_others():
    spec = trace(lively("networks:ordered"), (6,))
    assert [(group.name, group.size) for group in spec.groups] == [("second.weight[0]", 9)]


def test_what_leads_nowhere_stays_as_it_is_and_fixes_nothing():
    model = lively("networks:auxiliary")
    spec, before = trace(model, (1, 6, 6)), arrays(model)
    assert [group.size for group in spec.groups] == [8]
    heads = ("training_conv", "training_fc", "unheard")
    assert spec.unread == tuple(f"{head}.{part}" for head in heads for part in ("weight", "bias"))
    after = permute(before, spec, random_image(spec, np.random.default_rng(0)))
    moved = {name for name in before if (after[name] != before[name]).any()}
    assert moved == {"first.weight", "first.bias", "second.weight"}


def test_a_module_that_cannot_be_traced_is_named():
    with pytest.raises(DmmError, match=r"torch.export cannot trace Branching") as error:
        trace(networks.branching().eval(), (6,))
    assert error.value.evidence


@pytest.mark.parametrize(("network", "size"), [("gated", 7), ("branching", 6)])
def test_what_cannot_be_traced_is_told_by_the_error_alone(network, size):
    """An input that does not fit, and a decision by values; of either torch would log lines of its own."""
    code = f"from dmm_cli.alignment.trace import trace; import networks; trace(networks.{network}().eval(), ({size},))"
    said = shell(code=code, env={"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}).stderr
    assert f"DmmError: torch.export cannot trace {network.capitalize()}" in said
    assert "failed while attempting" not in said and "user code" not in said


def test_the_same_module_gives_the_same_spec():
    one, two = spec_of("heads"), spec_of("heads")
    assert one.count == two.count and (identity(one) == identity(two)).all()
    for a, b in zip(one.groups, two.groups, strict=True):
        assert a.name == b.name and (a.everything == b.everything).all()
