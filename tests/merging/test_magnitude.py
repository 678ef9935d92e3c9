from __future__ import annotations

import numpy as np
import pytest
from conftest import find

from dmm_cli.errors import DmmError
from dmm_cli.merging.facts import trim_threshold
from dmm_cli.merging.magnitude import Selection

SIZE = 600
FLOATS = [np.dtype(np.float32), np.dtype(np.float64)]


def rows(kind: str, dtype: np.dtype) -> np.ndarray:
    """Three rows of SIZE values of one kind, signs mixed."""
    draw = np.random.default_rng(0)
    normal = draw.normal(size=(3, SIZE))
    limits = np.finfo(dtype)
    if kind == "digits at the edge":  # of the 16-bit words that the selection goes by, all below the exponent
        words = draw.choice([0, 1, 0xFFFE, 0xFFFF], size=(3, SIZE, dtype.itemsize // 2)).astype(np.uint16)
        words[..., -1] = 0x3FF0
        return np.copysign(words.view(dtype)[..., 0], normal.astype(dtype))
    values = {
        "normal": normal,
        "ties": np.round(normal),
        "equal": np.where(normal < 0, -0.3, 0.3),
        "zeros": np.where(np.abs(normal) < 1.5, np.copysign(0.0, normal), normal),
        "only zeros": np.copysign(0.0, normal),
        "denormals": normal * float(limits.tiny) / 50,
        "huge": np.clip(normal, -1, 1) * float(limits.max),
        "all sizes": normal * 10.0 ** draw.integers(-300, 300, normal.shape),
        "neighbours": np.copysign(1.0 + draw.integers(-9, 9, normal.shape) * float(limits.eps), normal),
    }[kind]
    return np.clip(values, float(limits.min), float(limits.max)).astype(dtype)


def select(values: np.ndarray, ranks: list[int], block: int) -> np.ndarray:
    selection = Selection(np.array(ranks), values.dtype)
    return find(selection, [values[:, start : start + block] for start in range(0, values.shape[1], block)])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        "normal", "ties", "equal", "zeros", "only zeros", "denormals", "huge", "all sizes", "neighbours",
        "digits at the edge",
    ],
)  # fmt: skip
def test_the_kth_largest_magnitude_is_the_sorted_one(kind, dtype):
    values = rows(kind, dtype)
    before = values.copy()
    falling = np.sort(np.abs(values), axis=1)[:, ::-1]
    for ranks in ([1, 1, 1], [SIZE, SIZE, SIZE], [2, 2 * SIZE // 5, SIZE - 1]):
        got = select(values, ranks, SIZE)
        assert got.dtype == dtype
        assert got.tolist() == [falling[n, rank - 1] for n, rank in enumerate(ranks)], ranks
    assert values.tobytes() == before.tobytes(), "measuring changes nothing"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_cut_into_blocks_does_not_matter(dtype):
    values = rows("normal", dtype)
    falling = np.sort(np.abs(values), axis=1)[:, ::-1]
    for block in (SIZE // 2, 77, 599):
        assert select(values, [10, 20, 30], block).tolist() == [falling[0, 9], falling[1, 19], falling[2, 29]], block


def test_ranks_given_stay_as_they_are():
    ranks = np.array([3, 5])
    selection = Selection(ranks, np.dtype(np.float32))
    find(selection, [np.ones((2, 8), np.float32)])
    assert ranks.tolist() == [3, 5]


@pytest.mark.parametrize(("density", "kept"), [(0.0, 0), (0.001, 1), (0.015, 1), (0.2, 20), (0.999, 99), (1.0, 100)])
def test_a_density_is_rounded_down_to_whole_elements(density, kept):
    values = np.random.default_rng(1).permutation(np.arange(1.0, 101.0)).astype(np.float32)[None] * [[1], [-2]]
    values = values.astype(np.float32)
    thresholds = find(trim_threshold(density, 2, 100, values.dtype), [values[:, :30], values[:, 30:]])
    assert [(np.abs(row) >= limit).sum() for row, limit in zip(values, thresholds, strict=True)] == [kept, kept]


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_density_that_is_no_share_is_refused(density):
    with pytest.raises(DmmError, match="density must lie between 0 and 1"):
        trim_threshold(density, 2, 100, np.dtype(np.float32))


def test_a_tensor_without_elements_has_a_threshold():
    assert len(find(trim_threshold(0.2, 3, 0, np.dtype(np.float32)), [])) == 3
