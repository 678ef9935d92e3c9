"""One setting and one seed: its images, its checkpoints, and where they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import split
from .training import Recipe, Task
from .whole import savez

BASE, POOLED = 99, 98  # beside the numbers of clients, in seeds


@dataclass(frozen=True)
class Profile:
    """How large the benchmark is.

    Attributes:
        settings: what clients differ in, and where they start: ``ALPHA-own``, ``renderings-shared``.
        own, base, shared, pooled: training of clients from their own start; of the common start; of clients that go
            on from it; of one network on all data.
        run: flags of ``dmm run``.
    """

    clients: int
    settings: Sequence[str]
    seeds: int
    own: Recipe
    base: Recipe
    shared: Recipe
    pooled: Recipe
    run: Sequence[str] = ()


SMALL = "resnet18,num_classes=10,layers=(1,1,1,1),channels=(16,32,64,128)"  # 325,866 parameters
LARGE = "synthesis_speed:cifar_resnet18"
PROFILES = {
    "small": Profile(
        clients=5,
        settings=("0.01-own", "100-shared", "renderings-shared"),
        seeds=1,
        own=Recipe(SMALL, 40),
        base=Recipe(SMALL, 30),
        shared=Recipe(SMALL, 5, rate=5e-4),
        pooled=Recipe(SMALL, 8),
    ),
    "full": Profile(
        clients=10,
        settings=("0.01-own", "0.1-own", "0.5-own"),
        seeds=3,
        own=Recipe(LARGE, 40),
        base=Recipe(LARGE, 60),
        shared=Recipe(LARGE, 20, rate=5e-4),
        pooled=Recipe(LARGE, 30),
        run=("--preset", "best", "--distill-steps", "3600"),  # by training images that clients were kept from
    ),
}


@dataclass(frozen=True)
class Images:
    """Images, uint8 (N, 3, 32, 32), and labels, int64 (N,), for training and to judge by; names of the classes."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]


class Cell:
    """The clients of one setting and one seed.

    Attributes:
        shared: whether clients go on from a common start, which was trained on images that no client has.
        shares: of every client, indices into the training images.
        folder: where everything is kept, but for the network of all data, which other settings have too.
    """

    def __init__(self, work: Path, profile: Profile, setting: str, seed: int, images: Images, counted: bool) -> None:
        self.profile, self.setting, self.seed = profile, setting, seed
        self._images, self._counted = images, counted
        skew, _, start = setting.partition("-")
        self.shared, self._renders = start == "shared", skew == "renderings"
        self.folder = work / (setting + "-counted" * counted) / f"seed-{seed}"
        labels = images.train_labels
        self._base_share, free = split.base_and_rest(labels, seed)
        free = free if self.shared else np.arange(len(labels))
        alpha = split.EVEN if self._renders else float(skew)
        self.shares = [free[own] for own in split.dirichlet(labels[free], profile.clients, alpha, seed)]
        self.pooled = (self.folder if self._renders else work) / f"pooled-{seed}.safetensors"

    clients = property(lambda self: [self.folder / f"client-{n}.safetensors" for n in range(len(self.shares))])
    base = property(lambda self: self.folder / "base.safetensors")
    test = property(lambda self: self.folder / "test.npz")

    def write_images(self) -> None:
        """The test images, a part of them in every rendering, and who has which of the training images."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.test.exists():
            return
        savez(self.folder / "shares.npz", **{f"client_{n}": own for n, own in enumerate(self.shares)})
        images = self._images.test.copy()
        for number, name in enumerate(split.RENDERINGS if self._renders else ()):
            part = slice(number, None, len(split.RENDERINGS))
            images[part] = split.rendered(images[part], name, self._seed_of(number) + 1)
        savez(self.test, images=images, labels=self._images.test_labels, classes=np.array(self._images.classes))

    def seen(self, client: int) -> tuple[np.ndarray, np.ndarray]:
        """Training images of a client as it sees them, uint8 (N, 3, 32, 32), and their labels (N,)."""
        own = self.shares[client]
        images, labels = self._images.train[own], self._images.train_labels[own]
        if self._renders:
            names = list(split.RENDERINGS)
            images = split.rendered(images, names[client % len(names)], self._seed_of(client))
        return images, labels

    def starts(self, pooled: bool) -> list[Task]:
        """What is trained before the clients.

        Args:
            pooled: whether the network of all data, which nobody may have, is wanted beside the common start.
        """
        train, labels = self._images.train, self._images.train_labels
        tasks = []
        if self.shared and not self.base.exists():
            own = self._base_share
            tasks.append(self._task(self.base, self.profile.base, train[own], labels[own], BASE))
        if pooled and not self.pooled.exists():
            if self._renders:
                seen = [self.seen(client) for client in range(len(self.shares))]
                train, labels = (np.concatenate(part) for part in zip(*seen, strict=True))
            tasks.append(self._task(self.pooled, self.profile.pooled, train, labels, POOLED))
        return tasks

    def trainings(self) -> list[Task]:
        """Of the clients."""
        recipe, start = (self.profile.shared, self.base) if self.shared else (self.profile.own, None)
        missing = [(number, path) for number, path in enumerate(self.clients) if not path.exists()]
        return [self._task(path, recipe, *self.seen(number), number, start) for number, path in missing]

    def _task(self, path: Path, recipe: Recipe, images, labels, number: int, start: Path | None = None) -> Task:
        return Task(path, recipe, images, labels, self._images.classes, self._seed_of(number), start, self._counted)

    def _seed_of(self, number: int) -> int:
        return 1000 * self.seed + 10 * number
