"""A layer's speedup beside that of the model it stands in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fffexp import FF, FFF
from fffexp.bench.measure import mlp
from fffexp.cli import main
from fffexp.models.transformer import TransformerBlock

SIZES = [
    "--leaf_width",
    "4",
    "--in_features",
    "24",
    "--out_features",
    "24",
    "--depths",
    "3",
    "--batch_sizes",
    "130",
    "--seconds",
    "0.01",
]


def test_models_and_layers_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFFEXP_TIMING_LOCK", str(tmp_path / "timing.lock"))
    command = ["bench", "model", *SIZES, "--layers", "NoisyTopKMoE", "FFF", "--seconds", "0.01"]
    command += ["--json", str(tmp_path / "model.json")]
    assert main(command) == 0
    content = json.loads((tmp_path / "model.json").read_text())
    assert [(r["model"], r["layer"]) for r in content["records"]] == [
        (model, layer) for model in ("MLP", "transformer block") for layer in ("FF", "NoisyTopKMoE", "FFF")
    ]
    for r in content["records"]:
        assert r["layer_share"] == pytest.approx(r["layer_s"] / r["model_s"])
        assert (r["layer_speedup"] == r["model_speedup"] == 1) == (r["layer"] == "FF")
        assert (r["in_features"], r["training_width"], r["batch_size"]) == (24, 32, 130)
    assert main(command) == 0
    assert json.loads((tmp_path / "model.json").read_text()) == content, "what is there is kept"


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
    model = mlp(layer).eval()
    first, _, held, classifier = model.children()
    x = torch.randn(5, 6)
    assert held is layer
    torch.testing.assert_close(model(x), classifier(layer(torch.relu(first(x)))))
