"""Paths of trees whose nodes are the neurons, by hand and against a walk down each tree."""

import math

import pytest
import torch
from tolerances import assert_close

from fffexp.kernels import naive
from fffexp.routing.paths import PathRouting, descend, node_balance, path_neurons


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize(("batch", "trees"), [(0, 2), (1, 1), (40, 3)])
def test_paths_are_those_of_a_walk(depth: int, batch: int, trees: int) -> None:
    x = torch.randn(batch, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.randn(trees, 2**depth - 1, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bias = torch.zeros(trees, 2**depth - 1, dtype=torch.float64)
    path_BT = descend(torch.einsum("bi,tni->btn", x, weight))
    assert path_BT.shape == (batch, trees)
    found = path_neurons(path_BT, depth).view(batch, trees, depth)
    for row, each in zip(x, found.tolist(), strict=True):
        for tree, (neurons, *more) in enumerate(zip(each, weight, bias, strict=True)):
            first = tree * (2**depth - 1)
            assert neurons == [first + node for node, _ in naive.tree_path(row, *more)]


def test_ties_go_right() -> None:
    assert descend(torch.zeros(2, 1, 7)).tolist() == [[3], [3]]
    assert path_neurons(torch.tensor([[3, 0]]), 3).tolist() == [[0, 2, 6, 7, 8, 10]]


def routing(logits: list[float], path: list[int], last: float = 0.0) -> PathRouting:
    # a tree of two levels: the root decides, and the neuron below it decides nothing
    return PathRouting(torch.tensor([[[logit, last]] for logit in logits]), torch.tensor([[p] for p in path]))


def test_balance_of_a_node() -> None:
    third = math.log(2)  # sigmoid 2/3
    # half of the samples each way: 2 * (1/2 * p + 1/2 * (1 - p)) = 1 whatever p
    assert_close(node_balance(routing([third, -third], [1, 0])), torch.tensor(1.0))
    # all right at p = 2/3: 2 * 2/3
    assert_close(node_balance(routing([third, third], [1, 1])), torch.tensor(4 / 3))
    # three of four right, mean p = (3 * 2/3 + 1/3) / 4 = 7/12: 2 * (3/4 * 7/12 + 1/4 * 5/12)
    assert_close(node_balance(routing([third, third, third, -third], [1, 1, 1, 0])), torch.tensor(13 / 12))
    # all one way for certain; what the last neuron says is not asked
    assert_close(node_balance(routing([-99.0] * 3, [0, 0, 0], last=5.0)), torch.tensor(2.0))


def test_balance_is_the_mean_over_nodes_by_the_samples_that_reach_them() -> None:
    # root: two each way, 1. Left child: both right, sigmoid 1, 2. Right child: one each way, 1. 4 * 1 + 2 * 2 + 2 * 1
    logits = torch.tensor([[[-9.0, 99.0, 0]], [[-9.0, 99.0, 0]], [[9.0, 1.0, 0]], [[9.0, -1.0, 0]]])
    assert_close(node_balance(PathRouting(logits, torch.tensor([[1], [1], [3], [2]]))), torch.tensor(10 / 8))


def test_balance_moves_the_larger_side_back() -> None:
    made = routing([0.5, 0.5, 0.5, -0.5], [1, 1, 1, 0])
    made.logits_BTD.requires_grad_()
    (gradient,) = torch.autograd.grad(node_balance(made), made.logits_BTD)
    assert (gradient[..., 0] > 0).all(), "a step down its gradient sends fewer right"
    assert not gradient[..., 1].any()


@pytest.mark.parametrize(("batch", "depth"), [(0, 3), (4, 1)])
def test_balance_of_nothing_is_0(batch: int, depth: int) -> None:
    made = PathRouting(torch.zeros(batch, 2, depth, requires_grad=True), torch.zeros(batch, 2, dtype=torch.long))
    balance = node_balance(made)
    assert balance == 0
    balance.backward()
