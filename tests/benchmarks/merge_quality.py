"""Accuracy of every merge method: three digit sites, and CIFAR-10 clients that start from one base.

    python tests/benchmarks/merge_quality.py --cifar10 DIRECTORY [--work DIRECTORY]

DIRECTORY holds what pack_cifar10.py wrote. The base is trained on a twentieth of the training images, the clients are
fine-tuned from it on the rest, dealt out class by class with Dirichlet(0.3) shares. Every method runs with its
defaults, through ``dmm merge``, on the pseudo-data of ``dmm synthesize`` where it needs them; nothing is chosen on the
test images. Trained checkpoints and pseudo-data are kept in the work directory, so that a second run only merges. About
20 minutes.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cifar.whole import savez
from commands import dmm
from PIL import Image

from dmm_cli.architectures import build
from dmm_cli.checkpoint import save_arrays
from dmm_cli.merging import METHODS

ARCH = "resnet18,num_classes=10,layers=(1,1,1,1),channels=(32,64,128,256)"
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
CLIENTS, ALPHA, BASE_SHARE = 4, 0.3, 0.05
BASE_EPOCHS, CLIENT_EPOCHS, BATCH = 30, 5, 64
BASE_RATE, CLIENT_RATE, WEIGHT_DECAY = 2e-3, 5e-4, 0.05
DIGITS = Path(__file__).parents[2] / "fixtures" / "digits"
VARIANTS = {
    **{name: [name] for name in METHODS},
    "wudi, 300 steps of Adam": ["wudi", "--param", "steps=300"],
    "task_arithmetic, svc": ["task_arithmetic", "--calibrate", "svc"],
    "tsv, svc": ["tsv", "--calibrate", "svc"],
    "iso_cts, svc": ["iso_cts", "--calibrate", "svc"],
    "linear, recalibrated": ["linear", "--recalibrate"],
}


def shares(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """Disjoint indices: of the base, then of every client."""
    draw = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in range(CLIENTS + 1)]
    for label in range(10):
        index = draw.permutation(np.flatnonzero(labels == label))
        public = int(len(index) * BASE_SHARE)
        parts[0].append(index[:public])
        cuts = np.cumsum(draw.dirichlet([ALPHA] * CLIENTS))[:-1] * (len(index) - public)
        for part, own in zip(parts[1:], np.split(index[public:], cuts.astype(int)), strict=True):
            part.append(own)
    return [np.concatenate(part) for part in parts]


def train(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, rate: float, seed: int):
    """Plain supervised training with flips and shifts of up to four pixels."""
    stream = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=WEIGHT_DECAY)
    steps = epochs * max(len(labels) // BATCH, 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(labels), (BATCH,), generator=stream)
        x = F.pad(normalised(images[batch]), (4, 4, 4, 4))  # (B, 3, 40, 40)
        top, left = (int(v) for v in torch.randint(9, (2,), generator=stream))
        x = x[:, :, top : top + 32, left : left + 32]
        flip = torch.rand(BATCH, generator=stream) < 0.5
        x[flip] = x[flip].flip(3)
        loss = F.cross_entropy(model(x), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def normalised(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, 32, 32) to the networks' input."""
    return (images.float() / 255.0 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def save(path: Path, model: torch.nn.Module) -> None:
    """Write a checkpoint that says what it is."""
    metadata = {"dmm.arch": ARCH, "dmm.input": json.dumps({"size": [3, 32, 32], "mean": MEAN, "std": STD})}
    save_arrays(path, {name: value.numpy() for name, value in model.state_dict().items()}, metadata, force=True)


def unpack(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (N, 3, 32, 32), and labels (N,)."""
    with np.load(path) as file:
        jpeg, offsets, labels = file["jpeg"], file["offsets"], file["labels"]
    images = np.empty((len(labels), 3, 32, 32), np.uint8)
    for number in range(len(labels)):
        picture = Image.open(io.BytesIO(jpeg[offsets[number] : offsets[number + 1]].tobytes()))
        images[number] = np.asarray(picture).transpose(2, 0, 1)
    return images, labels.astype(np.int64)


def train_clients(data: Path, work: Path, seed: int = 0) -> None:
    """Base and clients as safetensors, unless they are there."""
    if (work / f"client-{CLIENTS - 1}.safetensors").exists():
        return
    images, labels = map(torch.from_numpy, unpack(data / "train.npz"))
    index = shares(labels.numpy(), seed)
    torch.manual_seed(seed)
    base = train(build(ARCH), images[index[0]], labels[index[0]], BASE_EPOCHS, BASE_RATE, seed)
    save(work / "base.safetensors", base)
    for number, own in enumerate(index[1:]):
        model = build(ARCH)
        model.load_state_dict(base.state_dict())
        train(model, images[own], labels[own], CLIENT_EPOCHS, CLIENT_RATE, seed + 1 + number)
        save(work / f"client-{number}.safetensors", model)
        print(f"client {number}: {np.bincount(labels[own], minlength=10).tolist()} images a class", file=sys.stderr)


def accuracies(parents: list[Path], base: Path, data: Path, work: Path) -> dict[str, float | None]:
    """Accuracy in per cent of the parents and of every merge of them."""
    rows = {}
    pseudo = work / f"pseudo-of-{len(parents)}.safetensors"
    if not pseudo.exists():
        dmm("synthesize", *parents, "-o", pseudo)
    scores = dmm("evaluate", base, *parents, "--data", data, "-q").split()
    for path, score in zip([base, *parents], scores, strict=True):
        rows[path.stem] = float(score)
    for name, (method, *flags) in VARIANTS.items():
        traits = METHODS.traits(method)
        if "pair" in traits and len(parents) > 2:
            rows[name] = None
            continue
        start = ["--base", base] if "base" in traits else []
        flags = [*flags, *(["--recalibrate"] if "features" in traits else [])]
        flags += [pseudo] if "--recalibrate" in flags else []
        merged = work / "merged.safetensors"
        dmm("merge", *parents, *start, "--method", method, *flags, "-o", merged, "--force", "-q")
        rows[name] = float(dmm("evaluate", merged, "--data", data, "-q"))
    return rows


def main() -> None:
    """Train what is missing, merge, and print one table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dmm-merge-quality")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    train_clients(options.cifar10, options.work)
    held_out = options.work / "test.npz"
    if not held_out.exists():
        images, labels = unpack(options.cifar10 / "test.npz")
        savez(held_out, images=images, labels=labels)
    sites = [DIGITS / f"site-{name}.safetensors" for name in "abc"]
    clients = [options.work / f"client-{number}.safetensors" for number in range(CLIENTS)]
    columns = [
        accuracies(sites, DIGITS / "base.safetensors", DIGITS / "test.safetensors", options.work),
        accuracies(clients, options.work / "base.safetensors", held_out, options.work),
    ]
    print(f"| | digits, {len(sites)} sites | CIFAR-10, {len(clients)} clients |\n|---|---|---|")
    for heading, parents in (("base", ["base"]), ("parents", None)):
        cells = []
        for column, files in zip(columns, (sites, clients), strict=True):
            cells.append(", ".join(f"{column[name]:.1f}" for name in parents or [file.stem for file in files]))
        print(f"| {heading} | {' | '.join(cells)} |")
    for name in VARIANTS:
        cells = ["-" if column[name] is None else f"{column[name]:.1f}" for column in columns]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
