"""Write the table of docs/architectures.md: what is replaced in each, and whether the model stays the same.

`make architectures` runs it, which installs timm. Models are small and of random weights, so nothing is fetched.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is a script

from adapt.same_weights import copy_weights, linears

from fffexp import FF, FeedforwardLayer, replace_feedforward
from fffexp.adapt.replace import Replacement, Replacements

PAGE = Path(__file__).parents[2] / "docs/architectures.md"
D, H, TOKENS = 32, 48, torch.arange(16).view(2, 8) + 3
SIZES: dict[str, Any] = {
    "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": H, "vocab_size": 50, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
BART: dict[str, Any] = {
    f"{part}_{size}": number
    for part in ("encoder", "decoder")
    for size, number in (("layers", 2), ("ffn_dim", H), ("attention_heads", 4))
}
IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8}
MLA: dict[str, Any] = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": H,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": H}
# by their model_type; what differs from SIZES
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "bert": {}, "roberta": {}, "electra": {"embedding_size": D}, "albert": {"embedding_size": D},
    "distilbert": {"dim": D, "hidden_dim": H, "n_heads": 4}, "deberta-v2": {}, "mpnet": {},
    "modernbert": {"cls_token_id": 0, "sep_token_id": 1},
    "xlnet": {"d_model": D, "n_layer": 2, "n_head": 4, "d_inner": H},
    "gpt2": {"n_embd": D, "n_layer": 2, "n_head": 4}, "gptj": {"n_embd": D, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global"], 2]], "num_heads": 4}, "gpt_neox": {},
    "opt": {"ffn_dim": H, "word_embed_proj_dim": D}, "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": D, "n_layers": 2, "n_heads": 4}, "falcon": {}, "phi": {}, "starcoder2": {},
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {"head_dim": 8}, "gemma2": {"head_dim": 8}, "olmo2": {},
    "phi3": {}, "glm": {"head_dim": 8}, "cohere": {}, "granite": {},
    "mixtral": {"num_local_experts": 4}, "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": H},
    "qwen3_moe": EXPERTS | {"head_dim": 8},
    "deepseek_v3": MLA | {"first_k_dense_replace": 1}, "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "granitemoe": {"num_local_experts": 4},
    "t5": {"d_model": D, "d_kv": 8, "d_ff": H, "num_layers": 2, "num_heads": 4},
    "switch_transformers": {"d_model": D, "d_kv": 8, "d_ff": H, "num_layers": 2, "num_heads": 4, "num_experts": 4},
    "bart": {"d_model": D} | BART, "marian": {"d_model": D, "decoder_start_token_id": 2} | BART,
    "pegasus": {"d_model": D} | BART, "led": {"d_model": D, "attention_window": 4} | BART,
    "vit": IMAGE, "deit": IMAGE, "dinov2": IMAGE, "beit": IMAGE,
    "clip_vision_model": IMAGE, "siglip_vision_model": IMAGE,
    "swin": IMAGE | {"patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    "swinv2": IMAGE | {"patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    "convnext": {"hidden_sizes": [16, D], "depths": [1, 1], "num_stages": 2, "layer_scale_init_value": 0.5},
    "convnextv2": {"hidden_sizes": [16, D], "depths": [1, 1], "num_stages": 2},
}  # fmt: skip
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": 2, "num_heads": 4, "num_classes": 5}
DEPTHS = {"depths": (1, 1, 1, 1)}
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": VIT, "deit_tiny_patch16_224": VIT, "beit_base_patch16_224": VIT,
    "cait_xxs24_224": VIT, "eva02_tiny_patch14_224": VIT,
    "mixer_s32_224": {"img_size": 64}, "resmlp_12_224": {"img_size": 64}, "gmlp_ti16_224": {"img_size": 64},
    "swin_tiny_patch4_window7_224": DEPTHS, "swinv2_tiny_window8_256": DEPTHS, "swinv2_cr_tiny_224": DEPTHS,
    "convnext_tiny": DEPTHS, "convnextv2_tiny": DEPTHS, "maxvit_rmlp_pico_rw_256": {}, "coatnet_nano_rw_224": {},
    "davit_tiny": {}, "efficientnet_b0": {}, "seresnet18": {},
}  # fmt: skip
TORCHVISION = ("convnext_tiny", "maxvit_t", "efficientnet_b0", "vgg11")


class QuickGELU(nn.Module):
    """Of CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = [QuickGELU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU(), nn.SiLU()]


class ScaledEncoderLayer(nn.TransformerEncoderLayer):
    """A subclass with a method of its own."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return 0.5 * super()._ff_block(x)


class Skip(nn.Sequential):
    """A subclass with a forward of its own, which adds the input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class SkipEach(nn.Sequential):
    """A subclass whose forward changes what its parts make."""

    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            x = 2 * part(x)
        return x


