"""Speed, memory and agreement of ``dmm merge`` next to mergekit and to a plain streamed mean, in one run.

    python tests/benchmarks/merge_speed.py --mergekit VENV/bin/mergekit-pytorch [--part NAME ...] [--work DIRECTORY]
        [--device cpu|cuda]

Checkpoints are made: the tensors of timm models with random values, fine-tunings that move them a little. Every
command runs as a process of its own, start-up included, from a warm page cache, in turn with the others, its output
deleted before; wall time and peak resident memory are what the kernel accounts for the process. dmm remembers the
hashes of its inputs: "first" is a run that finds none of them, all other figures are of later runs. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dmm_cli.architectures import build

RUNS = 5
DMM = [sys.executable, "-m", "dmm_cli", "merge"]
FLOOR = [sys.executable, str(Path(__file__).with_name("streamed_mean.py"))]
MODELS = {"slerp": 2, "linear": 4, "karcher": 4}  # the others: three and their base
MERGEKIT = {  # the parameters that make mergekit compute what dmm's defaults do; more steps of karcher do not
    "linear": {},
    "slerp": {"t": 0.5},
    "karcher": {},
    "task_arithmetic": {"weight": 0.3, "normalize": False},
    "model_stock": {},
    "ties": {"weight": 1.0, "density": 0.2, "normalize": True},
    "dare_linear": {"weight": 0.3, "density": 0.1, "normalize": False},
    "dare_ties": {"weight": 1.0, "density": 0.1, "normalize": True, "lambda": 0.3},
}
MEASURE = """
import os, sys, time
start = time.perf_counter()
process = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(process, 0)
print()
print(time.perf_counter() - start, usage.ru_maxrss / 1024)
sys.exit(status != 0)
"""  # a small process: the kernel counts the memory of whoever starts a process as that process's own
SPECTRAL = ("tsv", "iso_c", "iso_cts", "wudi")


def checkpoints(work: Path, name: str, like: Mapping[str, torch.Tensor], count: int) -> list[Path]:
    """A start and ``count - 1`` fine-tunings of it, of these names, shapes and dtypes; made once."""
    paths = [work / f"{name}-{number}.safetensors" for number in range(count)]
    for number, path in enumerate(paths):
        if path.exists():
            continue
        draw = torch.Generator().manual_seed(number)
        moved = {}
        for key, value in like.items():
            shared = torch.Generator().manual_seed(len(key) + value.numel())
            tensor = _noise(value, shared, 0.02)
            if number:  # fine-tunings go partly the same way
                tensor += _noise(value, shared, 0.001).add_(_noise(value, draw, 0.001))
            moved[key] = tensor
        save_file(moved, path, {"format": "pt"})
    return paths


def _noise(like: torch.Tensor, draw: torch.Generator, scale: float) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype).normal_(generator=draw).mul_(scale)


def shapes(spec: str, copies: int = 1) -> dict[str, torch.Tensor]:
    """Names, shapes and dtypes of a timm model, several times over under other names."""
    with torch.device("meta"):
        state = build(spec).state_dict()
    return {f"{number}.{key}" if copies > 1 else key: v for number in range(copies) for key, v in state.items()}


class Command(NamedTuple):
    """A command, what it writes, and whether it is to find no hashes remembered."""

    arguments: Sequence[str]
    output: Path
    first: bool = False


def run(command: Command) -> tuple[float, float]:
    """Wall seconds and peak MiB of one process; its output is deleted before."""
    cache = command.output.with_name("cache")
    for path in [command.output, *([cache] if command.first else [])]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # as installed
    done = subprocess.run(
        [sys.executable, "-S", "-c", MEASURE, *command.arguments],
        capture_output=True,
        text=True,
        env={**compiled, "XDG_CACHE_HOME": str(cache)},
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command.arguments)}\n{done.stderr[-3000:]}")
    seconds, memory = map(float, done.stdout.splitlines()[-1].split())
    return seconds, memory


def compare(commands: Mapping[str, Command], runs: int = RUNS) -> dict[str, tuple[float, float]]:
    """Median seconds and MiB of several commands that run in turn."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            found[name].append(run(command))
    return {
        name: tuple(statistics.median(column) for column in zip(*pairs, strict=True)) for name, pairs in found.items()
    }


