"""Losses and hardening in a training loop of one's own."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fffexp import FF, FFF, NoisyTopKMoE, SwitchMoE, anneal, auxiliary_loss


def layers() -> Any:  # a Sequential of layers
    torch.manual_seed(0)
    return nn.Sequential(FFF(6, 6, 2, 3), FF(6, 6, 5), NoisyTopKMoE(6, 6, 4, 2), SwitchMoE(6, 6, 4, 2))


def test_the_loss_is_the_sum_over_the_layers() -> None:
    model = layers().train()
    model(torch.randn(20, 6))
    tree, _, moe, switch = model
    expected = sum(
        coefficient * layer.aux_losses[name](layer.routing)
        for layer, name, coefficient in (
            (tree, "importance", 0.1), (moe, "importance", 0.1), (switch, "load_balance", 0.3),
        )
    )  # fmt: skip
    found = auxiliary_loss(model)
    assert found.item() == pytest.approx(expected.item())
    found.backward()
    assert tree.node_weight.grad.abs().sum() > 0


def test_coefficients_can_be_given() -> None:
    model = layers().train()
    model(torch.randn(20, 6))
    entropy = model[0].aux_losses["hardening_mean"](model[0].routing).item()
    assert auxiliary_loss(model, {"hardening_mean": 3.0}).item() == pytest.approx(3 * entropy)
    model(torch.randn(20, 6))  # the last pass has been let go of
    assert auxiliary_loss(model, {}).item() == 0


def test_a_copy_can_be_made_between_steps() -> None:
    model = layers().train()
    model(torch.randn(20, 6))
    auxiliary_loss(model).backward()
    assert all(layer.routing is None for layer in model)
    copy.deepcopy(model)


def test_mistakes_in_the_loop() -> None:
    model = layers().train()
    with pytest.raises(RuntimeError, match="no layer made a training pass"):
        auxiliary_loss(model)
    model(torch.randn(20, 6))
    with pytest.raises(ValueError, match="no layer has the auxiliary loss entropy; there are: hardening_mean"):
        auxiliary_loss(model, {"entropy": 1.0})
    with pytest.raises(ValueError, match="Linear has no layer of fffexp"):
        auxiliary_loss(nn.Linear(2, 2))


@pytest.mark.parametrize("progress", [2, -0.1, float("nan")])
def test_progress_is_a_share_of_the_training(progress: float) -> None:
    model = layers()
    with pytest.raises(ValueError, match=r"progress is .*; it must be between 0 and 1"):
        anneal(model, progress)
    assert model[0].inverse_temperature == 1


def test_a_model_to_harden_has_layers() -> None:
    anneal(nn.Sequential(FF(6, 6, 5)), 0.5)  # one that has no choices is a layer too
    with pytest.raises(ValueError, match="Linear has no layer of fffexp"):
        anneal(nn.Linear(2, 2), 0.5)


def test_a_layer_that_was_left_out_is_no_mistake() -> None:
    model = layers().train()
    model[0](torch.randn(20, 6))
    assert auxiliary_loss(model).item() > 0


def test_trees_harden() -> None:
    model = layers().eval()
    x = torch.randn(50, 6)
    model[0].routing_mode = "soft"
    gaps = []
    for progress in (0.0, 0.5, 1.0):
        anneal(model, progress)
        soft = model[0](x)
        model[0].routing_mode = "hard"
        gaps.append((soft - model[0](x)).abs().mean().item())
        model[0].routing_mode = "soft"
    assert model[0].inverse_temperature.item() == pytest.approx(300)
    assert gaps[0] > gaps[1] > gaps[2]


def test_a_shared_layer_counts_once_with_all_its_passes() -> None:
    torch.manual_seed(0)
    layer = FFF(6, 6, 2, 3)
    model = nn.Sequential(nn.Sequential(layer), layer)
    model(torch.randn(20, 6))
    assert len(layer.routings) == 2
    expected = 0.1 * sum(layer.aux_losses["importance"](routing) for routing in layer.routings)
    assert auxiliary_loss(model).item() == pytest.approx(expected.item())
