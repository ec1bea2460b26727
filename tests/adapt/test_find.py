"""What is an MLP, and what only looks like one, as running it shows."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fffexp.adapt.replace import replace_feedforward
from fffexp.layers import FF, FFF, NoisyTopKMoE

D, H = 16, 24  # features and hidden neurons of every module below
TREE = partial(FFF, depth=2, leaf_width=3)


class Residual(nn.Module):
    """Two linear layers, but the output is not the second's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Mixing(nn.Module):
    """Three linear layers of a gated MLP's shapes, but tokens are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.q(x) * self.k(x).mean(1, keepdim=True))


class InPlace(nn.Module):
    """As Residual, but the output of the second linear layer is what is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        out = self.down(self.up(x).relu())
        out += x
        return out


class Causal(nn.Module):
    """A token sees those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu().cumsum(1))


class Straight(nn.Module):
    """A product of two matrices, without an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class Gated(nn.Module):
    """Three linear layers; the product of two goes into the last."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Squeezed(nn.Module):
    """A score for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()).squeeze(-1)


class Functional(nn.Module):
    """Its dropout is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.down(self.up(x).relu()), 0.5, self.training)


class Objecting(nn.Module):
    """Takes something else than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Any) -> Tensor:
        return self.down(self.up(x.features).relu())


class PreNormIntermediate(nn.Module):
    """Of RoBERTa with pre-norm: a norm is in the way."""

    def __init__(self) -> None:
        super().__init__()
        self.LayerNorm, self.dense = nn.LayerNorm(D), nn.Linear(D, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.LayerNorm(x)).relu()


class PreNormBlock(nn.Module):
    """As BERT's, with that."""

    def __init__(self) -> None:
        super().__init__()
        self.intermediate = PreNormIntermediate()
        self.output = nn.Module()
        self.output.dense = nn.Linear(H, D)


def test_a_head_that_takes_one_token_is_passed_over() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.out = nn.Linear(D, D), nn.Linear(D, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.dense(x).tanh()[:, 0])

    model = nn.Sequential(nn.TransformerEncoderLayer(D, 4, H, batch_first=True), Head())
    assert [each.name for each in replace_feedforward(model, TREE)] == ["0"]


def test_an_mlp_may_be_called_intermediate_and_output() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.intermediate, self.output = nn.Linear(D, H), nn.Linear(H, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.output(self.intermediate(x).relu())

    assert [each.name for each in replace_feedforward(nn.Sequential(Named()), TREE)] == ["0"]


def test_several_mlps_in_a_sequential() -> None:
    pair = [nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)]
    model = nn.Sequential(*pair, nn.ReLU(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 5))
    assert [each.name for each in replace_feedforward(model, TREE)] == ["0", "4"]
    assert model(torch.randn(3, D)).shape == (3, 5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("std", "bias"), [(1e-6, 1.0), (0.0, 0.0), (0.002, 0.0), (0.1, 50.0), (0.1, -50.0)])
@pytest.mark.parametrize("kind", [Plain, Gated])
def test_an_mlp_is_one_whatever_its_weights_are(
    kind: type[nn.Module], std: float, bias: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(kind()).to(dtype)
    first = next(model[0].children())
    nn.init.normal_(first.weight, std=std)  # where 1e-6 and 1: timm's SwiGLU
    nn.init.constant_(first.bias, bias)
    nn.init.zeros_(model[0].down.weight)
    assert [each.name for each in replace_feedforward(model, TREE)] == ["0"]


@torch.no_grad()
@pytest.mark.parametrize("kind", [Mixing, Causal])
def test_a_last_layer_of_zeros_hides_nothing(kind: type[nn.Module]) -> None:
    model: Any = nn.Sequential(kind())
    *_, last = model[0].children()
    nn.init.zeros_(last.weight)  # no row of the output comes from another
    with pytest.raises(ValueError, match="holds no MLP"):
        replace_feedforward(model, TREE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_activation(dtype: torch.dtype) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        with pytest.raises(ValueError, match="holds no MLP"):
            replace_feedforward(nn.Sequential(Straight()).to(dtype), TREE)


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(D, D),
        nn.Sequential(nn.Linear(D, H), nn.Linear(H, D)),  # no activation
        nn.Sequential(nn.Linear(D, H), nn.AlphaDropout(), nn.Linear(H, D)),
        nn.Sequential(nn.Linear(D, H), nn.Flatten(), nn.ReLU(), nn.Linear(H, D)),
        nn.Sequential(nn.Linear(D, H), nn.Softmax(1), nn.Linear(H, D)),
        nn.Sequential(nn.Linear(D, 2 * H), nn.GLU(), nn.Linear(H, D)),
        nn.Sequential(norm := nn.LayerNorm(D), nn.Linear(D, D), nn.ReLU(), norm, nn.Linear(D, D)),
        *(nn.Sequential(kind()) for kind in (Residual, Mixing, InPlace, Causal, Straight, Squeezed, Functional)),
        *(nn.Sequential(kind()) for kind in (Objecting, PreNormBlock)),
        nn.MultiheadAttention(D, 4),
        NoisyTopKMoE(D, D, num_experts=4, expert_width=2),
        FF(D, D, H),  # the model itself
    ],
    ids=lambda model: type(model[0] if isinstance(model, nn.Sequential) else model).__name__,
)
def test_what_is_no_mlp_is_left_alone(model: nn.Module) -> None:
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="holds no MLP of a known form"):
        replace_feedforward(model, TREE)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any(m._forward_hooks for m in model.modules())
    assert model.training


def test_a_dense_layer_of_ours_is_an_mlp() -> None:
    model = nn.Sequential(nn.LayerNorm(8), FF(8, 5, width=12))
    (made,) = replace_feedforward(model, partial(FFF, depth=1, leaf_width=4))
    assert model[1] is made.new
    assert made.old_sizes["inference_width"] == 12
    with pytest.raises(ValueError, match="no MLP"):
        replace_feedforward(model, partial(FFF, depth=1, leaf_width=4))


class Counted(nn.Linear):
    """Counts its passes."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x)


def test_what_has_weights_between_two_linear_layers_is_not_run() -> None:
    model = nn.Sequential(nn.Linear(D, H), nn.Sequential(Counted(H, H), nn.ReLU()), nn.Linear(H, D))
    with pytest.raises(ValueError, match="holds no MLP"):
        replace_feedforward(model, TREE)
    assert model[1][0].passes == 0


def test_the_model_itself_is_not_run() -> None:
    model = Residual()
    model.up = Counted(D, H)
    with pytest.raises(ValueError, match="holds no MLP"):
        replace_feedforward(model, TREE)
    assert model.up.passes == 0
