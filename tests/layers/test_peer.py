"""Product-key experts by their definition, arXiv 2407.04153, section 2."""

import math
from typing import Any

import pytest
import torch
from cases import IN, OUT, Calls, copy_dense, inputs, product_forms, randomized
from planted import clusters, dense_error, train
from tolerances import assert_all_close, assert_close, gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fffexp.kernels import naive, operators
from fffexp.layers import FF, PEER
from fffexp.routing.retrieval import RetrievalRouting, product_top_k, unevenness

SIZES = {"num_experts": 18, "top_k": 3, "heads": 2, "query_width": 4}


def make(dtype: torch.dtype = torch.float64, **options: Any) -> PEER:
    layer: PEER = randomized(PEER(IN, OUT, **SIZES | options)).to(dtype)
    torch.manual_seed(1)
    layer.running_mean.normal_(0, 0.3)
    layer.running_var.uniform_(0.5, 2)
    return layer


def expected_of(layer: PEER, x: Tensor, by_batch: bool) -> Tensor:
    query = x @ layer.query_weight.T
    norm = nn.BatchNorm1d(query.shape[1], dtype=x.dtype)  # torch's own
    with torch.no_grad():
        for name in ("running_mean", "running_var"):
            getattr(norm, name).copy_(getattr(layer, name))
    training = by_batch and len(x) > 1
    query = torch.nn.functional.batch_norm(
        query, norm.running_mean, norm.running_var, layer.norm_weight, layer.norm_bias, training
    )
    keys = layer.first_keys, layer.second_keys
    query = query.unflatten(1, (layer.heads, -1))
    return naive.peer(x, query, keys, layer.top_k, layer.hidden_weight, layer.output_weight, layer.hidden[0])


@pytest.mark.parametrize("batch", [0, 1, 3, 63, 257])
@pytest.mark.parametrize("training", [True, False])
def test_equals_naive_with_every_gradient(training: bool, batch: int) -> None:
    layer, x = make(activation="gelu").train(training), inputs(batch, dtype=torch.float64)
    wanted = {"x": x.requires_grad_(), **dict(layer.named_parameters())}
    expected, output = expected_of(layer, x, training), layer(x)
    assert_close(output, expected)
    if batch:
        assert_all_close(gradients(output, wanted), gradients(expected, wanted))


@pytest.mark.parametrize("options", [{"num_experts": 16}, {"top_k": 1}, {"heads": 1, "top_k": 18}, {"query_width": 2}])
def test_other_sizes(options: Any) -> None:
    layer, x = make(**options), inputs(30, dtype=torch.float64)
    for training in (True, False):
        assert_close(layer.train(training)(x), expected_of(layer, x, training))


def test_a_large_batch_in_single_precision() -> None:
    layer, x = make(torch.float32).eval(), inputs(257)
    assert_close(layer(x), layer.forward_reference(x))


def test_the_backend_is_the_one_that_runs() -> None:
    layer, x = make(torch.float32), inputs(9)
    flags = {"auto": operators.available(), "eager": False} | ({"native": True} if operators.available() else {})
    for backend, compiled in flags.items():
        layer.backend = backend
        assert layer.eval().inference_backend() == ("native" if compiled else "eager")
        assert product_forms(layer, x) == {compiled}
        assert layer.train().training_backend(x) == ("native" if operators.available() else "eager")
        assert product_forms(layer, x) == {operators.available()}
    layer.backend = "triton"
    with pytest.raises(ValueError, match=r"backend is 'triton', which does not serve torch.float32 on cpu here"):
        layer.eval()(x)
    layer = make().eval()
    assert layer.inference_backend() == layer.training_backend(x) == "eager"
    layer.backend = "native"
    with pytest.raises(ValueError, match=r"'native', which does not serve torch.float64"):
        layer(x)


def test_an_activation_may_return_another_type() -> None:
    class Lower(nn.Module):  # as torch.nn.PReLU under autocast on CUDA
        def forward(self, z: Tensor) -> Tensor:
            return torch.relu(z).bfloat16()

    x = inputs(9)
    lower, plain = make(torch.float32, activation=Lower()).eval(), make(torch.float32).eval()
    output = lower(x)
    assert output.dtype == torch.float32
    assert (output - plain(x)).abs().max() < 0.02
    output.sum().backward()


def test_the_definition_by_hand() -> None:
    layer, x = make(heads=1, top_k=1).eval(), inputs(1, dtype=torch.float64)
    query = (layer.query_weight @ x[0] - layer.running_mean) / torch.sqrt(layer.running_var + 1e-5)
    query = query * layer.norm_weight + layer.norm_bias
    first, second = (
        int((keys @ part).argmax()) for keys, part in ((layer.first_keys, query[:2]), (layer.second_keys, query[2:]))
    )
    expert = 6 * first + second
    assert layer.route(x).tolist() == [[expert]]
    assert_close(layer(x)[0], torch.relu(layer.hidden_weight[expert] @ x[0]) * layer.output_weight[expert])


