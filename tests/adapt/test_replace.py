"""Layers in models of torch and transformers, in the place of their MLPs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt.same_weights import copy_weights
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoConfig,
    AutoModel,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    BigBirdPegasusConfig,
    BloomConfig,
    BloomModel,
    ConvNextConfig,
    ConvNextModel,
    GPT2Config,
    GPT2LMHeadModel,
    LEDConfig,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    MptConfig,
    MptModel,
    OPTConfig,
    OPTModel,
    Phi3Config,
    Phi3Model,
    Swinv2Config,
    Swinv2Model,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

import fffexp
from fffexp.adapt.replace import replace_feedforward
from fffexp.layers import FF, FFF, FeedforwardLayer, NoisyTopKMoE

D, H = 16, 24  # features and hidden neurons of every model below
TREE = partial(FFF, depth=2, leaf_width=3)
SIZES: dict[str, Any] = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": H}
BART: dict[str, Any] = {
    f"{part}_{size}": number
    for part in ("encoder", "decoder")
    for size, number in (("layers", 1), ("ffn_dim", H), ("attention_heads", 4))
}
TOKENS: dict[str, Any] = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(12).view(2, 6) + 3}


def x() -> dict[str, Tensor]:
    return {"x": torch.linspace(-1, 1, 2 * 6 * D).view(2, 6, D)}


def encoder() -> nn.Module:
    block = nn.TransformerEncoderLayer(D, 4, H, dropout=0.1, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(block, 2)


def decoder() -> nn.Module:
    return nn.TransformerDecoderLayer(D, 4, H, dropout=0.1, batch_first=True)


Make = Callable[[], nn.Module]
Given = Callable[[], dict[str, Tensor]]
# what makes it, what it takes, its activation unless it is gated, and how many MLPs it has
MODELS: dict[str, tuple[Make, Given, Make | None, int]] = {
    "encoder": (encoder, lambda: {"src": x()["x"]}, nn.GELU, 2),
    "decoder": (decoder, lambda: {"tgt": x()["x"], "memory": x()["x"]}, nn.ReLU, 1),
    "bert": (lambda: BertModel(BertConfig(**SIZES, **TOKENS)), tokens, nn.GELU, 2),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=D, n_layer=2, n_head=4, n_inner=H, **TOKENS)),
        tokens, partial(nn.GELU, approximate="tanh"), 2,
    ),
    "vit": (
        lambda: ViTModel(ViTConfig(**SIZES, image_size=8, patch_size=4)),
        lambda: {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)}, nn.GELU, 2,
    ),
    "t5": (
        lambda: T5Model(T5Config(d_model=D, d_kv=4, d_ff=H, num_layers=2, num_heads=4, **TOKENS)),
        lambda: tokens() | {"decoder_input_ids": tokens()["input_ids"]}, nn.ReLU, 4,
    ),
    "bart": (
        lambda: BartModel(BartConfig(d_model=D, activation_dropout=0.1, **BART, **TOKENS)),
        lambda: tokens() | {"decoder_input_ids": tokens()["input_ids"]}, nn.GELU, 2,
    ),
    "opt": (lambda: OPTModel(OPTConfig(ffn_dim=H, word_embed_proj_dim=D, **SIZES, **TOKENS)), tokens, nn.ReLU, 2),
    "llama": (lambda: LlamaModel(LlamaConfig(**SIZES, **TOKENS)), tokens, None, 2),
    "modernbert": (
        lambda: ModernBertModel(ModernBertConfig(**SIZES, **TOKENS, cls_token_id=0, sep_token_id=1)), tokens, None, 2,
    ),
    "phi3": (lambda: Phi3Model(Phi3Config(**SIZES, **TOKENS, num_key_value_heads=4)), tokens, None, 2),
    "albert": (
        lambda: AlbertModel(AlbertConfig(embedding_size=D, **SIZES, **TOKENS)),
        tokens, partial(nn.GELU, approximate="tanh"), 1,
    ),
    "bloom": (
        lambda: BloomModel(BloomConfig(hidden_size=D, n_layer=2, n_head=4, **TOKENS)),
        tokens, partial(nn.GELU, approximate="tanh"), 2,
    ),
    "mpt": (lambda: MptModel(MptConfig(d_model=D, n_layers=2, n_heads=4, **TOKENS)), tokens, nn.GELU, 2),
    "convnext": (
        lambda: ConvNextModel(
            ConvNextConfig(hidden_sizes=[D, D], depths=[1, 1], num_stages=2, layer_scale_init_value=0.5)
        ),
        lambda: {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}, nn.GELU, 2,
    ),
    "sequential": (
        lambda: nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Dropout(0.1), nn.Linear(H, D), nn.LayerNorm(D)),
        lambda: {"input": x()["x"]}, nn.ReLU, 1,
    ),
}  # fmt: skip
WIDER = "bloom", "mpt", "convnext"  # always four times as wide


def output(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    found: Any = model(**given)
    return found if isinstance(found, Tensor) else found[0]


@pytest.mark.parametrize("name", [name for name, (*_, activation, _) in MODELS.items() if activation])
def test_a_dense_layer_of_the_same_weights_changes_nothing(name: str) -> None:
    make, given, activation, count = MODELS[name]
    assert activation
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        before = output(model, given())
        replaced = replace_feedforward(model, partial(FF, width=4 * D if name in WIDER else H, activation=activation))
        changed = output(model, given())
        for each in replaced:
            copy_weights(each.old, each.new)
        after = output(model, given())
    assert len(replaced) == count
    assert not torch.allclose(changed, before, atol=1e-4)
    assert torch.allclose(after, before, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_models_train_and_infer_with_trees(name: str) -> None:
    make, given, _, count = MODELS[name]
    torch.manual_seed(0)
    model = make().train()
    replaced = replace_feedforward(model, TREE)
    assert len(replaced) == count
    assert [m for m in model.modules() if isinstance(m, FeedforwardLayer)] == [each.new for each in replaced]
    loss = output(model, given()).square().mean() + fffexp.auxiliary_loss(model)
    loss.backward()
    for each in replaced:
        assert each.new.training
        for parameter in each.new.parameters():
            assert parameter.grad is not None
            assert torch.isfinite(parameter.grad).all()
    with torch.no_grad():
        hard = output(model.eval(), given())
        assert torch.isfinite(hard).all()
        for each in replaced:
            each.new.routing_mode = "soft"
        assert not torch.allclose(output(model, given()), hard), "the layers are in use"


def test_an_encoder_takes_padding() -> None:
    """Padded places, which torch's fused inference gives as zeros, hold values as in training."""
    padded = torch.tensor([[False] * 4 + [True] * 2, [False] * 6])
    torch.manual_seed(0)
    model = encoder().eval()
    with torch.no_grad():
        before = model(x()["x"], src_key_padding_mask=padded)
        for each in replace_feedforward(model, partial(FF, width=H, activation=nn.GELU)):
            copy_weights(each.old, each.new)
        after = model(x()["x"], src_key_padding_mask=padded)
    assert torch.allclose(after[~padded], before[~padded], atol=1e-5)
    assert not before[padded].any()
    assert after[padded].all()


