"""Small networks of every kind that can be aligned, and of some that cannot; ``networks:NAME`` names one of these."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from dmm_cli.architectures import build

KINDS = {  # what is special: architecture, size of an input
    "residual": ("resnet18,num_classes=5,in_chans=2,layers=(1,2,1,1),channels=(8,12,16,20)", (2, 32, 32)),
    "bottleneck": ("resnet50,num_classes=5,layers=(1,1,1,1),channels=(4,6,8,10)", (3, 32, 32)),
    "grouped": (
        "resnext50_32x4d,num_classes=5,layers=(1,1,1,1),channels=(8,12,16,20),cardinality=4,base_width=32",
        (3, 32, 32),
    ),
    "depthwise, squeeze-excite": ("mobilenetv3_small_050,num_classes=5", (3, 64, 64)),
    "grouped, squeeze-excite": ("regnety_002,num_classes=5", (3, 64, 64)),
    "concatenated": ("densenet121,num_classes=5,growth_rate=6,block_config=(2,2)", (3, 32, 32)),
    "layer scale": ("convnext_atto,num_classes=5,depths=(1,1,1,1),dims=(8,12,16,20)", (3, 64, 64)),
    "heads": ("vit_tiny_patch16_224,num_classes=5,img_size=32,embed_dim=36,num_heads=3,depth=2", (3, 32, 32)),
    "mixer": (
        "timm.models.mlp_mixer:MlpMixer,num_classes=5,img_size=64,patch_size=16,embed_dim=24,num_blocks=2",
        (3, 64, 64),
    ),
    "windows": (
        "swin_tiny_patch4_window7_224,num_classes=5,img_size=56,embed_dim=24,depths=(2,2),num_heads=(2,3)",
        (3, 56, 56),
    ),
    "flattened": ("networks:flattened", (3, 8, 8)),
    "gated": ("networks:gated", (6,)),
}


def flattened() -> nn.Module:
    """Channels that a view joins with fixed positions."""
    layers = [nn.Conv2d(3, 10, 3), nn.GroupNorm(2, 10), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(90, 16)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(16, 4))


def separable() -> nn.Module:
    """A filter of its own for every channel, between mixtures of all."""
    layers = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


class Called(nn.Module):
    """Layers that are given their input by position, or by its name."""

    num_classes = 4

    def __init__(self, by_name: bool = False) -> None:
        super().__init__()
        self._by_name = by_name
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.conv, self.norm):
            x = layer(input=x) if self._by_name else layer(x)
        x = x.relu().mean((2, 3))  # (B, 8)
        return self.head(input=x) if self._by_name else self.head(x)


called = Called


class Counted(Called):
    """Takes features of eight channels alone, and tells it by no word."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        assert x.shape[1] == 8
        return self.head(x.relu().mean((2, 3)))


counted = Counted


class Twice(nn.Module):
    """Two convolutions with the same filters."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.one, self.two = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(self.norm(self.stem(x)).relu()).relu()
        return self.head(self.two(x).relu().mean((2, 3)))


twice = Twice


class Gated(nn.Module):
    """Two halves of one layer meet unit by unit; another is split into parts of unlike use."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.parts, self.out = nn.Linear(6, 24), nn.Linear(12, 20), nn.Linear(20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.up(x).chunk(2, dim=-1)
        left, right = self.parts(a * b.sigmoid()).split([8, 12], dim=-1)
        return self.out(torch.cat([left.relu(), right.tanh()], dim=-1))


gated = Gated


class Tied(nn.Module):
    """One matrix under two names, used in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 10, bias=False)
        self.again = nn.Linear(6, 10, bias=False)
        self.again.weight = self.inner.weight
        self.shift = nn.Linear(10, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.shift(self.inner(x).relu()) + self.again(x)
        return h @ self.again.weight


tied = Tied


class Sorted(nn.Module):
    """An operation that depends on the order of units, between layers whose units are free."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 9), nn.Linear(9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x).cumsum(-1)).relu())


ordered = Sorted


def only_normalised() -> nn.Module:
    """Units that are normalised with one another."""
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


class Auxiliary(nn.Module):
    """One head for training alone, one whose answer nobody hears, and a result that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Linear(8, 3)
        self.training_conv, self.training_fc = nn.Conv2d(8, 6, 3), nn.Linear(6, 5)
        self.unheard = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).relu_()
        if self.training:
            self.told = self.training_fc(self.training_conv(h).mean((2, 3)))
        pooled = h.mean((2, 3))
        self.unheard(pooled)
        h.abs()
        return self.second(pooled)


auxiliary = Auxiliary


class Branching(nn.Module):
    """Control flow that torch.export cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.second(h.relu() if float(h.sum()) > 0 else h.tanh())


branching = Branching


def lively(spec: str, seed: int = 0) -> nn.Module:
    """A network in eval mode none of whose tensors is constant, as after training."""
    torch.manual_seed(seed)
    model = build(spec).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            spread = float(tensor.std(correction=0))
            tensor += torch.randn(tensor.shape) * (0.1 if spread == 0 else 0.1 * spread)
            if name.endswith("running_var"):
                tensor.abs_()
    return model


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """The state dict as arrays."""
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def noisy(tensors: dict[str, np.ndarray], share: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Float tensors with noise of this share of their own deviation; running variances stay positive."""
    draw = np.random.default_rng(seed)
    changed = dict(tensors)
    for name, array in tensors.items():
        if array.dtype.kind == "f":
            changed[name] = (array + draw.normal(size=array.shape) * share * array.std()).astype(array.dtype)
        if name.endswith("running_var"):
            changed[name] = np.abs(changed[name])
    return changed
