import itertools
import math

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from fffexp.routing import blocks
from fffexp.routing.blocks import GateRouting, cv_squared, gate_entropy, importance, load


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", range(1, 10))
def test_cv_squared_is_n_minus_1_if_one_hot_and_0_if_uniform(n: int, dtype: torch.dtype) -> None:
    one_hot = torch.zeros(n, dtype=dtype)
    one_hot[-1] = 3
    assert_close(cv_squared(one_hot), torch.tensor(n - 1.0))
    assert cv_squared(torch.full((n,), 0.5, dtype=dtype)) == 0


def test_cv_squared_of_nothing_is_finite() -> None:
    values = torch.zeros(4, requires_grad=True)
    loss = cv_squared(values)
    loss.backward()
    assert loss == 0
    assert values.grad.isfinite().all()


def test_importance_by_hand() -> None:
    # columns sum to 1.5, 1, 0.5: mean 1, variance (0.25 + 0 + 0.25) / 3
    gates = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    assert_close(importance(GateRouting(gates, torch.ones(3))), torch.tensor(1 / 6))


def test_load_by_hand() -> None:
    # mean 2, variance (1 + 0 + 1) / 3, over 2^2
    assert_close(load(GateRouting(torch.ones(3, 3), torch.tensor([1.0, 2.0, 3.0]))), torch.tensor(1 / 6))


def test_load_of_a_3_by_3_matrix_by_hand() -> None:
    # no noise was drawn, its deviation is 1 and k = 1: P = Phi(own logit - the largest of the others)
    logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    margins = torch.tensor([[1.0, -1.0, -1.0], [-2.0, 2.0, -2.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    expected = 0.5 * (1 + torch.erf(margins / math.sqrt(2)))
    found = blocks.chosen_probability(logits, torch.ones_like(logits), logits, k=1)
    assert_close(found, expected)
    # Phi(1) = 0.841345, Phi(2) = 0.977250: loads 0.841345 + 0.022750 + 0.5, 0.158655 + 0.977250 + 0.5,
    # 0.158655 + 0.022750 + 0.5
    assert (found.sum(0) - torch.tensor([1.364095, 1.635905, 0.681405])).abs().max() < 2e-6


@pytest.mark.parametrize("k", [1, 2, 3])
def test_kth_excluding_by_brute_force(k: int) -> None:
    logits = random(20, 4)
    found = blocks.kth_excluding(logits, k)
    for row, expert in itertools.product(range(20), range(4)):
        others = sorted((float(v) for i, v in enumerate(logits[row]) if i != expert), reverse=True)
        assert float(found[row, expert]) == others[k - 1]


def test_kth_excluding_with_ties() -> None:
    # leaving one out of three equal logits, the largest of the rest is still that logit
    assert blocks.kth_excluding(torch.zeros(1, 3), 1).tolist() == [[0, 0, 0]]
    assert blocks.kth_excluding(torch.tensor([[1.0, 1.0, 0.0]]), 1).tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_chosen_probability_against_redrawing_one_noise(k: int) -> None:
    draws, generator = 200_000, torch.Generator().manual_seed(1)
    clean, noise, eps = random(1, 4), random(1, 4, seed=2).exp(), random(1, 4, seed=3)
    found = blocks.chosen_probability(clean, noise, clean + eps * noise, k)
    for expert in range(4):
        redrawn = eps.repeat(draws, 1)
        redrawn[:, expert] = torch.randn(draws, generator=generator, dtype=torch.float64)
        chosen = (clean + redrawn * noise).topk(k, dim=1).indices
        assert abs(found[0, expert] - (chosen == expert).any(1).double().mean()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e4])
def test_chosen_probability_without_noise_is_finite(dtype: torch.dtype, scale: float) -> None:
    clean = (scale * random(9, 4)).to(dtype).requires_grad_()
    noise = torch.zeros(9, 4, dtype=dtype, requires_grad=True)
    found = blocks.chosen_probability(clean, noise, clean, 2)
    found.sum().backward()
    assert ((found >= 0) & (found <= 1)).all()
    assert clean.grad.isfinite().all()
    assert noise.grad.isfinite().all()


def test_gate_entropy() -> None:
    alike = GateRouting(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.ones(2))
    collapsed = GateRouting(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.ones(2))
    assert_close(gate_entropy(alike), torch.tensor(math.log(2)))
    assert gate_entropy(collapsed) == 0