def test_sizes_before_and_after() -> None:
    (each,) = replace_feedforward(MODELS["sequential"][0](), TREE)
    assert each.name == "0"
    assert each.old_sizes == {
        "training_width": H, "training_size": H, "inference_width": H, "inference_size": H,
        "parameters": 2 * D * H + H + D, "flops_per_sample": 4 * D * H,
    }  # fmt: skip
    assert each.new_sizes == each.new.sizes()
    assert each.new_sizes["inference_size"] == 5
    llama = replace_feedforward(MODELS["llama"][0](), TREE)
    assert [e.name for e in llama] == ["layers.0.mlp", "layers.1.mlp"]
    assert llama[0].old_sizes["parameters"] == 3 * D * H
    assert llama[0].old_sizes["flops_per_sample"] == 6 * D * H
    assert replace_feedforward(MODELS["phi3"][0](), TREE)[0].old_sizes == llama[0].old_sizes


def test_what_is_behind_the_mlp_stays() -> None:
    model = MODELS["gpt2"][0]()
    replaced = replace_feedforward(model, TREE)
    mlp: Any = model.get_submodule("transformer.h.0.mlp")
    assert list(mlp) == [replaced[0].new, mlp[1]]
    assert mlp[1].p == 0.1
    sequential = MODELS["sequential"][0]()
    replace_feedforward(sequential, TREE)
    assert isinstance(sequential[-1], nn.LayerNorm)


