"""Layers solved on what they see: features against the layers' own answers, solutions against numpy's least squares.

Legend: N checkpoints, B images, S features, R outputs.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import normal
from safetensors.torch import save_file
from torch import nn

from dmm_cli.errors import DmmError
from dmm_cli.inputs import resolve_source
from dmm_cli.merging.features import POSITIONS, Batch, features_of, solve_layers
from dmm_cli.merging.method import Layer
from dmm_cli.merging.pleas import pleas
from dmm_cli.merging.recipe import Override, Recipe
from dmm_cli.merging.regmean import regmean

COUNT = 40  # images of each parent


# The formula.


def layer_of(weights: np.ndarray, inputs: list[np.ndarray], shares: np.ndarray) -> Layer:
    grams = np.stack([x.T @ x / len(x) for x in inputs])
    return Layer(torch.from_numpy(weights), torch.from_numpy(grams), torch.from_numpy(shares))


def stacked(weights: np.ndarray, inputs: list[np.ndarray], shares: np.ndarray, off_diagonal=1.0) -> np.ndarray:
    """The (R, S) of smallest squared error over all rows of all parents, each parent's together weighing its share."""
    rows, answers = [], []
    for own, weight, share in zip(inputs, weights, shares, strict=True):
        own = own * np.sqrt(share / len(own))
        spread = np.diag(np.sqrt((own**2).sum(0)))  # one row a unit, as if units were awake one at a time
        for x in (np.sqrt(off_diagonal) * own, np.sqrt(1 - off_diagonal) * spread):
            rows.append(x)
            answers.append(x @ weight.T)
    return np.linalg.lstsq(np.concatenate(rows), np.concatenate(answers), rcond=None)[0].T


@pytest.mark.parametrize("off_diagonal", [0.0, 0.5, 0.9, 1.0])
def test_regmean_is_the_least_squares_solution_over_all_rows(off_diagonal):
    weights, shares = normal(3, 4, 6), np.array([0.5, 0.3, 0.2])
    inputs = [normal(count, 6, seed=count) @ normal(6, 6, seed=1) for count in (20, 30, 50)]
    got = regmean(layer_of(weights, inputs, shares), off_diagonal=off_diagonal, ridge=0.0).numpy()
    assert np.allclose(got, stacked(weights, inputs, shares, off_diagonal), atol=1e-8)


def test_the_ridge_draws_toward_the_weighted_mean():
    weights, shares = normal(2, 4, 6), np.array([0.75, 0.25])
    inputs = [normal(30, 6, seed=seed) for seed in (1, 2)]
    layer = layer_of(weights, inputs, shares)
    mean = 0.75 * weights[0] + 0.25 * weights[1]
    size = 0.5 * np.mean([0.75 * (inputs[0] ** 2).mean(0) + 0.25 * (inputs[1] ** 2).mean(0)])
    weights, inputs = [*weights, mean], [*inputs, np.eye(6)]
    expected = stacked(np.stack(weights), inputs, np.array([*shares, 6 * size]))
    assert np.allclose(regmean(layer, off_diagonal=1.0, ridge=0.5).numpy(), expected, atol=1e-10)
    assert np.allclose(regmean(layer, ridge=1e9).numpy(), mean, atol=1e-6)


def test_what_no_parent_sees_stays_the_weighted_mean():
    weights, shares = normal(2, 4, 6), np.array([0.75, 0.25])
    inputs = [normal(30, 6, seed=seed) * [1, 1, 1, 1, 0, 0] for seed in (1, 2)]
    got = regmean(layer_of(weights, inputs, shares)).numpy()
    assert np.allclose(got[:, 4:], np.tensordot(shares, weights, 1)[:, 4:], atol=1e-12)
    assert not np.allclose(got[:, :4], np.tensordot(shares, weights, 1)[:, :4], atol=1e-2)


