"""Trained MLPs to trees and narrow dense layers."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaModel,
    Phi3Config,
    Phi3Model,
    T5Config,
    T5Model,
)

from fffexp import FF, FFF, Forest, NoisyTopKMoE, convert_feedforward
from fffexp.adapt import distil

D, H = 6, 16


def trained() -> nn.Sequential:
    """An MLP that does something else in each quarter of its inputs, with few of its neurons."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(500):
        x = torch.randn(256, D)
        y = torch.stack([x[:, 0] * (x[:, 1] > 0), x[:, 2].abs(), x[:, 1]], 1)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return model.eval()


def trained_once() -> nn.Sequential:
    with torch.enable_grad():
        return trained()


def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(500, D) for _ in range(8)]


@pytest.mark.parametrize(
    "factory", [partial(FF, width=H), partial(FF, width=H + 3), partial(FFF, depth=2, leaf_width=H)]
)
def test_a_layer_of_all_neurons_starts_as_what_it_replaces(factory: partial[FF]) -> None:
    model = trained()
    x = torch.randn(200, D)
    before = model(x)
    (made,) = convert_feedforward(model, batches(), factory, steps=0)
    assert made.final_error == made.initial_error < 1e-3
    assert torch.allclose(model.eval()(x), before, atol=0.1)


def test_a_tree_distils_better_than_one_of_its_leaves() -> None:
    errors = {}
    for name, factory in (("tree", partial(FFF, depth=2, leaf_width=2)), ("leaf", partial(FF, width=2))):
        torch.manual_seed(0)
        (made,) = convert_feedforward(trained(), batches(), factory, steps=300)
        assert made.final_error < made.initial_error
        assert made.new_sizes["inference_width"] == 2
        assert made.old_sizes["inference_size"] == H
        errors[name] = made.final_error
    assert errors["tree"] < 0.5 * errors["leaf"]


def test_the_halves_are_even() -> None:
    model = trained()
    (made,) = convert_feedforward(model, batches(), partial(FFF, depth=3, leaf_width=2), steps=0)
    shares = made.new.route(torch.cat(batches())).squeeze(1).bincount(minlength=8) / 4000
    assert shares.min() > 0.08
    assert shares.max() < 0.17


@torch.no_grad()
def test_neurons_that_explain_the_outputs_are_chosen() -> None:
    torch.manual_seed(0)
    up, down = nn.Linear(D, 5), nn.Linear(5, 1)
    up.weight[4] = up.weight[1] + 0.01 * torch.randn(D)  # says nothing that neuron 1 does not
    down.weight.copy_(torch.tensor([[0.0, 3.0, 0.0, -2.0, 0.0]]))
    model = nn.Sequential(up, nn.ReLU(), down)
    (made,) = convert_feedforward(model, batches(), partial(FF, width=2), steps=0)
    chosen = {int((up.weight - row).square().sum(1).argmin()) for row in made.new.network[0].weight}
    assert chosen in ({1, 3}, {4, 3})
    assert made.final_error < 1e-2