def test_select() -> None:
    model = encoder()
    (each,) = replace_feedforward(model, TREE, select=lambda name, module: name.endswith("1"))
    assert each.name == "layers.1"
    with pytest.raises(ValueError, match=r"select takes none of the MLPs: layers\.0"):
        replace_feedforward(model, TREE, select=lambda name, module: False)


def test_mode_dtype_and_place_are_those_of_the_mlp() -> None:
    model = encoder().double().eval()
    (first, _) = replace_feedforward(model, TREE)
    assert not first.new.training
    assert {p.dtype for p in first.new.parameters()} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factory", [TREE, partial(FF, width=H), partial(NoisyTopKMoE, num_experts=4, expert_width=3)])
def test_the_type_is_that_of_what_comes_in(dtype: torch.dtype, factory: partial[FF], tmp_path: Path) -> None:
    MODELS["t5"][0]().save_pretrained(tmp_path)
    model = T5Model.from_pretrained(tmp_path, dtype=dtype)
    kept = model.get_submodule("encoder.block.0.layer.1.DenseReluDense.wo").weight.dtype
    assert kept == (torch.float32 if dtype == torch.float16 else dtype)
    replaced = replace_feedforward(model, factory)
    assert len(replaced) == 4
    assert {p.dtype for each in replaced for p in each.new.parameters()} == {dtype}
    for training in (True, False):
        found = output(model.train(training), MODELS["t5"][1]())
        assert found.dtype == dtype
        assert found.isfinite().all()


def test_an_mlp_in_two_places_is_replaced_in_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mlp = MODELS["llama"][0]().get_submodule("layers.0.mlp")
            self.one, self.other = mlp, mlp

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.other(x)

    model = Twice().eval()
    (each,) = replace_feedforward(model, TREE)
    assert model.one is model.other is each.new
    model.train()(torch.randn(3, D))
    both = sum(each.new.aux_losses["importance"](routing) for routing in each.new.routings)
    assert len(each.new.routings) == 2
    torch.testing.assert_close(fffexp.auxiliary_loss(model, {"importance": 1.0}), both)


def test_nothing_is_changed_if_a_layer_cannot_be_made() -> None:
    model = encoder()
    layers = iter([FF(D, D, 4)])
    with pytest.raises(StopIteration):
        replace_feedforward(model, lambda i, o: next(layers))
    assert not any(isinstance(m, FeedforwardLayer) for m in model.modules())


