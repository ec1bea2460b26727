from typing import Any, Literal

import pytest
import torch
from cases import inputs, randomized

from fffexp import FFF, LazyAdamW

OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def test_dense_gradients_are_those_of_adamw() -> None:
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3)) for _ in range(2))
    optimizers = LazyAdamW([ours], **OPTIONS), torch.optim.AdamW([theirs], **OPTIONS)
    for step in range(5):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = torch.sin(torch.arange(12.0) + step).view(4, 3)
            optimizer.step()
        torch.testing.assert_close(ours, theirs)


def test_sparse_gradients_are_those_of_sparse_adam() -> None:
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 24).view(4, 3, 2)) for _ in range(2))
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}
    optimizers = LazyAdamW([ours], **options), torch.optim.SparseAdam([theirs], **options)
    for step in range(5):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            values = torch.sin(torch.arange(18.0) + step).view(3, 3, 2)
            # a row twice: they add up
            parameter.grad = torch.sparse_coo_tensor(torch.tensor([[step % 4, 2, 2]]), values, (4, 3, 2))
            optimizer.step()
        # torch's adds eps before the correction of the second moment
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_rows_without_gradient_are_left_alone() -> None:
    parameter = torch.nn.Parameter(torch.ones(5, 2))
    optimizer = LazyAdamW([parameter], **OPTIONS)
    parameter.grad = torch.sparse_coo_tensor(torch.tensor([[1, 3]]), torch.ones(2, 2), (5, 2))
    optimizer.step()
    moved = (parameter != 1).all(1)
    assert moved.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("mode", ["chosen_leaf", "chosen_path"])
def test_trains_a_sparse_layer(mode: Literal["chosen_leaf", "chosen_path"]) -> None:
    layer = randomized(FFF(6, 4, 3, 8, trained=mode))
    x = inputs(64)
    target = torch.sin(x[:, :4] * 2)
    optimizer = LazyAdamW(layer.parameters(), lr=0.01)
    nodes = layer.node_weight.detach().clone()
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(layer.node_weight, nodes) == (mode == "chosen_leaf")


def test_state_survives_saving() -> None:
    parameter = torch.nn.Parameter(torch.ones(5, 2))
    optimizer = LazyAdamW([parameter], **OPTIONS)
    parameter.grad = torch.ones(5, 2)
    optimizer.step()
    other = LazyAdamW([parameter], **OPTIONS)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[parameter]["step"] == 1


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -0.1}, {"betas": (1.0, 0.9)}])
def test_mistakes_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LazyAdamW([torch.nn.Parameter(torch.ones(1))], **wrong)
