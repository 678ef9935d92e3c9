"""Images of unusual shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmm_cli.images import InputSpec
from dmm_cli.report.figures import image_grid
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


@pytest.mark.parametrize(("shape", "expected"), [((1, 1, 1, 3), 1.0), ((1, 1, 3, 1), 1.0), ((1, 1, 1, 1), 0.0)])
def test_images_one_pixel_high_or_wide_have_a_variation(shape, expected):
    images = torch.arange(float(np.prod(shape))).reshape(shape)
    seen = Observation(images, torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), [], None, None)
    assert float(total_variation(seen)) == expected
