"""The sigmoid gate by its definition, arXiv 2412.19437 (equations 13 to 16) and 2408.15664 (algorithm 1)."""

import copy
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
from fffexp.layers import FF, SigmoidMoE
from fffexp.routing.blocks import GateRouting, max_violation

EXPERTS, WIDTH, K = 5, 3, 2
BIASES = (3, -2, 0, 5, -1)


def make(num_experts: int = EXPERTS, k: int = K, dtype: torch.dtype = torch.float64, **options: Any) -> SigmoidMoE:
    layer: SigmoidMoE = randomized(SigmoidMoE(IN, OUT, num_experts, WIDTH, k, **options)).to(dtype)
    layer.bias_moves.copy_(torch.tensor((BIASES * 9)[:num_experts]))
    return layer


def expected_of(layer: SigmoidMoE, x: Tensor) -> Tensor:
    logits = x @ layer.gate_weight.T
    return naive.sigmoid_moe(x, logits, layer.bias.to(x.dtype), layer.top_k, blocks_of(layer.experts), torch.relu)


@pytest.mark.parametrize("batch", [0, 1, 3, 63, 257])
@pytest.mark.parametrize("training", [True, False])
def test_equals_naive_with_every_gradient(training: bool, batch: int) -> None:
    layer, x = make(bias_update_rate=0.1).train(training), inputs(batch, dtype=torch.float64)
    wanted = {"x": x.requires_grad_(), **dict(layer.named_parameters())}
    expected, output = expected_of(layer, x), layer(x)
    assert_close(output, expected)
    if batch:
        assert_all_close(gradients(output, wanted), gradients(expected, wanted))
    assert_close(make(bias_update_rate=0.1, dtype=torch.float32).eval()(x.float()), expected)


@pytest.mark.parametrize("k", range(1, EXPERTS + 1))
def test_equals_naive_for_each_k(k: int) -> None:
    layer, x = make(k=k, trainable=k > 1), inputs(9, dtype=torch.float64)
    for training in (True, False):
        assert_close(layer.train(training)(x), expected_of(layer, x))


def test_the_definition_by_hand() -> None:
    layer, x = make(bias_update_rate=0.1).eval(), inputs(1, dtype=torch.float64)
    scores = 1 / (1 + torch.exp(-(layer.gate_weight @ x[0])))
    biased = [score.item() + 0.1 * move for score, move in zip(scores, BIASES, strict=True)]
    first, second = sorted(range(EXPERTS), key=lambda e: -biased[e])[:2]
    outputs = [naive.block(x[0], e, blocks_of(layer.experts), torch.relu) for e in (first, second)]
    a, b = scores[first], scores[second]
    assert_close(layer(x)[0], (a * outputs[0] + b * outputs[1]) / (a + b))
    assert layer.route(x).tolist() == [[first, second]]


def test_the_bias_chooses_and_does_not_weigh() -> None:
    layer, x = make(k=EXPERTS).eval(), inputs(9, dtype=torch.float64)
    before = layer(x)
    layer.bias_moves += torch.tensor([1000, 0, -1000, 70, 7])
    assert_close(layer(x), before)  # all are chosen whatever the biases
    layer = make(bias_update_rate=1.0).eval()
    layer.bias_moves.copy_(torch.tensor([0, 0, 9, 0, 9]))
    assert set(layer.route(x).flatten().tolist()) == {2, 4}


@pytest.mark.parametrize("training", [True, False])
def test_one_expert_is_a_dense_layer(training: bool) -> None:
    layer, x = make(num_experts=1, k=1).train(training), inputs(9, dtype=torch.float64)
    assert_close(layer(x), copy_block(FF(IN, OUT, WIDTH).double(), layer.experts, 0)(x))
    layer.check_trainable()


def test_a_single_chosen_expert_does_not_train_the_gate() -> None:
    for layer in (make(k=1), make(k=1, trainable=False)):
        with pytest.raises(ValueError, match=r"top_k is 1: .*SwitchMoE"):
            layer.check_trainable()
    with pytest.raises(ValueError, match=r"top_k is 1"):
        make(k=1)(inputs(3))
    make(k=1, trainable=False)(inputs(3))
    with pytest.raises(ValueError, match="bias_update_rate is -1; it must be at least 0"):
        make(bias_update_rate=-1)


def test_scores_that_underflow_still_weigh() -> None:
    layer, x = make(dtype=torch.float32), inputs(9)
    with torch.no_grad():
        layer.gate_weight.copy_(-1e4 * x.abs().mean(0).sign() * layer.gate_weight.abs())
    output = layer(x.abs())
    output.sum().backward()
    assert output.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert_close(layer.routing.weights_BG.sum(1), torch.ones(9))


def step(layer: SigmoidMoE, *batches: Tensor) -> None:
    """An optimizer step after several passes."""
    optimizer = torch.optim.SGD([layer.gate_weight], lr=1e-6)
    for x in batches:
        layer(x).square().sum().backward()
    optimizer.step()