def dmm(method: str, paths: Sequence[Path], output: Path) -> Command:
    """The command that merges the first files the method takes; of methods with a base, the first is it."""
    start = [] if method in MODELS else ["--base", str(paths[0])]
    models = paths[: MODELS[method]] if method in MODELS else paths[1:]
    return Command([*DMM, *map(str, models), *start, "--method", method, "-o", str(output), "-q"], output)


def mergekit(program: str, method: str, paths: Sequence[Path], work: Path) -> Command:
    """The same merge by mergekit."""
    models = paths[: MODELS[method]] if method in MODELS else paths[1:]
    base = paths[0] if method not in MODELS or method == "slerp" else None
    settings = "".join(f"  {key}: {str(value).lower()}\n" for key, value in MERGEKIT[method].items())
    lines = [f"merge_method: {method}\n", *([f"base_model: {base}\n"] if base else []), "models:\n"]
    lines += [f"  - model: {path}\n" for path in models] + ([f"parameters:\n{settings}"] if settings else [])
    if method == "linear":
        lines = [line + "    parameters:\n      weight: 1.0\n" if "- model" in line else line for line in lines]
    config, output = work / f"{method}.yml", work / f"mergekit-{method}"
    config.write_text("".join(lines))
    return Command([program, str(config), str(output)], output)


def difference(ours: Path, theirs: Path) -> float:
    """The largest, over tensors, of the distance of two results over their norm."""
    worst = 0.0
    with safe_open(ours, "pt") as a, safe_open(theirs / "model.safetensors", "pt") as b:
        for key in a.keys():  # noqa: SIM118
            x, y = a.get_tensor(key).double(), b.get_tensor(key).double()
            worst = max(worst, float((x - y).norm() / y.norm().clamp_min(1e-30)))
    return worst


def against_mergekit(work: Path, options: argparse.Namespace) -> None:
    """Four ViT-B/16, or a base and three: seconds, MiB, and how far results lie apart."""
    paths = checkpoints(work, "vit", shapes("vit_base_patch16_224"), 4)
    print(
        "\n| four ViT-B/16, float32 | dmm first s | dmm s | mergekit s | ratios | dmm MiB | mergekit MiB | difference |"
        + "\n"
        + "|---" * 8
        + "|"
    )
    for method in MERGEKIT:
        ours, theirs = dmm(method, paths, work / "out.safetensors"), mergekit(options.mergekit, method, paths, work)
        found = compare({"first": ours._replace(first=True), "dmm": ours, "mergekit": theirs})
        apart = "random" if method.startswith("dare") else f"{difference(ours.output, theirs.output):.0e}"
        (first, _), (seconds, memory), (other, more) = found.values()
        print(
            f"| {method} | {first:.2f} | {seconds:.2f} | {other:.1f} | {other / first:.1f}, {other / seconds:.1f} "
            f"| {memory:.0f} | {more:.0f} | {apart} |",
            flush=True,
        )


def against_the_floor(work: Path, _: argparse.Namespace) -> None:
    """A linear merge of four ViT-B/16 next to a streamed mean in plain numpy."""
    paths = checkpoints(work, "vit", shapes("vit_base_patch16_224"), 4)
    ours, plain = dmm("linear", paths, work / "out.safetensors"), work / "mean.safetensors"
    numpy = Command([*FLOOR, str(plain), *map(str, paths)], plain)
    found = compare({"first": ours._replace(first=True), "dmm": ours, "numpy": numpy}, 2 * RUNS + 1)
    (first, _), (seconds, memory), (floor, less) = found.values()
    print(f"\nlinear: first {first:.2f} s, then {seconds:.2f} s, {memory:.0f} MiB; ", end="")
    print(f"streamed mean in numpy: {floor:.2f} s, {less:.0f} MiB; ratio {first / floor:.2f}, {seconds / floor:.2f}")


