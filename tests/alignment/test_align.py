"""Whole checkpoints: files in, verified alignments out."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from networks import KINDS, arrays, lively, noisy
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from dmm_cli.alignment.align import align, cosine
from dmm_cli.alignment.apply import permute, random_image
from dmm_cli.alignment.basins import basins
from dmm_cli.alignment.trace import trace
from dmm_cli.errors import DmmError
from dmm_cli.grouping import same_start
from dmm_cli.inputs import Source, resolve_source
from dmm_cli.names import is_head
from dmm_cli.similarity.engine import compute_similarity
from dmm_cli.trust import grant

KIND = "residual"
ARCH, SIZE = KINDS[KIND]
INPUT = '{"size": [2, 32, 32], "mean": [0.5, 0.5], "std": [0.5, 0.5]}'


def saved(path, tensors: dict[str, np.ndarray], arch: str = ARCH, **metadata: str) -> Source:
    save_file(tensors, path, {"dmm.arch": arch, "dmm.input": INPUT, **metadata})
    return resolve_source(str(path))


def scrambled(tensors: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The same network with its units in another order."""
    return permute(
        tensors, trace(lively(ARCH), SIZE), random_image(trace(lively(ARCH), SIZE), np.random.default_rng(seed))
    )


def test_a_permuted_copy_comes_back_to_the_bit(tmp_path):
    tensors = arrays(lively(ARCH))
    sources = [saved(tmp_path / "a", tensors), saved(tmp_path / "b", scrambled(tensors, 1))]
    (found,) = align([[source] for source in sources])
    assert found.source is sources[1] and found.covered > 0.99 and 0 < found.difference < 1e-12
    assert found.cosine[0] < 0.5 < found.cosine[1] == pytest.approx(1)
    found.write(tmp_path / "out.safetensors", {})
    back = load_file(tmp_path / "out.safetensors")
    assert all(back[key].tobytes() == value.tobytes() for key, value in tensors.items())


def test_a_checkpoint_that_has_changed_since_is_not_written(tmp_path):
    tensors = arrays(lively(ARCH))
    sources = [saved(tmp_path / "a", tensors), saved(tmp_path / "b", scrambled(tensors, 1))]
    (found,) = align([[source] for source in sources])
    os.utime(tmp_path / "b")
    with pytest.raises(DmmError, match="b changed while"):
        found.write(tmp_path / "out", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_keep_their_bytes_in_every_dtype(tmp_path, dtype):
    model, spec = lively(ARCH), trace(lively(ARCH), SIZE)
    states = []
    for seed, name in enumerate("ab"):
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in lively(ARCH, seed).state_dict().items()}
        save_torch(state, tmp_path / name, {"dmm.arch": ARCH, "dmm.input": INPUT})
        states.append(state)
    (found,) = align([[resolve_source(str(tmp_path / name))] for name in "ab"])
    found.write(tmp_path / "out", {})
    got = resolve_source(str(tmp_path / "out"))
    assert {n: i.dtype for n, i in got.tensors.items()} == {n: i.dtype for n, i in found.source.tensors.items()}
    from dmm_cli.loading import load_state_dict

    written = load_state_dict(got)
    wanted = permute({k: v.double().numpy() for k, v in states[1].items()}, spec, found.image)
    assert all((written[key].double().numpy() == value).all() for key, value in wanted.items())
    assert set(written) == set(model.state_dict())


def test_tied_weights_may_stand_in_the_file_under_one_name(tmp_path):
    tied, found = {}, {}
    for kept in ("both", "one"):
        for seed in range(2):
            tensors = arrays(lively("networks:tied", seed))
            if kept == "one":
                del tensors["again.weight"]
            tied[kept, seed] = saved(tmp_path / f"{kept}-{seed}", tensors, "networks:tied")
        (found[kept],) = align([[tied[kept, seed]] for seed in range(2)], size=(6,))
        found[kept].write(tmp_path / f"{kept}-aligned", {})
    both, one = (load_file(tmp_path / f"{kept}-aligned") for kept in ("both", "one"))
    assert one.keys() == both.keys() - {"again.weight"}
    assert found["one"].moved(np.arange(10)) > 0
    assert all((one[name] == both[name]).all() for name in one)


def test_three_permuted_copies_come_together_the_likest_first(tmp_path):
    tensors = arrays(lively(ARCH))
    near = noisy(tensors, 0.3, seed=1)
    files = [tensors, scrambled(noisy(tensors, 0.3, seed=2), 2), scrambled(noisy(tensors, 0.3, seed=3), 3), near]
    sources = [saved(tmp_path / str(number), file) for number, file in enumerate(files)]
    found = align([[source] for source in sources])
    assert found[0].source.label == "3" and found[0].moved(np.arange(found[0].spec.count)) == 0
    for alignment in found:
        assert alignment.cosine[1] > 0.9
        aligned = permute(files[sources.index(alignment.source)], alignment.spec, alignment.image)
        weight = "layer1.0.conv1.weight"
        assert np.corrcoef(aligned[weight].ravel(), tensors[weight].ravel())[0, 1] > 0.9


def test_checkpoints_of_one_start_move_as_one(tmp_path):
    a, b = arrays(lively(ARCH, 0)), scrambled(arrays(lively(ARCH, 0)), 4)
    sources = [saved(tmp_path / "a", a), *(saved(tmp_path / f"b{n}", noisy(b, 0.3, seed=n)) for n in range(3))]
    assert basins([sources[1], sources[0], *sources[2:]]) == [[0, 2, 3], [1]]
    found = align([[sources[0]], sources[1:]])
    assert [alignment.source for alignment in found] == sources[1:]
    assert all((alignment.image == found[0].image).all() for alignment in found)
    assert all(alignment.cosine[1] > 0.9 for alignment in found)


