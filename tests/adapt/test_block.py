"""What a block does around its MLP decides whether a layer can take the MLP's place, and whether it does by default."""

from functools import partial
from typing import Any

import pytest
import torch
from adapt.same_weights import copy_weights
from torch import Tensor, nn

from fffexp.adapt.replace import replace_feedforward
from fffexp.layers import FF, FFF

D, H = 16, 24
TREE = partial(FFF, depth=2, leaf_width=3)
DENSE = partial(FF, width=H)


def pair(inner: int = H, outer: int = D) -> list[nn.Module]:
    return [nn.Linear(D, inner), nn.ReLU(), nn.Linear(inner, outer)]


class Skip(nn.Sequential):
    """Adds its input to what its parts make in a row."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * super().forward(x)


class SkipEach(nn.Sequential):
    """Adds to what each part makes."""

    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            y = part(x)
            x = x[..., : y.shape[-1]] + y if y.shape[-1] <= x.shape[-1] else y
        return x


class ScaleEach(nn.Sequential):
    """Scales what each part makes."""

    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            x = 2 * part(x)
        return x


class Hidden(nn.Sequential):
    """Gives its hidden values too."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self[1](self[0](x))
        return self[2](hidden) + hidden.mean(-1, keepdim=True)


class Asking(nn.Sequential):
    """Cannot be run without more than is known here."""

    def forward(self, x: Any) -> Tensor:
        return super().forward(x.features)


class Indexed(nn.Module):
    """Runs the parts of a plain nn.Sequential in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(*pair())

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = 2 * part(x)
        return x


class Encoder(nn.TransformerEncoderLayer):
    """Of torch, with a scale of its own."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return 0.5 * super()._ff_block(x)


class Decoder(nn.TransformerDecoderLayer):
    """Of torch, with a scale of its own."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return 0.5 * super()._ff_block(x)


class NormedEncoder(nn.TransformerEncoderLayer):
    """Normalises hidden values."""

    def _ff_block(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.linear1(x))
        return self.linear2(hidden / hidden.norm(dim=-1, keepdim=True))


class OtherDecoder(nn.TransformerDecoderLayer):
    """Has another activation than it says."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.linear2(self.linear1(x).sigmoid())


class FusedEncoder(nn.TransformerEncoderLayer):
    """Reads weights past their modules."""

    def _ff_block(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, self.linear1.weight, self.linear1.bias).relu()
        return nn.functional.linear(hidden, self.linear2.weight, self.linear2.bias)


TORCH = {"d_model": D, "nhead": 4, "dim_feedforward": H, "batch_first": True}


@pytest.mark.parametrize("kind", [Skip, Encoder, Decoder])
def test_a_subclass_with_a_forward_of_its_own_gives_the_same(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"block": kind(*pair()) if kind is Skip else kind(**TORCH)}).eval()
    x = torch.randn(2, 5, D)
    given = [x, x] if kind is Decoder else [x]
    before = model["block"](*given)  # with a graph: torch's fused inference would pass the method by
    (made,) = replace_feedforward(model, DENSE)
    copy_weights(made.old, made.new)
    assert torch.allclose(model["block"](*given), before, atol=1e-5)


