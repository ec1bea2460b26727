"""A dense layer in all it computes, and what it skips."""

import math
from typing import Any

import pytest
import torch
from cases import IN, OUT, blocks_of, copy_block, inputs, randomized
from planted import train
from tolerances import assert_all_close, assert_close, gradients
from torch import Tensor, nn

from fffexp.kernels import naive
from fffexp.layers import FF, SparseFF
from fffexp.routing.activations import ActivationRouting, activation_l1, active_neurons

WIDTH = 40


def make(dtype: torch.dtype = torch.float64, bias: float = -1.5, **options: Any) -> SparseFF:
    layer: SparseFF = randomized(SparseFF(IN, OUT, WIDTH, **options)).to(dtype)
    with torch.no_grad():
        layer.network.hidden_bias.add_(bias)  # few neurons are active
    return layer


def active(layer: SparseFF, x: Tensor) -> Tensor:
    return torch.relu(x @ layer.network.hidden_weight[0].T + layer.network.hidden_bias[0]) != 0


@pytest.mark.parametrize("batch", [0, 1, 3, 63, 257])
@pytest.mark.parametrize("training", [True, False])
def test_equals_naive_with_every_gradient(training: bool, batch: int) -> None:
    layer, x = make().train(training), inputs(batch, dtype=torch.float64)
    wanted = {"x": x.requires_grad_(), **dict(layer.named_parameters())}
    expected = naive.selected(x, [[0]] * batch, x.new_ones(batch, 1), blocks_of(layer.network), torch.relu)
    output = layer(x)
    assert_close(output, expected)
    if batch:
        assert_all_close(gradients(output, wanted), gradients(expected, wanted))
    with torch.no_grad():
        assert_close(make(torch.float32).eval()(x.float()), expected)


@pytest.mark.parametrize("bias", [-30.0, -1.5, 30.0], ids=["none", "some", "all"])
@pytest.mark.parametrize("activation", ["relu", "hardtanh", "relu6", "gelu", "tanh"])
def test_is_a_dense_layer(activation: str, bias: float) -> None:
    layer, x = make(bias=bias, activation=activation), inputs(9, dtype=torch.float64)
    dense = copy_block(FF(IN, OUT, WIDTH, activation).double(), layer.network, 0)
    for training in (True, False):
        output, expected = layer.train(training)(x), dense(x)
        assert_close(output, expected)
        (found,) = gradients(output, {"x": layer.network.hidden_bias}).values()
        assert_close(found[0], gradients(expected, {"x": dense.network[0].bias})["x"])  # type: ignore[dict-item]
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(("batch", "bias"), [(1, -1.0), (3, -1.5)])
def test_rows_of_zero_neurons_are_not_read(batch: int, bias: float) -> None:
    layer, x = make(bias=bias).eval(), inputs(batch, dtype=torch.float64)
    used = active(layer, x).any(0)
    assert 0 < used.sum() <= WIDTH // 2
    expected = layer(x)
    with torch.no_grad():
        layer.network.output_weight[0, ~used] = math.nan
    assert torch.equal(layer(x), expected)
    assert layer.weights_read(x) == WIDTH * (IN + 1) + int(used.sum()) * OUT + OUT


def test_gradients_of_activations_that_are_zero_but_not_flat() -> None:
    layer = make(activation=nn.Tanh, bias=0.0).eval()
    with torch.no_grad():
        layer.network.hidden_bias.zero_()
    x = torch.zeros(1, IN, dtype=torch.float64, requires_grad=True)
    expected = layer.network.output_weight[0].T @ layer.network.hidden_weight[0]
    assert_close(torch.autograd.functional.jacobian(layer, x)[0, :, 0], expected)


def test_the_loss_and_the_metric() -> None:
    h = torch.tensor([[0.0, 2.0, 0.0], [-1.0, 3.0, 0.5]])
    assert activation_l1(ActivationRouting.of(h)) == 3.25
    assert active_neurons(ActivationRouting.of(h)) == 2
    assert activation_l1(ActivationRouting.of(h[:0])) == 0


def test_dropout_is_no_sparsity() -> None:
    layer, x = make(dropout=0.5), inputs(9, dtype=torch.float64)
    layer(x)
    assert torch.equal(layer.routing.active_B, active(layer, x).sum(1))


def test_the_loss_silences_neurons() -> None:
    """A planted task of four neurons that need not be active together."""
    x = inputs(512)
    teacher = torch.randn(4, IN, generator=torch.Generator().manual_seed(0))
    y = torch.relu(x @ teacher.T - 1.0) * 3
    counts = {}
    for weight in (0.0, 0.1):
        torch.manual_seed(0)
        layer = SparseFF(IN, OUT, 64)
        error = train(layer, x, y, aux_weight=weight)
        assert error < 0.02 * float(y.var())
        counts[weight] = float(active(layer, x).sum(1).double().mean())
    assert counts[0.1] < 0.4 * counts[0.0]