def test_parents_that_see_different_directions_are_both_reproduced():
    basis = np.linalg.qr(normal(6, 6))[0]
    inputs = [normal(30, 3, seed=1) @ basis[:3], normal(30, 3, seed=2) @ basis[3:]]
    weights, shares = normal(2, 4, 6), np.array([0.5, 0.5])
    got = regmean(layer_of(weights, inputs, shares), off_diagonal=1.0, ridge=0.0).numpy()
    for own, weight in zip(inputs, weights, strict=True):
        assert np.allclose(own @ got.T, own @ weight.T, atol=1e-8)
        assert not np.allclose(own @ weights.mean(0).T, own @ weight.T, atol=0.5)


def test_pleas_is_the_least_squares_solution_for_the_parents_outputs():
    weights, shares = normal(2, 4, 6), np.array([0.75, 0.25])
    inputs = [normal(30, 6, seed=seed) for seed in (1, 2)]
    outputs = [normal(30, 4, seed=seed) for seed in (3, 4)]
    plain = layer_of(weights, inputs, shares)
    targets = np.stack([y.T @ x / len(x) for x, y in zip(inputs, outputs, strict=True)])
    layer = Layer(plain.weights, plain.grams, plain.shares, torch.from_numpy(targets))
    rows, answers = (
        np.concatenate([np.sqrt(s) * v for s, v in zip(shares, of, strict=True)]) for of in (inputs, outputs)
    )
    expected = np.linalg.lstsq(rows, answers, rcond=None)[0].T
    assert np.allclose(pleas(layer, ridge=0.0).numpy(), expected, atol=1e-8)
    assert np.allclose(pleas(layer, ridge=1e9).numpy(), np.tensordot(shares, weights, 1), atol=1e-6)


# Features.


@torch.no_grad()
@pytest.mark.parametrize("unfolded", [1, 1 << 24])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 3, bias=False), (4, 5)),
        (nn.Linear(5, 3, bias=False), (4, 2, 3, 5)),
        (nn.Linear(5, 3, bias=False), (8, 7, 5)),  # two windows of each image
        (nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2, bias=False), (4, 2, 11)),
        (nn.Conv2d(2, 3, 3, bias=False), (4, 2, 5, 6)),
        (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), (4, 2, 5, 4)),
        (nn.Conv2d(2, 3, 3, stride=2, padding=2, dilation=2, bias=False), (4, 2, 7, 7)),
    ],
    ids=str,
)
def test_features_are_what_the_weight_is_multiplied_with(layer, shape, unfolded, monkeypatch):
    monkeypatch.setattr("dmm_cli.merging.features.UNFOLDED", unfolded)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = features_of(layer, inputs, 4, torch.Generator())  # (B, P, S)
    answers = layer(inputs)
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        answers = answers.flatten(2).mT  # (B, P, R)
    assert rows.shape[1] <= POSITIONS
    assert torch.allclose(rows @ layer.weight.flatten(1).T, answers.reshape(4, -1, 3), atol=1e-5)


