from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import DIGITS, digits_as_pseudo_data, dmm
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from dmm_cli.architectures import input_spec
from dmm_cli.errors import DmmError
from dmm_cli.images import PixelSpace
from dmm_cli.inputs import resolve_source
from dmm_cli.loading import load_model
from dmm_cli.similarity.cka import cka


class Features(nn.Module):
    """A network whose one layer is a given matrix; images are numbered one-hot vectors, so rows are its features."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(*features.shape, bias=False, dtype=torch.float64)
        self.layer.weight = nn.Parameter(features.T.contiguous())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images)


def of_features(*features: torch.Tensor, split: int | None = None) -> np.ndarray:
    images = torch.eye(len(features[0]), dtype=torch.float64)
    return cka([Features(f) for f in features], images.split(split or len(images)))[0]


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """The U-statistic over all ordered quadruples of different samples; Song et al. 2012, theorem 2's kernel."""
    k, m = x @ x.T, y @ y.T
    quadruples = list(itertools.permutations(range(len(x)), 4))
    return sum(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in quadruples) / len(quadruples)


def test_it_is_the_ratio_of_unbiased_hsic():
    torch.manual_seed(0)
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    y = y + x[:, :2]
    a, b = x.numpy(), y.numpy()
    wanted = hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b))
    assert of_features(x, y)[0, 1] == pytest.approx(wanted, rel=1e-9)


def test_rotated_scaled_and_shifted_features_are_the_same_and_strangers_are_not():
    torch.manual_seed(0)
    x = torch.randn(256, 40, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0]
    stranger = torch.randn(256, 400, dtype=torch.float64)
    matrix = of_features(x, 3 * x @ rotation + 5, stranger)
    assert np.allclose(np.diag(matrix), 1) and (matrix == matrix.T).all()
    assert matrix[0, 1] == pytest.approx(1, abs=1e-9)
    assert abs(matrix[0, 2]) < 0.05, "a biased estimate would be about 0.6"


def test_batches_estimate_the_same_and_short_ones_are_left_out():
    torch.manual_seed(0)
    x = torch.randn(1024, 6, dtype=torch.float64)
    y = x + torch.randn(1024, 6, dtype=torch.float64)
    whole, parts = of_features(x, y)[0, 1], of_features(x, y, split=128)[0, 1]
    assert parts == pytest.approx(whole, abs=0.03)
    assert of_features(x[:131], y[:131], split=128)[0, 1] == pytest.approx(of_features(x[:128], y[:128])[0, 1])


def test_the_command_measures_it_on_pseudo_data(tmp_path):
    sites = [DIGITS / f"site-{name}.safetensors" for name in "abd"]
    known = (range(5), range(2, 6), (7, 8))
    data = digits_as_pseudo_data(tmp_path / "pseudo.safetensors", list(zip(sites, known, strict=True)))
    result = dmm("similarity", *sites, "--data", data, "--json")
    assert result.exit_code == 0, result.stderr
    measures = json.loads(result.stdout)["measures"]
    assert list(measures) == ["cosine", "sign", "bn", "cka"]
    matrix = np.array(measures["cka"])
    assert (matrix == matrix.T).all() and np.allclose(np.diag(matrix), 1)
    assert matrix[0, 1] > matrix[0, 2] + 0.1, "two sites of one start are more alike than two of different ones"
    assert dmm("similarity", *sites, "--data", data, "--json").stdout == result.stdout
    alone = json.loads(dmm("similarity", *sites, "--measure", "cka", "--data", data, "--json").stdout)
    assert list(alone["measures"]) == ["cosine", "cka"], "grouping stands on the cosine"


