"""A classifier of two inputs on real digits: the upper half as an image, features of the lower half as a vector.

The digits are those that ship with scikit-learn (UCI, 1,797 images of 8 x 8 pixels). The vector has the means of 1 x 2
pixels of the lower half, 0 to 16 each. ``halves:net`` names the network, ``example_inputs`` tells what it takes.

Legend: N digits.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

SITES = {"a": (0, 1, 2, 3), "b": (4, 5, 6), "c": (7, 8, 9)}  # classes; a and b go on from the base, c begins anew
BASE, BASE_SHARE = range(7), 0.15  # classes of the base, and its share of their images
HELD_OUT = 45  # test images per class
LEVELS = 5  # tokens that a mean of two pixels may be
INPUT = {"image": {"mean": [0.3], "std": [0.4]}, "vector": {"mean": [5.0], "std": [5.0]}}
BATCH, RATE = 32, 5e-3

Data = dict[str, torch.Tensor]


class Net(nn.Module):
    """Convolutions on the image, a dense layer on the vector, and layers on both."""

    def __init__(self, num_classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.look = nn.Sequential(_conv(1, width), _conv(width, 2 * width, 2), _conv(2 * width, 2 * width, 2))
        self.read = _dense(16, 2 * width)
        self.both = _dense(10 * width, 4 * width)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, image: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        seen = self.look(image).mean(2).flatten(1)  # (N, 2 width * 4)
        return self.head(self.both(torch.cat([seen, self.read(vector)], 1)))


class TokenNet(Net):
    """The same, of grey levels of the lower half as tokens."""

    def __init__(self, num_classes: int = 10, width: int = 8) -> None:
        super().__init__(num_classes, width)
        self.words = nn.Embedding(LEVELS, 4)
        self.read = _dense(16 * 4, 2 * width)

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(image, self.words(tokens).flatten(1))

    def example_inputs(self) -> Data:
        """Two examples."""
        return {"image": torch.zeros(2, 1, 8, 16), "tokens": torch.zeros(2, 16, dtype=torch.int64)}


net, token_net = Net, TokenNet


def example_inputs() -> Data:
    """Two examples."""
    return {"image": torch.zeros(2, 1, 8, 16), "vector": torch.zeros(2, 16)}


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    layers = [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def _dense(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU())


def digits(seed: int = 0) -> tuple[dict[str, Data], Data]:
    """What the base, every site and ``all`` train on, no digit at two sites, and the test: stored inputs and labels."""
    raw = load_digits()
    pixels, labels = torch.from_numpy(raw.images).float(), torch.from_numpy(raw.target)
    upper = F.interpolate(pixels[:, None, :4] * (255 / 16), scale_factor=2, mode="bilinear")  # (N, 1, 8, 16)
    whole = {
        "image": upper.round().to(torch.uint8),
        "vector": pixels[:, 4:].unflatten(2, (4, 2)).mean(3).flatten(1),  # (N, 16)
        "labels": labels,
    }
    draw = np.random.default_rng(seed)
    index: dict[str, list[np.ndarray]] = {"test": [], "base": [], **{site: [] for site in SITES}}
    for digit in range(10):
        own = draw.permutation(np.flatnonzero(raw.target == digit))
        public = HELD_OUT + (int(BASE_SHARE * (len(own) - HELD_OUT)) if digit in BASE else 0)
        test, base, rest = np.split(own, [HELD_OUT, public])
        site = next(name for name, classes in SITES.items() if digit in classes)
        for name, part in (("test", test), ("base", base), (site, rest)):
            index[name].append(part)
    parts = {name: np.concatenate(pieces) for name, pieces in index.items()}
    parts["all"] = np.concatenate([part for name, part in parts.items() if name != "test"])
    split = {name: {key: value[part] for key, value in whole.items()} for name, part in parts.items()}
    return split, split.pop("test")


def train(model: nn.Module, data: Data, epochs: int, seed: int, shown: tuple[str, ...] = ("image", "vector")) -> Net:
    """Train on stored inputs, those not ``shown`` at zero; leaves the model in eval mode."""
    inputs, labels = taken(data, shown), data["labels"]
    stream = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    batches = len(labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=epochs * batches)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=stream)[: batches * BATCH].split(BATCH):
            loss = F.cross_entropy(model(**{name: value[rows] for name, value in inputs.items()}), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def taken(data: Data, shown: tuple[str, ...] = ("image", "vector")) -> Data:
    """Stored inputs as the network takes them, what it is not shown at zero."""
    scale = {"image": 255.0, "vector": 1.0}
    inputs = {
        name: (data[name] / scale[name] - space["mean"][0]) / space["std"][0] * (name in shown)
        for name, space in INPUT.items()
        if name in data
    }
    return inputs | {"tokens": data["tokens"]} if "tokens" in data else inputs


def accuracy(model: nn.Module, data: Data, shown: tuple[str, ...] = ("image", "vector")) -> float:
    """In per cent."""
    with torch.no_grad():
        return 100 * float((model(**taken(data, shown)).argmax(1) == data["labels"]).float().mean())


def with_tokens(data: Data) -> Data:
    """The same with the vector in levels, as ``TokenNet`` takes it."""
    tokens = (data["vector"] / 16 * (LEVELS - 1)).round().long()  # (N, 16)
    return {"image": data["image"], "tokens": tokens, "labels": data["labels"]}


def train_sites(split: dict[str, Data], epochs: int, seed: int = 0) -> dict[str, Net]:
    """The base and every site."""
    models = {"base": train(fresh(seed + 1), split["base"], 2 * epochs, seed + 1)}
    for number, site in enumerate(SITES):
        model = fresh(seed + 10 + number)
        if site != "c":
            model.load_state_dict(models["base"].state_dict())
        models[site] = train(model, split[site], epochs, seed + 10 + number)
    return models


def fresh(seed: int) -> Net:
    """The network at a random start."""
    torch.manual_seed(seed)
    return Net()


def save(path: Path, model: nn.Module) -> Path:
    """A checkpoint that says what it is and what it takes."""
    factory, stated = ("token_net", {"image": INPUT["image"]}) if isinstance(model, TokenNet) else ("net", INPUT)
    save_file(model.state_dict(), path, {"dmm.arch": f"halves:{factory}", "dmm.input": json.dumps(stated)})
    return path
