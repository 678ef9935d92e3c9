from __future__ import annotations

import numpy as np
import pytest
from networks import KINDS, arrays, lively

from dmm_cli.alignment.apply import carry, identity, permute, permute_tensor, random_image
from dmm_cli.alignment.spec import TensorAxis
from dmm_cli.alignment.trace import trace


def test_a_unit_that_stands_twice_moves_twice():
    axis = TensorAxis(1, (), np.array([0, 1, 2, 0, 1, 2]))
    got = permute_tensor(np.arange(12).reshape(2, 6), [axis], np.array([2, 0, 1]))
    assert got.tolist() == [[2, 0, 1, 5, 3, 4], [8, 6, 7, 11, 9, 10]]


def test_inputs_of_a_grouped_convolution_follow_the_group_of_their_output():
    # outputs 0, 1 belong to group a with inputs 4, 5; outputs 2, 3 to group b with inputs 6, 7
    outputs, inputs = np.array([0, 1, 2, 3]), np.array([[4, 5], [4, 5], [6, 7], [6, 7]])
    axes = [TensorAxis(0, (), outputs), TensorAxis(1, (0,), inputs)]
    weight = np.array([[1, 2], [3, 4], [5, 6], [7, 8]])
    image = np.array([3, 2, 0, 1, 6, 7, 5, 4])  # groups change places; so do a's outputs then, and b's inputs
    assert permute_tensor(weight, axes, image).tolist() == [[7, 8], [5, 6], [2, 1], [4, 3]]


@pytest.mark.parametrize("kind", ["heads", "grouped", "concatenated", "windows"])
def test_permutations_compose_and_have_an_inverse(kind):
    name, size = KINDS[kind]
    model = lively(name)
    spec, tensors, draw = trace(model, size), arrays(model), np.random.default_rng(0)
    a, b = random_image(spec, draw), random_image(spec, draw)
    twice, once = permute(permute(tensors, spec, a), spec, b), permute(tensors, spec, a[b])
    back = permute(permute(tensors, spec, a), spec, np.argsort(a))
    for key, value in tensors.items():
        assert twice[key].tobytes() == once[key].tobytes() and back[key].tobytes() == value.tobytes()


def test_nothing_moves_and_nothing_is_copied_by_the_identity():
    name, size = KINDS["residual"]
    model = lively(name)
    spec, tensors = trace(model, size), arrays(model)
    same = permute(tensors, spec, identity(spec))
    assert all(same[key] is value for key, value in tensors.items())


def test_every_permutation_is_as_likely():
    name, size = KINDS["flattened"]
    spec = trace(lively(name), size)
    draw = np.random.default_rng(0)
    group = spec.groups[0]  # two blocks of five
    swapped = sum(random_image(spec, draw)[group.blocks[0]] == group.blocks[1] for _ in range(400))
    assert 150 < swapped < 250


def test_a_permutation_is_carried_to_a_network_with_another_head():
    name, size = KINDS["heads"]
    wide = name.replace("num_classes=5", "num_classes=9")
    one, two = lively(name), lively(wide)
    specs = trace(one, size), trace(two, size)
    assert specs[0].count != specs[1].count
    image = random_image(specs[0], np.random.default_rng(1))
    a = permute(arrays(one), specs[0], image)
    tensors = {**arrays(two), **{key: value for key, value in arrays(one).items() if "head" not in key}}
    b = permute(tensors, specs[1], carry(image, *specs))
    assert all(a[key].tobytes() == b[key].tobytes() for key in a if "head" not in key)
    order = a["norm.weight"].argsort()[arrays(one)["norm.weight"].argsort().argsort()]
    assert (b["head.weight"][:, order] == tensors["head.weight"]).all()
