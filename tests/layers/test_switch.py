"""The Switch gate by its definition, arXiv 2101.03961, section 2."""

import math

import pytest
import torch
from cases import IN, OUT, blocks_of, copy_block, inputs, randomized
from tolerances import assert_all_close, assert_close, gradients

from fffexp.kernels import naive
from fffexp.layers import FF, SwitchMoE
from fffexp.routing.blocks import SwitchRouting, balance, gate_entropy

EXPERTS, WIDTH = 5, 3


def make(num_experts: int = EXPERTS, dtype: torch.dtype = torch.float64) -> SwitchMoE:
    layer: SwitchMoE = randomized(SwitchMoE(IN, OUT, num_experts, WIDTH)).to(dtype)
    return layer


@pytest.mark.parametrize(("training", "dense"), [(True, False), (True, True), (False, False)])
def test_equals_naive_with_every_gradient(training: bool, dense: bool) -> None:
    layer, x = make().train(training), inputs(9, dtype=torch.float64)
    layer.vectorized = dense
    wanted = {"x": x.requires_grad_(), **dict(layer.named_parameters())}
    expected = naive.switch(x, x @ layer.gate_weight.T, blocks_of(layer.experts), torch.relu)
    output = layer(x)
    assert_close(output, expected)
    found = gradients(output, wanted)
    assert_all_close(found, gradients(expected, wanted))
    assert (found["gate_weight"].abs().sum(1) > 0).all(), "the gate learns from the prediction loss at k = 1"


@pytest.mark.parametrize("batch", [0, 1, 3, 63, 257])
def test_batches_that_fill_no_tile(batch: int) -> None:
    layer, x = make(dtype=torch.float32).eval(), inputs(batch)
    assert_close(layer(x), naive.switch(x, x @ layer.gate_weight.T, blocks_of(layer.experts), torch.relu))


def test_one_expert_is_a_dense_layer() -> None:
    layer, x = make(num_experts=1), inputs(9, dtype=torch.float64)
    assert_close(layer(x), copy_block(FF(IN, OUT, WIDTH).double(), layer.experts, 0)(x))
    layer.check_trainable()


def test_the_auxiliary_loss() -> None:
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7], [0.2, 0.5, 0.3]])
    routing = SwitchRouting(probabilities, probabilities.argmax(1))
    # f = (1/2, 1/4, 1/4), P = (1.4, 1.4, 1.2) / 4: 3 * (0.175 + 0.0875 + 0.075)
    assert_close(balance(routing), torch.tensor(1.0125))
    collapsed = torch.tensor([[1.0, 0.0, 0.0]] * 4)
    assert balance(SwitchRouting(collapsed, collapsed.argmax(1))) == 3
    # P = (1.4, 1.4, 1.2) / 4
    entropy = -sum(p * math.log(p) for p in (0.35, 0.35, 0.3))
    assert_close(gate_entropy(routing), torch.tensor(entropy))


def test_the_loss_moves_the_gate_alone() -> None:
    layer = make()
    layer(inputs(20, dtype=torch.float64))
    balance(layer.routing).backward()
    assert layer.gate_weight.grad is not None
    assert layer.gate_weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in layer.experts.parameters())


def test_initial_gate_uses_all_experts() -> None:
    torch.manual_seed(0)
    layer = SwitchMoE(100, OUT, 8, WIDTH)
    std = math.sqrt(0.1 / 100)
    # a normal distribution cut at two deviations has 0.88 of them
    assert layer.gate_weight.std().item() == pytest.approx(0.88 * std, rel=0.1)
    assert layer.gate_weight.abs().max() <= 2 * std
    assert len(layer.route(torch.randn(1000, 100)).unique()) == 8
