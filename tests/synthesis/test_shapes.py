"""Images of unusual shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmm_cli.examples import Examples
from dmm_cli.images import InputSpec
from dmm_cli.report.figures import draw_image_grid, image_grid
from dmm_cli.spaces import JointSpec
from dmm_cli.synthesis.losses import Observation
from dmm_cli.synthesis.losses.total_variation import total_variation
from dmm_cli.synthesis.pseudodata import PseudoData, TeacherRecord


def test_a_grid_of_two_channels_shows_the_first(tmp_path):
    images = np.zeros((2, 2, 4, 4), np.uint8)
    images[:, 0] = 200
    zeros, teachers = np.zeros(2, np.int16), (TeacherRecord("a", "0" * 64, (1.0,)),)
    for channels in (1, 2):
        spec = InputSpec((channels, 4, 4), (0.0,) * channels, (1.0,) * channels)
        logits, sure = np.zeros((2, 1), np.float16), np.ones(2, np.float16)
        data = PseudoData(images[:, :channels], zeros, zeros, logits, sure, np.zeros(1), teachers, spec)
        image_grid(data, tmp_path / f"{channels}.png")
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


def test_a_grid_of_numbers_shows_those_of_every_unit_and_fills_its_rows():
    values = np.array([[1e3, 0.001, 5.0], [3e3, 0.003, 5.0]], np.float32)
    zeros, sure, teachers = np.zeros(2, np.int16), np.ones(2, np.float16), (TeacherRecord("a", "0" * 64, (1.0,)),)
    spec = JointSpec(("labs",), (InputSpec((3,), (2e3, 0.002, 5.0), (1e3, 0.001, 1.0)),))
    images = Examples({"labs": values})
    data = PseudoData(images, zeros, zeros, np.zeros((2, 1), np.float16), sure, np.zeros(1), teachers, spec)
    row = draw_image_grid(data).axes[0]
    low, high = row.images[0].get_array()[0, :8].reshape(2, 4)[:, :3].tolist()
    assert low == pytest.approx([0, 0, 127], abs=1) and high == pytest.approx([255, 255, 127], abs=1)
    assert row.get_aspect() == "auto"


@pytest.mark.parametrize(("shape", "expected"), [((1, 1, 1, 3), 1.0), ((1, 1, 3, 1), 1.0), ((1, 1, 1, 1), 0.0)])
def test_images_one_pixel_high_or_wide_have_a_variation(shape, expected):
    images = torch.arange(float(np.prod(shape))).reshape(shape)
    seen = Observation(images, torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), [], None, None)
    assert float(total_variation(seen)) == expected