def test_a_head_of_another_size_is_left_out_and_follows(tmp_path):
    a, other = arrays(lively(ARCH)), ARCH.replace("num_classes=5", "num_classes=9")
    head = {key: value for key, value in arrays(lively(other)).items() if is_head(key)}
    spec = trace(lively(other), SIZE)
    planted = random_image(spec, np.random.default_rng(3))
    b = permute({**a, **head}, spec, planted)
    sources = [saved(tmp_path / "a", a), saved(tmp_path / "b", b, other)]
    (found,) = align([[source] for source in sources])
    found.write(tmp_path / "out", {})
    back = load_file(tmp_path / "out")
    assert all(back[key].tobytes() == value.tobytes() for key, value in {**a, **head}.items())


def test_heads_of_other_classes_are_not_compared(tmp_path):
    tensors = arrays(lively(ARCH))
    strange = scrambled(tensors, 5)
    strange["fc.weight"] = strange["fc.weight"] * -50  # would outweigh all else
    sources = [
        saved(tmp_path / "a", tensors, **{"dmm.classes": '["a", "b", "c", "d", "e"]'}),
        saved(tmp_path / "b", strange, **{"dmm.classes": '["v", "w", "x", "y", "z"]'}),
    ]
    (found,) = align([[source] for source in sources])
    back = permute(strange, found.spec, found.image)
    assert all(back[key].tobytes() == value.tobytes() for key, value in tensors.items() if key != "fc.weight")


def test_one_start_as_two_architectures_of_the_same_tensors_is_refused(tmp_path):
    arch, size = "vit_tiny_patch16_224,num_classes=5,img_size=32,embed_dim=12,num_heads=3,depth=1", (3, 32, 32)
    other = arch.replace("num_heads=3", "num_heads=2")
    a, b = (arrays(lively(arch, seed)) for seed in range(2))
    first, second = saved(tmp_path / "a", a, arch), saved(tmp_path / "b", b, arch)
    third = saved(tmp_path / "c", noisy(b, 0.1), other)
    with pytest.raises(DmmError, match="have one start, and units that do not correspond") as error:
        align([[first], [second, third]], size=size)
    assert list(error.value.evidence) == [f"{second.path} is {arch}", f"{third.path} is {other}"]
    assert "--arch" in error.value.hint


def test_weights_that_are_not_finite_are_named(tmp_path):
    tensors = arrays(lively(ARCH))
    bad = {**tensors, "conv1.weight": np.full_like(tensors["conv1.weight"], np.inf)}
    with pytest.raises(DmmError, match=r"b cannot be computed with"):
        align([[saved(tmp_path / "a", tensors)], [saved(tmp_path / "b", bad)]])


def test_nothing_to_align_is_an_error(tmp_path):
    sources = [
        saved(
            tmp_path / n,
            {"weight": np.ones((2, 3), np.float32)},
            "torch.nn:Linear,in_features=3,out_features=2,bias=False",
        )
        for n in "ab"
    ]
    grant(["torch.nn"])
    with pytest.raises(DmmError, match=r"no units of torch.nn:Linear.* may change places"):
        align([[source] for source in sources], size=(3,))


def test_basins_do_not_depend_on_heads_or_on_the_order(tmp_path):
    a, b = arrays(lively(ARCH, 0)), arrays(lively(ARCH, 1))
    files = [a, b, noisy(a, 0.5, 1), noisy(b, 0.5, 2), {**noisy(a, 0.5, 3), "fc.weight": np.ones((9, 20), np.float32)}]
    sources = [saved(tmp_path / str(number), file) for number, file in enumerate(files)]
    assert basins(sources) == [[0, 2, 4], [1, 3]]
    assert basins(sources[::-1]) == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize(
    ("shared", "scale", "expected"),
    [("small", 2.5, [[0], [1]]), ("large", 4.0, [[0, 1]]), ("none", 0.0, [[0, 1]]), ("none", 1.0, [[0], [1]])],
)
def test_basins_are_those_that_similarities_tell(tmp_path, shared, scale, expected):
    """A frozen stem under layers of other starts; adapters between layers of one start; nothing but zeros."""
    shapes = {"small": (32, 256), **dict.fromkeys(("large1", "large2", "large3", "large4"), (256, 256))}
    draw, files = np.random.default_rng(0), ({}, {})
    for name, shape in shapes.items():
        one, other = draw.standard_normal((2, *shape)).astype(np.float32) * (scale if name == "small" else bool(scale))
        files[0][f"{name}.weight"] = one
        files[1][f"{name}.weight"] = one if name.startswith(shared) else other
    sources = [saved(tmp_path / str(number), file) for number, file in enumerate(files)]
    assert basins(sources) == expected
    assert same_start(compute_similarity(sources, measures=["cosine"]))[0, 1] == (len(expected) == 1)


def test_the_cosine_with_nothing_is_0_but_for_another_nothing():
    some, none = {"w": np.array([1.0, 2.0])}, {"w": np.zeros(2)}
    assert [cosine(*pair, ["w"]) for pair in ((some, none), (none, some), (none, none))] == [0.0, 0.0, 1.0]
    assert cosine(some, {"w": np.array([1e-150, 2e-150])}, ["w"]) == pytest.approx(1)
