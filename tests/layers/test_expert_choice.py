"""Expert choice by its definition, arXiv 2202.09368, section 3.2, and by thresholds in evaluation."""

import math
from typing import Any

import pytest
import torch
from cases import IN, OUT, blocks_of, copy_block, inputs, randomized
from planted import clusters, dense_error, train
from tolerances import assert_all_close, assert_close, gradients
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fffexp.kernels import naive
from fffexp.layers import FF, ExpertChoiceMoE
from fffexp.routing.blocks import ExpertChoiceRouting, dropped_samples

EXPERTS, WIDTH, K = 5, 3, 2


def make(num_experts: int = EXPERTS, k: int = K, dtype: torch.dtype = torch.float64, **options: Any) -> ExpertChoiceMoE:
    layer: ExpertChoiceMoE = randomized(ExpertChoiceMoE(IN, OUT, num_experts, WIDTH, k, **options)).to(dtype)
    return layer


def trained(dtype: torch.dtype = torch.float64) -> ExpertChoiceMoE:
    layer = make(dtype=dtype)
    for seed in range(4):
        layer(inputs(60, seed=seed, dtype=dtype))
    return layer.eval()


def by_the_paper(layer: ExpertChoiceMoE, x: Tensor) -> Tensor:
    """One expert and one of its samples at a time."""
    weights = torch.softmax(x @ layer.gate_weight.T, dim=1)
    output, capacity = [x.new_zeros(OUT)] * len(x), math.ceil(len(x) * layer.top_k / layer.num_experts)
    for expert in range(layer.num_experts):
        for row in sorted(range(len(x)), key=lambda row: -weights[row, expert].item())[:capacity]:
            y = naive.block(x[row], expert, blocks_of(layer.experts), torch.relu)
            output[row] = output[row] + weights[row, expert] * y
    return torch.stack(output)


@pytest.mark.parametrize(("batch", "k"), [(1, 2), (3, 2), (63, 2), (257, 2), (63, 1), (63, 5)])
def test_training_equals_naive_with_every_gradient(batch: int, k: int) -> None:
    layer, x = make(k=k), inputs(batch, dtype=torch.float64)
    wanted = {"x": x.requires_grad_(), **dict(layer.named_parameters())}
    output, expected = layer(x), by_the_paper(layer, x)
    assert_close(output, expected)
    assert_all_close(gradients(output, wanted), gradients(expected, wanted))


@pytest.mark.parametrize("batch", [0, 1, 3, 63, 257])
def test_inference_equals_naive(batch: int) -> None:
    x = inputs(batch, seed=9, dtype=torch.float64)
    for layer in (trained(), make().eval()):
        expected = layer.forward_reference(x.requires_grad_())
        output = layer(x)
        assert_close(output, expected)
        if batch:
            wanted = {"x": x, **dict(layer.named_parameters())}
            assert_all_close(gradients(output, wanted), gradients(expected, wanted))
    single = trained(torch.float32)
    assert_close(single(x.float()), single.forward_reference(x))


def test_loads_are_equal_and_gates_learn() -> None:
    layer = make()
    layer(inputs(40, dtype=torch.float64)).square().sum().backward()
    assert int(layer.routing.taken_B.sum()) == 40 * K
    assert layer.gate_weight.grad is not None
    assert (layer.gate_weight.grad.abs().sum(1) > 0).all()


def test_a_sample_that_nobody_takes_gets_nothing() -> None:
    layer, x = make(k=1), inputs(50, dtype=torch.float64)
    output = layer(x)
    dropped = layer.routing.taken_B == 0
    assert dropped.any()
    assert not output[dropped].any()
    assert dropped_samples(layer.routing) == dropped.double().mean()
    assert dropped_samples(ExpertChoiceRouting(torch.ones(4, 2), torch.tensor([0, 1, 2, 1]))) == 0.25


def test_a_single_row_in_training_is_taken_by_all() -> None:
    layer = make()
    layer(inputs(1, dtype=torch.float64))
    assert layer.routing.taken_B.tolist() == [EXPERTS]


def test_training_looks_at_later_rows_and_evaluation_does_not() -> None:
    layer, x = make(), inputs(20, dtype=torch.float64)
    other = x.clone()
    other[10:] *= 3
    assert not torch.allclose(layer(x)[:10], layer(other)[:10])
    layer.eval()
    assert torch.equal(layer(x)[:10], layer(other)[:10])
    assert_close(torch.cat([layer(row) for row in x.split(1)]), layer(x))
    assert torch.equal(layer(x), layer(x))


def test_the_cutoff_is_the_smallest_weight_taken() -> None:
    layer, x = make(), inputs(40, dtype=torch.float64)
    layer(x)
    weights = torch.softmax(x @ layer.gate_weight.T, dim=1)
    assert torch.equal(layer.cutoff, weights.sort(dim=0, descending=True).values[40 * K // EXPERTS - 1])
    taken = layer.routing.taken_B
    training = layer(x)
    assert_close(layer.eval()(x), training)  # one batch: its cutoffs are those of all
    assert layer.route(x).shape == (40, int(taken.max()))


def test_no_other_expert_is_read_for_a_row_that_fewer_take() -> None:
    layer, x = trained(), inputs(200, dtype=torch.float64)
    weights = torch.softmax(x @ layer.gate_weight.T, dim=1)
    for row, weight in zip(layer.route(x), weights, strict=True):
        wanted = set((weight >= layer.cutoff).nonzero().flatten().tolist())
        assert set(row.tolist()) == wanted or (not wanted and len(set(row.tolist())) == 1)


def test_the_cutoff_forgets_and_a_checkpoint_counts_once() -> None:
    layer = make()
    for scale in [1.0] * 30 + [2.0] * 90:
        layer(scale * inputs(40, dtype=torch.float64))
    fresh = make()
    fresh(2 * inputs(40, dtype=torch.float64))
    assert (layer.cutoff - fresh.cutoff).abs().max() < 0.01
    layer = make()
    checkpoint(layer, inputs(9, dtype=torch.float64).requires_grad_(), use_reentrant=False).sum().backward()
    assert int(layer.batches) == 1


@pytest.mark.parametrize("training", [True, False])
def test_one_expert_is_a_dense_layer(training: bool) -> None:
    layer, x = make(num_experts=1, k=1).train(training), inputs(9, dtype=torch.float64)
    expected = copy_block(FF(IN, OUT, WIDTH).double(), layer.experts, 0)(x)
    assert_close(layer(x), expected)
    assert_close(layer.eval()(x), expected)


def test_recovers_planted_clusters_in_evaluation_too() -> None:
    torch.manual_seed(0)
    x, y, _ = clusters()
    layer = ExpertChoiceMoE(IN, OUT, 8, 8)
    error = train(layer, x, y)
    assert error < 0.06 < 0.08 < dense_error()
    with torch.no_grad():
        assert (layer.train()(x) - y).square().mean() == pytest.approx(error, rel=0.15)