def test_the_model_is_otherwise_as_it_was() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
    model = BertModel(config).train()
    mine = ("encoder.layer.0.intermediate.", "encoder.layer.0.output.dense.")
    others = {n: p.clone() for n, p in model.named_parameters() if not n.startswith(mine)}
    data = [{"input_ids": torch.randint(50, (4, 6))} for _ in range(20)]
    made = convert_feedforward(
        model,
        data,
        partial(FFF, depth=1, leaf_width=24, activation=nn.GELU),
        select=lambda n, m: n.endswith("0"),
        steps=0,
    )
    assert [each.name for each in made] == ["encoder.layer.0"]
    assert made[0].final_error < 0.05
    assert model.training
    assert made[0].new.training
    assert not any(m._forward_hooks for m in model.modules())
    now = dict(model.named_parameters())
    assert now.keys() - others.keys() == {n for n in now if n.startswith("encoder.layer.0.intermediate.")}
    assert all(torch.equal(now[name], p) for name, p in others.items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    errors = {}
    for each in (torch.float32, dtype):
        model = trained().to(each)
        (made,) = convert_feedforward(
            model, [b.to(each) for b in batches()], partial(FFF, depth=2, leaf_width=4), steps=100
        )
        assert {p.dtype for p in made.new.parameters()} == {each}
        assert torch.isfinite(model(batches()[0].to(each))).all()
        errors[each] = made.final_error
    assert errors[dtype] == pytest.approx(errors[torch.float32], rel=0.5)


@pytest.mark.parametrize("tokens", [6, 50])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_padding_is_not_looked_at(tokens: int, batch_first: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(block, 1).eval()
    padded = torch.zeros(50, tokens, dtype=torch.bool)
    padded[:, 3:] = True
    mask = padded if dtype == torch.bool else torch.zeros(padded.shape).masked_fill(padded, float("-inf"))
    data = [{"src": torch.randn(50, tokens, 16), "src_key_padding_mask": mask} for _ in range(10)]
    if not batch_first:
        for batch in data:
            batch["src"] = batch["src"].transpose(0, 1)
    errors = []
    for noise in (0.0, 100.0):
        for batch in data:
            src = batch["src"] if batch_first else batch["src"].transpose(0, 1)
            src[:, 3:] = noise * torch.randn(50, tokens - 3, 16)
        torch.manual_seed(0)
        (made,) = convert_feedforward(copy.deepcopy(model), data, partial(FFF, depth=2, leaf_width=6), steps=0)
        errors.append(made.final_error)
    assert errors[0] == pytest.approx(errors[1])


def test_neurons_are_selected_on_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "SELECTION_ROWS", 200)
    data = torch.cat(batches())
    starts = {}
    for name, order in {"sorted": data[:, 1].argsort(), "shuffled": torch.arange(len(data))}.items():
        held_out = batches()[:1]  # the last of the batches
        torch.manual_seed(0)
        (made,) = convert_feedforward(trained(), [*data[order].split(500), *held_out], partial(FF, width=4), steps=0)
        starts[name] = made.initial_error
    assert starts["sorted"] == pytest.approx(starts["shuffled"], rel=0.5)


class Seen(FF):
    """Keeps the rows that it starts from, and those that are held out."""

    def route(self, x: Tensor) -> Tensor:
        self.train_rows = x
        return super().route(x)

    def forward(self, x: Tensor) -> Tensor:
        self.held_out = x
        return super().forward(x)


def rows(model: nn.Module, batches: list[Any]) -> list[tuple[Tensor, Tensor]]:
    """What each MLP's layer starts from, and what is held out."""
    made: list[Any] = convert_feedforward(model, batches, partial(Seen, width=2), steps=0)
    return [(each.new.train_rows, each.new.held_out) for each in made]


@pytest.mark.filterwarnings("ignore:the activation of")
def test_a_decoder_of_torch_has_a_padding_of_its_own() -> None:
    torch.manual_seed(0)
    block = nn.TransformerDecoderLayer(16, 4, 24, batch_first=True)
    padded = torch.zeros(20, 6, dtype=torch.bool)
    padded[:, 2:] = True
    tokens = torch.randn(20, 6, 16)
    data = {"tgt": tokens, "memory": tokens, "tgt_key_padding_mask": padded}
    model = nn.TransformerDecoder(block, 1)
    ((train, _),) = rows(model, [data, data])
    assert len(train) == 40


def test_a_decoder_has_a_padding_of_its_own() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
    model = T5Model(config).eval()
    tokens = torch.randint(3, 50, (20, 6))
    encoder, decoder = torch.ones(2, 20, 6, dtype=torch.long)
    encoder[:, 2:] = 0
    data = {"input_ids": tokens, "attention_mask": encoder, "decoder_input_ids": tokens}
    seen = {}
    for name, batch in {"all": data, "some": data | {"decoder_attention_mask": decoder}}.items():
        decoder[:, 5:] = 0
        seen[name] = [len(train) for train, _ in rows(copy.deepcopy(model), [batch, batch])]
    assert seen == {"all": [40, 120], "some": [40, 100]}


def test_an_output_that_never_varies() -> None:
    model = trained()
    with torch.no_grad():
        model[2].weight.zero_()
    (made,) = convert_feedforward(model, batches(), partial(FFF, depth=1, leaf_width=2), steps=3)
    assert made.final_error < 1e-3
    assert torch.allclose(model(batches()[0]), made.old[2].bias.expand(500, 3), atol=0.1)


def test_the_layer_has_the_type_of_the_weights(recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Sequential(nn.Linear(D, D), trained())
    with torch.autocast("cpu", torch.bfloat16):
        (made,) = convert_feedforward(model, batches(), partial(FFF, depth=1, leaf_width=2), steps=3)
    assert {p.dtype for p in made.new.parameters()} == {torch.float32}
    assert model(batches()[0]).dtype == torch.float32
    assert not recwarn.list, "rounding is no other activation"


def test_rows_that_come_often_do_not_fill_the_tree() -> None:
    often = [torch.cat([torch.ones(1500, D), batch]) for batch in batches()]
    (made,) = convert_feedforward(trained(), often, partial(FFF, depth=3, leaf_width=2), steps=0)
    shares = made.new.route(torch.cat(batches())).squeeze(1).bincount(minlength=8) / 4000
    assert shares.min() > 0.08


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(*trained(), nn.ReLU(), nn.Linear(3, H), nn.ReLU(), nn.Linear(H, 3))
    before = list(model)
    layers = iter([FF(D, 3, 4)])
    with pytest.raises(StopIteration):
        convert_feedforward(model, batches(), lambda i, o: next(layers), steps=1)
    with pytest.raises(ValueError, match="a FFF with sparse gradients cannot be distilled"):
        convert_feedforward(model, batches(), partial(FFF, depth=1, leaf_width=2, trained="chosen_leaf"))
    assert list(model) == before


@torch.no_grad()
def test_without_gradients_around_it() -> None:
    (made,) = convert_feedforward(trained_once(), batches(), partial(FFF, depth=1, leaf_width=4), steps=50)
    assert made.final_error < made.initial_error


@pytest.mark.parametrize(("model", "config"), [(LlamaModel, LlamaConfig), (Phi3Model, Phi3Config)])
@pytest.mark.parametrize("factory", [partial(FFF, depth=2, leaf_width=8), partial(FF, width=16)])
def test_in_the_place_of_a_gated_mlp_output_weights_are_fitted(
    factory: partial[FFF], model: type[nn.Module], config: type[LlamaConfig | Phi3Config]
) -> None:
    """Else the error relative to outputs that are small begins at a million, and ends at thousands."""
    (made,) = convert_feedforward(gated(model, config), gated_data(), factory, steps=500, lr=5e-3)
    assert made.initial_error < 1
    assert made.final_error < 0.8 * made.initial_error


def test_what_cannot_begin_from_the_weights_is_distilled() -> None:
    factory = partial(NoisyTopKMoE, num_experts=4, expert_width=8)
    with pytest.warns(UserWarning, match=r"replaces layers.0.mlp has an error of .*, a constant has 1: use more steps"):
        (made,) = convert_feedforward(gated(LlamaModel, LlamaConfig), gated_data(), factory, steps=200, lr=1e-2)
    assert made.final_error < 0.5 * made.initial_error


def test_an_error_that_is_no_number_is_told() -> None:
    with pytest.warns(UserWarning, match="replaces .* has an error of nan, a constant has 1"):
        convert_feedforward(trained(), batches(), partial(FFF, depth=1, leaf_width=4), steps=50, lr=1e30)


def gated(model: type[nn.Module], config: type[LlamaConfig | Phi3Config]) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 24,
        "pad_token_id": 0,
    }
    return model(config(**sizes, num_attention_heads=4, num_key_value_heads=4)).eval()


def gated_data() -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.randint(50, (4, 6))} for _ in range(50)]


