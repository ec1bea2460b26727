"""A trained vision transformer's layers made into trees, on data that is quickly learnt."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from fffexp.cli import main
from fffexp.layers import FF
from fffexp.models import ViT
from fffexp.paper import conversion
from fffexp.paper.cells import Cell
from fffexp.paper.table3 import DENSE


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
        conversion.CONSTANT,
        Cell("FFF", 32, 8),
        Cell("FF", 10),
        Cell("FFF", 64, 32),
        Cell("FF", 33),
    ]
    assert main([*command, "2"]) == 0
    found = json.loads(path.read_text())
    assert found["runs"][: len(first)] == first
    assert [run["seed"] for run in found["runs"]] == [0] * 6 + [1] * 6
    for run in found["runs"]:
        assert len(run["errors"]) == (0 if Cell.of(run) in (DENSE, conversion.CONSTANT) else 4)
        assert all(error < 1 for error in run["errors"]), "more than the mean is told"
        assert run["test_accuracy"] > 0.9 or Cell.of(run) == conversion.CONSTANT, "both classes are told apart"
    told = capsys.readouterr().out
    assert "FFF 4 leaves of 8 - FF of 10: " in told
    monkeypatch.setattr(conversion, "Replicas", None)  # nothing is left to train
    assert main([*command, "2"]) == 0
    assert told.endswith(capsys.readouterr().out)
    monkeypatch.setattr(conversion, "STEPS", 60)
    assert main([*command, "2"]) == 2
    assert "another measurement" in capsys.readouterr().err


def test_without_neurons_a_layer_gives_its_mean_output() -> None:
    torch.manual_seed(0)
    model = ViT(partial(FF, width=16), (1, 8, 8), 3, features=8, num_blocks=2).eval()
    x = torch.randn(5, 1, 8, 8)
    given: list[torch.Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, FF)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: given.append(args[0].detach()))
    bare = conversion.without_neurons(model, x)
    given.clear()
    model(x)
    for layer, own, z in zip(layers, (m for m in bare.modules() if isinstance(m, FF)), list(given), strict=True):
        mean = layer(z).flatten(0, -2).mean(0)
        torch.testing.assert_close(own(torch.randn(7, 8)), mean.expand(7, -1))
        assert layer(z).std(0).min() > 1e-4, "the layer itself is as it was"


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
