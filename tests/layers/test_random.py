"""Under torch.vmap over stacked seeds each seed gets the random numbers that it gets alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch.func import functional_call

from fffexp.layers import FF, FFF, PEER, ExpertChoiceMoE, Forest, NoisyTopKMoE, SigmoidMoE, SparseFF, SwitchMoE
from fffexp.layers.random import Dropout, normal_like, seed_generators, uniform_like
from fffexp.models import ViT

SEEDS = (3, 11, 42)
IMAGE = (1, 8, 8)


def alone(module: nn.Module, x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    output: Tensor = module(x)
    return output


def stacked(modules: list[nn.Module], x: Tensor) -> Tensor:
    """All modules in one pass of torch.vmap."""
    names = [name for name, _ in modules[0].named_parameters()]
    weights = {name: torch.stack([m.get_parameter(name).detach() for m in modules]) for name in names}
    with seed_generators([torch.Generator().manual_seed(seed) for seed in SEEDS]):
        output: Tensor = torch.vmap(partial(functional_call, modules[0]), randomness="error")(weights, (x,))
    return output


@pytest.mark.parametrize(
    "make",
    [
        partial(FF, width=9, dropout=0.4),
        partial(FFF, depth=2, leaf_width=3, region_leak=0.3),
        partial(FFF, depth=2, leaf_width=3, region_leak=0.3, dropout=0.4),
        partial(Forest, trees=2, depth=2, leaf_width=3, master_width=3, dropout=0.4),
        partial(NoisyTopKMoE, num_experts=4, expert_width=3),
        partial(NoisyTopKMoE, num_experts=4, expert_width=3, top_k=4),
        partial(SwitchMoE, num_experts=4, expert_width=3),
        partial(SparseFF, width=9, dropout=0.4),
    ],
)
@pytest.mark.parametrize("routing_mode", ["soft", "hard"])
def test_a_layer(make: Callable[..., Any], routing_mode: str) -> None:
    layers = [make(16, 8) for _ in SEEDS]
    x = torch.randn(len(SEEDS), 20, 16)
    for layer in layers:
        assert layer.vectorizable
        layer.routing_mode, layer.vectorized = routing_mode, True
    for training in (True, False):
        for layer in layers:
            layer.train(training)
        together = stacked(layers, x)
        for index, seed in enumerate(SEEDS):
            assert_close(together[index], alone(layers[index], x[index], seed))


def test_a_vision_transformer() -> None:
    layer = partial(NoisyTopKMoE, num_experts=4, expert_width=3)
    networks = [ViT(layer, IMAGE, 3, features=16, heads=2, num_blocks=2, input_dropout=0.3) for _ in SEEDS]
    for network in networks:
        for block in network.blocks:
            block.layer.vectorized = True
    x = torch.randn(len(SEEDS), 5, *IMAGE)
    together = stacked(list(networks), x)
    for index, seed in enumerate(SEEDS):
        assert_close(together[index], alone(networks[index], x[index], seed))


def test_vectorized_is_another_way_to_the_same_result() -> None:
    x = torch.randn(20, 16)
    for layer in (FFF(16, 8, 3, 2, region_leak=0.2), NoisyTopKMoE(16, 8, 4, 3), SwitchMoE(16, 8, 4, 3)):
        for training in (True, False):
            layer.train(training).vectorized = False
            expected = alone(layer, x, 1)
            layer.vectorized = True
            assert_close(alone(layer, x, 1), expected)


def test_sparse_gradients_have_no_seed_axis() -> None:
    assert not FFF(16, 8, 3, 2, trained="chosen_leaf").vectorizable
    # their buffers follow the batches of one seed
    assert not SigmoidMoE(16, 8, 4, 3).vectorizable
    assert not ExpertChoiceMoE(16, 8, 4, 3).vectorizable
    assert not PEER(16, 8, 16).vectorizable


@pytest.mark.parametrize("draw", [normal_like, uniform_like])
def test_without_vmap_numbers_are_those_of_torch(draw: Callable[[Tensor], Tensor]) -> None:
    like = torch.empty(40, 3).T
    torch.manual_seed(5)
    drawn = draw(like)
    torch.manual_seed(5)
    assert torch.equal(drawn, (torch.randn if draw is normal_like else torch.rand)(3, 40))


def test_dropout_is_that_of_torch() -> None:
    ours, theirs, x = Dropout(0.3), nn.Dropout(0.3), torch.randn(100, 30)
    assert isinstance(ours, nn.Dropout)
    assert torch.equal(alone(ours, x, 1), alone(theirs, x, 1))
    assert torch.equal(ours.eval()(x), x)
    ours.train()
    with seed_generators([torch.Generator().manual_seed(1)]):
        one = torch.vmap(ours, randomness="error")(x.unsqueeze(0))
    assert torch.equal(one[0], alone(theirs, x, 1))
    kept = torch.vmap(ours, randomness="different")(x.repeat(2, 1, 1)) != 0  # as torch draws without generators
    assert not torch.equal(kept[0], kept[1])


def test_dropout_compiles_and_exports() -> None:
    ours, x = nn.Sequential(Dropout(0.3)), torch.randn(100, 30)
    compiled: Any = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert torch.equal(alone(compiled, x, 1), alone(ours, x, 1))
    exported = torch.export.export(ours.eval(), (x,)).module()
    assert torch.equal(exported(x), x)


def test_gradients_pass_dropout_and_stop_at_noise() -> None:
    x = torch.ones(2, 10, requires_grad=True)
    with seed_generators([torch.Generator().manual_seed(seed) for seed in (1, 2)]):
        dropped = torch.vmap(Dropout(0.5))(x)
        noise = torch.vmap(normal_like)(x)
    assert not noise.requires_grad
    dropped.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, dropped)  # the mask


def test_there_is_a_generator_for_each_seed() -> None:
    with (
        seed_generators([torch.Generator()]),
        pytest.raises(ValueError, match=r"1 seed generators for 2 rows of torch\.vmap"),
    ):
        torch.vmap(normal_like)(torch.ones(2, 3))
