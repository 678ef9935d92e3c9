"""Speed of ``dmm synthesize --engine pixels`` next to the textbook loop, at equal steps, in one run.

    python tests/benchmarks/synthesis_speed.py [--device cpu|cuda] [--network NAME ...] [--part speed|quality ...]
        [--precision float32|bfloat16 ...] [--runs N]

The textbook loop is the algorithm as published (DeepInversion, Yin et al., CVPR 2020) in plain PyTorch: the teacher's
weights take gradients that nobody reads, every BatchNorm layer has a hook with operations of its own, Adam is torch's
default, float32, every term is read back at every step, images are stored as PNG files. Losses, weights, schedule,
targets' distribution and start are those of dmm. Loops take turns in one process, after a few steps of each that are
not counted; times are of the loop and the writing, not of loading the network, over the number of steps. "Step alone"
is what a step makes of the difference between that loop and one of a quarter of the steps, on a GPU, where a step is
short, of four times as many: without capturing, judging and writing. "Forward" is a bare forward pass of one batch, on
a GPU in bf16, channels_last, as a CUDA graph; the floor is twice that: forward, and the gradient of the images. "Share
of the peak": floating-point operations of that floor, over what a wide convolution in float32 (on a GPU a large product
in bfloat16) does in the time dmm took. Speed: networks as initialised, with statistics of coloured noise. Quality: the
five digit sites, whose students are judged on held-out digits. Prints Markdown.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from commands import dmm
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dmm_cli.architectures import build
from dmm_cli.checkpoint import save_arrays
from dmm_cli.commands.synthesize import synthesize_sources
from dmm_cli.images import InputSpec, PixelSpace
from dmm_cli.inputs import resolve_source
from dmm_cli.loading import load_model
from dmm_cli.synthesis.pseudodata import PseudoData, TeacherRecord, load_pseudo_data, save_pseudo_data
from dmm_cli.synthesis.settings import Settings
from dmm_cli.trust import grant

RUNS = 5
WARM_UP = 6  # steps, in which libraries load and kernels are built
CLASSES = 10
PRECISIONS = {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16"]}
RATE, BETAS, NORM, CROSS_ENTROPY = 0.1, (0.9, 0.99), 1.0, 0.1
DIGITS = Path(__file__).parents[2] / "fixtures" / "digits"
QUALITY = {"count": 256, "batch": 64, "steps": 150}
DIGITS_ARCH = "resnet18,num_classes=10,layers=(1,1,1,1),channels=(16,32,64,64)"
DIGIT_SPEC = InputSpec((1, 16, 16), (0.3,), (0.38,))


def cifar_resnet18() -> nn.Module:
    """ResNet-18 with the stem that CIFAR calls for: 3 x 3 at full resolution, no pooling."""
    model = build("resnet18,num_classes=10")
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


class Network(NamedTuple):
    """A teacher to time: its architecture, side of its images, and images a batch, batches and steps of a run."""

    arch: str
    side: int
    batch: int
    batches: int
    steps: int


NETWORKS = {
    "cpu": {
        "ResNet of the digits": Network(DIGITS_ARCH, 16, 64, 8, 60),
        "ResNet-18, CIFAR stem": Network("synthesis_speed:cifar_resnet18", 32, 64, 2, 16),
        "ResNet-50 at 224": Network("resnet50,num_classes=10", 224, 8, 2, 12),
    },
    "cuda": {
        "ResNet-18, CIFAR stem": Network("synthesis_speed:cifar_resnet18", 32, 256, 1, 800),
        "ResNet-50 at 224": Network("resnet50,num_classes=10", 224, 64, 1, 150),
    },
}


def textbook(
    model: nn.Module, spec: InputSpec, targets: torch.Tensor, steps: int, seed: int, folder: Path
) -> dict[int, float]:
    """Optimise images for targets (B,) and store them as PNG files; gives the norm term by step."""
    device = next(model.parameters()).device
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    terms: list[torch.Tensor] = []

    def hook(layer: nn.BatchNorm2d, inputs: tuple[torch.Tensor], _: torch.Tensor) -> None:
        mean = inputs[0].mean((0, 2, 3))
        variance = inputs[0].var((0, 2, 3), unbiased=False)
        ratio = (variance + layer.eps) / (layer.running_var + layer.eps)
        shift = (mean - layer.running_mean).square() / (layer.running_var + layer.eps)
        terms.append((shift + ratio - 1 - ratio.log()).mean())

    handles = [layer.register_forward_hook(hook) for layer in layers]
    start = torch.randn(len(targets), *spec.size, generator=torch.Generator().manual_seed(seed))
    raw = start.to(device).requires_grad_(True)
    space = PixelSpace(spec, device)
    optimiser = torch.optim.Adam([raw], lr=RATE, betas=BETAS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, steps + 1, pct_start=0.0, cycle_momentum=False)
    targets, curve = targets.to(device), {}
    for step in range(steps):
        terms.clear()
        optimiser.zero_grad()
        logits = model(space.normalise(raw.sigmoid()))
        norm, cross_entropy = torch.stack(terms).mean(), F.cross_entropy(logits, targets)
        (NORM * norm + CROSS_ENTROPY * cross_entropy).backward()
        optimiser.step()
        schedule.step()
        curve[step] = norm.item()
        cross_entropy.item()
    for handle in handles:
        handle.remove()
    pixels = (raw.detach().sigmoid() * 255).round().to(torch.uint8).cpu().numpy()
    for number, image in enumerate(pixels):
        Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(folder / f"{number:05d}.png")
    return curve


def ours(checkpoint: Path, out: Path, network: Network, device: str, precision: str, seed: int) -> float:
    """Seconds of the same by what ``dmm synthesize`` calls."""
    settings = Settings(
        count=network.batch * network.batches,
        steps=network.steps,
        batch=network.batch,
        seed=seed,
        engine="pixels",
        precision=precision,
        weights={"norm": NORM, "cross_entropy": CROSS_ENTROPY},
    )
    options = {"arch": None, "device": device, "prior": (1 / CLASSES,) * CLASSES, "force": True}
    manifest, _ = synthesize_sources([resolve_source(str(checkpoint))], out, settings, **options)
    return manifest.seconds


def teacher(network: Network, path: Path) -> tuple[nn.Module, InputSpec]:
    """The network as initialised, with statistics of coloured noise, which the command finds in a file."""
    spec = InputSpec((3, network.side, network.side), (0.5,) * 3, (0.25,) * 3)
    torch.manual_seed(0)
    factory = cifar_resnet18 if ":" in network.arch else lambda: build(network.arch)
    model = factory().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        for _ in range(2):
            model(F.interpolate(torch.randn(16, 3, network.side // 4, network.side // 4), scale_factor=4))
    metadata = {"dmm.arch": network.arch, "dmm.input": json.dumps(spec.__dict__)}
    save_arrays(path, {name: value.numpy() for name, value in model.state_dict().items()}, metadata, force=True)
    return model.eval(), spec


def forward_seconds(model: nn.Module, images: torch.Tensor) -> float:
    """Median of a bare forward pass; on a GPU bf16, channels_last, replayed from a graph."""
    if images.device.type == "cpu":
        with torch.no_grad():
            return _median_of(lambda: model(images))
    half = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
    model, images = copy.deepcopy(model).to(**half), images.to(**half)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(side):
            for _ in range(3):
                model(images)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            model(images)

    def replay() -> None:
        for _ in range(20):
            graph.replay()
        torch.cuda.synchronize()

    return _median_of(replay) / 20


def peak(device: str) -> float:
    """Floating-point operations a second: of a wide convolution in float32 on the CPU, of a large product on a GPU.

    On an AMD CPU torch's matrix product reaches less than its convolutions do.
    """
    if device == "cpu":
        batch, width, side = 32, 512, 8
        images, kernels = torch.randn(batch, width, side, side), torch.randn(width, width, 3, 3)
        images, kernels = (part.to(memory_format=torch.channels_last) for part in (images, kernels))
        return 2 * batch * side**2 * 9 * width**2 / _median_of(lambda: F.conv2d(images, kernels, padding=1))
    size = 8192
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def multiply() -> None:
        left @ right
        torch.cuda.synchronize()

    return 2 * size**3 / _median_of(multiply)


def operations(model: nn.Module, image: torch.Tensor) -> int:
    """Floating-point operations of one forward pass of an image (1, C, H, W)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops()


