"""What a study file may say, and how a mistake in it is told."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import CONFIGS, digits, write_yaml

from fffexp.cli import main
from fffexp.errors import UserError
from fffexp.study.plan import search_work
from fffexp.study.spec import StudySpec, digest, load
from fffexp.training.experiment import check

CONTENT: dict[str, Any] = {
    "name": "tiny",
    "configs": ["digits.yaml"],
    "layers": {
        "FF": {
            "config": "ff.yaml",
            "space": {
                "width": {"keys": ["model.layer.init_args.width"], "low": 4, "high": 32, "log": True},
                "lr": {"keys": ["model.optimizer.init_args.lr"], "choices": [0.01, 0.1]},
            },
        }
    },
    "trials_per_layer": 3,
    "seeds": [0, 1],
    "evaluation_seeds": [2, 3],
    "overrides": {"trainer.max_epochs": 1},
    "sampler": {"class_path": "optuna.samplers.RandomSampler", "init_args": {"seed": 0}},
}
MEDIAN = {"class_path": "optuna.pruners.MedianPruner"}
ACCURACY = {"val/accuracy": "maximize"}


@pytest.fixture(autouse=True)
def configs(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text((CONFIGS / "data" / "digits.yaml").read_text())
    (tmp_path / "ff.yaml").write_text((CONFIGS / "layer" / "ff.yaml").read_text())


def spec(tmp_path: Path, **changes: Any) -> StudySpec:
    return load(write_yaml(tmp_path / "tiny.yaml", CONTENT | changes))[0]


def width(**changes: Any) -> dict[str, Any]:
    layers = copy.deepcopy(CONTENT["layers"])
    layers["FF"]["space"]["width"] = {"keys": ["model.layer.init_args.width"], **changes}
    return {"layers": layers}


def test_a_spec(tmp_path: Path) -> None:
    found = spec(tmp_path)
    assert (found.name, found.trials, found.seeds, found.evaluation_seeds) == ("tiny", 3, [0, 1], [2, 3])
    assert found.objectives == {"val/accuracy": "maximize", "speed/latency_b256_ms": "minimize"}
    assert found.folder == tmp_path
    space = found.layers["FF"].space
    assert (space["width"].low, space["width"].high, space["lr"].choices) == (4, 32, [0.01, 0.1])
    assert [(c["width"], c["lr"]) for c in found.corners("FF")] == [(4, 0.01), (32, 0.01), (4, 0.1), (32, 0.1)]
    assert all(isinstance(c["width"], int) for c in found.corners("FF"))


def test_whole_numbers_stay_whole_after_other_configs_were_read(tmp_path: Path) -> None:
    check(digits("ff"))
    width = spec(tmp_path).layers["FF"].space["width"]
    assert all(isinstance(end, int) for end in (width.low, width.high))


def test_arguments_of_a_fit(tmp_path: Path) -> None:
    arguments = spec(tmp_path).arguments("FF", {"width": 8, "lr": 0.1}, 7, test=True)
    assert arguments[:3] == ["fit", f"--config={tmp_path / 'digits.yaml'}", f"--config={tmp_path / 'ff.yaml'}"]
    assert set(arguments[3:]) == {
        *("--trainer.max_epochs=1", "--model.layer.init_args.width=8", "--model.optimizer.init_args.lr=0.1"),
        *("--name=tiny", "--seed_everything=7", "--test=true"),
    }


def test_one_value_may_go_to_several_keys(tmp_path: Path) -> None:
    changes = width(low=4, high=8)
    changes["layers"]["FF"]["space"]["width"]["keys"] = ["a.b", "c"]
    arguments = spec(tmp_path, **changes).arguments("FF", {"width": 8, "lr": 0.1}, 7, test=False)
    assert {"--a.b=8", "--c=8"} <= set(arguments)


FIRST = [{"width": 8, "lr": 0.1}, {"lr": 0.01}]


def with_first(*first: dict[str, Any], **changes: Any) -> dict[str, Any]:
    layers = copy.deepcopy(CONTENT["layers"])
    layers["FF"]["first"] = list(first)
    return {"layers": layers} | changes


def test_values_that_are_tried_first(tmp_path: Path) -> None:
    work = search_work(spec(tmp_path, **with_first(*FIRST)))
    assert work == {
        0: {"layer": "FF", "FF.width": 8, "FF.lr": 0.1},
        1: {"layer": "FF", "FF.width": 8, "FF.lr": 0.01},
        2: {"layer": "FF"},
    }


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layers": {}}, ["layers is empty"]),
        ({"vectorize_seeds": True}, ["vectorize_seeds", "only objective"]),
        (with_first({"width": 8}), ["first[0]: lr is missing"]),
        (with_first(*FIRST, {"depth": 3}), ["first[2]: depth is not in the space"]),
        (with_first(FIRST[0], {"width": 2}), ["first[1]: width = 2"]),
        (with_first(FIRST[0], {"lr": 0.05}), ["first[1]: lr = 0.05"]),
        (with_first(FIRST[0], {"width": "nine"}), ["first[1]: width = nine"]),
        (with_first(FIRST[0], {"width": 8.5}), ["first[1]: width = 8.5"]),
        (with_first(*FIRST, trials_per_layer=1), ["first has 2 entries", "trials_per_layer"]),
        ({"vectorize_seeds": True, "objectives": ACCURACY, "pruner": MEDIAN}, ["vectorize_seeds", "pruner"]),
        ({"layers": {"FF": CONTENT["layers"]["FF"] | {"config": "nonesuch.yaml"}}}, ["nonesuch.yaml", "not there"]),
        ({"layers": {"FF": {"config": "ff.yaml", "space": {}}}}, ["layers.FF.space is empty"]),
        ({"overrides": {"model.layer.init_args.width": 3}}, ["model.layer.init_args.width", "twice"]),
        ({"configs": ["absent.yaml"]}, ["absent.yaml", "not there"]),
        (width(choices=[]), ["layers.FF.space.width", "choices"]),
        (width(), ["layers.FF.space.width", "choices", "low"]),
        (width(low=1), ["layers.FF.space.width"]),
        (width(high=1), ["layers.FF.space.width"]),
        (width(low=1, choices=[1]), ["layers.FF.space.width"]),
        (width(low=1, high=2, choices=[1]), ["layers.FF.space.width"]),
        (width(low=9, high=4), ["layers.FF.space.width", "low is 9", "high is 4"]),
        (width(low=0, high=4, log=True), ["layers.FF.space.width", "log"]),
        (width(set=[], low=1, high=4), ["layers.FF.space.width.set"]),
        (width(low="few", high=4), ["width", "low"]),
        ({"trials_per_layer": 0}, ["trials_per_layer"]),
        ({"trials_per_layer": "many"}, ["trials_per_layer"]),
        ({"seeds": []}, ["seeds"]),
        ({"seeds": [1, 1]}, ["seeds"]),
        ({"evaluation_seeds": []}, ["evaluation_seeds"]),
        ({"evaluation_seeds": [3, 1]}, ["evaluation_seeds", "[1]"]),
        ({"objectives": {"val/accuracy": "up"}}, ["objectives"]),
        ({"objectives": {}}, ["objectives"]),
        ({"objectives": {"val/loss": "minimize"}}, ["objectives", "val/accuracy"]),
        ({"pruner": MEDIAN}, ["pruner"]),
        ({"constraints": {"speed/latency_b256_ms": 1.0}}, ["constraints"]),
        ({"sampler": {"class_path": "optuna.samplers.Nonesuch"}}, ["sampler", "Nonesuch"]),
        ({"sampler": {"class_path": "optuna.samplers.RandomSampler", "init_args": {"sed": 0}}}, ["sampler", "sed"]),
        ({"objectives": ACCURACY, "pruner": {"class_path": "Nonesuch"}}, ["pruner", "Nonesuch"]),
        ({"budget": 3}, ["budget"]),
        ({"folder": "elsewhere"}, ["folder"]),
        ({"name": None}, ["name"]),
        ({"name": "a/b"}, ["name", "a/b"]),
        ({"name": ".."}, ["name", "'..'"]),
        ({"seeds": [-1]}, ["seeds", "-1"]),
    ],
    ids=str,
)
def test_a_mistake_is_told_in_one_line(changes: dict[str, Any], named: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        spec(tmp_path, **changes)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"study file {tmp_path / 'tiny.yaml'}")
    for part in named:
        assert part in message


@pytest.mark.parametrize("key", ["name", "configs", "layers", "trials_per_layer", "seeds", "evaluation_seeds"])
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    content = {k: v for k, v in CONTENT.items() if k != key}
    with pytest.raises(UserError, match=rf"^study file .*{key}") as error:
        load(write_yaml(tmp_path / "tiny.yaml", content))
    assert "\n" not in str(error.value)


def test_a_single_objective_takes_constraints_and_a_pruner(tmp_path: Path) -> None:
    found = spec(tmp_path, objectives=ACCURACY, constraints={"speed/latency_b256_ms": 2}, pruner=MEDIAN)
    assert found.constraints == {"speed/latency_b256_ms": 2.0}
    assert type(found.pruner).__name__ == "MedianPruner"


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\t- x"])
def test_what_is_not_yaml(text: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(text)
    with pytest.raises(UserError, match=r"tiny\.yaml is not YAML") as error:
        load(tmp_path / "tiny.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "just words", "[1, 2]"])
def test_what_is_not_a_mapping(text: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(text)
    with pytest.raises(UserError, match=r"tiny\.yaml: it is not a mapping"):
        load(tmp_path / "tiny.yaml")


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "nonesuch.yaml", tmp_path):
        with pytest.raises(UserError, match=f"study file {path}"):
            load(path)


def test_binary_file(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match=r"tiny\.yaml"):
        load(tmp_path / "tiny.yaml")


def test_digest_changes_with_what_decides_a_result_alone(tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "tiny.yaml", CONTENT)

    def mark() -> str:
        return digest(*load(path))

    first = mark()
    path.write_text("# a comment\n" + path.read_text())
    (tmp_path / "ff.yaml").write_text("# another\n" + (tmp_path / "ff.yaml").read_text())
    assert mark() == first
    (tmp_path / "ff.yaml").write_text((tmp_path / "ff.yaml").read_text().replace("128", "64"))
    second = mark()
    write_yaml(path, CONTENT | {"seeds": [0, 4]})
    assert len({first, second, mark()}) == 3


@pytest.fixture
def mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FFFEXP_STORAGE", raising=False)

    def call(*args: str) -> str:
        assert main(["study", *args]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("fffexp: ")
        return line

    return call


def test_mistakes_on_the_command_line(mistake: Callable[..., str], tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "tiny.yaml", CONTENT | {"layers": {}})
    assert "layers is empty" in mistake("run", str(path))
    assert "nonesuch.yaml" in mistake("run", "nonesuch.yaml")
    assert "nonesuch" in mistake("show", "nonesuch")
    assert "nonesuch" in mistake("resume", "nonesuch")
    assert "jobz" in mistake("run", str(path), "--jobz=2")
    assert "jobs" in mistake("run", str(write_yaml(path, CONTENT)), "--jobs=0")
    assert "file" in mistake("run")
    line = mistake("resume", "tiny", "--storage=nonesuch://x")
    assert "nonesuch://x" in line
    assert "--storage" in line
