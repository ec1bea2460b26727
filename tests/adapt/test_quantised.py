"""Linear layers that are quantised, or wrapped by adapters: what stays is reported in one line."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel, Phi3Config, Phi3Model

from fffexp.adapt.replace import replace_feedforward
from fffexp.layers import FF, FFF

D, H = 16, 24
TREE = partial(FFF, depth=2, leaf_width=3)
ADAPTERS = Path(sys.prefix) / "adapters"
SIZES: dict[str, Any] = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": H}


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 4, H, batch_first=True), 1).eval()


def quantised(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


class Wrapper(nn.Module):
    """As an adapter of peft: not a linear layer, which it holds."""

    def __init__(self, base: nn.Module, taken: int, given: int) -> None:
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, taken, given
        self.lora_A, self.lora_B = nn.Linear(taken, 2, bias=False), nn.Linear(2, given, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Lora(nn.Linear):
    """As loralib's: a linear layer and more."""

    def __init__(self, taken: int, given: int) -> None:
        super().__init__(taken, given)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, taken)), nn.Parameter(torch.zeros(given, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


class Bytes(nn.Linear):
    """As those of bitsandbytes and of models in eight bits: a weight of another kind."""

    def __init__(self, taken: int, given: int) -> None:
        super().__init__(taken, given)
        self.weight = nn.Parameter(self.weight.to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class Counted(nn.Linear):
    """Has a forward of its own, and is a linear layer all the same."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def test_quantised_layers_stay_and_are_reported() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.linear1 .* quantised.*: replace first, quantise afterwards"):
        replace_feedforward(quantised(encoder()), TREE)
    other = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))
    found = replace_feedforward(nn.ModuleDict({"quantised": quantised(encoder()), "other": other}), TREE)
    assert [each.name for each in found] == ["other.0"]
    assert list(found.left) == [f"quantised.layers.0.linear{i}" for i in (1, 2)]


@pytest.mark.parametrize("factory", [TREE, partial(FF, width=8)])
def test_a_model_is_quantised_after_its_mlps_were_replaced(factory: partial[FF]) -> None:
    model = encoder()
    replace_feedforward(model, factory)
    x = torch.randn(2, 5, D)
    before = model(x)
    assert torch.allclose(quantised(model)(x), before, atol=0.2)


@pytest.mark.parametrize("kind", [Lora, Bytes, partial(Wrapper, nn.Identity())])
@pytest.mark.parametrize("which", [(0,), (2,), (0, 2)])
def test_one_line_says_what_to_do(kind: Any, which: tuple[int, ...]) -> None:
    parts = [nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)]
    sizes = {0: (D, H), 2: (H, D)}
    parts = [kind(*sizes[i]) if i in which else part for i, part in enumerate(parts)]
    fix = "replace first, quantise afterwards" if kind is Bytes else "wrapped by an adapter .*: merge it first"
    with pytest.raises(ValueError, match=f"holds no MLP of a known form.*{fix}") as caught:
        replace_feedforward(nn.ModuleDict({"mlp": nn.Sequential(*parts)}), TREE)
    assert len(str(caught.value)) < 300


def test_gated_and_transposed_layers_are_reported_too() -> None:
    llama: Any = LlamaModel(LlamaConfig(**SIZES, vocab_size=50))
    phi3: Any = Phi3Model(Phi3Config(**SIZES, vocab_size=50, pad_token_id=2))
    gpt2: Any = GPT2Model(GPT2Config(vocab_size=50, n_embd=D, n_layer=1, n_head=4, n_inner=H))
    llama.layers[0].mlp.gate_proj = Wrapper(llama.layers[0].mlp.gate_proj, D, H)
    phi3.layers[0].mlp.gate_up_proj = Wrapper(phi3.layers[0].mlp.gate_up_proj, D, 2 * H)
    gpt2.h[0].mlp.c_fc = Wrapper(gpt2.h[0].mlp.c_fc, D, H)
    for model, path in ((llama, "layers.0.mlp.gate_proj"), (phi3, "layers.0.mlp.gate_up_proj")):
        found = replace_feedforward(model, TREE)
        assert [each.name for each in found] == ["layers.1.mlp"]
        assert list(found.left) == [path]
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.c_fc: it is wrapped by an adapter"):
        replace_feedforward(gpt2, TREE)


def test_a_linear_layer_with_a_forward_of_its_own_is_one() -> None:
    model = nn.Sequential(Counted(D, H), nn.ReLU(), Counted(H, D))
    assert [each.name for each in replace_feedforward(model, TREE)] == ["0"]


SCRIPT = """
from functools import partial
import torch
from torch import nn
from fffexp import FFF, replace_feedforward

def model():
    return nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))})

def try_(changed):
    try:
        print([each.name for each in replace_feedforward(changed, partial(FFF, depth=2, leaf_width=4))])
    except ValueError as error:
        print(error)
"""
PEFT = """
from peft import LoraConfig, get_peft_model
for names in (["0", "2"], ["0"]):
    try_(get_peft_model(model(), LoraConfig(target_modules=names)))
try_(get_peft_model(model(), LoraConfig(target_modules=["0", "2"])).merge_and_unload())
"""
TORCHAO = """
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
for config in (Int8DynamicActivationInt8WeightConfig(), Int8WeightOnlyConfig()):
    changed = model()
    quantize_(changed, config)
    try_(changed)
changed = model()
replace_feedforward(changed, partial(FFF, depth=2, leaf_width=4))
quantize_(changed, config)
print(changed["mlp"](torch.randn(3, 32)).shape)
"""


@pytest.mark.slow
@pytest.mark.skipif(not ADAPTERS.is_dir(), reason="make test-all installs peft and torchao into .venv/adapters")
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (PEFT, ["wrapped by an adapter (Linear of peft): merge it first"] * 2 + ["['mlp.0']"]),
        (TORCHAO, ["(Int8Tensor of torchao): replace first, quantise afterwards"] * 2 + ["torch.Size([3, 32])"]),
    ],
)
def test_peft_and_torchao(script: str, expected: list[str]) -> None:
    path = f"import sys; sys.path.insert(0, {str(ADAPTERS)!r})\n"
    run = subprocess.run([sys.executable, "-c", path + SCRIPT + script], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == len(expected)
    assert all(text in line for text, line in zip(expected, lines, strict=True))
