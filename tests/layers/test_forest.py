"""Parallel trees and a master leaf against the sum of their parts."""

from functools import partial

import pytest
import torch
from torch import nn

from fffexp.adapt.replace import replace_feedforward
from fffexp.layers import Forest, feedforward_layers
from fffexp.models import ViT
from fffexp.training.classification import ClassificationTask

IMAGE = (1, 8, 12)


@pytest.mark.parametrize("master_width", [0, 5])
def test_a_forest_is_the_sum_of_its_parts(master_width: int) -> None:
    forest = Forest(16, 12, trees=3, depth=2, leaf_width=4, master_width=master_width)
    parts = [*forest.trees, *([forest.master] if forest.master else [])]
    assert len(parts) == 3 + bool(master_width)
    x = torch.randn(2, 5, 16)
    for mode in (True, False):
        forest.train(mode)
        assert torch.allclose(forest(x), sum(part(x) for part in parts), atol=1e-6)
        for part in parts:
            part.routing = None


def test_a_task_trains_the_parts_of_a_forest() -> None:
    torch.manual_seed(0)
    forest = partial(Forest, trees=2, depth=2, leaf_width=4, master_width=3)
    network = partial(ViT, features=16, heads=2, num_blocks=1, input_dropout=0.0)
    task = ClassificationTask(forest, IMAGE, 3, network=network, aux_weights={"importance": 0.1})
    (layer,) = task.layers.values()
    assert layer.inference_size == 2 * (2 + 4) + 3
    batch = torch.randn(4, *IMAGE), torch.arange(4) % 3
    plain = task.training_step(batch, 0)
    task.on_after_backward()
    task.aux_weights = {"importance": 1.0}
    loss = task.training_step(batch, 0)
    importance = sum(layer.trees[0].aux_losses["importance"](routing) for routing in layer.routing)
    assert float((loss - plain).detach()) == pytest.approx(float(importance), rel=1e-3)
    loss.backward()
    assert all(p.grad is not None for p in task.parameters())


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="trees is 0"):
        Forest(4, 4, trees=0, depth=1, leaf_width=1)
    with pytest.raises(ValueError, match="master_width is -1"):
        Forest(4, 4, trees=1, depth=1, leaf_width=1, master_width=-1)


def test_takes_the_place_of_an_mlp() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    (replaced,) = replace_feedforward(model, partial(Forest, trees=2, depth=1, leaf_width=1))
    assert feedforward_layers(model) == {"0": replaced.new}
    assert replaced.new.inference_size == 2 * (1 + 1)


def test_settings_reach_the_parts() -> None:
    forest = Forest(4, 4, trees=2, depth=1, leaf_width=1, master_width=1)
    forest.routing_mode, forest.backend, forest.vectorized = "hard", "eager", True
    forest.anneal("inverse_temperature", 7.0)
    for part in [*forest.trees, forest.master]:
        assert (part.routing_mode, part.backend, part.vectorized) == ("hard", "eager", True)
    assert all(tree.inverse_temperature == 7 for tree in forest.trees)


def test_a_leaf_has_one_number_among_all_trees() -> None:
    forest = Forest(4, 4, trees=2, depth=2, leaf_width=1, master_width=3).eval()
    x = torch.randn(50, 4)
    routes = forest.route(x)
    assert torch.equal(routes[:, 0], forest.trees[0].route(x).squeeze(1))
    assert torch.equal(routes[:, 1], forest.trees[1].route(x).squeeze(1) + 4)
    assert (routes[:, 2] == 8).all()
    assert forest.num_experts == 9