def test_an_image_of_a_rare_class_counts_once_in_a_batch(tmp_path):
    """Against the estimate over all images at once, of which there are fewer than fill a batch."""
    sites = [DIGITS / f"site-{name}.safetensors" for name in "bd"]
    data = digits_as_pseudo_data(tmp_path / "pseudo.safetensors", [(sites[0], (2, 3)), (sites[1], (8,))])
    told = load_file(data)
    with safe_open(data, "numpy") as file:
        metadata = file.metadata()
    command = ["similarity", *sites, "--measure", "cka", "--json", "--data", tmp_path / "few.safetensors"]

    def keep(few: list[int]) -> dict[str, np.ndarray]:
        rows = {name: array[few] if len(array) == len(told["targets"]) else array for name, array in told.items()}
        save_file(rows, tmp_path / "few.safetensors", metadata)
        return rows

    keep([0, 1, -1])
    result = dmm(*command)
    assert result.exit_code == 2 and "few.safetensors holds 3 of these" in result.stderr
    rows = keep([0, 1, 2, 3, 4, 60, -1])
    result = dmm(*command)
    assert result.exit_code == 0, result.stderr
    models = [load_model(resolve_source(str(site)))[0].eval() for site in sites]
    spec = input_spec(resolve_source(str(sites[0])), models[0])
    expected = cka(models, [PixelSpace(spec).from_bytes(torch.from_numpy(rows["images"]))])[0]
    assert json.loads(result.stdout)["measures"]["cka"][0][1] == pytest.approx(expected[0, 1], abs=1e-6)


def test_without_images_it_is_left_out_or_refused():
    sites = [DIGITS / f"site-{name}.safetensors" for name in "ab"]
    assert list(json.loads(dmm("similarity", *sites, "--json").stdout)["measures"]) == ["cosine", "sign", "bn"]
    result = dmm("similarity", *sites, "--measure", "cka")
    assert result.exit_code == 2 and "cka needs images" in result.stderr and "dmm synthesize" in result.stderr


def test_layers_that_make_the_same_of_all_images_have_no_part():
    draw = torch.Generator().manual_seed(5)
    alive = torch.randn(32, 6, generator=draw, dtype=torch.float64)
    other = torch.randn(32, 6, generator=draw, dtype=torch.float64)
    dead, constant = torch.zeros_like(alive), torch.ones_like(alive)

    class Two(nn.Module):
        def __init__(self, first: torch.Tensor, second: torch.Tensor) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Features(first), Features(second)])

        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [part(images) for part in self.parts]

    images = torch.eye(32, dtype=torch.float64)
    for silent in (dead, constant):
        whole, layers = cka([Two(alive, silent), Two(alive, silent), Two(other, alive)], [images])
        plain = of_features(alive, other)
        assert whole[0, 1] == pytest.approx(1) and np.allclose(np.diag(whole), 1)
        assert whole[0, 2] == pytest.approx(plain[0, 1] / 2)  # the mean with the layer that is silent in one of them
        assert np.isnan(list(layers.values())[1][0, 1])
    assert (of_features(dead, constant) == 1).all()


def test_layers_that_work_on_positions_are_left_out():
    class Placed(nn.Module):
        def __init__(self, features: torch.Tensor, places: int) -> None:
            super().__init__()
            self.body, self.place = Features(features), nn.Linear(2, 3, dtype=torch.float64)
            self.places = torch.ones(places, 2, dtype=torch.float64)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.body(images) + self.place(self.places).sum()

    draw = torch.Generator().manual_seed(6)
    features = [torch.randn(32, 6, generator=draw, dtype=torch.float64) for _ in range(2)]
    images = torch.eye(32, dtype=torch.float64)
    for places in (1, 49):
        whole, layers = cka([Placed(f, places) for f in features], [images])
        assert list(layers) == ["body.layer"] and np.allclose(whole, of_features(*features))


def test_networks_without_layers_to_compare_are_refused():
    images = torch.eye(8)
    with pytest.raises(DmmError, match="LayerNorm has no convolution or linear layer") as refused:
        cka([nn.LayerNorm(8), nn.LayerNorm(8)], [images])
    assert "--data" in refused.value.hint