@pytest.mark.parametrize(
    "kind", [SkipEach, ScaleEach, Hidden, Asking, NormedEncoder, OtherDecoder, FusedEncoder, Indexed]
)
def test_what_would_give_something_else_stays(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    block = kind() if kind is Indexed else kind(*pair()) if issubclass(kind, nn.Sequential) else kind(**TORCH)
    model = nn.ModuleDict({"block": block, "other": nn.Sequential(*pair())}).eval()
    found = replace_feedforward(model, TREE, select=lambda name, module: True)
    assert [each.name for each in found] == ["other.0"]
    (where,) = found.left
    assert where.startswith("block")
    assert kind.__name__ in found.left[where]
    with pytest.raises(ValueError, match=f"holds no MLP of a known form .*; block.*{kind.__name__}"):
        replace_feedforward(nn.ModuleDict({"block": block}), TREE)


def test_a_subclass_that_is_the_model() -> None:
    with pytest.raises(ValueError, match="Scale"):
        replace_feedforward(ScaleEach(*pair()), TREE)
    assert len(replace_feedforward(Skip(*pair()), TREE)) == 1


class SqueezeExcitation(nn.Module):
    """Of channels."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.fc = nn.Sequential(*pair(D // 4), gate)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class HeldSqueezeExcitation(nn.Module):
    """Holds its linear layers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = pair(D // 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.act(self.fc1(x.mean((2, 3))))).sigmoid()[:, :, None, None]


class MBConv(nn.Module):
    """A block of convolutions; a residual is around the whole."""

    def __init__(self, excitation: nn.Module) -> None:
        super().__init__()
        self.conv, self.se, self.norm = nn.Conv2d(D, D, 3, padding=1), excitation, nn.BatchNorm2d(D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.se(self.conv(x)))


class Block(nn.Module):
    """A residual around an MLP, with what `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norm, self.net = kind, nn.LayerNorm(D), nn.Sequential(*pair())
        self.gamma = nn.Parameter(torch.full((D,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "channels first":
            rows = self.net(self.norm(x.permute(0, 2, 3, 1)))
            return x + rows.permute(0, 3, 1, 2)
        makes = {
            "before": lambda: x + self.net(self.norm(x)),
            "behind": lambda: self.norm(x + self.net(x)),
            "by a function": lambda: nn.functional.layer_norm(x + self.net(x), (D,)),
            "within": lambda: x + self.norm(self.net(x)),
            "scaled": lambda: x + self.gamma * self.net(self.norm(x)),
            "in place": lambda: x.clone().add_(self.net(self.norm(x))),
        }
        return makes[self.kind]()


class Wrapped(nn.Module):
    """The residual is around a module that holds norm and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Sequential(nn.LayerNorm(D), nn.Sequential(*pair()), nn.Dropout(0.1))])
        self.mix = nn.Conv1d(D, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return x + self.parts[0](x)


class Net(nn.Module):
    """Holds blocks, and what is no linear layer."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.stem, self.parts = nn.Conv2d(3, D, 1), nn.ModuleList(parts)


@pytest.mark.parametrize("gate", [nn.Sigmoid(), nn.Hardsigmoid(), nn.Tanh()])
def test_squeeze_and_excitation_is_no_blocks_mlp(gate: nn.Module) -> None:
    model = Net(MBConv(SqueezeExcitation(gate)), Block("before"))
    found = replace_feedforward(model, TREE)
    assert [each.name for each in found] == ["parts.1.net.0"]
    assert "nothing is added" in found.left["parts.0.se.fc.0"]
    found = replace_feedforward(model, TREE, select=lambda name, module: True)
    assert [each.name for each in found] == ["parts.0.se.fc.0"]


def test_a_model_without_a_blocks_mlp() -> None:
    with pytest.raises(ValueError, match=r"no block of Net holds an MLP .*; parts.0 \(and 1 more\): .*select takes it"):
        replace_feedforward(Net(HeldSqueezeExcitation(), MBConv(HeldSqueezeExcitation())), TREE)


@pytest.mark.parametrize(
    "kind", ["before", "behind", "by a function", "within", "scaled", "in place", "channels first"]
)
def test_a_residual_is_seen(kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found = replace_feedforward(Net(Block(kind)).to(dtype), TREE)
        assert [each.name for each in found] == ["parts.0.net.0"]
        assert not found.left


def test_a_residual_further_out_is_seen() -> None:
    assert [each.name for each in replace_feedforward(Net(Wrapped()), TREE)] == ["parts.0.parts.0.1.0"]


def test_a_residual_around_an_mlp_of_rows_is_seen() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.net = nn.LayerNorm(D + 4), nn.Sequential(*pair())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.net(self.norm(x).transpose(1, 2)).transpose(1, 2)

    found = replace_feedforward(Net(Mixer()), TREE)
    assert [each.name for each in found] == ["parts.0.net.0"]


def test_experts_of_their_own_are_taken() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(D, 3), nn.ModuleList(nn.Sequential(*pair()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            share, index = self.gate(x).softmax(-1).max(-1)
            out = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                out[index == i] = expert(x[index == i]) * share[index == i, None]
            return out

    found = replace_feedforward(Net(Experts()), TREE)
    assert [each.name for each in found] == [f"parts.0.experts.{i}.0" for i in range(3)]


def test_heads_and_position_mlps_stay() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(2, H), nn.ReLU(), nn.Linear(H, 2))})
            self.query, self.scale = nn.Linear(D, D), nn.Parameter(torch.ones(2, 1, 1))

        def forward(self, x: Tensor, windows: Any) -> Tensor:
            return self.query(x) + self.bias["mlp"](windows.coordinates)

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.place = nn.Sequential(*pair()), nn.Parameter(torch.randn(D))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.net(self.place)

    head = nn.Sequential(*pair(outer=5))
    found = replace_feedforward(Net(Block("before"), Positions(), Constant(), head), TREE)
    assert [each.name for each in found] == ["parts.0.net.0"]
    assert list(found.left) == ["parts.1.bias.mlp.0", "parts.2.net.0", "parts.3.0"]
    assert "5 features of 16" in found.left["parts.3.0"]


def test_a_model_of_linear_layers_is_taken_whole() -> None:
    model = nn.Sequential(nn.Sequential(*pair(outer=8), nn.LayerNorm(8)), nn.ReLU(), nn.Linear(8, 5))
    assert [each.name for each in replace_feedforward(model, TREE)] == ["0.0"]


def test_a_gated_shared_expert_is_a_blocks_mlp() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert, self.gate, self.norm = nn.Sequential(*pair()), nn.Linear(D, 1), nn.LayerNorm(D)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gate(x).sigmoid() * self.expert(self.norm(x))

    assert [each.name for each in replace_feedforward(Net(nn.ModuleList([Shared()])), TREE)] == ["parts.0.0.expert.0"]


def test_a_block_that_cannot_be_run_is_tried_on_few_rows() -> None:
    tried: list[int] = []

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8 * D)
            self.net = nn.Sequential(nn.Linear(8 * D, H), nn.ReLU(), nn.Linear(H, 8 * D))

        def forward(self, x: Tensor, cache: Any = None) -> Tensor:
            tried.append(x.numel() // (8 * D))
            return x + self.net(self.norm(x)) + cache.mean

    assert len(replace_feedforward(Net(Failing()), TREE)) == 1
    assert max(tried) < 2 * 8 * D, "not as many rows as it has features"


def test_running_blocks_leaves_no_trace() -> None:
    class Counting(Block):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return super().forward(x)

    block = Counting("before").train()
    model = Net(block)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="select takes none"):
        replace_feedforward(model, TREE, select=lambda name, module: False)
    assert torch.equal(torch.get_rng_state(), before)
    assert block.passes == 0
    assert block.training
    assert not any("forward" in vars(m) for m in block.modules())
