import math
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from cases import IN, OUT, Calls, blocks_of, copy_block, copy_dense, inputs, randomized
from tolerances import assert_all_close, assert_close, gradients
from torch import Tensor

from fffexp.kernels import naive
from fffexp.layers import FF, FFF

DEEP = 9  # deeper than the levels that one product decides (kernels/eager.py)


def make(depth: int = 3, leaf_width: int = 5, dtype: torch.dtype = torch.float64, **options: Any) -> FFF:
    return randomized(FFF(IN, OUT, depth, leaf_width, **options)).to(dtype)


def differentiable(layer: FFF, x: Tensor) -> dict[str, Tensor]:
    return {"x": x.requires_grad_(), **dict(layer.named_parameters())}


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4, DEEP])
def test_soft_equals_naive_with_every_gradient(depth: int) -> None:
    layer, x = make(depth), inputs(3, dtype=torch.float64)
    wanted = differentiable(layer, x)
    logits = x @ layer.node_weight.T + layer.node_bias
    expected = naive.fff_soft(x, logits, depth, blocks_of(layer.leaves), torch.relu)
    output = layer(x)
    assert_close(output, expected)
    assert_all_close(gradients(output, wanted), gradients(expected, wanted))
    layer.eval().routing_mode = "soft"
    assert_close(layer(x), expected)


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)  # on the compiled kernel the second
def test_detached_choices_give_the_input_no_gradient(dtype: torch.dtype, backend: str) -> None:
    layer, x = make(3, detach_router_input=True, dtype=dtype), inputs(40, dtype=dtype)
    layer.backend = backend
    wanted = differentiable(layer, x)
    logits = x.detach() @ layer.node_weight.T + layer.node_bias
    expected = naive.fff_soft(x, logits, 3, blocks_of(layer.leaves), torch.relu)
    output = layer(x)
    assert_close(output, expected)
    assert_all_close(gradients(output, wanted), gradients(expected, wanted))
    # nor from a loss of the choices
    layer.routing = None
    layer(x)
    loss = layer.aux_losses["hardening_mean"](layer.routing)
    grad_x, grad_nodes = torch.autograd.grad(loss, (x, layer.node_weight), materialize_grads=True)
    assert not grad_x.any()
    assert grad_nodes.any()


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4, DEEP])
def test_hard_equals_naive_with_every_gradient(depth: int) -> None:
    layer, x = make(depth).eval(), inputs(21, dtype=torch.float64)
    wanted = differentiable(layer, x)
    expected = naive.fff_hard(x, layer.node_weight, layer.node_bias, depth, blocks_of(layer.leaves), torch.relu)
    output = layer(x)
    assert_close(output, expected)
    assert_all_close(gradients(output, wanted), gradients(expected, wanted))
    layer.train().routing_mode = "hard"
    assert_close(layer(x), expected)
    leaves = torch.tensor([naive.fff_leaf(row, layer.node_weight, layer.node_bias, depth) for row in x])
    assert torch.equal(layer.routing.block_B, leaves)
    assert torch.equal(layer.route(x), leaves.unsqueeze(1))


@pytest.mark.parametrize("batch", [0, 1, 3, 63, 257])
def test_batches_that_fill_no_tile(batch: int) -> None:
    layer, x = make(dtype=torch.float32), inputs(batch)
    blocks = blocks_of(layer.leaves)
    logits = F.linear(x, layer.node_weight, layer.node_bias)
    assert_close(layer(x), naive.fff_soft(x, logits, 3, blocks, torch.relu))
    expected = naive.fff_hard(x, layer.node_weight, layer.node_bias, 3, blocks, torch.relu)
    assert_close(layer.eval()(x), expected)


@pytest.mark.parametrize("decisions", ["soft", "hard"])
@pytest.mark.parametrize("training", [True, False])
def test_depth_0_is_a_dense_layer(decisions: Literal["soft", "hard"], training: bool) -> None:
    layer, x = make(depth=0).train(training), inputs(5, dtype=torch.float64)
    layer.routing_mode = decisions
    ff = copy_block(FF(IN, OUT, width=5).double(), layer.leaves, 0)
    output = layer(x)
    assert_close(output, ff(x))
    theirs = gradients(ff(x), dict(ff.named_parameters()))
    ours = gradients(output, dict(layer.leaves.named_parameters()))
    assert_close(ours["hidden_weight"][0], theirs["network.0.weight"])
    assert_close(ours["output_bias"][0], theirs["network.3.bias"])


def test_zero_nodes_are_a_uniform_mixture() -> None:
    layer, x = make(depth=3), inputs(5, dtype=torch.float64)
    torch.nn.init.zeros_(layer.node_weight)
    torch.nn.init.zeros_(layer.node_bias)
    w1, b1, w2, b2 = blocks_of(layer.leaves)
    ff = FF(IN, OUT, width=layer.training_width).double()
    copy_dense(ff, w1.flatten(0, 1), b1.flatten(), w2.flatten(0, 1) / 8, b2.mean(0))
    assert_close(layer(x), ff(x))
    assert_close(layer.routing.weights_BG, torch.full((5, 8), 1 / 8))


