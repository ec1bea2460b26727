"""The benchmark's numbers: what is timed, against what, and never for a wrong output."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fffexp import FFF
from fffexp.bench import contenders, inference, training
from fffexp.bench.contenders import Contender, Point
from fffexp.bench.machine import Limits, last_level_cache_bytes, measure_limits
from fffexp.cli import main

SMALL = [
    "--depths",
    "0",
    "3",
    "--leaf_width",
    "4",
    "--in_features",
    "24",
    "--out_features",
    "20",
    "--batch_sizes",
    "1",
    "33",
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rounds: the numbers are not looked at."""
    for module in (inference, training):
        monkeypatch.setattr(module, "POINT_S", 0.01)
    monkeypatch.setattr("fffexp.bench.commands.measure_limits", lambda dtype, device: Limits(1e11, 1e10))


def run(task: str, tmp_path: Path, *more: str) -> dict[str, Any]:
    path = tmp_path / "bench.json"
    assert main(["bench", task, *SMALL, *more, "--json", str(path)]) == 0
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def test_inference_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("inference", tmp_path, "--peers")
    told = capsys.readouterr().out
    records = found["records"]
    layers = ("FF", "NoisyTopKMoE", "FFF", "fastfeedforward")
    # the peer crashes at depth 0
    expected = [(w, b, layer) for w in (4, 32) for b in (1, 33) for layer in layers[: 3 if w == 4 else 4]]
    assert [(r["training_width"], r["batch_size"], r["layer"]) for r in records] == expected
    for r in records:
        assert told.count(r["layer"]) >= 2
        assert r["median_s"] > 0
        assert r["p10_s"] <= r["median_s"] <= r["p90_s"]
        assert r["max_abs_error"] < 1e-5
        assert r["limit_s"] == max(r["flops"] / 1e11, r["bytes"] / 1e10)
        assert r["task"] == "inference"
    deep = {r["layer"]: r for r in records if r["batch_size"] == 33 and r["training_width"] == 32}
    assert deep["FF"]["speedup_over_ff"] is None
    assert deep["FF"]["backend"] == "linear"
    assert deep["FF"]["flops"] == 33 * 2 * 32 * (24 + 20)
    assert deep["FF"]["bytes"] == 4 * (32 * (24 + 20 + 1) + 20 + 33 * (24 + 20))
    assert deep["FFF"]["flops"] == 33 * 2 * (3 * 24 + 4 * (24 + 20))
    assert deep["FFF"]["visited_share"] == 1
    assert all(deep["FFF"][f"speedup_over_{other}"] > 0 for other in ("ff", "moe", "peer"))
    assert deep["NoisyTopKMoE"]["top_k"] == 1
    assert deep["NoisyTopKMoE"]["num_experts"] == 8
    assert found["limits"] == {"gemm_flops_per_s": 1e11, "read_bytes_per_s": 1e10}
    assert {"cpu", "cores", "threads", "torch", "compiler", "commit", "date"} <= found["environment"].keys()


def test_training_records(tmp_path: Path) -> None:
    records = run("training", tmp_path, "--peers")["records"]
    # two peers' less at depth 0, and two sparse modes of FFF at each of 4 points
    assert len(records) == 14 + 8
    ran = {"FF": "linear", "NoisyTopKMoE": "eager", "FFF": "native", "fastfeedforward": "0.2.1"}
    assert {r["layer"]: r["backend"] for r in records}.items() >= ran.items()
    assert {r["backend"] for r in records if r["layer"] in ("FFF chosen_leaf", "FFF chosen_path")} == {"sparse"}
    for r in records:
        parts = r["forward_s"], r["backward_s"], r["optimizer_s"]
        assert all(part > 0 for part in parts)
        assert r["median_s"] == pytest.approx(sum(parts), rel=0.5)
    deep = {r["layer"]: r for r in records if r["batch_size"] == 33 and r["training_width"] == 32}
    # 1 + (2^d - 1) in / (w (in + out)): operations alone
    assert deep["FFF"]["operations_over_ff"] == pytest.approx(1 + 7 * 24 / (32 * 44))
    assert deep["FFF"]["speedup_over_ff"] > 0


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_backend_that_ran_is_named(tmp_path: Path, backend: str, dtype: str) -> None:
    records = run("inference", tmp_path, "--backend", backend, "--dtype", dtype)["records"]
    assert {r["backend"] for r in records if r["layer"] != "FF"} == {backend}
    assert {r["dtype"] for r in records} == {dtype}


class Wrong(nn.Module):
    def __init__(self, layer: FFF) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 1.001


def test_a_wrong_output_is_not_timed() -> None:
    layer = FFF(24, 20, 3, 4).eval()
    x = torch.randn(40, 24)
    Contender("FFF", "native", layer, layer, layer.forward_reference).check(x)
    for name, module in (("wrong", Wrong(layer)), ("nan", lambda x: layer(x) * math.nan)):
        with pytest.raises(RuntimeError, match=f"{name}.*is off by.*not timed"):
            Contender(name, "x", layer, module, layer.forward_reference).check(x)


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = FFF(24, 20, 3, 4)

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = layer(x)
            return y.detach() + 0.5 * (y - y.detach())

    contender = Contender("FFF", "native", layer, Half(), layer.forward_reference)
    with pytest.raises(RuntimeError, match="wrong gradient"):
        training._check(contender, torch.randn(8, 24))


def test_all_have_the_same_hidden_weights() -> None:
    point = Point(24, 20, 3, 4, 2, torch.float32, "cpu", "auto")
    ff, moe, fff = (c.layer for c in contenders.make(["FF", "NoisyTopKMoE", "FFF"], point, False))
    assert ff.training_width == moe.training_width == fff.training_width == 32
    assert ff.network[0].weight.data_ptr() == fff.leaves.hidden_weight.data_ptr()
    assert moe.experts is fff.leaves
    assert len(moe.route(torch.randn(300, 24)).unique()) == 8, "the gate sends all samples the same way"


def test_inputs_rotate_until_the_weights_do_not_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    point = Point(24, 20, 6, 4, 1, torch.float32, "cpu", "auto")
    some = contenders.make(["FFF"], point, False)
    monkeypatch.setattr(inference, "last_level_cache_bytes", lambda: 2**30)
    batches = inference.rotating(some, point, 1)
    assert inference.visited_share(some[0].layer.route, batches, 64) >= inference.WHOLE
    monkeypatch.setattr(inference, "last_level_cache_bytes", lambda: 100)
    assert len(inference.rotating(some, point, 1)) == 8
    assert len({float(batch[0, 0]) for batch in batches}) == len(batches)


def test_limits_are_plausible() -> None:
    limits = measure_limits(torch.float32, "cpu")
    assert 1e9 < limits.gemm_flops_per_s < 1e14
    assert 1e8 < limits.read_bytes_per_s < 1e13
    assert 2**18 <= last_level_cache_bytes() <= 2**32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", "-1"], "'-1' is not a whole number"),
        (["--batch_sizes", "0"], "'0' is not a whole number of at least 1"),
        (["--layers", "Dense"], "'Dense' is not one of FF"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "cuda:99"], "no such CUDA device"),
        (["--device", "gpu"], "give cpu, cuda"),
        (["--depths", "40"], "depth 40: the weights would take"),
        (["--peers", "--dtype", "bfloat16", "--depths", "1"], "float32 alone"),
        (["--json"], "--json"),
        (["--json", "/proc/no/x.json"], "--json /proc/no/x.json: "),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "inference", *arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told
    assert "\n" not in told
