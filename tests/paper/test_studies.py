"""`fffexp reproduce table1|table2|table3`: which points are trained, where a file goes on, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fffexp.cli import main
from fffexp.paper import speeds, studies
from fffexp.paper.studies import PaperStudy

STUDIES = sorted(path.stem for path in studies.FOLDER.glob("*.yaml"))
SHAPES = ("training_width", "leaf_width", "depth")


@pytest.mark.parametrize("name", [name for name in STUDIES if not name.startswith("text")])
def test_sizes_of_every_point_fit_together(name: str) -> None:
    for point in PaperStudy(name, "fashion_mnist").points():
        width, leaf, depth = (point.params.get(key) for key in SHAPES)
        if leaf is not None:
            assert width == leaf * (point.params.get("num_experts") or 2 ** (depth or 0))
        assert point.recipe


def test_the_paper_s_points_are_there() -> None:
    points = [point.params for point in PaperStudy("table1_printed", "fashion_mnist").points()]
    assert len(points) == 4 + 2 * 16, "dense layers, and trees by either reduction of the loss"
    assert len({(p["training_width"], p.get("leaf_width")) for p in points}) == 20
    assert len(PaperStudy("table2", "fashion_mnist").points()) == 5 * 5


def test_other_data_replaces_the_first_config() -> None:
    study = PaperStudy("table1", "usps", 2)
    study.choose(lambda label, _: label == "FFF")
    args = study.arguments(study.points()[0], 1)
    assert "--data.init_args.name=usps" in args
    assert not [arg for arg in args if "fashion_mnist" in arg]
    assert study.spec.seeds == [0, 1]


def runs(path: Path) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    content = json.loads(path.read_text())
    return {
        (t["params"]["layer"], *(t["params"].get(key) for key in ("training_width", "leaf_width"))): t["runs"]
        for t in content["trials"]
    }


@pytest.mark.slow
def test_the_command_trains_and_goes_on_where_it_stopped(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table1.json"
    command = ["reproduce", "table1", "--training_widths", "16", "--jobs", "1", "--json", str(path)]
    assert main([*command, "--leaf_widths", "8", "--seeds", "2"]) == 0
    first = runs(path)
    command += ["--leaf_widths", "8", "4", "--seeds", "3"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    found = runs(path)
    assert found.keys() == {("FF", 16, None), ("FFF", 16, 8), ("FFF", 16, 4)}
    for point, before in first.items():
        assert found[point][:2] == before, "what was trained was trained again"
    assert all([run["seed"] for run in each] == [0, 1, 2] for each in found.values())
    content = json.loads(path.read_text())
    assert {row["n"] for row in content["cells"]} == {3}
    assert {row["metric"] for row in content["cells"]} == {"M_A", "G_A", "ETT_M", "ETT_G"}
    assert (content["table"], content["recipe"], content["seeds"]) == ("table1", "tuned", [0, 1, 2])
    assert all(trial["sizes"]["training_width"] == 16 for trial in content["trials"])
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    written = path.read_bytes()
    monkeypatch.setattr("fffexp.study.runner.StudyRunner", None)  # nothing is left to train
    assert main(command) == 0
    assert printed.endswith(capsys.readouterr().out)
    assert path.read_bytes() == written
    assert main([*command, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == content["cells"]
    config = small.parents[1] / "configs/recipe/fff.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"model": {"input_noise_std": 0.7}}))
    assert main(command) == 2
    assert "FFF" in (error := capsys.readouterr().err)
    assert "was trained by another recipe: give another file" in error


@pytest.mark.slow
def test_the_command_adds_controls(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speeds, "BESIDE_S", 0.1)
    path = tmp_path / "table1.json"
    command = ["reproduce", "table1", "--training_widths", "16", "--leaf_widths", "8", "--controls", "--seeds", "2"]
    assert main([*command, "--jobs", "1", "--json", str(path), "--show", "controls"]) == 0
    assert runs(path).keys() == {("FFF", 16, 8), *(("FF", width, None) for width in (17, 16, 9, 4))}
    (record,) = json.loads(path.read_text())["controls"]
    assert record["time_ratios"].keys() == {"17", "16", "9", "4"}
    printed = capsys.readouterr().out
    for kind in ("parameters", "width", "inference size", "inference time"):
        assert kind in printed


@pytest.mark.slow
def test_table_3_times_what_it_trains(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speeds, "TIMING_S", 0.1)
    path = tmp_path / "table3.json"
    command = ["reproduce", "table3", "--jobs", "1", "--blocks", "1", "--epochs", "2", "--seeds", "1"]
    command += ["--leaf_widths", "8", "--json", str(path)]
    assert main(command) == 0
    dense = {("FF", width, None) for width in (128, 12, 8)}
    assert runs(path).keys() == {*dense, ("none", 0, None), ("FFF", 128, 8), ("NoisyTopKMoE", 128, 16)}
    content = json.loads(path.read_text())
    times = {(speed["layer"], speed["training_width"]): speed for speed in content["speeds"]}
    assert times["FF", 128]["layer_speedup"] == times["FF", 128]["model_speedup"] == 1
    assert times["none", 0]["layer_s"] is None
    capsys.readouterr()
    assert main(command) == 0
    assert json.loads(path.read_text())["speeds"] == content["speeds"], "times are not taken again"
    command[command.index("--epochs") + 1] = "3"
    assert main(command) == 2
    assert "it holds another measurement, epochs is 2 there and 3 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table1", "--json", "/"], "--json /: name a file that ends in .json"),
        (["table1", "--json", "/proc/no/x.json"], "--json /proc/no/x.json cannot be written"),
        (["table1", "--training_widths", "13", "--leaf_widths", "8"], "table1.yaml has no such point"),
        (["table1", "--data", "letters"], "data: "),
        (["table1", "--recipe", "printed", "--layers", "SwitchMoE"], "table1_printed.yaml has FF, FFF"),
        (["table1", "--figure", "x.foo"], "--figure x.foo: name a file that ends in .png"),
        (["table1", "--seeds", "0"], "seeds: "),
        (["table3", "--leaf_widths", "3", "--blocks", "0"], "blocks: "),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_file_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table1.json"
    for content in ("[", "{}", '{"table": "table1", "runs": []}'):
        path.write_text(content)
        assert main(["reproduce", "table1", "--json", str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{path} holds no results of a study" in line
        assert path.read_text() == content
