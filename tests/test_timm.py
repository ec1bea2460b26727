"""Layers in models of timm."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TIMM = Path(sys.prefix) / "timm"


@pytest.mark.skipif(not TIMM.is_dir(), reason="make setup installs timm into .venv/timm")
def test_models_of_timm() -> None:
    run = subprocess.run(
        [sys.executable, Path(__file__).parent / "timm_models.py"], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["vit"]["names"] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert found["deit"]["names"] == found["vit"]["names"]
    assert found["mixer"]["names"] == [f"blocks.{i}.mlp_{of}" for i in range(2) for of in ("tokens", "channels")]
    for each in found.values():
        assert each["trained"]
        assert each["shape"] == [4, 5]
        assert each["difference"] < 1e-5, "a dense layer of the same weights changes nothing"
