import math

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from fffexp.routing import tree
from fffexp.routing.blocks import balance, block_counts, importance
from fffexp.routing.tree import TreeRouting


def logits(rows: int, depth: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2**depth - 1, generator=generator, dtype=torch.float64)


def routing(weights: list[list[float]], leaf: list[int] | None = None) -> TreeRouting:
    """Of these soft weights, with logits that send each row to its leaf."""
    depth = len(weights[0]).bit_length() - 1
    z = torch.full((len(weights), 2**depth - 1), -1.0)
    for row, reached in enumerate(leaf or []):
        for node, right in path(reached, depth):
            z[row, node] = 1.0 if right else -1.0
    return TreeRouting(z, torch.ones(()), torch.tensor(weights))


def path(leaf: int, depth: int) -> list[tuple[int, int]]:
    """(node, 1 if right) from the root to a leaf: the children of node i are 2i + 1 and 2i + 2."""
    steps, child = [], 2**depth - 1 + leaf
    while child:
        node = (child - 1) // 2
        steps.append((node, child - 2 * node - 1))
        child = node
    return steps[::-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_is_that_of_torch_distributions(dtype: torch.dtype) -> None:
    exact = torch.linspace(-40, 40, 161, dtype=torch.float64)
    z = exact.to(dtype).requires_grad_()
    entropy = tree.bernoulli_entropy(z)
    assert_close(entropy, torch.distributions.Bernoulli(logits=exact).entropy())
    entropy.sum().backward()
    # dH/dz = -z c (1 - c)
    assert_close(z.grad, -exact * torch.sigmoid(exact) * torch.sigmoid(-exact))


def test_entropy_of_an_even_choice_is_ln_2() -> None:
    assert_close(tree.bernoulli_entropy(torch.zeros(1)), torch.tensor([math.log(2)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [30.0, 100.0, 1e4, 1e30])
def test_entropy_of_a_sure_choice_is_finite(dtype: torch.dtype, size: float) -> None:
    z = torch.tensor([-size, size], dtype=dtype, requires_grad=True)
    entropy = tree.bernoulli_entropy(z)
    entropy.sum().backward()
    assert z.grad.isfinite().all()
    assert (entropy.abs() < 1e-7).all()


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 5])
def test_leaf_mixture_is_the_product_of_the_choices_on_a_path(depth: int) -> None:
    choices = torch.sigmoid(logits(4, depth))
    weights = tree.leaf_mixture(choices, depth)
    expected = torch.ones(4, 2**depth, dtype=torch.float64)
    for leaf in range(2**depth):
        for node, right in path(leaf, depth):
            expected[:, leaf] *= choices[:, node] if right else 1 - choices[:, node]
    assert_close(weights, expected)
    assert_close(weights.sum(1), torch.ones(4))


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_descend_goes_right_where_the_logit_is_not_negative(depth: int, rows: int) -> None:
    z = logits(rows, depth)
    z[::3] = z[::3].round()  # some exact zeros
    found = tree.descend(z, depth)
    assert found.shape == (rows,)
    for row, leaf in zip(z, found.tolist(), strict=True):
        assert all((row[node] >= 0) == right for node, right in path(leaf, depth))


def test_straight_through() -> None:
    z = torch.tensor([-2.0, -0.0, 0.0, 1e-30, 3.0], requires_grad=True)
    soft = torch.sigmoid(z)
    hard = tree.straight_through(soft, z)
    assert hard.tolist() == [0, 1, 1, 1, 1]
    hard.sum().backward()
    assert_close(z.grad, soft * (1 - soft))


def test_hardening_sum_and_mean() -> None:
    # entropies of 0 logits are ln 2 and of sure ones 0: 4 ln 2 over 2 samples and 3 nodes
    z = torch.tensor([[0.0, 100.0, 0.0], [-100.0, 0.0, 0.0]])
    left = TreeRouting(z, torch.ones(()), torch.full((2, 4), 0.25))
    assert_close(tree.hardening_sum(left), torch.tensor(4 * math.log(2)))
    assert_close(tree.hardening_mean(left), torch.tensor(4 / 6 * math.log(2)))


def test_entropy_is_of_the_scaled_logits() -> None:
    z = torch.tensor([[0.3, -1.0, 2.0]])
    left = TreeRouting(z, torch.tensor(2.0), torch.full((1, 4), 0.25))
    assert_close(left.entropy_BN, tree.bernoulli_entropy(2 * z))
    assert left.block_B.tolist() == [3]


@pytest.mark.parametrize(("rows", "depth"), [(0, 2), (5, 0)])
def test_hardening_of_nothing_is_0(rows: int, depth: int) -> None:
    left = TreeRouting(torch.zeros(rows, 2**depth - 1), torch.ones(()), torch.ones(rows, 2**depth))
    assert tree.hardening_sum(left) == 0
    assert tree.hardening_mean(left) == 0


def test_balance_by_hand() -> None:
    # f = (2/4, 1/4, 1/4, 0); P = column means = (0.4, 0.3, 0.2, 0.1)
    # 4 * (0.5 * 0.4 + 0.25 * 0.3 + 0.25 * 0.2 + 0 * 0.1) = 4 * 0.325 = 1.3
    weights = [[0.7, 0.1, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.3, 0.5, 0.1]]
    assert_close(balance(routing(weights, leaf=[0, 0, 1, 2])), torch.tensor(1.3))


@pytest.mark.parametrize(("leaf", "expected"), [([0, 1, 2, 3], 1.0), ([2, 2, 2, 2], 4.0)])
def test_balance_is_1_if_uniform_and_the_leaves_if_collapsed(leaf: list[int], expected: float) -> None:
    one_hot = torch.eye(4)[leaf].tolist()
    assert_close(balance(routing(one_hot, leaf)), torch.tensor(expected))


def test_balance_pushes_weight_away_from_crowded_leaves() -> None:
    weights = torch.full((4, 2), 0.5, requires_grad=True)
    balance(TreeRouting(torch.tensor([[-1.0], [-1.0], [-1.0], [1.0]]), torch.ones(()), weights)).backward()
    # d/dP_i = leaves * f_i, and P_i takes a quarter of each row: 2 * 3/4 / 4 and 2 * 1/4 / 4
    assert_close(weights.grad, torch.tensor([[0.375, 0.125]] * 4))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([[0.5, 0.5], [0.5, 0.5]], 0.0),
        ([[1.0, 0.0], [0.0, 1.0]], 0.0),  # sums 1, 1
        ([[0.0, 1.0, 0.0, 0.0]] * 3, 3.0),  # collapsed: leaves - 1
        ([[1.0, 0.0], [0.5, 0.5]], 0.25),  # sums 1.5, 0.5: variance 0.25, mean 1
    ],
)
def test_leaf_importance(weights: list[list[float]], expected: float) -> None:
    assert_close(importance(routing(weights)), torch.tensor(expected))


@pytest.mark.parametrize("shape", [(7,), (7, 1), (0, 2), (5, 2)])
def test_block_counts(shape: tuple[int, ...]) -> None:
    blocks = torch.randint(4, shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block_counts(blocks, 6), torch.bincount(blocks.flatten(), minlength=6))