def test_large_choice_scale_turns_soft_into_hard() -> None:
    layer, x = make(depth=4).eval(), inputs(50, dtype=torch.float64)
    hard = layer(x)
    layer.routing_mode = "soft"
    assert not torch.allclose(layer(x), hard, atol=0.01)
    layer.inverse_temperature.fill_(1e9)
    assert_close(layer(x), hard)


def test_choice_scale_multiplies_the_logits() -> None:
    layer, scaled, x = make(), make(), inputs(5, dtype=torch.float64)
    scaled.inverse_temperature.fill_(2.5)
    with torch.no_grad():
        layer.node_weight.mul_(2.5)
        layer.node_bias.mul_(2.5)
    assert_close(scaled(x), layer(x))
    assert_close(scaled.routing.entropy_BN, layer.routing.entropy_BN)


@pytest.mark.parametrize("decisions", ["soft", "hard"])
@pytest.mark.parametrize("region_leak", [0.0, 0.4])
def test_leaf_weights_sum_to_1(decisions: Literal["soft", "hard"], region_leak: float) -> None:
    layer = make(depth=4, region_leak=region_leak)
    layer.routing_mode = decisions
    layer(inputs(50, dtype=torch.float64))
    weights = layer.routing.weights_BG
    assert weights.shape == (50, 16)
    assert (weights >= 0).all()
    assert_close(weights.sum(1), torch.ones(50))


def test_regularisers_see_soft_weights_under_hard_decisions_too() -> None:
    soft, hard, x = make(), make(), inputs(9, dtype=torch.float64)
    hard.routing_mode = "hard"
    soft(x)
    hard(x)
    assert_close(hard.routing.weights_BG, soft.routing.weights_BG)