def architectures() -> Iterator[tuple[str, str, Callable[[], nn.Module], dict[str, Tensor]]]:
    """Library, name, what makes the model, and what it takes."""
    x = torch.linspace(-1, 1, 2 * 8 * D).view(2, 8, D)
    pair = partial(lambda: [nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)])
    block: dict[str, Any] = {"d_model": D, "nhead": 4, "dim_feedforward": H, "batch_first": True}
    for name, make, given in (
        ("TransformerEncoder", lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**block), 2), {"src": x}),
        (
            "TransformerDecoder",
            lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**block), 2),
            {"tgt": x, "memory": x},
        ),
        ("Transformer", lambda: nn.Transformer(D, 4, 2, 2, H, batch_first=True), {"src": x, "tgt": x}),
        ("a subclass of TransformerEncoderLayer", lambda: nn.Sequential(ScaledEncoderLayer(**block)), {"input": x}),
        ("Sequential", lambda: nn.Sequential(*pair()), {"input": x}),
        ("a subclass of Sequential, x + f(x)", lambda: nn.Sequential(Skip(*pair())), {"input": x}),
        ("a subclass of Sequential, 2 f(x) of each part", lambda: nn.Sequential(SkipEach(*pair())), {"input": x}),
    ):
        yield "torch.nn", name, make, given
    for name, sizes in HUGGING_FACE.items():
        config = AutoConfig.for_model(name, **(sizes if "depths" in sizes else SIZES | sizes))
        text = {"input_ids": TOKENS} | ({"decoder_input_ids": TOKENS} if config.is_encoder_decoder else {})
        pixels = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}
        vision = hasattr(config, "num_channels")
        yield "Hugging Face", name, partial(AutoModel.from_config, config), pixels if vision else text
    from adapt.timm_models import timm  # type: ignore[attr-defined]  # makes timm and torchvision importable

    torchvision = import_module("torchvision")
    for name, sizes in TIMM.items():
        make = partial(timm.create_model, name, **sizes)
        yield "timm", name, make, {"x": _images(sizes.get("img_size") or make().default_cfg["input_size"][-1])}
    vit = partial(torchvision.models.VisionTransformer, 32, 8, 2, 4, D, H)
    yield "torchvision", "VisionTransformer", vit, {"x": _images(32)}
    for name in TORCHVISION:
        yield "torchvision", name, partial(torchvision.models.get_model, name), {"x": _images(224)}


def _images(size: int) -> Tensor:
    return torch.linspace(-1, 1, 3 * size * size).sin().view(1, 3, size, size)


class Slot(FeedforwardLayer):
    """A layer that computes what it is given to compute."""

    training_width = flops_per_sample = 0

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.layer: nn.Module = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def row(library: str, name: str, make: Callable[[], nn.Module], given: dict[str, Tensor]) -> dict[str, str]:
    """What is replaced, and how far the output is off with layers of the same weights, as a share of the largest."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():  # else zeros and small scales of an initialisation would hide a difference
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.5 if p.dim() < 2 else p[0].numel() ** -0.5)
    before = _output(model, given)
    try:
        made = replace_feedforward(model, Slot)
        left = [*made.left.values()]
    except ValueError as error:
        reported = re.findall(r"; \S+(?: \(and (\d+) more\))?: ([^;]*)", str(error))
        made, left = Replacements([], {}), [reason for more, reason in reported for _ in range(1 + int(more or 0))]
    gated = [_fill(each, nn.GELU()) for each in made]
    differences = {}
    for activation in ACTIVATIONS if made else []:
        for each in made:
            _fill(each, activation)
        differences[str(activation)] = float((_output(model, given) - before).abs().max() / before.abs().max())
    best = min(differences, key=differences.__getitem__, default="")
    forms = ["gated: the MLP itself in its place" if all(gated) else f"{best} in the FF"] if made else []
    notes = [*forms, *(f"{count} stay: {why}" for why, count in Counter(map(_kind, left)).items())]
    return {
        "library": library,
        "architecture": f"`{name}`" if " " not in name else name,
        "replaced": str(len(made)),
        "stay": str(len(left)),
        "difference": _small(differences[best]) if made else "",
        "note": "; ".join(notes or ["none of a known form"]).replace("(approximate='none')", "()"),
    }


def _fill(each: Replacement, activation: nn.Module) -> bool:
    """Put an FF of the MLP's weights in the slot; the MLP itself, and return True, if it is gated."""
    assert isinstance(each.new, Slot)
    count, width = len(linears(each.old)), each.old_sizes["inference_width"]
    gated = count == 3 or each.old_sizes["flops_per_sample"] != 2 * width * (
        each.new.in_features + each.new.out_features
    )
    each.new.layer = each.old if gated else FF(each.new.in_features, each.new.out_features, width, activation)
    if not gated:
        copy_weights(each.old, each.new.layer)
    return gated


def _output(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    # with a graph: torch's fused inference passes methods of subclasses by
    found: Any = model(**given)
    return (found if isinstance(found, Tensor) else found[0]).detach()


def _small(difference: float) -> str:
    return "< 1e-5" if difference < 1e-5 else f"{difference:.0e}"


def _kind(reason: str) -> str:
    return re.sub(r"^it makes .* features of .*, so", "its widths differ, so", reason)


def table(rows: list[dict[str, str]]) -> str:
    """In Markdown."""
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0]), *(" | ".join(each.values()) for each in rows)]
    return "".join(f"| {line} |\n" for line in lines)


def main(page: Path = PAGE) -> None:
    """Write the table anew, and leave the rest of the page."""
    rows = []
    for architecture in architectures():
        print(*architecture[:2], file=sys.stderr, flush=True)
        rows.append(row(*architecture))
    page.write_text(re.sub(r"(^\|.*\n)+", lambda _: table(rows), page.read_text(), count=1, flags=re.MULTILINE))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
