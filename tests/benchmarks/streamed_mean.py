"""The floor of a linear merge: read equal files block by block, average, write, fsync. Plain numpy, checks nothing.

python tests/benchmarks/streamed_mean.py OUTPUT INPUT...
"""

import os
import struct
import sys

import numpy as np

BLOCK = 1 << 20  # float32 values of one file


def main(output: str, inputs: list[str]) -> None:
    """Average float32 files that have the same header."""
    files = [open(path, "rb", buffering=0) for path in inputs]  # noqa: SIM115
    start = 8 + struct.unpack("<Q", files[0].read(8))[0]
    files[0].seek(0)
    header = files[0].read(start)
    left = (os.path.getsize(inputs[0]) - start) // 4
    for file in files:
        file.seek(start)
    rows = np.empty((len(files), BLOCK), np.float32)
    with open(output, "wb", buffering=0) as out:
        out.write(header)
        while left:
            size = min(left, BLOCK)
            for file, row in zip(files, rows, strict=True):
                file.readinto(row[:size])
            total = rows[0, :size].copy()
            for row in rows[1:]:
                total += row[:size]
            total *= 1.0 / len(files)
            out.write(total)
            left -= size
        os.fsync(out.fileno())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
