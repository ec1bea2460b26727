"""Each row of the failures known from other implementations, and the definition itself, arXiv 1701.06538."""

import math
from typing import Any

import pytest
import torch
from cases import IN, OUT, Calls, blocks_of, copy_block, inputs, randomized
from tolerances import assert_all_close, assert_close, gradients
from torch import Tensor

from fffexp.kernels import eager, naive
from fffexp.kernels.grouped import grouped_mm
from fffexp.layers import FF, NoisyTopKMoE
from fffexp.routing.blocks import importance, load

EXPERTS, WIDTH, K = 5, 3, 2


def make(num_experts: int = EXPERTS, k: int = K, dtype: torch.dtype = torch.float64, **options: Any) -> NoisyTopKMoE:
    options = {"trainable": k > 1 or num_experts == 1} | options
    return randomized(NoisyTopKMoE(IN, OUT, num_experts, WIDTH, k, **options)).to(dtype)


def fix_noise(rows: int, experts: int = EXPERTS, seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """What the layer draws next."""
    torch.manual_seed(seed)
    eps = torch.randn(rows, experts, dtype=dtype)
    torch.manual_seed(seed)
    return eps.double()


def noisy_logits(layer: NoisyTopKMoE, x: Tensor, eps: Tensor) -> Tensor:
    return x @ layer.gate_weight.T + eps * torch.log1p(torch.exp(x @ layer.noise_weight.T))


def train_loss(layer: NoisyTopKMoE, x: Tensor) -> Tensor:
    output = layer(x)
    return output.square().sum() + importance(layer.routing) + load(layer.routing)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("k", range(1, EXPERTS + 1))
@pytest.mark.parametrize("activation", [torch.nn.ReLU, torch.nn.Tanh])
def test_training_equals_naive_with_every_gradient(k: int, activation: type[torch.nn.Module], dense: bool) -> None:
    layer, x = make(k=k, activation=activation), inputs(9, dtype=torch.float64)
    layer.vectorized = dense
    eps = fix_noise(9)
    wanted = {"x": x.requires_grad_(), **dict(layer.named_parameters())}
    expected = naive.moe(x, noisy_logits(layer, x, eps), k, blocks_of(layer.experts), activation())
    output = layer(x)
    assert_close(output, expected)
    assert_all_close(gradients(output, wanted), gradients(expected, wanted))


@pytest.mark.parametrize("k", range(1, EXPERTS + 1))
def test_inference_equals_naive_without_noise(k: int) -> None:
    layer, x = make(k=k).eval(), inputs(9, dtype=torch.float64)
    logits = x @ layer.gate_weight.T
    wanted = {"x": x.requires_grad_(), "gate": layer.gate_weight, **dict(layer.experts.named_parameters())}
    expected = naive.moe(x, x @ layer.gate_weight.T, k, blocks_of(layer.experts), torch.relu)
    output = layer(x)
    assert_close(output, expected)
    assert_all_close(gradients(output, wanted), gradients(expected, wanted))
    assert torch.equal(layer.route(x), logits.argsort(dim=1, descending=True)[:, :k])


@pytest.mark.parametrize("batch", [0, 1, 3, 63, 257])
def test_batches_that_fill_no_tile(batch: int) -> None:
    layer, x = make(dtype=torch.float32).eval(), inputs(batch)
    assert_close(layer(x), naive.moe(x, x @ layer.gate_weight.T, K, blocks_of(layer.experts), torch.relu))


def test_load_is_the_probability_of_being_chosen_when_one_noise_is_redrawn() -> None:
    layer, draws = make(), 200_000
    generator = torch.Generator().manual_seed(5)
    for seed in range(3):
        x = inputs(1, seed=seed, dtype=torch.float64)
        eps = fix_noise(1, seed=seed)
        layer(x)
        for expert in range(EXPERTS):
            redrawn = eps.repeat(draws, 1)
            redrawn[:, expert] = torch.randn(draws, generator=generator, dtype=torch.float64)
            chosen = noisy_logits(layer, x, redrawn).topk(K, dim=1).indices
            share = (chosen == expert).any(1).double().mean()
            assert abs(layer.routing.load_G[expert] - share) < 0.01
        layer.routing = None


def test_gates_are_those_of_the_definition() -> None:
    layer, x = make(), inputs(20, dtype=torch.float64)
    logits = noisy_logits(layer, x, fix_noise(20))
    layer(x)
    kept = logits >= logits.sort(dim=1, descending=True).values[:, K - 1 : K]
    assert_close(layer.routing.weights_BG, torch.softmax(logits.masked_fill(~kept, -math.inf), dim=1))
    assert ((layer.routing.weights_BG > 0).sum(1) == K).all()


def test_inference_is_repeatable_whatever_the_options() -> None:
    layer, x = make(dropout=0.5).eval(), inputs(50, dtype=torch.float64)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.allclose(layer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
def test_finite_without_noise(dtype: torch.dtype, tied: bool) -> None:
    layer, x = make(dtype=dtype), inputs(30, dtype=dtype).abs()
    torch.nn.init.constant_(layer.noise_weight, -1e4)  # softplus underflows to 0
    if tied:
        torch.nn.init.zeros_(layer.gate_weight)
    loss = train_loss(layer, x)
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_noise_has_its_own_weights() -> None:
    for aux_loss in (None, load):  # by the prediction loss, and by the load
        layer, x = make(), inputs(30, dtype=torch.float64)
        output = layer(x)
        loss = output.square().sum() if aux_loss is None else aux_loss(layer.routing)
        loss.backward()
        assert (layer.noise_weight.grad.abs().sum(1) > 0).all()
        assert (layer.gate_weight.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("training", [True, False])
def test_one_expert_is_a_dense_layer(training: bool) -> None:
    layer, x = make(num_experts=1, k=1).train(training), inputs(9, dtype=torch.float64)
    ff = copy_block(FF(IN, OUT, WIDTH).double(), layer.experts, 0)
    output, expected = layer(x), ff(x)
    assert_close(output, expected)
    ours = gradients(output, dict(layer.experts.named_parameters()))
    theirs = gradients(expected, dict(ff.named_parameters()))
    for name, other in (("hidden_weight", "network.0.weight"), ("hidden_bias", "network.0.bias")):
        assert_close(ours[name][0], theirs[other])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_at_initialisation_every_expert_is_equally_likely(k: int) -> None:
    torch.manual_seed(0)
    layer, rows = NoisyTopKMoE(IN, OUT, EXPERTS, WIDTH, k, trainable=k > 1), 20_000
    layer(inputs(rows))
    # the standard deviation of P over draws is at most 1/2: 4 * 0.5 / sqrt(20,000) = 0.0142
    assert (layer.routing.load_G / rows - k / EXPERTS).abs().max() < 0.0142


def test_initial_gate() -> None:
    layer = NoisyTopKMoE(IN, OUT, EXPERTS, WIDTH, EXPERTS)
    assert {name for name, _ in layer.named_parameters(recurse=False)} == {"gate_weight", "noise_weight"}  # no bias
    assert not layer.gate_weight.any()
    assert not layer.noise_weight.any()
    eps = fix_noise(9, dtype=torch.float32)
    layer(inputs(9))
    assert_close(layer.routing.weights_BG, torch.softmax(math.log(2) * eps, dim=1))  # softplus(0) = ln 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("k", [1, 2, EXPERTS])
def test_rows_sent_to_experts_are_counted(monkeypatch: pytest.MonkeyPatch, k: int, training: bool) -> None:
    sent = []

    def count(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        assert weight.shape[0] == EXPERTS
        sent.append((x.shape[0], int(ends[-1])))
        return grouped_mm(x, weight, ends)

    monkeypatch.setattr(eager, "grouped_mm", count)
    make(k=k).train(training)(inputs(13, dtype=torch.float64))
    assert sent == [(13 * k, 13 * k)] * 2  # the hidden and the output product


def test_only_the_chosen_experts_are_read() -> None:
    layer = make().eval()
    for x in inputs(5, dtype=torch.float64):
        expected, poisoned = layer(x), make().eval()
        others = torch.ones(EXPERTS, dtype=torch.bool)
        others[layer.route(x)[0]] = False
        with torch.no_grad():
            for parameter in poisoned.experts.parameters():
                parameter[others] = math.nan
        assert torch.equal(poisoned(x), expected)


def test_all_experts_chosen_makes_the_load_a_count() -> None:
    layer = make(k=EXPERTS)
    layer(inputs(13, dtype=torch.float64))
    assert_close(layer.routing.load_G, torch.full((EXPERTS,), 13.0))
    assert load(layer.routing) == 0


def test_one_expert_at_a_time_is_for_timing() -> None:
    layer = make(k=1)
    output = layer(inputs(9, dtype=torch.float64))
    assert not gradients(output, {"gate": layer.gate_weight})["gate"].any()
    for layer in (make(k=1), make(k=1, trainable=True)):
        with pytest.raises(ValueError, match=r"top_k is 1: .*SwitchMoE"):
            layer.check_trainable()
    with pytest.raises(ValueError, match=r"top_k is 1: .*SwitchMoE"):
        layer(inputs(9))
    with torch.no_grad():
        layer(inputs(9))
    layer.eval()(inputs(9))
    make(k=2).check_trainable()
    make(num_experts=1, k=1).check_trainable()


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="top_k is 6 but there are 5 experts"):
        make(k=6)
    with pytest.raises(ValueError, match=r"weights would take [\d,.]+ GiB .*: lower num_experts or expert_width"):
        NoisyTopKMoE(IN, OUT, num_experts=10**15, expert_width=1)


def test_training_keeps_no_tensor_of_batch_experts_hidden() -> None:
    # (batch, experts, width) would be four times the bound
    batch, layer = 512, randomized(NoisyTopKMoE(IN, OUT, num_experts=8, expert_width=20, top_k=2))
    with Calls() as calls:
        layer(inputs(batch)).sum().backward()
    assert calls.largest == batch * layer.inference_width
