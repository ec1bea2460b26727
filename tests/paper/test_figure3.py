"""Time against the number of blocks: the cost model on made-up times, the command on small layers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fffexp.cli import main
from fffexp.paper import figure3
from fffexp.paper.figure3 import fit, local_slopes

SMALL = ["--leaf_width", "4", "--in_features", "24", "--out_features", "20", "--ff_depth", "2"]


def test_the_fit_finds_the_rates_that_made_the_times() -> None:
    flops, size = 1e6 * np.array([1, 2, 4, 8, 16, 32]), 1e6 * np.array([8, 7, 6, 5, 4, 3])
    seconds = 3e-6 + np.maximum(flops / 1e11, size / 4e10)
    found = fit(seconds, flops, size, 2e11)
    assert found.r_squared == pytest.approx(1, abs=1e-6)
    assert found.flops_per_s == pytest.approx(1e11, rel=0.01)
    assert found.bytes_per_s == pytest.approx(4e10, rel=0.01)
    assert found.call_s == pytest.approx(3e-6, rel=0.05)
    assert fit(seconds, flops, size, 5e10).flops_per_s <= 5e10
    with pytest.raises(ValueError, match="3 points cannot fit"):
        fit(seconds[:3], flops[:3], size[:3], 2e11)


def test_slopes() -> None:
    assert local_slopes([1, 2, 8], [5.0, 10.0, 10.0]) == pytest.approx([1, 0])


def records(*ratios: float) -> list[dict[str, Any]]:
    return [
        {"layer": "FFF", "depth_of_point": d, "k_of_point": 1, "top_k": None, "batch_size": 16,
         "training_width": 32 * 2**d,
         "speedup_over_ff": ratio}
        for d, ratio in enumerate(ratios)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ratios", "answer"),
    [((0.5, 2.0, 0.9, 1.5, 9.0), "w = 256 (1.50x)"), ((2.0, 3.0), "w = 32 (2.00x)"), ((0.5, 0.6), "none measured")],
)
def test_break_even_is_the_width_from_which_fff_stays_ahead(ratios: tuple[float, ...], answer: str) -> None:
    assert figure3.break_even(records(*ratios)) == f"  batch    16: {answer}"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fffexp.paper.commands.POINT_S", 0.01)
    limits = {"gemm_flops_per_s": 1e11, "read_bytes_per_s": 1e10}
    monkeypatch.setattr(figure3, "measure_limits", lambda dtype, device: limits)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_command_measures_draws_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "figure3.json"
    command = ["reproduce", "figure3", *SMALL, "--batch_sizes", "1", "9", "--json", str(path), "--depths"]
    assert main([*command, "1", "2"]) == 0
    first = json.loads(path.read_text())["records"]
    assert main([*command, "1", "2", "3", "4"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["records"][: len(first)] == first, "what was measured was measured again"
    # at each of 4 depths and 2 batch sizes MoE twice and FFF; FF to depth 2
    assert len(found["records"]) == 4 * 2 * 3 + 2 * 2
    assert {"FF", "MoE k=1", "MoE k=2", "FFF"} <= figure3.panels(found["records"])[9].keys()
    for part in ("local slopes", "R^2", "break-even", "counted operations a sample"):
        assert part in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    # drawn again without measuring
    monkeypatch.setattr(figure3, "bench", None)
    assert main([*command, "1", "2", "3", "4"]) == 0


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure3", "--json", "x.txt"], "ends in .json"),
        (["figure3", "--depths", "-1"], "depths"),
        (["figure9"], "unknown command 'reproduce figure9'"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *arguments]) == 2
    printed = capsys.readouterr().err.strip()
    assert message in printed
    assert "\n" not in printed


@pytest.mark.usefixtures("quick")
def test_a_file_of_another_measurement_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figure3.json"
    path.write_text('{"figure": "figure3", "setting": {}}')
    assert main(["reproduce", "figure3", *SMALL, "--depths", "1", "--json", str(path)]) == 2
    assert "another measurement" in capsys.readouterr().err
    assert path.read_text() == '{"figure": "figure3", "setting": {}}'
    path.write_text("[")
    assert main(["reproduce", "figure3", *SMALL, "--depths", "1", "--json", str(path)]) == 2
    assert "holds no records" in capsys.readouterr().err
