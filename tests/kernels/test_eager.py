import pytest
import torch
from tolerances import assert_all_close, assert_close, gradients
from torch import Tensor

from fffexp.kernels import eager, naive
from fffexp.kernels.naive import Blocks

IN, WIDTH, OUT = 5, 3, 7


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def random_blocks(count: int, dtype: torch.dtype = torch.float64) -> Blocks:
    shapes = ((count, WIDTH, IN), (count, WIDTH), (count, WIDTH, OUT), (count, OUT))
    return Blocks(*(random(*shape, seed=10 + i, dtype=dtype) for i, shape in enumerate(shapes)))


def weighted_sum(x: Tensor, block: Tensor, weights: Tensor, blocks: Blocks) -> Tensor:
    """(B, in), (B, K), (B, K) -> (B, out), one row and one block at a time."""
    rows = [
        torch.stack([w * naive.block(row, int(i), blocks, torch.tanh) for i, w in zip(chosen, share, strict=True)])
        for row, chosen, share in zip(x, block, weights, strict=True)
    ]
    return torch.stack(rows).sum(1)


def choose(batch: int, k: int, blocks: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.stack([torch.randperm(blocks, generator=generator)[:k] for _ in range(batch)])


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (4, 9), (7, 2)])
def test_mixture_with_every_gradient(count: int, batch: int) -> None:
    blocks, x, weights = random_blocks(count), random(batch, IN), random(batch, count, seed=1)
    everything = torch.arange(count).expand(batch, count)
    wanted = {"x": x, "weights": weights, **blocks._asdict()}
    output, expected = eager.mixture(x, weights, blocks, torch.tanh), weighted_sum(x, everything, weights, blocks)
    assert_close(output, expected)
    assert_all_close(gradients(output, wanted), gradients(expected, wanted))


@pytest.mark.parametrize(("count", "batch", "k"), [(1, 1, 1), (4, 9, 2), (40, 3, 2), (3, 17, 3)])
@pytest.mark.parametrize("weighted", [True, False])
def test_selected_with_every_gradient(count: int, batch: int, k: int, weighted: bool) -> None:
    blocks, x, block = random_blocks(count), random(batch, IN), choose(batch, k, count)
    weights = random(batch, k, seed=1)
    wanted = {"x": x, **blocks._asdict(), **({"weights": weights} if weighted else {})}
    output = eager.selected(x, block, weights if weighted else None, blocks, torch.tanh)
    expected = weighted_sum(x, block, weights if weighted else torch.ones(batch, k), blocks)
    assert_close(output, expected)
    assert_all_close(gradients(output, wanted), gradients(expected, wanted))


@pytest.mark.parametrize("batch", [0, 1, 3, 63, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selected_at_sizes_that_fill_no_tile(batch: int, dtype: torch.dtype) -> None:
    blocks, x = random_blocks(4, dtype), random(batch, IN, dtype=dtype)
    block = choose(batch, 2, 4) if batch else torch.empty(0, 2, dtype=torch.long)
    weights = random(batch, 2, seed=1, dtype=dtype)
    output = eager.selected(x, block, weights, blocks, torch.tanh)
    assert output.dtype == dtype
    assert output.shape == (batch, OUT)
    if batch:
        exact = Blocks(*(p.double() for p in blocks))
        assert_close(output, weighted_sum(x.double(), block, weights.double(), exact))


def test_selected_takes_rows_of_one_block_only() -> None:
    # all rows to the last of many blocks: the others are empty
    blocks, x = random_blocks(9, torch.float32), random(5, IN, dtype=torch.float32)
    block = torch.full((5, 1), 8)
    output = eager.selected(x, block, None, blocks, torch.tanh)
    assert_close(output, weighted_sum(x, block, torch.ones(5, 1), blocks))
    found = gradients(output, blocks._asdict())
    assert all((g[:8] == 0).all() and (g[8] != 0).any() for g in found.values())


@pytest.mark.parametrize("depth", [0, 1, 2, eager.SHALLOW_LEVELS, eager.SHALLOW_LEVELS + 1, 9])
@pytest.mark.parametrize("batch", [0, 1, 50])
def test_route(depth: int, batch: int) -> None:
    x, weight, bias = random(batch, IN), random(2**depth - 1, IN, seed=1), random(2**depth - 1, seed=2)
    found = eager.route(x, weight, bias, depth)
    assert found.dtype == torch.long
    assert found.tolist() == [naive.fff_leaf(row, weight, bias, depth) for row in x]
    if depth >= 2 and batch > 1:
        assert len(set(found.tolist())) > 2, "every row goes the same way"


@pytest.mark.parametrize("depth", [1, eager.SHALLOW_LEVELS, 9])
def test_route_goes_right_at_ties(depth: int) -> None:
    nodes = 2**depth - 1
    found = eager.route(random(3, IN), torch.zeros(nodes, IN).double(), torch.zeros(nodes).double(), depth)
    assert found.tolist() == [2**depth - 1] * 3