def test_all_pairs_are_among_the_best_of_the_halves() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(20, 2, 4, generator=generator), torch.randn(20, 2, 8, generator=generator)
    pairs = (first.unsqueeze(3) + second.unsqueeze(2)).flatten(2)
    for k in (1, 3, 7, 32):
        values, index = product_top_k(first, second, k)
        assert_close(values, pairs.topk(k, dim=2).values)
        assert torch.equal(pairs.gather(2, index), values)


def test_running_means_are_those_of_torch() -> None:
    layer, norm = make(torch.float32), nn.BatchNorm1d(8)
    norm.running_mean, norm.running_var = layer.running_mean.clone(), layer.running_var.clone()
    for seed in range(3):
        x = inputs(9, seed=seed)
        checkpoint(layer, x.requires_grad_(), use_reentrant=False).sum().backward()  # which computes it twice
        norm(x @ layer.query_weight.T)
    assert_close(layer.running_mean, norm.running_mean)
    assert_close(layer.running_var, norm.running_var)
    before = layer.running_mean.clone()
    layer(inputs(1))
    layer(inputs(0))
    layer.eval()(inputs(9))
    assert torch.equal(layer.running_mean, before)
    assert torch.equal(layer(inputs(9)), layer(inputs(9)))


@pytest.mark.parametrize("training", [True, False])
def test_one_neuron_is_a_dense_layer_of_one(training: bool) -> None:
    layer, x = make(num_experts=1, top_k=1, heads=1).train(training), inputs(9, dtype=torch.float64)
    dense, zeros = FF(IN, OUT, 1).double(), torch.zeros(5, dtype=torch.float64)
    copy_dense(dense, layer.hidden_weight, zeros[:1], layer.output_weight, zeros[1:])
    assert_close(layer(x), dense(x))


def test_heads_that_take_one_neuron_assemble_a_dense_layer() -> None:  # equation 8
    layer, x = make(top_k=1, heads=5).eval(), inputs(1, dtype=torch.float64)
    w1, w2 = (weight[layer.route(x)[0]] for weight in (layer.hidden_weight, layer.output_weight))
    assert_close(layer(x), torch.relu(x @ w1.T) @ w2)


def test_only_the_chosen_rows_are_read_and_trained() -> None:
    layer, x = make(), inputs(3, dtype=torch.float64)
    layer(x).sum().backward()
    assert layer.hidden_weight.grad is not None
    layer.eval()
    others = torch.ones(18, dtype=torch.bool)
    others[layer.route(x).unique()] = False
    expected = layer(x)
    with torch.no_grad():
        layer.hidden_weight[others], layer.output_weight[others] = math.nan, math.nan
    assert torch.equal(layer(x), expected)
    assert others.any()


@pytest.mark.parametrize("training", [True, False])
def test_no_product_with_all_experts(training: bool) -> None:
    layer, x = PEER(32, 32, 2**14, top_k=4, heads=2, query_width=8).train(training), torch.randn(16, 32)
    with Calls() as calls, FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 16 * layer.flops_per_sample
    assert calls.largest <= 2**14  # the sums of scores; all neurons of all rows would be 2^18


def test_unevenness() -> None:
    assert_close(unevenness(RetrievalRouting(torch.ones(8))), torch.tensor(0.0))
    assert_close(unevenness(RetrievalRouting(torch.tensor([0.0, 3.0, 0.0, 0.0]))), torch.tensor(math.log(4)))
    assert unevenness(RetrievalRouting(torch.zeros(4))) == 0


def test_mistakes_are_named() -> None:
    for count in (3, 12, 15, 1000):
        with pytest.raises(ValueError, match=f"num_experts is {count}; it must be a square, or twice a square"):
            make(num_experts=count)
    with pytest.raises(ValueError, match="query_width is 3; it must be even"):
        make(query_width=3)
    with pytest.raises(ValueError, match="top_k is 19 but there are 18 experts"):
        make(top_k=19)


def test_sized_for_benchmarks() -> None:
    layer = PEER.sized(IN, OUT, depth=5, leaf_width=4, top_k=2)
    assert (layer.training_width, layer.inference_width, layer.heads, layer.top_k) == (128, 8, 8, 1)


def test_recovers_planted_clusters() -> None:
    torch.manual_seed(0)
    x, y, _ = clusters()
    layer = PEER(IN, OUT, 256, top_k=4, heads=4, query_width=8)  # 16 neurons of 256
    assert train(layer, x, y) < 0.06 < 0.08 < dense_error()
