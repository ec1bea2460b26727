"""Training of the chosen leaves alone: the gradients of hard inference, and none for the rest."""

from typing import Any

import pytest
import torch
from cases import IN, OUT, inputs, randomized
from tolerances import assert_close, gradients
from torch import Tensor, nn

from fffexp.kernels import naive
from fffexp.layers import FFF

DTYPES = [torch.float32, torch.float64]


def make(depth: int, dtype: torch.dtype = torch.float64, **options: object) -> FFF:
    layer: FFF = randomized(FFF(IN, OUT, depth, 5, **options)).to(dtype)  # type: ignore[arg-type]
    return layer


def dense_gradients(output: Tensor, layer: FFF, x: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    wanted = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad(output, list(wanted.values()), upstream, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g.to_dense()
        for (name, p), g in zip(wanted.items(), found, strict=True)
    }


@pytest.mark.parametrize("depth", [0, 1, 3, 6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Softplus])
def test_frozen_equals_naive_with_every_gradient(depth: int, dtype: torch.dtype, activation: type[nn.Module]) -> None:
    layer = make(depth, dtype, trained="chosen_leaf", activation=activation)
    x = inputs(21, dtype=dtype).requires_grad_()
    act = activation()
    expected = naive.fff_hard(x, layer.node_weight, layer.node_bias, depth, layer.leaves.tensors(), act)
    output = layer(x)
    assert_close(output, expected)
    truth = gradients(expected, {"x": x, **dict(layer.named_parameters())})
    for name, found in dense_gradients(output, layer, x).items():
        assert_close(found, truth[name])


def test_an_activation_may_have_parameters() -> None:
    layer = make(3, trained="chosen_leaf", activation=nn.PReLU)
    x = inputs(21, dtype=torch.float64)
    expected = naive.fff_hard(
        x, layer.node_weight, layer.node_bias, 3, layer.leaves.tensors(), lambda z: layer.leaves.hidden(z)
    )
    slope: Any = layer.leaves.hidden[0].weight
    found, wanted = (torch.autograd.grad(y.sum(), slope)[0] for y in (layer(x), expected))
    assert wanted.abs().max() > 0
    assert_close(found, wanted)


def test_a_second_derivative_is_refused() -> None:
    layer = make(3, trained="chosen_path")
    x = inputs(9, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_decisions_in_training() -> None:
    layer, plain = make(3, trained="chosen_leaf"), make(3)
    x = inputs(9, dtype=torch.float64)
    assert_close(layer(x), plain.eval()(x))
    layer.routing_mode = plain.routing_mode = "soft"
    assert_close(layer(x), plain(x))


@pytest.mark.parametrize("batch", [0, 1, 3, 63])
def test_batches(batch: int) -> None:
    layer = make(3, trained="chosen_path")
    x = inputs(batch, dtype=torch.float64)
    output = layer(x)
    assert output.shape == (batch, OUT)
    assert_close(output, layer.eval()(x))
    output.sum().backward()


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_chosen_path_gives_the_nodes_the_gradient_of_p_times_the_chosen_leaf(depth: int) -> None:
    layer = make(depth, trained="chosen_path")
    layer.inverse_temperature.fill_(1.7)
    x = inputs(9, dtype=torch.float64).requires_grad_()
    found = dense_gradients(layer(x), layer, x)
    # naively: y p / stopgrad(p), a sample at a time
    rows = []
    for row in x:
        leaf, p, node = naive.fff_leaf(row, layer.node_weight, layer.node_bias, depth), torch.ones(()).double(), 0
        for level in range(depth):
            right = leaf >> (depth - 1 - level) & 1
            c = torch.sigmoid((layer.node_weight[node] @ row + layer.node_bias[node]) * 1.7)
            p, node = p * (c if right else 1 - c), 2 * node + 1 + right
        rows.append(naive.block(row, leaf, layer.leaves.tensors(), torch.relu) * p / p.detach())
    expected = torch.stack(rows)
    truth = gradients(expected, {"x": x, **dict(layer.named_parameters())})
    assert truth["node_weight"].abs().max() > 0
    for name in truth:
        assert_close(found[name], truth[name])


def test_only_rows_in_use_have_gradients() -> None:
    layer = make(6, trained="chosen_path")
    x = inputs(3, dtype=torch.float64)
    layer(x).sum().backward()
    leaves = layer.route(x).unique()
    for parameter in layer.leaves.parameters():
        assert parameter.grad is not None
        assert parameter.grad.is_sparse
        assert parameter.grad.coalesce().indices()[0].tolist() == leaves.tolist()
    grad = layer.node_weight.grad
    assert grad is not None
    assert grad.is_sparse
    assert len(grad.coalesce().indices()[0]) <= 3 * 6
    frozen = make(6, trained="chosen_leaf")
    frozen(x).sum().backward()
    assert frozen.node_weight.grad is None


def test_evaluation_is_that_of_the_layer() -> None:
    plain, sparse = make(3), make(3, trained="chosen_leaf")
    x = inputs(9, dtype=torch.float64)
    assert torch.equal(plain.eval()(x), sparse.eval()(x))
    assert plain.state_dict().keys() == sparse.state_dict().keys()


def test_dropout() -> None:
    layer = make(2, trained="chosen_leaf", dropout=0.5)
    x = inputs(50, dtype=torch.float64)
    torch.manual_seed(0)
    output = layer(x)
    assert not torch.allclose(output, layer.eval()(x))
    output.sum().backward()


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="trained is 'soft'"):
        make(2, trained="soft")
    with pytest.raises(ValueError, match=r"region_leak is 0\.1 but trained"):
        make(2, trained="chosen_leaf", region_leak=0.1)
    assert not make(2, trained="chosen_leaf").aux_losses
    assert make(2).aux_losses
