"""Shared neurons beside a layer that routes, against the sum of both."""

from functools import partial

import pytest
import torch
from cases import inputs, randomized
from tolerances import assert_close
from torch import Tensor, nn

from fffexp.layers import FFF, FeedforwardLayer, Shared, SwitchMoE
from fffexp.training.losses import auxiliary_loss

TREE = partial(FFF, depth=2, leaf_width=3)


def test_it_is_the_sum_of_every_neuron_s_part() -> None:
    layer = randomized(Shared(6, 4, 5, TREE)).eval().double()
    up, _, _, down = layer.shared.network
    tree: FFF = layer.routed
    leaves = tree.leaves
    for x, found in zip(inputs(20).double(), layer(inputs(20).double()), strict=True):
        expected: Tensor = down.bias + leaves.output_bias[0] * 0
        for n in range(5):
            expected = expected + (up.weight[n] @ x + up.bias[n]).relu() * down.weight[:, n]
        node = 0
        while node < 3:
            node = 2 * node + 1 + int(tree.node_weight[node] @ x + tree.node_bias[node] >= 0)
        leaf = node - 3
        for n in range(3):
            active = (leaves.hidden_weight[leaf, n] @ x + leaves.hidden_bias[leaf, n]).relu()
            expected = expected + active * leaves.output_weight[leaf, n]
        assert_close(found, expected + leaves.output_bias[leaf])


@pytest.mark.parametrize("routed", [TREE, partial(SwitchMoE, num_experts=4, expert_width=3)])
def test_routing_and_losses_are_those_of_the_part(routed: partial[FeedforwardLayer]) -> None:
    layer = randomized(Shared(6, 4, 5, routed))
    assert layer.aux_losses == layer.routed.aux_losses
    alone = layer.routed(inputs(9))
    expected = auxiliary_loss(layer.routed)
    output = layer(inputs(9))
    assert layer.routed.routing is None, "it is kept twice"
    assert_close(auxiliary_loss(layer), expected)
    assert_close(output - layer.shared(inputs(9)), alone)
    assert layer.num_experts == 5
    routes = layer.eval().route(inputs(9))
    assert torch.equal(routes[:, :1], layer.routed.route(inputs(9)))
    assert (routes[:, 1] == 4).all()


def test_settings_reach_the_parts() -> None:
    layer = Shared(4, 4, 2, TREE)
    layer.routing_mode, layer.backend, layer.vectorized = "hard", "eager", True
    layer.anneal("inverse_temperature", 7.0)
    for part in (layer.shared, layer.routed):
        assert (part.routing_mode, part.backend, part.vectorized) == ("hard", "eager", True)
    assert layer.routed.get_buffer("inverse_temperature") == 7


@pytest.mark.parametrize("layer", [lambda i, o: nn.Linear(i, o), lambda i, o: FFF(i, o + 1, 1, 1)])
def test_mistakes(layer: partial[FeedforwardLayer]) -> None:
    with pytest.raises(ValueError, match="layer makes a"):
        Shared(4, 4, 2, layer)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_sized(depth: int) -> None:
    assert Shared.sized(6, 4, depth, 4).training_width == 2**depth * 4
