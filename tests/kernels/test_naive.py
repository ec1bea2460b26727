"""The ground truth itself, against arithmetic by hand."""

import math

import torch
from tolerances import assert_close

from fffexp.kernels import naive
from fffexp.kernels.naive import Blocks

# Four blocks of one hidden neuron relu(x1 - x2 + g), times g + 1 and -1, plus 10 * g and 0.
X = torch.tensor([[3.0, 1.0], [0.0, 5.0]], dtype=torch.float64)
BLOCKS = Blocks(
    torch.tensor([[[1.0, -1.0]]] * 4, dtype=torch.float64),
    torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64),
    torch.tensor([[[1.0, -1.0]], [[2.0, -1.0]], [[3.0, -1.0]], [[4.0, -1.0]]], dtype=torch.float64),
    torch.tensor([[0.0, 0.0], [10.0, 0.0], [20.0, 0.0], [30.0, 0.0]], dtype=torch.float64),
)
# The first sample: hidden 2, 3, 4, 5; the second: hidden 0 four times.
FIRST = torch.tensor([[2.0, -2.0], [16.0, -3.0], [32.0, -4.0], [50.0, -5.0]], dtype=torch.float64)
SECOND = torch.tensor([[0.0, 0.0], [10.0, 0.0], [20.0, 0.0], [30.0, 0.0]], dtype=torch.float64)


def test_block() -> None:
    for g in range(4):
        assert_close(naive.block(X[0], g, BLOCKS, torch.relu), FIRST[g])
        assert_close(naive.block(X[1], g, BLOCKS, torch.relu), SECOND[g])


def test_fff_soft() -> None:
    # choices: root 3/4 right, left node 1/2, right node 1/4
    logits = torch.tensor([[math.log(3), 0.0, -math.log(3)]] * 2, dtype=torch.float64)
    weights = torch.tensor([1 / 8, 1 / 8, 9 / 16, 3 / 16], dtype=torch.float64)
    expected = torch.stack([weights @ FIRST, weights @ SECOND])
    assert_close(naive.fff_soft(X, logits, 2, BLOCKS, torch.relu), expected)


def test_fff_hard() -> None:
    # root: x1 - 1; left node: never right; right node: always right; x1 = 3 goes to leaf 3, x1 = 0 to leaf 0
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    bias = torch.tensor([-1.0, -1.0, 0.0], dtype=torch.float64)
    assert [naive.fff_leaf(x, weight, bias, 2) for x in X] == [3, 0]
    expected = torch.stack([FIRST[3], SECOND[0]])
    assert_close(naive.fff_hard(X, weight, bias, 2, BLOCKS, torch.relu), expected)


def test_moe() -> None:
    # the largest two: experts 2 and 0, gates 3/4 and 1/4; experts 1 and 3, gates 1/2 each
    logits = torch.tensor([[0.0, -9.0, math.log(3), -9.0], [-9.0, 1.0, -9.0, 1.0]], dtype=torch.float64)
    expected = torch.stack([0.75 * FIRST[2] + 0.25 * FIRST[0], 0.5 * SECOND[1] + 0.5 * SECOND[3]])
    assert_close(naive.moe(X, logits, 2, BLOCKS, torch.relu), expected)


def test_no_rows() -> None:
    none, nodes = X[:0], X.new_zeros(0, 3)
    assert naive.fff_soft(none, nodes, 2, BLOCKS, torch.relu).shape == (0, 2)
    assert naive.fff_hard(none, X.new_zeros(3, 2), X.new_zeros(3), 2, BLOCKS, torch.relu).shape == (0, 2)
    assert naive.moe(none, X.new_zeros(0, 4), 2, BLOCKS, torch.relu).shape == (0, 2)