def test_looking_for_mlps_leaves_no_trace() -> None:
    torch.manual_seed(3)
    model = MODELS["gpt2"][0]().train()
    before = torch.get_rng_state()
    weights = {name: (p, p._version, p.clone()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="select takes none"):
        replace_feedforward(model, TREE, select=lambda name, module: False)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    for name, p in model.named_parameters():
        own, version, value = weights[name]
        assert p is own
        assert p._version == version
        assert torch.equal(p, value)


def test_a_model_without_weights_is_told() -> None:
    with torch.device("meta"):
        model = encoder()
    with pytest.raises(ValueError, match="meta device"):
        replace_feedforward(model, TREE)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_gradient_checkpointing(name: str) -> None:
    make, given, _, _ = MODELS[name]
    torch.manual_seed(0)
    model = make().train()
    replace_feedforward(model, TREE)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for _ in range(2):
        model.zero_grad()
        (output(model, given()).square().mean() + fffexp.auxiliary_loss(model)).backward()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    given_embeddings = {"inputs_embeds": torch.randn(2, 6, D, requires_grad=True)}
    output(model, given_embeddings)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        fffexp.auxiliary_loss(model)


def test_mlps_of_another_form_stay() -> None:
    """Those that the README names."""
    model = AutoModel.from_config(AutoConfig.for_model("xlnet", d_model=D, n_layer=1, n_head=4, d_inner=H, **TOKENS))
    with pytest.raises(ValueError, match="holds no MLP of a known form"):
        replace_feedforward(model, TREE)


@pytest.mark.parametrize(
    ("name", "sizes", "replaced", "holder"),
    [
        ("mixtral", {"num_local_experts": 2}, [], "mlp.experts"),
        ("granitemoe", {"num_local_experts": 2}, [], "block_sparse_moe.experts"),
        ("jetmoe", {"num_local_experts": 2, "num_experts_per_tok": 2, "kv_channels": 4}, [], "mlp"),
        ("gpt_oss", {"num_local_experts": 2, "head_dim": 4}, [], "mlp.experts"),
        (
            "qwen2_moe",
            {"num_experts": 2, "moe_intermediate_size": H, "shared_expert_intermediate_size": H},
            ["layers.0.mlp.shared_expert", "layers.1.mlp.shared_expert"],
            "mlp.experts",
        ),
        (
            "deepseek_v3",
            {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 4,
             "q_lora_rank": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "qk_nope_head_dim": 4,
             "moe_intermediate_size": H},
            ["layers.0.mlp", "layers.1.mlp.shared_experts"],
            "mlp.experts",
        ),
    ],
)  # fmt: skip
def test_routed_experts_stay_and_are_reported(
    name: str, sizes: dict[str, int], replaced: list[str], holder: str
) -> None:
    model = AutoModel.from_config(AutoConfig.for_model(name, **TOKENS | SIZES | {"num_key_value_heads": 4} | sizes))
    layers = [i for i in range(2) if (name, i) != ("deepseek_v3", 0)]
    if not replaced:
        with pytest.raises(
            ValueError, match=rf"holds no MLP of a known form.*; layers\.0\.{holder} \(and 1 more\): .* routed experts"
        ):
            replace_feedforward(model, TREE)
        return
    found = replace_feedforward(model, TREE)
    assert [each.name for each in found] == replaced
    assert list(found.left) == [f"layers.{i}.{holder}" for i in layers]
    assert "routed experts" in found.left[f"layers.1.{holder}"]


def test_a_block_that_cannot_be_run_alone_stays() -> None:
    """Those that the README names: sequences of an encoder with windows or blocks are of certain lengths."""
    for config in (LEDConfig(attention_window=4, d_model=D, **BART), BigBirdPegasusConfig(d_model=D, **BART)):
        found = replace_feedforward(AutoModel.from_config(config), TREE)
        assert [each.name for each in found] == ["decoder.layers.0"]


def test_swin_v2_adds_its_residual_outside() -> None:
    config = Swinv2Config(image_size=8, patch_size=2, embed_dim=D, depths=[1], num_heads=[2], window_size=2)
    found = replace_feedforward(Swinv2Model(config), TREE)
    block = "encoder.layers.0.blocks.0"
    assert [each.name for each in found] == [block]
    assert list(found.left) == [f"{block}.attention.self.continuous_position_bias_mlp.0"]


class Held(nn.Module):
    """A block that holds its linear layers itself; `between` is what else it does, in training with `dropout`."""

    dropout = 0.0

    def __init__(self, between: Callable[[Tensor], Tensor], activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(D), nn.Linear(D, H), nn.Linear(H, D)
        self.activation_fn, self.between = activation, between

    def forward(self, x: Tensor, mask: Tensor | None, head_mask: Tensor | None, cache: None = None) -> tuple[Tensor]:
        hidden = self.between(self.activation_fn(self.fc1(self.norm(x))))
        return (x + self.fc2(nn.functional.dropout(hidden, self.dropout, self.training)),)


class Dropping(Held):
    """By a function, at what is not known to be a probability."""

    dropout = 0.5


@pytest.mark.parametrize(
    ("between", "activation", "known"),
    [
        (lambda x: x, nn.SiLU(), True),
        (lambda x: x + 1, nn.SiLU(), False),
        (nn.Dropout(0.1), nn.SiLU(), False),  # would drop the layer's outputs
        (lambda x: x, nn.Identity(), False),
        (lambda x: x, nn.Softmax(-1), False),
    ],
)
def test_a_block_that_holds_its_linear_layers(
    between: Callable[[Tensor], Tensor], activation: nn.Module, known: bool
) -> None:
    model = nn.ModuleList([Held(between, activation)])
    if not known:
        with pytest.raises(ValueError, match="holds no MLP of a known form"):
            replace_feedforward(model, TREE)
        return
    (replaced,) = replace_feedforward(model, TREE)
    assert replaced.name == "0"
    x = torch.linspace(-1, 1, 2 * 6 * D).view(2, 6, D)
    block = model[0].eval()
    assert isinstance(block, Held)
    assert torch.equal(block(x, None, None)[0], x + replaced.new(block.norm(x)))


class Noisy(nn.Module):
    """Mean and deviation of what goes down, which is no gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = self.up(x).chunk(2, -1)
        return self.down(mean + torch.randn_like(mean) * deviation)


def test_a_module_that_draws_random_numbers_stays() -> None:
    with pytest.raises(ValueError, match="holds no MLP of a known form"):
        replace_feedforward(nn.ModuleList([Noisy()]), TREE)


def test_dropout_by_a_function_would_drop_the_layers_outputs() -> None:
    with pytest.raises(ValueError, match="holds no MLP of a known form"):
        replace_feedforward(nn.ModuleList([Dropping(lambda x: x, nn.SiLU())]), TREE)
    block = Held(lambda x: x, nn.SiLU())
    block.activation_dropout = nn.Dropout(0.1)  # no number, which could be set to 0
    with pytest.raises(ValueError, match="holds no MLP of a known form"):
        replace_feedforward(nn.ModuleList([block]), TREE)


def test_no_dropout_is_left_behind_the_layer() -> None:
    model = BartModel(BartConfig(d_model=D, activation_dropout=0.9, dropout=0.0, **BART, **TOKENS)).train()
    (decoder,) = replace_feedforward(model, partial(FF, width=H), lambda name, _: name == "decoder.layers.0")
    assert decoder.name == "decoder.layers.0"
    assert model.encoder.layers[0].activation_dropout == 0.9, "looked at and left"
    replace_feedforward(model, partial(FF, width=H))
    given = tokens() | {"decoder_input_ids": tokens()["input_ids"]}
    assert torch.equal(output(model, given), output(model, given))


@pytest.mark.parametrize("sizes", [(D, D), (H, 5)])
def test_a_layer_of_other_sizes_is_refused(sizes: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, 5))
    with pytest.raises(ValueError, match=f"a layer of {sizes[0]} -> {sizes[1]} for 0, an MLP of {D} -> 5: use the in_"):
        replace_feedforward(model, lambda *_: FFF(*sizes, depth=1, leaf_width=4))
    assert isinstance(model[0], nn.Linear)


def test_a_gate_that_never_trains_is_refused_in_training() -> None:
    model = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))
    replace_feedforward(model, partial(NoisyTopKMoE, num_experts=4, expert_width=8, top_k=1))
    x = torch.randn(5, D)
    assert model.eval()(x).shape == (5, D)
    with pytest.raises((ValueError, RuntimeError), match="top_k"):
        model.train()(x)
