"""What statistics in the networks of others are worth on the five digit sites of fixtures/digits.

    python tests/benchmarks/elsewhere.py [--seeds N] [--work DIRECTORY]

Every site records what its training images look like in the networks of the other four, without their labels, and
``dmm run`` is given the twenty files. Needs scikit-learn, for the images. Prints the accuracy of each seed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from commands import dmm

sys.path.append(str(Path(__file__).parents[2] / "fixtures"))
import make_digits as digits

FIXTURES = Path(digits.__file__).parent


def record(work: Path) -> None:
    """What every site's images look like in the networks of the others."""
    images, labels = digits.digits()
    parts = digits.split(labels, digits.TEST_PER_CLASS, 0)
    sites = {name: FIXTURES / "digits" / f"site-{name}.safetensors" for name in digits.SITES}
    for name, site in sites.items():
        data = work / f"{name}.npz"
        np.savez(data, images=images[parts[name]].numpy())
        others = [model for other, model in sites.items() if other != name]
        dmm("record", *others, "--data", data, "--owner", site, "-o", work / "statistics", "--force", "-q")


def main() -> None:
    """Record, run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dmm-elsewhere")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    record(options.work)
    sites, test = sorted((FIXTURES / "digits").glob("site-?.safetensors")), FIXTURES / "digits" / "test.safetensors"
    for seed in range(options.seeds):
        out = options.work / f"run-{seed}"
        dmm(
            "run",
            *sites,
            "--statistics",
            options.work / "statistics" / "*.safetensors",
            "--seed",
            seed,
            "-o",
            out,
            "-q",
        )
        print(f"seed {seed}: {dmm('evaluate', out / 'model.safetensors', '--data', test, '-q').strip()}")


if __name__ == "__main__":
    main()