@pytest.mark.parametrize("depth", [1, 3, DEEP])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_ties_go_right(depth: int, zero: float) -> None:
    layer, x = make(depth), inputs(4, dtype=torch.float64)
    torch.nn.init.zeros_(layer.node_weight)
    torch.nn.init.constant_(layer.node_bias, zero)
    last = copy_block(FF(IN, OUT, width=5).double(), layer.leaves, 2**depth - 1)
    layer.routing_mode = "hard"
    assert_close(layer.train()(x), last(x))
    assert (layer.routing.block_B == 2**depth - 1).all()
    assert_close(layer.eval()(x), last(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [1, 4, DEEP])
def test_output_biases_survive_inference(dtype: torch.dtype, depth: int) -> None:
    layer, x = make(depth, dtype=dtype), inputs(64, dtype=dtype)
    torch.nn.init.normal_(layer.leaves.output_bias, std=2)
    layer.routing_mode = "hard"
    assert_close(layer.eval()(x), layer.train()(x))


def test_evaluation_reads_only_the_leaf_of_a_row() -> None:
    layer = make(depth=4).eval()
    for x in inputs(5, dtype=torch.float64):
        expected = layer(x)
        poisoned = make(depth=4).eval()
        others = torch.arange(16) != layer.route(x).item()
        with torch.no_grad():
            for parameter in poisoned.leaves.parameters():
                parameter[others] = math.nan
        assert torch.equal(poisoned(x), expected)


def test_straight_through_reaches_every_node_on_a_path() -> None:
    layer, x = make(depth=4), inputs(6, dtype=torch.float64)
    layer.routing_mode = "hard"
    found = gradients(layer(x), {"weight": layer.node_weight, "bias": layer.node_bias})
    on_a_path = set()
    for row in x:
        node = 15 + naive.fff_leaf(row, layer.node_weight, layer.node_bias, 4)
        while node:
            node = (node - 1) // 2
            on_a_path.add(node)
    assert 4 < len(on_a_path) < 15
    assert set(found["bias"].nonzero().flatten().tolist()) == on_a_path
    assert set(found["weight"].abs().sum(1).nonzero().flatten().tolist()) == on_a_path


def test_straight_through_gradient_of_one_node() -> None:
    layer, x = make(depth=1), inputs(1, dtype=torch.float64)
    layer.routing_mode = "hard"
    choice = torch.sigmoid(x @ layer.node_weight.T + layer.node_bias)
    left, right = (naive.block(x[0], i, blocks_of(layer.leaves), torch.relu) for i in (0, 1))
    found = torch.autograd.grad(layer(x).sum(), layer.node_bias)[0]
    # dy/dlogit = c (1 - c) (right - left)
    assert_close(found, (choice * (1 - choice))[0] * (right - left).sum())


@pytest.mark.parametrize("decisions", ["soft", "hard"])
def test_region_leak_swaps_each_choice_by_itself(decisions: Literal["soft", "hard"]) -> None:
    rows, leak = 20_000, 0.2
    layer, x = make(depth=2, leaf_width=1, region_leak=leak), inputs(rows, dtype=torch.float64)
    layer.routing_mode = decisions
    layer.inverse_temperature.fill_(1e9)  # every choice is 0 or 1
    output = layer(x)
    reached, home = layer.routing.weights_BG.argmax(1), layer.routing.block_B
    assert torch.equal(home, layer.route(x).flatten())  # where inference would go
    top = reached // 2 != home // 2
    low = (reached != home) & ~top
    # shares of the rows; 4 standard deviations of a share over 20,000 rows are at most 0.0142
    assert abs(top.double().mean() - leak) < 0.0142
    assert abs(low.double().mean() - leak * (1 - leak)) < 0.0142
    expected = torch.stack([naive.block(x[i], int(reached[i]), blocks_of(layer.leaves), torch.relu) for i in range(9)])
    assert_close(output[:9], expected)


def test_region_leak_is_off_in_evaluation() -> None:
    x = inputs(50, dtype=torch.float64)
    for decisions in ("soft", "hard"):
        layer, plain = make(region_leak=0.5).eval(), make().eval()
        layer.routing_mode = plain.routing_mode = decisions
        assert torch.equal(layer(x), plain(x))


def test_region_leak_leaves_entropy_alone() -> None:
    leaking, plain, x = make(region_leak=0.5), make(), inputs(50, dtype=torch.float64)
    assert not torch.allclose(leaking(x), plain(x))
    assert_close(leaking.routing.entropy_BN, plain.routing.entropy_BN)


def test_cost_of_inference_does_not_grow_with_the_leaves() -> None:
    def operators(depth: int) -> int:
        layer, x = make(depth, dtype=torch.float32).eval(), inputs(1)
        with torch.no_grad(), torch.profiler.profile() as profile:
            layer(x)
        return sum(event.name.startswith("aten::") for event in profile.events())

    operators(1)
    assert operators(8) < 2 * operators(4)  # 256 leaves and 16, those inside of other operators counted


@pytest.mark.parametrize("decisions", ["soft", "hard"])
def test_training_keeps_no_tensor_of_batch_leaves_outputs(decisions: Literal["soft", "hard"]) -> None:
    # (batch, leaves, outputs) would be eight times the bound
    batch, outputs, layer = 64, 40, randomized(FFF(IN, 40, depth=5, leaf_width=2))
    layer.routing_mode = decisions
    with Calls() as calls:
        layer(inputs(batch)).sum().backward()
    assert batch * layer.training_width <= calls.largest <= batch * max(layer.training_width, IN, outputs)


def test_too_deep_names_the_memory_and_what_to_lower() -> None:
    with pytest.raises(ValueError, match=r"weights would take [\d,.]+ GiB .*: lower depth \(it is 50\)"):
        FFF(IN, OUT, depth=50, leaf_width=1)
    with pytest.raises(ValueError, match=r"region_leak is 1\.2"):
        FFF(IN, OUT, depth=1, leaf_width=1, region_leak=1.2)


def test_absurdly_deep_is_refused_as_well() -> None:
    with pytest.raises(ValueError, match="lower depth"):
        FFF(IN, OUT, depth=2000, leaf_width=1)


@pytest.mark.parametrize(
    ("depth", "leaf_width", "training_size", "inference_size"),
    [(2, 32, 131, 34), (3, 16, 135, 19), (4, 8, 143, 12), (5, 4, 159, 9), (6, 2, 191, 8), (7, 1, 255, 8)],
)
def test_sizes_of_the_paper(depth: int, leaf_width: int, training_size: int, inference_size: int) -> None:
    # arXiv 2308.14711, table 3
    layer = FFF(128, 128, depth, leaf_width)
    assert (layer.training_width, layer.training_size) == (128, training_size)
    assert (layer.inference_width, layer.inference_size) == (leaf_width, inference_size)


@pytest.mark.parametrize("depth", [1, 3])
def test_equals_the_reference_package(depth: int) -> None:
    reference = pytest.importorskip("fastfeedforward")
    layer, x = make(depth, dtype=torch.float32), inputs(20)
    theirs = reference.FFF(IN, 5, OUT, depth, activation=torch.nn.ReLU())
    with torch.no_grad():
        theirs.node_weights.copy_(layer.node_weight)
        theirs.node_biases.copy_(layer.node_bias.unsqueeze(1))
        theirs.w1s.copy_(layer.leaves.hidden_weight.mT)
        theirs.b1s.copy_(layer.leaves.hidden_bias)
        theirs.w2s.copy_(layer.leaves.output_weight)
        theirs.b2s.copy_(layer.leaves.output_bias)
    expected, entropies = theirs(x, return_entropies=True)
    output = layer(x)
    assert_close(output, expected)
    assert_close(layer.routing.entropy_BN.mean(0), entropies)
    # at inference it forgets the output biases
    bias = layer.leaves.output_bias[layer.route(x).flatten()]
    assert_close(layer.eval()(x), theirs.eval()(x) + bias)