@torch.no_grad()
def test_of_many_positions_some_are_drawn_for_each_image():
    layer = nn.Conv2d(1, 1, 1)
    inputs = torch.arange(3 * 100.0).reshape(3, 1, 10, 10)
    rows = features_of(layer, inputs, 3, torch.Generator().manual_seed(0))[:, :, 0]  # (B, P)
    assert rows.shape == (3, POSITIONS)
    assert [set((row // 100).tolist()) for row in rows] == [{0}, {1}, {2}], "every image keeps its own"
    assert all(len(set(row.tolist())) == POSITIONS for row in rows), "no position twice"
    assert len({tuple((row % 100).tolist()) for row in rows}) == 3


# Layers of a network, one after the other.


class Net(nn.Module):
    """Registered in another order than it runs in."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(4, 3)
        self.unused = nn.Linear(3, 3)
        self.position = nn.Linear(2, 4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.wrapped = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.conv = nn.Conv2d(2, 4, 2, stride=2)
        self.square = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).relu()
        x = x + self.position(torch.ones(1, 2)).view(1, 4, 1, 1)
        x = self.wrapped(self.depthwise(x)).flatten(2).mT  # (B, P, 4)
        return self.fc(self.drop(self.square(self.square(x))).relu().mean(1))


@pytest.fixture
def family(tmp_path: Path) -> tuple[Net, list[Net], list[Batch]]:
    """The mean of two parents, them, and two batches of images of both: teacher 7 and teacher 2."""
    nets = [Net(1).eval(), Net(2).eval()]
    mean = Net(3).eval()
    mean.load_state_dict({k: (v + nets[1].state_dict()[k]) / 2 for k, v in nets[0].state_dict().items()})
    for number, net in enumerate(nets):
        save_file(net.state_dict(), tmp_path / f"{number}.safetensors")
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(2 * COUNT, 2, 4, 6, generator=draw) + 1
    owners = torch.tensor([7, 2]).repeat(COUNT)
    return mean, nets, [Batch(*part) for part in zip(images.split(COUNT), owners.split(COUNT), strict=True)]


def solve(family, tmp_path: Path, order=(0, 1), method: str = "regmean", **details) -> dict[str, float]:
    mean, nets, batches = family
    modules = [nets[number] for number in order] if method == "pleas" else []
    exact = {"ridge": 0.0, **({"off_diagonal": 1.0} if method == "regmean" else {})}
    sources = [resolve_source(str(tmp_path / f"{number}.safetensors")) for number in order]
    recipe = Recipe(method, **{"parameters": exact, **details})
    return solve_layers(mean, sources, recipe, batches, [[7, 2][number] for number in order], [mean.norm], modules)


def seen_by(net: Net, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the first layer and the last are given, (B, P, S)."""
    mean, variance = (net.norm.running_mean, net.norm.running_var) if not net.norm.training else (None, None)
    x = F.batch_norm(net.conv(images), mean, variance, net.norm.weight, net.norm.bias, net.norm.training).relu()
    x = x + net.position(torch.ones(1, 2)).view(1, 4, 1, 1)
    x = net.wrapped(net.depthwise(x)).flatten(2).mT  # (B, P, 4)
    return {"conv": F.unfold(images, 2, stride=2).mT, "fc": net.square(net.square(x)).relu().mean(1, keepdim=True)}


@torch.no_grad()
@pytest.mark.parametrize("method", ["regmean", "pleas"])
def test_every_layer_is_solved_on_what_the_solved_layers_before_it_give(family, tmp_path, method):
    merged, parents, batches = family
    before = {name: value.clone() for name, value in merged.state_dict().items()}
    lengths = solve(family, tmp_path, method=method)
    after = merged.state_dict()
    assert list(lengths) == ["conv.weight", "square.weight", "fc.weight"]
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(lengths)
    assert not merged.norm.training and merged.norm.track_running_stats

    merged.norm.training = True  # every batch by its own statistics, images of both parents in it
    merged.norm.track_running_stats = False
    for name in ("conv", "fc"):
        layers = [getattr(net, name) for net in parents]
        rows, answers = [], []
        for images, owners in batches:
            given = seen_by(merged, images)[name]
            for net, layer, owner in zip(parents, layers, (7, 2), strict=True):
                own = given[owners == owner].flatten(0, 1)  # (rows, S)
                theirs = seen_by(net, images[owners == owner])[name].flatten(0, 1)
                beyond = layer.bias - getattr(merged, name).bias if method == "pleas" else 0
                rows.append(own)
                answers.append((theirs if method == "pleas" else own) @ layer.weight.flatten(1).T + beyond)
        expected = np.linalg.lstsq(torch.cat(rows).numpy(), torch.cat(answers).numpy(), rcond=None)[0].T
        assert np.allclose(after[f"{name}.weight"].flatten(1).numpy(), expected, atol=1e-3), name
        norms = [float(layer.weight.norm()) for layer in layers]
        assert lengths[f"{name}.weight"] == pytest.approx(np.linalg.norm(expected) / np.mean(norms), rel=1e-3)


@torch.no_grad()
def test_what_one_parent_alone_has_it_answers_for_the_images_of_both(family, tmp_path):
    """Of a layer's four outputs one is the first parent's own and one the second's."""
    merged, parents, batches = family
    own = {"dmm.own": json.dumps({"conv.weight": [[1], [2]]})}
    for number, net in enumerate(parents):
        save_file(net.state_dict(), tmp_path / f"{number}.safetensors", own)
    solve(family, tmp_path, method="pleas")
    images, owners = (torch.cat(part) for part in zip(*batches, strict=True))
    rows = seen_by(merged, images)["conv"]  # (B, P, S)
    answers = torch.stack([net.conv(images).flatten(2).mT - merged.conv.bias for net in parents])  # (N, B, P, R)
    speaker = (owners == 2).long()[:, None].repeat(1, 4)  # (B, R)
    speaker[:, 1], speaker[:, 2] = 0, 1
    wanted = answers.permute(1, 2, 3, 0).gather(3, speaker[:, None, :, None].expand(-1, rows.shape[1], -1, 1))
    expected = np.linalg.lstsq(rows.flatten(0, 1).numpy(), wanted.flatten(0, 1).squeeze(-1).numpy(), rcond=None)[0].T
    assert np.allclose(merged.conv.weight.flatten(1).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    "told", ["x", "[]", "3", '{"conv.weight": 3}', '{"conv.weight": [[1], 2]}', '{"conv.weight": [[1], ["a"]]}',
             '{"conv.weight": [[4], [2]]}', '{"conv.weight": [[-1], [2]]}', '{"conv.weight": ["12"]}', "[" * 100000,
             '{"conv.weight": [""]}', '{"conv.weight": [[1], [2], [3]]}'],
)  # fmt: skip
def test_rows_of_one_parent_that_are_no_rows_are_refused_by_file(family, tmp_path, told):
    for number, net in enumerate(family[1]):
        save_file(net.state_dict(), tmp_path / f"{number}.safetensors", {"dmm.own": told})
    with pytest.raises(DmmError, match=r"0\.safetensors: dmm\.own in the metadata is not rows of conv\.weight"):
        solve(family, tmp_path, method="pleas")


@pytest.mark.parametrize("method", ["regmean", "pleas"])
def test_the_same_draws_give_the_same_weights_and_the_order_of_checkpoints_does_not_matter(family, tmp_path, method):
    merged, _, _ = family
    start = {name: value.clone() for name, value in merged.state_dict().items()}
    found = []
    for order in ((0, 1), (0, 1), (1, 0)):
        merged.load_state_dict(start)
        solve(family, tmp_path, order, method)
        found.append(merged.state_dict()["fc.weight"].clone())
    assert torch.equal(found[0], found[1]) and torch.allclose(found[0], found[2], atol=1e-6)


@pytest.mark.parametrize("method", ["regmean", "pleas"])
def test_a_batch_need_not_hold_images_of_every_parent(family, tmp_path, method):
    merged, parents, batches = family
    images, owners = (torch.cat(part) for part in zip(*batches, strict=True))
    apart = [Batch(images[owners == owner], owners[owners == owner]) for owner in (7, 2)]
    solve((merged, parents, apart), tmp_path, method=method)
    assert all(value.isfinite().all() for value in merged.state_dict().values())


def test_heads_whose_rows_do_not_correspond_are_left_alone(family, tmp_path):
    merged, parents, _ = family
    before = merged.fc.weight.detach().clone()
    for number, (net, names) in enumerate(zip(parents, ("abc", "bca"), strict=True)):
        save_file(net.state_dict(), tmp_path / f"{number}.safetensors", {"dmm.classes": json.dumps(list(names))})
    assert list(solve(family, tmp_path)) == ["conv.weight", "square.weight"]
    assert torch.equal(merged.fc.weight, before)


def test_weights_and_parameters_of_some_layers(family, tmp_path):
    merged, parents, _ = family
    overrides = (Override("conv.*", weights=(0.0, 1.0)), Override("fc.*", {"ridge": 1e9}))
    mean = merged.fc.weight.detach().clone()
    solve(family, tmp_path, overrides=overrides)
    assert torch.allclose(merged.conv.weight, parents[1].conv.weight, atol=1e-5)
    assert torch.allclose(merged.fc.weight, mean, atol=1e-5)
    square = torch.stack([net.square.weight for net in parents]).mean(0)
    assert not torch.allclose(merged.square.weight, square, atol=0.01)