@pytest.mark.parametrize(
    ("sizes", "held_out"),
    [
        ([40] * 10 + [1], 41), ([100] * 9 + [500], 500), ([1] * 30, 3), ([2] * 10, 2), ([400, 1], 40), ([200], 20),
        ([500] * 9, 500), ([128] * 64, 6 * 128),
    ],
    ids=str,
)  # fmt: skip
def test_about_a_tenth_is_held_out(sizes: list[int], held_out: int) -> None:
    model = trained()
    data = torch.randn(sum(sizes), D)
    ((train, rest),) = rows(model, list(data.split(sizes)))
    assert len(rest) == held_out
    assert torch.equal(torch.cat([train, rest]), data)


GELU = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def gelu_encoder() -> nn.Module:
    block = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(block, 2)


@pytest.mark.parametrize("factory", [partial(FF, width=4), partial(FFF, depth=1, leaf_width=4)])
def test_another_activation_warns_once(factory: partial[FF]) -> None:
    with pytest.warns(UserWarning, match=r"of layers\.0 is GELU\(.*none'\), that of its FFF? is ReLU\(\)") as warned:
        convert_feedforward(gelu_encoder(), torch.randn(10, 20, 8).split(2), factory, steps=0)
    assert len(warned) == 1
    assert warned[0].filename == __file__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_activation_is_not_told(dtype: torch.dtype, recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    data = torch.randn(400, 8).to(dtype).split(40)
    for activation in (nn.GELU, partial(nn.GELU, approximate="tanh")):
        for factory in (partial(FF, width=4), partial(FFF, depth=1, leaf_width=4, dropout=0.5)):
            model = copy.deepcopy(GELU).to(dtype)
            convert_feedforward(model, data, partial(factory, activation=activation), steps=0)
    # its experts begin from their own initialisation
    convert_feedforward(
        copy.deepcopy(GELU),
        torch.randn(400, 8).split(40),
        partial(NoisyTopKMoE, num_experts=2, expert_width=4),
        steps=0,
    )
    assert not recwarn.list


def test_rounding_is_no_other_activation(recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, 3)).bfloat16()
    nn.init.constant_(model.get_parameter("2.bias"), 5.0)  # far from zero, where rounding is most of the variance
    data = [batch.bfloat16() for batch in batches()]
    convert_feedforward(model, data, partial(FF, width=4), steps=0)
    assert not recwarn.list


