"""Figures 5 and 6 of arXiv 2308.14711 on small data."""

import json
import math
from pathlib import Path

import pytest
from points import table, trial

from fffexp.cli import main
from fffexp.paper import hardening


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "layers"),
    [("figure5", {"layer": [4, 8, 16]}), ("figure6", {f"blocks.{i}.layer": [4] for i in range(4)})],
)
def test_the_command_draws_what_fit_tracks(
    name: str,
    layers: dict[str, list[int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / f"{name}.json"
    command = ["reproduce", name, "--epochs", "3", "--json", str(path)]
    assert main(command) == 0
    trainings = list(json.loads(path.read_text())["trainings"].values())
    for training in trainings:
        assert training["entropies"].keys() == training["classes_by_leaf"].keys() == layers.keys()
        for curve in training["entropies"].values():
            assert len(curve) == 3
            assert all(0 < entropy < math.log(2) for entropy in curve)
    for layer, leaves in layers.items():
        counts = [training["classes_by_leaf"][layer] for training in trainings]
        assert [len(each) for each in counts] == leaves
        # 20 of 200 rows are for validation, half of each of two classes; an image is 17 tokens, in the last block 1
        tokens = 1 if layer in ("layer", "blocks.3.layer") else 17
        assert [[sum(column) for column in zip(*each, strict=True)] for each in counts] == [
            [10 * tokens, 10 * tokens]
        ] * len(leaves)
    printed = capsys.readouterr().out
    assert path.with_suffix(".png").stat().st_size > 10_000
    monkeypatch.setattr(hardening, "train", None)  # nothing is left to train
    assert main(command) == 0
    assert capsys.readouterr().out in printed
    assert main([*command, "--epochs", "2"]) == 2
    assert "another measurement" in capsys.readouterr().err


def test_leaves_that_say_the_class() -> None:
    training = {"entropies": {"layer": [0.69, 0.5, 0.1]}, "classes_by_leaf": {"layer": [[10, 0], [0, 10]]}}
    found = table(trial(0, "FFF", [], training_width=16, leaf_width=8, depth=1), trainings={"0": training})
    line = hardening.report(found).splitlines()[1].split()
    assert line[-2:] == ["2", f"{math.log(2):.3f}"]
    assert (line[3], line[7]) == ("0.690", "0.100")