def loads(layer: SigmoidMoE, x: Tensor) -> Tensor:
    return torch.bincount(layer.route(x).flatten(), minlength=layer.num_experts)


def test_biases_move_against_the_load_of_the_step_before() -> None:
    layer = make()
    layer.bias_moves.zero_()
    x = inputs(40, dtype=torch.float64)
    load = loads(layer, x)
    mean = 40 * K / EXPERTS
    assert (load != mean).any()
    step(layer, x)
    assert not layer.bias_moves.any(), "the step itself uses the biases it began with"
    layer(inputs(3, dtype=torch.float64))
    assert layer.bias_moves.tolist() == [int(math.copysign(1, mean - n)) if n != mean else 0 for n in load]


def test_even_and_empty_loads_move_nothing() -> None:
    layer = make(k=EXPERTS)  # all are chosen
    step(layer, inputs(8, dtype=torch.float64))
    step(layer, inputs(0, dtype=torch.float64))
    step(layer, inputs(0, dtype=torch.float64))
    assert layer.bias_moves.tolist() == list(BIASES)


def test_micro_batches_are_one_step() -> None:
    whole, parts = make(), make()
    x = inputs(40, dtype=torch.float64)
    for _ in range(3):
        step(whole, x)
        step(parts, *x.split(7))
    for layer in (whole, parts):
        layer(x)
    assert parts.bias_moves.tolist() == whole.bias_moves.tolist() != list(BIASES)


def test_nothing_moves_without_a_step_or_in_evaluation() -> None:
    layer, x = make(), inputs(40, dtype=torch.float64)
    for _ in range(3):
        layer(x)
    step(layer, x)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert layer.bias_moves.tolist() == list(BIASES)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_takes_the_same_experts_again(reentrant: bool) -> None:
    plain, layer = make(), make()
    for _ in range(4):
        for each in (plain, layer):
            x = inputs(40, dtype=torch.float64).requires_grad_()
            output = checkpoint(each, x, use_reentrant=reentrant) if each is layer else each(x)
            each.zero_grad()
            output.square().sum().backward()
            torch.optim.SGD([each.gate_weight], lr=1e-6).step()
        assert torch.equal(layer.load, plain.load)
        assert_all_close(
            {name: p.grad for name, p in layer.named_parameters() if p.grad is not None},
            {name: p.grad for name, p in plain.named_parameters() if p.grad is not None},
        )
    assert layer.bias_moves.tolist() == plain.bias_moves.tolist() != list(BIASES)


def test_compiled_steps_move_alike() -> None:
    plain, layer = make(), make()
    forward = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = inputs(40, dtype=torch.float64)
        for each, call in ((plain, plain), (layer, forward)):
            each.zero_grad()
            call(x).square().sum().backward()
            torch.optim.SGD([each.gate_weight], lr=1e-6).step()
    assert layer.bias_moves.tolist() == plain.bias_moves.tolist() != list(BIASES)


def test_training_goes_on_from_a_state_dict() -> None:
    layer, x = make(), inputs(40, dtype=torch.float64)
    step(layer, x)
    resumed = SigmoidMoE(IN, OUT, EXPERTS, WIDTH, K, dtype=torch.float64)
    resumed.load_state_dict(copy.deepcopy(layer.state_dict()))
    for each in (layer, resumed):
        step(each, x)
        each(x)
    assert torch.equal(resumed.bias_moves, layer.bias_moves)
    assert torch.equal(resumed.load, layer.load)


def test_a_low_precision_rounds_no_bias() -> None:
    layer = make(dtype=torch.bfloat16)
    layer.bias_moves.fill_(1001)
    layer.to(torch.bfloat16)
    assert_close(layer.bias, torch.full((EXPERTS,), 1.001))


def test_loads_become_even_on_skewed_data() -> None:
    torch.manual_seed(0)
    layer = SigmoidMoE(IN, OUT, 8, WIDTH, bias_update_rate=0.005)
    x = inputs(512) + 2.0  # the gate prefers a few experts for all of it
    layer(x)
    before = float(max_violation(layer.routing))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-6)
    for _ in range(250):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    layer(x)
    assert before > 2
    assert max_violation(layer.routing) < 0.15


def test_violation() -> None:
    load = torch.tensor([1.0, 2.0, 6.0])  # mean 3
    assert max_violation(GateRouting(load, load)) == 1
    assert max_violation(GateRouting(load, torch.zeros(3))) == 0


def test_recovers_planted_clusters() -> None:
    torch.manual_seed(0)
    x, y, cluster = clusters()
    layer = SigmoidMoE(IN, OUT, 8, 8, bias_update_rate=0.003)
    assert train(layer, x, y) < 0.06 < 0.08 < dense_error()
    layer(x)
    counts = torch.stack([loads(layer, x[cluster == c]) for c in range(4)])
    assert (counts.max(0).values / counts.sum(0)).mean() > 0.7, "experts do not keep to a cluster"
