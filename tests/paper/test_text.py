"""`fffexp reproduce text`: the rule's comparisons on made results, and the command on a small text."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fffexp.cli import main
from fffexp.configs import given
from fffexp.paper import speeds, studies, text
from fffexp.paper.studies import PaperStudy
from fffexp.study.results import Results, Trial
from fffexp.training.experiment import build

ROOT = Path(__file__).parents[2]


def made() -> Results:
    """Two budgets of four contenders; the layer gains half of what dense 512 does, then all of it."""
    of = {"none": ("none", 0), "dense 128": ("FF", 128), "dense 512": ("FF", 512), "tree": ("FFF", 0)}
    bits = {1: (2.8, 2.6, 2.4, 2.6), 3: (2.4, 2.2, 2.0, 2.0)}
    ms = {"dense 128": (0.02, 0.2), "dense 512": (0.05, 1.0), "tree": (0.03, 0.9)}
    noise = [0.0, 0.02, -0.01]
    trials = [
        Trial(
            2 * number + (epochs == 3),
            "COMPLETE",
            {"layer": layer, "contender": key, "width": width, "epochs": epochs},
            runs=[{"seed": s, "test/bits_per_byte": values[number] + x} for s, x in enumerate(noise)],
            sizes={"inference_size": 2 * width, "flops_per_sample": 4000 * width},
        )
        for number, (key, (layer, width)) in enumerate(of.items())
        for epochs, values in bits.items()
    ]
    timed = [
        {"contender": key} | {f"layer_b{n}_ms": t for n, t in zip((1, 256), v, strict=True)} for key, v in ms.items()
    ]
    return Results("text", "val/bits_per_byte", "min", trials=trials, extra={"speeds": timed})


def test_recovered_share_and_layers_of_equal_time() -> None:
    results = made()
    per_budget = text.budgets(results)
    assert {steps: [*trials] for steps, trials in per_budget.items()} == {
        steps: ["none", "dense 128", "dense 512", "tree"] for steps in (300, 900)
    }
    for steps, share in ((300, 0.5), (900, 1.0)):
        found = text.recovered(results, per_budget[steps], "tree")
        assert found is not None
        assert found[0] == pytest.approx(share)
    assert text.recovered(results, {"tree": per_budget[300]["tree"]}, "tree") is None, "nothing to compare with"
    pairs = {c.kinds[0]: c for c in text.at_equal_time(results, per_budget[300]) if text.name(c.trial) == "tree"}
    assert {size: text.name(c.control) for size, c in pairs.items()} == {"b1": "dense 128", "b256": "dense 512"}
    assert pairs["b256"].test.difference == pytest.approx(0.2)
    assert pairs["b1"].time_ratio == pytest.approx(2 / 3)
    assert "+0.200" in text.report(results)


@pytest.mark.parametrize("data", ["gcide", "python"])
def test_what_the_report_says_of_the_study(data: str) -> None:
    study = PaperStudy(f"text_{data}", data)
    rates = yaml.safe_load((ROOT / "studies/text_rates.yaml").read_text())["layers"]
    assert {text.NONE, text.DENSE} <= study.content["layers"].keys() <= rates.keys()
    for label, group in study.content["layers"].items():
        for point in group["points"]:
            before = [p for p in rates[label]["points"] if p["lr"] == point["lr"]]
            assert [p | {"epochs": point["epochs"]} for p in before] == [point], "it is not a contender of the rule"
    config = given(study.arguments(study.points()[0], 0))
    assert config["trainer.limit_train_batches"] == text.EPOCH_STEPS
    assert config["model.network.num_blocks"] == text.BLOCKS
    assert config["data.context"] * config["data.batch_size"] == 4096


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short text and a small model in place of the real ones; the folder of the studies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FFFEXP_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setattr(speeds, "TIMING_S", 0.05)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/gcide").write_bytes(np.random.default_rng(0).integers(97, 101, 6000, dtype=np.uint8).tobytes())
    for name in ("configs", "studies"):
        shutil.copytree(ROOT / name, tmp_path / name)
    folder = tmp_path / "studies/paper"
    path = folder / "text_gcide.yaml"
    study = yaml.safe_load(path.read_text())
    network = {"features": 16, "heads": 2}
    study["overrides"] = {f"model.network.init_args.{key}": value for key, value in network.items()} | {
        "trainer.limit_train_batches": 3,
        "trainer.limit_val_batches": 2,
        "data.init_args.context": 16,
    }
    study["layers"] = {name: study["layers"][name] for name in ("none", "dense 512", "SparseFF 512")}
    for group in study["layers"].values():
        group["points"] = [point for point in group["points"] if point["epochs"] == 1]
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    monkeypatch.setattr(studies, "FOLDER", folder)
    return folder


@pytest.mark.slow
def test_the_command_trains_times_and_goes_on(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.json"
    command = ["reproduce", "text", "--jobs", "1", "--seeds", "2", "--json", str(path)]
    assert main([*command, "--contenders", "none", "dense 512"]) == 0
    before: Any = {trial["params"]["contender"]: trial["runs"] for trial in json.loads(path.read_text())["trials"]}
    assert main([*command, "--speeds"]) == 0
    found = json.loads(path.read_text())
    runs = {trial["params"]["contender"]: trial["runs"] for trial in found["trials"]}
    assert {key: runs[key] for key in before} == before, "what was trained was trained again"
    assert found["monitor"] == "val/bits_per_byte"
    assert [run["seed"] for run in runs["SparseFF 512"]] == [0, 1]
    timed = {speed.pop("contender"): speed for speed in found["speeds"]}
    assert timed.keys() == runs.keys()
    assert {"model_b1_ms", "model_b256_ms"} <= timed["none"].keys()
    assert not timed["none"].keys() & {"layer_b1_ms", "layer_b256_ms"}, "it has no layer"
    assert all(timed[key]["layer_b256_ms"] > 0 for key in runs if key != "none")
    printed = capsys.readouterr().out
    assert "against the dense layer of equal time" in printed
    assert (tmp_path / "text.png").is_file()
    assert (tmp_path / "text_steps.png").is_file()
    # the weights that are timed are those that were trained
    study = PaperStudy("text_gcide", "gcide", 2)
    results = study.open(path, {"table": "text", "data": "gcide"})
    trial = next(t for t in study.wanted(results) if t.params["contender"] == "dense 512")
    fresh = build(study.arguments(trial, 0)).task.state_dict()
    trained = speeds._trained(trial.runs[0]["run_id"])
    assert trained.keys() == fresh.keys()
    assert not any(np.allclose(trained[key], fresh[key]) for key in fresh if key.endswith("mlp.fc.weight"))
    monkeypatch.setenv("FFFEXP_OUTPUTS", str(tmp_path / "elsewhere"))
    capsys.readouterr()
    assert main([*command, "--speeds"]) == 2
    assert "has no checkpoint of run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--contenders", "dense 49"], "it has"),
        (["--steps", "301"], "has [300"),
        (["--data", "latin"], "gcide"),
        (["--speeds", "--steps=300"], "leave --contenders"),
    ],
)
def test_what_is_not_in_the_study_is_one_line(option: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "text", *option]) == 2
    assert option[0].strip("-") in (err := capsys.readouterr().err)
    assert says.replace("it has", "text_gcide.yaml has") in err
