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


@pytest.mark.usefixtures("small")
@pytest.mark.slow
def test_the_command_converts_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(conversion.SETTING["distillation"], "steps", 50)
    path = tmp_path / "conversion.json"
    command = ["reproduce", "conversion", "--json", str(path), "--trees", "2x8", "1x32", "--seeds"]
    assert main([*command, "1"]) == 0
    first = json.loads(path.read_text())["trials"]
    assert [(each["params"]["layer"], each["params"]["training_width"]) for each in first] == [
        ("FF", 128), (conversion.MEAN, 0), ("FFF", 32), ("FF", 10), ("FFF", 64), ("FF", 33),
    ]  # fmt: skip
    assert main([*command, "2"]) == 0
    found = json.loads(path.read_text())["trials"]
    for number, (old, new) in enumerate(zip(first, found, strict=True)):
        assert new["runs"][:1] == old["runs"]
        assert [run["seed"] for run in new["runs"]] == [0, 1]
        for run in new["runs"]:
            assert all(error < 1 for error in run.get("errors", [])), "no better than the mean"
            assert len(run.get("errors", [])) == (4 if number > 1 else 0)
            assert run["test/accuracy"] > 0.9 or number == 1
    printed = capsys.readouterr().out
    monkeypatch.setattr(conversion, "run", None)  # nothing is left to train
    assert main([*command, "2"]) == 0
    assert printed.endswith(capsys.readouterr().out)
    monkeypatch.setitem(conversion.SETTING["distillation"], "steps", 60)
    assert main([*command, "2"]) == 2
    assert "another measurement" in capsys.readouterr().err


def test_a_layer_without_neurons_gives_its_mean_output() -> None:
    torch.manual_seed(0)
    model = ViT(partial(FF, width=16), (1, 8, 8), 3, features=8, num_blocks=2).eval()
    x = torch.randn(5, 1, 8, 8)
    given: list[torch.Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, FF)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: given.append(args[0].detach()))
    bare = conversion.with_mean_outputs(model, x)
    given.clear()
    model(x)
    own = [module for module in bare.modules() if isinstance(module, FF)]
    for layer, bare_layer, z in zip(layers, own, list(given), strict=True):
        mean = layer(z).flatten(0, -2).mean(0)
        torch.testing.assert_close(bare_layer(torch.randn(7, 8)), mean.expand(7, -1))
        assert layer(z).std(0).min() > 1e-4, "the layer itself is as it was"


@pytest.mark.parametrize(
    ("tree", "message"),
    [("4", "give DEPTHxLEAF"), ("x8", "give DEPTHxLEAF"), ("2x8x1", "give DEPTHxLEAF"),
     ("2x0", "2x0"), ("0x128", "no fewer than the 128"), ("60x8", "lower depth")],
)  # fmt: skip
def test_mistakes(tree: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "conversion", "--trees", tree]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--trees" in line
    assert message in line
