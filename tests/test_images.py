from __future__ import annotations

import torch

from dmm_cli.images import InputSpec, PixelSpace


def test_bytes_survive_the_way_there_and_back():
    space = PixelSpace(InputSpec((3, 2, 2), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3)[: 3 * 4 * 64].reshape(64, 3, 2, 2)
    assert torch.equal(space.to_bytes(space.from_bytes(pixels)), pixels)


def test_normalisation_is_per_channel():
    space = PixelSpace(InputSpec((2, 1, 1), (0.5, 0.0), (0.5, 2.0)))
    assert space.normalise(torch.ones(1, 2, 1, 1)).flatten().tolist() == [1.0, 0.5]
    assert space.to_bytes(torch.full((1, 2, 1, 1), 9.0)).flatten().tolist() == [255, 255]