def scaling(work: Path, _: argparse.Namespace) -> None:
    """Seconds and MiB by number of models, and by their size."""
    paths = checkpoints(work, "vit", shapes("vit_base_patch16_224"), 16)
    large = checkpoints(work, "vit4x", shapes("vit_base_patch16_224", 4), 4)
    print("\n| models | values each | linear s | MiB | ties s | MiB |\n" + "|---" * 6 + "|")
    for files, size in [(paths[:count], "86 M") for count in (2, 4, 8, 16)] + [(large, "346 M")]:
        out = work / "out.safetensors"
        linear = [*DMM, *map(str, files), "-o", str(out), "-q"]
        ties = [*DMM, *map(str, files), "--base", str(files[0]), "--method", "ties", "-o", str(out), "-q"]
        found = compare({"linear": Command(linear, out), "ties": Command(ties, out)}, 3)
        cells = " | ".join(f"{seconds:.2f} | {memory:.0f}" for seconds, memory in found.values())
        print(f"| {len(files)} | {size} | {cells} |", flush=True)


def large(work: Path, _: argparse.Namespace) -> None:
    """Two models of 1.2 billion bfloat16 values, 263 million of them in one tensor, next to copying them."""
    like = {"embed.weight": torch.empty(128256, 2048, dtype=torch.bfloat16, device="meta")}
    like |= {f"layers.{n}.weight": torch.empty(8192, 2048, dtype=torch.bfloat16, device="meta") for n in range(56)}
    paths = checkpoints(work, "large", like, 2)
    copy, out = work / "copy.safetensors", work / "out.safetensors"
    copying = ["sh", "-c", f"cat {paths[0]} {paths[1]} > {copy} && sync {copy}"]
    one = ["sh", "-c", f"cp {paths[0]} {copy} && sync {copy}"]
    merging = [*DMM, *map(str, paths), "-o", str(out), "-q"]
    commands = {
        "first": Command(merging, out, first=True),
        "merge": Command(merging, out),
        "one": Command(one, copy),
        "both": Command(copying, copy),
    }
    count = sum(value.numel() for value in like.values())
    (first, _), (seconds, memory), (single, _), (double, _) = compare(commands, 3).values()
    print(f"\nlinear, 2 models of {count / 1e9:.2f} G bfloat16 values: first {first:.1f} s, ", end="")
    print(f"then {seconds:.1f} s, {memory:.0f} MiB; copying one {single:.1f} s, both {double:.1f} s")


def spectral(work: Path, options: argparse.Namespace) -> None:
    """Methods on matrices: eight ViT-B/16 and their base, on the CPU or a GPU."""
    paths = checkpoints(work, "vit", shapes("vit_base_patch16_224"), 9)
    run(dmm("task_arithmetic", paths, work / "out.safetensors"))  # so that the hashes of all files are remembered
    print("\n| eight ViT-B/16 and a base | s | MiB |\n|---|---|---|")
    for method in SPECTRAL:
        command = dmm(method, paths, work / "out.safetensors")
        command = command._replace(arguments=[*command.arguments, "--device", options.device])
        seconds, memory = compare({method: command}, 1)[method]
        print(f"| {method} | {seconds:.0f} | {memory:.0f} |", flush=True)


PARTS = {
    "floor": against_the_floor, "mergekit": against_mergekit, "scaling": scaling, "large": large, "spectral": spectral,
}  # fmt: skip


def main() -> None:
    """Run the parts asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", help="the mergekit-pytorch program of another environment")
    parser.add_argument("--part", nargs="+", choices=PARTS)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dmm-merge-speed")
    parser.add_argument("--device", default="cpu", help="of the part spectral")
    options = parser.parse_args()
    options.work = options.work.resolve()  # where hashes are remembered has to be absolute
    options.work.mkdir(parents=True, exist_ok=True)
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, numpy {np.__version__}, n = {RUNS} unless told")
    for name in options.part or PARTS:
        if name != "mergekit" or options.mergekit:
            PARTS[name](options.work, options)


if __name__ == "__main__":
    main()
