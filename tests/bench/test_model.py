"""A layer's speedup beside that of the model it stands in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fffexp import FF, FFF
from fffexp.bench import inference
from fffexp.bench.model import MLP
from fffexp.cli import main
from fffexp.models.transformer import TransformerBlock

SIZES = ["--leaf_width", "4", "--in_features", "24", "--out_features", "24", "--depths", "3", "--batch_sizes", "130"]


def test_models_and_layers_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "POINT_S", 0.01)
    path = tmp_path / "model.json"
    assert main(["bench", "model", *SIZES, "--json", str(path)]) == 0
    records = json.loads(path.read_text())["records"]
    assert [(r["model"], r["layer"]) for r in records] == [
        (model, layer) for model in ("MLP", "transformer block") for layer in ("FF", "NoisyTopKMoE", "FFF")
    ]
    for r in records:
        assert r["layer_share"] == pytest.approx(r["layer_s"] / r["model_s"])
        if r["layer"] == "FF":
            assert r["layer_speedup"] == r["model_speedup"] == 1


def test_the_block_is_torchs_own_encoder_layer() -> None:
    torch.manual_seed(0)
    ours: Any = TransformerBlock(lambda i, o: FF(i, o, 40), 24, 4).eval()
    theirs = torch.nn.TransformerEncoderLayer(24, 4, 40, dropout=0.0, batch_first=True, norm_first=True).eval()
    first, _, _, second = ours.layer.network
    pairs = (
        (theirs.self_attn.in_proj_weight, ours.qkv.weight),
        (theirs.self_attn.in_proj_bias, ours.qkv.bias),
        (theirs.self_attn.out_proj.weight, ours.projection.weight),
        (theirs.self_attn.out_proj.bias, ours.projection.bias),
        (theirs.linear1.weight, first.weight),
        (theirs.linear1.bias, first.bias),
        (theirs.linear2.weight, second.weight),
        (theirs.linear2.bias, second.bias),
    )
    x = torch.randn(3, 7, 24)
    with torch.no_grad():
        for to, value in pairs:
            to.copy_(value)
        torch.testing.assert_close(ours(x), theirs(x))
    with pytest.raises(ValueError, match="heads is 5, which does not divide the 24 features"):
        TransformerBlock(lambda i, o: FF(i, o, 40), 24, 5)


def test_the_mlp_holds_the_layer() -> None:
    layer = FFF(6, 4, 2, 3).eval()
    model = MLP(layer).eval()
    x = torch.randn(5, 6)
    torch.testing.assert_close(model(x), model.classifier(layer(torch.relu(model.first(x)))))
