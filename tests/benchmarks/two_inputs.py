"""The pipeline on classifiers of two inputs, trained on real digits: the upper half as an image, the lower as numbers.

    python tests/benchmarks/two_inputs.py [--seeds N]

For the network, the digits and the sites see tests/halves.py: two sites with different digits go on from one base, a
third begins anew. Everything goes through the public commands; nothing is chosen on the test digits. The last three
rows are networks of the same kind trained on what no site may see: all digits, with both inputs or with one alone.
Prints Markdown, the mean over seeds, which count for training and for dmm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from commands import dmm
from safetensors.torch import save_file

from dmm_cli.trust import grant

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

import halves  # noqa: E402

EPOCHS = 15


def measure(work: Path, seed: int) -> dict[str, float]:
    """Accuracy in per cent of every row."""
    split, test = halves.digits()
    save_file(test, work / "test.safetensors")
    models = halves.train_sites(split, EPOCHS, 100 * seed)
    sites = [halves.save(work / f"{site}.safetensors", models[site]) for site in halves.SITES]
    flags = ["--data", work / "test.safetensors", "--seed", seed]
    dmm("run", *sites, "-o", work / "run", "-q", *flags)
    found = json.loads((work / "run" / "evaluation.json").read_text())["rows"]
    rows = {row["label"]: row["accuracy"] for row in found}
    rows["the same, 256 images a site by `--engine pixels`"] = by_pixels(work, sites, seed)
    for name, shown in {"both inputs": ("image", "vector"), "image": ("image",), "vector": ("vector",)}.items():
        model = halves.train(halves.fresh(100 * seed + 2), split["all"], EPOCHS, seed, shown)
        rows[f"trained on all, {name}{'' if len(shown) > 1 else ' alone'}"] = halves.accuracy(model, test, shown)
    return rows


def by_pixels(work: Path, sites: list[Path], seed: int) -> float:
    """Accuracy of the merge that the run made, distilled on what the other engine draws."""
    data, model = work / "pixels.safetensors", work / "model.safetensors"
    dmm("synthesize", *sites, "--engine", "pixels", "--count", 256, "--seed", seed, "-o", data, "-q")
    student = work / "run" / "merged" / "group-0.safetensors"
    dmm("distill", student, *sites, "--data", data, "--seed", seed, "-o", model, "-q")
    return float(dmm("evaluate", model, "--data", work / "test.safetensors", "-q"))


def main() -> None:
    """Train, run, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    grant([halves.__name__])  # the sites' files name its factory
    torch.set_num_threads(1)
    found = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(Path(folder), seed))
    print(f"| model | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |\n|---|{'---|' * (len(found) + 1)}")
    for name in found[0]:
        values = [rows[name] for rows in found]
        print(f"| {name} | {' | '.join(f'{value:.1f}' for value in (*values, statistics.mean(values)))} |")


if __name__ == "__main__":
    main()
