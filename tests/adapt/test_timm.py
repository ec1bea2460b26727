"""Layers in models of timm."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TIMM = Path(sys.prefix) / "timm"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TIMM.is_dir(), reason="make test-all installs timm into .venv/timm"),
]
SWIGLU = """
import json
from timm_models import FFF, SIZES, partial, replace_feedforward, timm

for more in ({}, {"global_pool": "map", "class_token": False}):
    model = timm.create_model("vit_tiny_patch16_224", mlp_layer=timm.layers.SwiGLU, **SIZES, **more)
    print(json.dumps([each.name for each in replace_feedforward(model, partial(FFF, depth=2, leaf_width=4))]))
"""


def lines(*command: str) -> list[Any]:
    run = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=1200, cwd=Path(__file__).parent
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_gated_mlps_as_timm_initialises_them() -> None:
    blocks = ["blocks.0.mlp", "blocks.1.mlp"]
    assert lines("-c", SWIGLU) == [blocks, [*blocks, "attn_pool.mlp"]]


def test_models_of_timm() -> None:
    found = lines("timm_models.py")[-1]
    assert found["vit"]["names"] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert found["deit"]["names"] == found["vit"]["names"]
    assert found["mixer"]["names"] == [f"blocks.{i}.mlp_{of}" for i in range(2) for of in ("tokens", "channels")]
    for each in found.values():
        assert each["trained"]
        assert each["shape"] == [4, 5]
        assert each["difference"] < 1e-5, "a dense layer of the same weights changes nothing"


def test_the_table_of_architectures(tmp_path: Path) -> None:
    page = tmp_path / "architectures.md"
    text = (Path(__file__).parents[2] / "docs/architectures.md").read_text()
    page.write_text(text)
    lines("architectures.py", str(page))
    assert page.read_text() == text
