"""What a study file may say, and the message of a mistake in it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import CONFIGS, digits, write_yaml

from fffexp.cli import main
from fffexp.errors import UserError
from fffexp.study.spec import StudySpec, load
from fffexp.training.experiment import build

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
    return load(write_yaml(tmp_path / "tiny.yaml", CONTENT | changes))


def width(**changes: Any) -> dict[str, Any]:
    layers = copy.deepcopy(CONTENT["layers"])
    layers["FF"]["space"]["width"] = WIDTH | changes
    return {"layers": layers}


def test_a_spec(tmp_path: Path) -> None:
    found = spec(tmp_path)
    assert (found.name, len(found.points()), found.seeds, found.evaluation_seeds) == ("tiny", 3, [0, 1], [2, 3])
    assert found.default_objectives("val/accuracy", "max") == {
        "val/accuracy": "maximize",
        "speed/latency_b256_ratio": "minimize",
    }
    assert next(iter(found.default_objectives("val/loss", "min").items())) == ("val/loss", "minimize")
    assert found.folder == tmp_path
    space = found.layers["FF"].space
    assert (space["width"].low, space["width"].high, space["lr"].choices) == (4, 32, [0.01, 0.1])
    assert [(c["width"], c["lr"]) for c in found.corners("FF")] == [(4, 0.01), (32, 0.1)]
    assert all(isinstance(c["width"], int) for c in found.corners("FF"))


def test_whole_numbers_stay_whole_after_other_configs_were_read(tmp_path: Path) -> None:
    build(digits("ff"))
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
    changes["layers"]["FF"]["space"]["width"]["keys"] = ["a.b", "d.e"]
    arguments = spec(tmp_path, **changes).arguments("FF", {"width": 8, "lr": 0.1}, 7, test=False)
    assert {"--a.b=8", "--d.e=8"} <= set(arguments)


FIRST = [{"width": 8, "lr": 0.1}, {"lr": 0.01}]


def with_first(*first: dict[str, Any], **changes: Any) -> dict[str, Any]:
    layers = copy.deepcopy(CONTENT["layers"])
    layers["FF"]["initial_trials"] = list(first)
    return {"layers": layers} | changes


def test_values_that_are_tried_first(tmp_path: Path) -> None:
    points = spec(tmp_path, **with_first(*FIRST)).points()
    assert [point.values for point in points] == [{"width": 8, "lr": 0.1}, {"width": 8, "lr": 0.01}, {}]


def listed(*points: dict[str, Any], **space: Any) -> dict[str, Any]:
    return {"config": "ff.yaml", "space": space, "points": list(points)}


WIDTH = {"keys": ["model.layer.init_args.width"]}


def test_points_are_numbered_over_all_layers_in_turn(tmp_path: Path) -> None:
    layers = {
        "wide": listed({"width": 64}, width=WIDTH),
        "FF": CONTENT["layers"]["FF"],
        "narrow": listed({"width": 4}, {"width": 8}, width=WIDTH),
    }
    found = spec(tmp_path, layers=layers)
    assert [(point.number, point.label) for point in found.points()] == [
        *((0, "wide"), (1, "FF"), (2, "narrow"), (3, "FF"), (4, "narrow"), (5, "FF"))
    ]
    assert [found.points()[number].values for number in (0, 1, 4)] == [{"width": 64}, {}, {"width": 8}]


def test_a_study_of_points_needs_no_search(tmp_path: Path) -> None:
    content = {key: CONTENT[key] for key in ("name", "configs", "seeds")}
    space = {"width": WIDTH, "kind": {"keys": []}, "recipe": {"keys": ["config"]}}
    points = [{"width": 4, "kind": "narrow", "recipe": "wide.yaml"}, {"width": 8, "kind": "wide"}]
    (tmp_path / "wide.yaml").write_text("trainer: {max_epochs: 3}")
    content |= {"layers": {"any label": listed(*points, **space)}, "test": True}
    found = load(write_yaml(tmp_path / "tiny.yaml", content))
    args = found.arguments("any label", found.points()[1].values, 5, found.test)
    assert f"--config={tmp_path / 'wide.yaml'}" == args[3], "on top of the layer's"
    assert set(args[4:]) == {"--model.layer.init_args.width=8", "--name=tiny", "--seed_everything=5", "--test=true"}
    assert build(args)


def test_choices_with_names(tmp_path: Path) -> None:
    adaptive = {"class_path": "fffexp.training.schedules.Adaptive", "init_args": {"start": 0.1}}
    space = {"entropy": {"keys": ["model.aux_weights.hardening_mean"], "choices": {"none": 0.0, "adaptive": adaptive}}}
    found = spec(tmp_path, layers={"FFF": {"config": "ff.yaml", "space": space}})
    assert found.corners("FFF") == [{"entropy": "none"}, {"entropy": "adaptive"}]
    args = found.arguments("FFF", {"entropy": "adaptive"}, 0)
    (flag,) = (arg for arg in args if "hardening_mean" in arg)
    assert json.loads(flag.partition("=")[2]) == adaptive


def test_values_for_configs_make_no_class(tmp_path: Path) -> None:
    made = tmp_path / "made"
    command = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(made)]}}
    space = {"x": {"keys": ["model.layer.init_args.width"], "choices": [command]}}
    spec(tmp_path, overrides={"a.b": command}, layers={"FF": {"config": "ff.yaml", "space": space}})
    assert not made.exists()


def test_the_recipe_is_what_decides_a_result(tmp_path: Path) -> None:
    found = spec(tmp_path)
    first = found.recipe("FF", {"width": 8, "lr": 0.1})
    assert found.recipe("FF", {"lr": 0.1, "width": 8}) == first
    assert spec(tmp_path, name="other", seeds=[7]).recipe("FF", {"width": 8, "lr": 0.1}) == first
    others = {
        found.recipe("FF", {"width": 8, "lr": 0.01}),
        spec(tmp_path, overrides={"trainer.max_epochs": 2}).recipe("FF", {"width": 8, "lr": 0.1}),
        spec(tmp_path, vectorize_seeds=True, objectives=ACCURACY, patience=3).recipe("FF", {"width": 8, "lr": 0.1}),
    }
    (tmp_path / "ff.yaml").write_text("# a comment\n" + (tmp_path / "ff.yaml").read_text())
    assert found.recipe("FF", {"width": 8, "lr": 0.1}) == first
    (tmp_path / "ff.yaml").write_text((tmp_path / "ff.yaml").read_text().replace("128", "64"))
    assert found.recipe("FF", {"width": 8, "lr": 0.1}) == first, "the point says otherwise"
    digits = tmp_path / "digits.yaml"
    digits.write_text(digits.read_text().replace("256", "64"))
    others.add(found.recipe("FF", {"width": 8, "lr": 0.1}))
    assert len({first, *others}) == 5


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layers": {}}, ["layers is empty"]),
        ({"vectorize_seeds": True, "objectives": ACCURACY | {"val/loss": "minimize"}}, ["vectorize_seeds", "timed"]),
        ({"vectorize_seeds": True, "objectives": {"speed/latency_b1_ms": "minimize"}}, ["vectorize_seeds", "timed"]),
        ({"test": True}, ["test", "finalists"]),
        ({"patience": 3}, ["patience", "vectorize_seeds"]),
        ({"overrides": {"trainer.limit_val_batches": 0}}, ["limit_val_batches", "selects"]),
        ({"layers": {"FF/x": CONTENT["layers"]["FF"]}}, ["FF/x", "slash"]),
        ({"layers": {"FF": listed(width=WIDTH)}}, ["layers.FF.points"]),
        ({"layers": {"FF": listed({}, width=WIDTH)}}, ["points[0]: width is missing"]),
        ({"layers": {"FF": listed({"widht": 3}, width=WIDTH)}}, ["points[0]: widht"]),
        ({"layers": {"FF": listed({"c": "x.yaml"}, c={"keys": ["config"]})}}, ["x.yaml", "not there"]),
        ({"layers": {"FF": {"space": CONTENT["layers"]["FF"]["space"]}}}, ["layers.FF.config is missing"]),
        (with_first({"width": 8}), ["initial_trials[0]: lr is missing"]),
        (with_first(*FIRST, {"depth": 3}), ["initial_trials[2]: depth is not in the space"]),
        (with_first(FIRST[0], {"width": 2}), ["initial_trials[1]: width = 2"]),
        (with_first(FIRST[0], {"lr": 0.05}), ["initial_trials[1]: lr = 0.05"]),
        (with_first(FIRST[0], {"width": "nine"}), ["initial_trials[1]: width = nine"]),
        (with_first(FIRST[0], {"width": 8.5}), ["initial_trials[1]: width = 8.5"]),
        (with_first(*FIRST, trials_per_layer=1), ["initial_trials has 2 entries", "trials_per_layer"]),
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
        (width(keys=[], low=1, high=4), ["layers.FF.space.width.keys"]),
        (width(low="few", high=4), ["width", "low"]),
        ({"trials_per_layer": 0}, ["trials_per_layer"]),
        ({"trials_per_layer": "many"}, ["trials_per_layer"]),
        ({"seeds": []}, ["seeds"]),
        ({"seeds": [1, 1]}, ["seeds"]),
        ({"evaluation_seeds": []}, ["evaluation_seeds"]),
        ({"evaluation_seeds": [3, 1]}, ["evaluation_seeds", "[1]"]),
        ({"objectives": {"val/accuracy": "up"}}, ["objectives"]),
        ({"pruner": MEDIAN}, ["pruner"]),
        ({"constraints": {"speed/latency_b256_ms": 1.0}}, ["constraints"]),
        ({"sampler": {"class_path": "optuna.samplers.Nonesuch"}}, ["sampler", "Nonesuch"]),
        ({"sampler": {"class_path": "optuna.samplers.RandomSampler", "init_args": {"sed": 0}}}, ["sampler", "sed"]),
        ({"objectives": ACCURACY, "pruner": {"class_path": "Nonesuch"}}, ["pruner", "Nonesuch"]),
        ({"budget": 3}, ["budget"]),
        ({"folder": "elsewhere"}, ["folder"]),
        ({"name": None}, ["name"]),
        ({"name": "n" * 101}, ["name", "100"]),
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
    with pytest.raises(UserError, match=r"study file .*tiny\.yaml") as error:
        load(tmp_path / "tiny.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "just words", "[1, 2]"])
def test_what_is_not_a_mapping(text: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(text)
    with pytest.raises(UserError, match=r"tiny\.yaml is not a mapping"):
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
        return load(path).digest()

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
