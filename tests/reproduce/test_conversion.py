"""A trained vision transformer's layers made into trees, on data that is quickly learnt."""

import json
from pathlib import Path

import pytest

from fffexp.cli import main
from fffexp.reproduce import conversion
from fffexp.reproduce.cells import Cell
from fffexp.reproduce.table3 import DENSE


@pytest.mark.usefixtures("fashion")
def test_the_command_converts_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "STEPS", 50)
    path = tmp_path / "conversion.json"
    command = ["reproduce", "conversion", "--json", str(path), "--trees", "2x8", "1x32", "--seeds"]
    assert main([*command, "1"]) == 0
    first = json.loads(path.read_text())["runs"]
    assert [Cell.of(run) for run in first] == [
        DENSE,
        Cell("FFF", 32, 8),
        Cell("FF", 10),
        Cell("FFF", 64, 32),
        Cell("FF", 33),
    ]
    assert main([*command, "2"]) == 0
    found = json.loads(path.read_text())
    assert found["runs"][: len(first)] == first
    assert [run["seed"] for run in found["runs"]] == [0] * 5 + [1] * 5
    for run in found["runs"]:
        assert len(run["errors"]) == (0 if Cell.of(run) == DENSE else 4)
        assert all(error < 1 for error in run["errors"]), "more than the mean is told"
        assert run["test_accuracy"] > 0.9, "both classes are told apart"
    told = capsys.readouterr().out
    assert "FFF 4 leaves of 8 - FF of 10: " in told
    monkeypatch.setattr(conversion, "Replicas", None)  # nothing is left to train
    assert main([*command, "2"]) == 0
    assert told.endswith(capsys.readouterr().out)
    monkeypatch.setattr(conversion, "STEPS", 60)
    assert main([*command, "2"]) == 2
    assert "another measurement" in capsys.readouterr().err


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for tree in ("4", "x8", "2x0", "2x8x1"):
        assert main(["reproduce", "conversion", "--trees", tree]) == 2
        assert "--trees" in capsys.readouterr().err
    for tree, told in (("0x128", "no fewer than the 128"), ("60x8", "lower depth")):
        assert main(["reproduce", "conversion", "--trees", tree]) == 2
        assert told in capsys.readouterr().err
    path = tmp_path / "conversion.json"
    path.write_text('{"conversion": "ViT", "data": "cifar10"}')
    assert main(["reproduce", "conversion", "--json", str(path)]) == 2
    assert "another measurement" in capsys.readouterr().err