def _median_of(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def speed(name: str, network: Network, device: str, precisions: list[str], runs: int, work: Path) -> list[str]:
    """A row for every precision of dmm: the loops on one teacher, in turn."""
    checkpoint, images = work / "teacher.safetensors", network.batch * network.batches
    model, spec = teacher(network, checkpoint)
    model = model.to(device)

    def plain(network: Network, seed: int) -> float:
        begin = time.perf_counter()
        for number in range(network.batches):
            targets = torch.randint(CLASSES, (network.batch,), generator=torch.Generator().manual_seed(seed))
            textbook(model, spec, targets, network.steps, seed * network.batches + number, work)
        return time.perf_counter() - begin

    def fast(network: Network, seed: int, precision: str) -> float:
        return ours(checkpoint, work / "ours.safetensors", network, device, precision, seed)

    loops = {"textbook": plain, **{precision: partial(fast, precision=precision) for precision in precisions}}
    for loop in loops.values():
        loop(network._replace(batches=1, steps=WARM_UP), 0)
    rounds = [{name: loop(network, seed) for name, loop in loops.items()} for seed in range(runs)]
    times = {name: statistics.median(turn[name] for turn in rounds) for name in loops}
    textbook_s = times.pop("textbook")
    other = network._replace(steps=network.steps // 4 if device == "cpu" else 4 * network.steps)
    others = {name: statistics.median(loops[name](other, seed) for seed in range(runs)) for name in times}
    batch = torch.randn(network.batch, *spec.size, device=device)
    bare, work_of_one = forward_seconds(model, batch), operations(model, batch[:1])
    steps, limit, rows = network.batches * network.steps, peak(device), []
    for precision, ours_s in times.items():
        alone = (others[precision] - ours_s) / (network.batches * other.steps - steps)
        reached = 2 * work_of_one * images * network.steps / ours_s / limit
        cells = [
            name, precision, f"{network.batches} x {network.batch}", network.steps, f"{images / textbook_s:.2f}",
            f"{images / ours_s:.2f}", f"{textbook_s / ours_s:.2f}", f"{textbook_s / steps / bare:.2f}",
            f"{ours_s / steps / bare:.2f}", f"{alone / bare:.2f}", f"{work_of_one / 1e9:.2f}", f"{100 * reached:.0f} %",
        ]  # fmt: skip
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return rows


def textbook_pseudo_data(
    like: PseudoData, sites: list[Path], seed: int, device: str, work: Path
) -> tuple[PseudoData, dict[int, float]]:
    """The textbook loop's images of all sites, with class priors as dmm estimated them; its first norm curve."""
    images, targets, logits, curve = [], [], [], {}
    for number, site in enumerate(sites):
        model = load_model(resolve_source(str(site)))[0].eval().to(device)
        prior = torch.tensor(like.teachers[number].prior)
        for batch in range(QUALITY["count"] // QUALITY["batch"]):
            draw = torch.Generator().manual_seed(1000 * seed + 10 * number + batch)
            wanted = torch.multinomial(prior, QUALITY["batch"], replacement=True, generator=draw)
            found = textbook(model, DIGIT_SPEC, wanted, QUALITY["steps"], draw.initial_seed(), work)
            curve = curve or found
            pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(work.glob("*.png"))])[:, None]
            images.append(pixels)
            targets.append(wanted.numpy())
            with torch.no_grad():
                seen = PixelSpace(DIGIT_SPEC, torch.device(device)).from_bytes(torch.from_numpy(pixels).to(device))
                logits.append(model(seen).cpu().numpy())
    count = len(np.concatenate(targets))
    data = PseudoData(
        images=np.concatenate(images),
        targets=np.concatenate(targets),
        teacher_id=np.repeat(np.arange(len(sites)), QUALITY["count"]).astype(np.int16),
        logits=np.concatenate(logits).astype(np.float16),
        confidence=np.ones(count, np.float16),
        bn_loss=np.zeros(1, np.float32),
        teachers=tuple(TeacherRecord(t.label, t.sha256, t.prior, QUALITY["count"], 0) for t in like.teachers),
        spec=DIGIT_SPEC,
    )
    return data, curve


def quality(device: str, runs: int, work: Path) -> str:
    """Images of the digit sites by both loops, what students of them know, and the loops' first batches."""
    sites, merged = sorted(DIGITS.glob("site-?.safetensors")), work / "merged"
    dmm("merge", *sites, "--group", "auto", "-o", merged, "--force", "-q")
    columns: dict[str, list[float]] = {"plain": [], "fast": []}
    curves: dict[int, tuple[list[float], list[float]]] = {}
    for seed in range(runs):
        ours_file, plain_file = work / "ours.safetensors", work / "plain.safetensors"
        sizes = [word for name, value in QUALITY.items() for word in (f"--{name}", value)]
        flags = ["--seed", seed, "--device", device, "--force"]
        made = json.loads(dmm("synthesize", *sites, "--engine", "pixels", *sizes, *flags, "-o", ours_file, "--json"))
        like = load_pseudo_data(resolve_source(str(ours_file)))
        data, curve = textbook_pseudo_data(like, sites, seed, device, work)
        save_pseudo_data(plain_file, data, {}, force=True)
        history = made["history"]
        for step, value in zip(history["step"], history["curves"]["norm"], strict=True):
            curves.setdefault(step, ([], []))[0].append(curve[step])
            curves[step][1].append(value)

        def taught(file: Path, flags: list[object] = flags) -> float:
            student, start = file.with_suffix(".student.safetensors"), merged / "group-0.safetensors"
            dmm("distill", start, *sites, "--data", file, *flags, "-o", student, "-q")
            return float(dmm("evaluate", student, "--data", DIGITS / "test.safetensors", "-q"))

        with ThreadPoolExecutor(len(columns)) as pool:
            for found, accuracy in zip(columns.values(), pool.map(taught, (plain_file, ours_file)), strict=True):
                found.append(accuracy)
        print(f"seed {seed}: {columns['plain'][-1]}, {columns['fast'][-1]}", file=sys.stderr, flush=True)
    row = f"| {_spread(columns['plain'], 1)} | {_spread(columns['fast'], 1)} |"
    chosen = sorted(curves)[:: len(curves) // 6]
    header = "| norm term at step | " + " | ".join(map(str, chosen)) + " |\n|" + "---|" * (1 + len(chosen))
    lines = (
        f"| {name} | " + " | ".join(_spread(curves[step][number], 3) for step in chosen) + " |"
        for number, name in enumerate(("textbook", "dmm"))
    )
    return "\n".join([row, "", header, *lines])


def _spread(values: list[float], digits: int) -> str:
    deviation = f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=list(NETWORKS))
    parser.add_argument("--network", nargs="*", help="default: all")
    parser.add_argument("--part", nargs="*", choices=("speed", "quality"), default=["speed", "quality"])
    parser.add_argument("--precision", nargs="*", choices=PRECISIONS["cpu"], help="default: all of use on the device")
    parser.add_argument("--runs", type=int, default=RUNS, help="of either part")
    arguments = parser.parse_args()
    grant([Path(__file__).stem])  # the teacher's file names a factory that stands here
    precisions = arguments.precision or PRECISIONS[arguments.device]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if "speed" in arguments.part:
            print(
                "| network | precision | images | steps | textbook, images/s | dmm, images/s | times "
                "| textbook / forward | dmm / forward | dmm, step alone / forward | forward, GFLOP an image "
                "| share of the peak |\n|" + "---|" * 12
            )
            for name, network in NETWORKS[arguments.device].items():
                if not arguments.network or name in arguments.network:
                    rows = speed(name, network, arguments.device, precisions, arguments.runs, work)
                    print("\n".join(rows), flush=True)
        if "quality" in arguments.part:
            print("\n| textbook's students, % (sd) | dmm's |\n|" + "---|" * 2)
            (work / "quality").mkdir()
            print(quality(arguments.device, arguments.runs, work / "quality"))


if __name__ == "__main__":
    main()