@pytest.mark.parametrize("batches", [torch.randn(40, 8), {"input": torch.randn(40, 8)}, BatchEncoding({"input": 0})])
def test_one_batch_is_no_list_of_batches(batches: Any) -> None:
    with pytest.raises(ValueError, match=f"batches is a {type(batches).__name__}: give a list of batches"):
        convert_feedforward(copy.deepcopy(GELU), batches, partial(FF, width=4))


def test_a_loader_of_inputs_and_labels() -> None:
    data = TensorDataset(torch.cat(batches()), torch.zeros(4000, dtype=torch.long))
    model = trained()
    (made,) = convert_feedforward(model, DataLoader(data, batch_size=500), partial(FF, width=H), steps=0)
    assert made.final_error < 1e-3


def test_a_loader_of_dictionaries_as_those_of_transformers() -> None:
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24)
    rows: Any = [{"input_ids": torch.randint(50, (6,)), "labels": torch.tensor(1), "idx": i} for i in range(80)]
    model = BertForSequenceClassification(config)
    (made,) = convert_feedforward(
        model, DataLoader(rows, batch_size=8), partial(FF, width=24, activation=nn.GELU), lambda n, m: "layer" in n, 0
    )
    assert made.final_error < 1e-3


class Takes(nn.Module):
    """Its MLP sees the sum of the tensors that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = copy.deepcopy(GELU)


class Two(Takes):
    def forward(self, x: Tensor, z: Tensor, scale: float = 1.0) -> Tensor:
        return self.mlp(scale * (x + z))


class Any_(Takes):
    def forward(self, *x: Tensor, **more: Tensor) -> Tensor:
        return self.mlp(sum(x) + sum(more.values()))


class Optional(Takes):
    def forward(self, x: Tensor | None = None, z: float = 0.0) -> Tensor:
        assert x is not None
        return self.mlp(x + z)


ONE, TWO, LABEL = torch.ones(20, 8), 2 * torch.ones(20, 8), torch.tensor(50.0)


@pytest.mark.parametrize(
    ("model", "batch", "expected"),
    [
        (Two, (ONE, TWO), 3),
        (Two, [ONE, TWO, LABEL], 3),  # what is behind the required arguments is a label
        (Two, {"z": TWO, "x": ONE, "y": LABEL}, 3),
        (Two, {"z": TWO, "x": ONE, "scale": 2.0}, 6),
        (Any_, (ONE, TWO, ONE), 4),
        (Any_, {"x": ONE, "y": TWO}, 3),
        (Optional, (ONE, LABEL), 1),
        (Optional, ONE, 1),
        (Optional, {"x": ONE, "z": LABEL}, 51),
    ],
)
@pytest.mark.filterwarnings("ignore:the activation of")
def test_what_of_a_batch_goes_to_the_model(model: type[Takes], batch: Any, expected: int) -> None:
    ((train, _),) = rows(model(), [batch])
    assert train.unique().tolist() == [expected]


@pytest.mark.parametrize(
    ("model", "batches"), [(GELU, (ONE, torch.zeros(20, dtype=torch.long))), (GELU, [ONE, ONE[0]]), (Two(), (ONE, TWO))]
)
def test_inputs_and_labels_are_no_list_of_batches(model: nn.Module, batches: Any) -> None:
    with pytest.raises(
        ValueError, match=r"batches is one batch \(\(20, 8\) torch.float32, .*give a list of batches, \[batch"
    ):
        convert_feedforward(copy.deepcopy(model), batches, partial(FF, width=4))


def test_a_gate_that_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k"):
        convert_feedforward(trained(), batches(), partial(NoisyTopKMoE, num_experts=4, expert_width=4, top_k=1))


def test_the_schedule_is_that_of_the_recipe() -> None:
    recipe = yaml.safe_load((Path(__file__).parents[2] / "configs" / "recipe" / "fff_distil.yaml").read_text())
    assert vars(distil.INVERSE_TEMPERATURE) == recipe["model"]["aux_weights"]["inverse_temperature"]["init_args"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_is_not_finite(value: float) -> None:
    data = batches()
    data[2][3, 0] = value
    with pytest.raises(ValueError, match="inputs or outputs of 0 are not finite: leave out the batches"):
        convert_feedforward(trained(), data, partial(FFF, depth=1, leaf_width=4))


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="no data reached 0"):
        convert_feedforward(trained(), [], partial(FF, width=4))
    with pytest.raises(ValueError, match="11 rows are too little data for 0"):
        convert_feedforward(trained(), [torch.randn(10, D), torch.randn(1, D)], partial(FF, width=4))
    with pytest.raises(ValueError, match="holds no MLP"):
        convert_feedforward(nn.Linear(2, 2), batches(), partial(FF, width=4))


@torch.no_grad()
def test_each_layer_of_a_sum_starts_from_what_those_before_it_leave() -> None:
    """One neuron that matters everywhere, two that matter in one half each: a shared part finds the first."""
    torch.manual_seed(0)
    up, down = nn.Linear(D, 3), nn.Linear(3, 1)
    up.weight.copy_(torch.eye(3, D))
    up.bias.copy_(torch.tensor([0.0, 0.0, 5.0]))  # the third is linear nearly everywhere
    down.weight.copy_(torch.tensor([[1.0, 1.0, 5.0]]))
    factory = partial(Forest, trees=1, depth=1, leaf_width=1, master_width=1)
    errors = {}
    for name, kind in (
        ("sum", factory),
        ("tree", partial(FFF, depth=1, leaf_width=1)),
        ("dense", partial(FF, width=1)),
    ):
        model = nn.Sequential(copy.deepcopy(up), nn.ReLU(), copy.deepcopy(down))
        (made,) = convert_feedforward(model, batches(), kind, steps=0)
        errors[name] = made.initial_error
        if name == "sum":
            shared = made.new.master.network[0].weight
            assert torch.allclose(shared, up.weight[2:], atol=1e-5)
            leaves = {
                int((up.weight - row).square().sum(1).argmin()) for row in made.new.trees[0].leaves.hidden_weight[:, 0]
            }
            assert leaves <= {0, 1}
    assert errors["sum"] < 0.5 * min(errors["tree"], errors["dense"])


def test_two_trees_start_better_than_one() -> None:
    errors = []
    for trees in (1, 2):
        torch.manual_seed(0)
        (made,) = convert_feedforward(
            trained(), batches(), partial(Forest, trees=trees, depth=2, leaf_width=2), steps=0
        )
        errors.append(made.initial_error)
    assert errors[1] < 0.7 * errors[0]
