"""A config file that is put together from others."""

from pathlib import Path

import pytest
import yaml
from processes import CONFIGS

from fffexp.configs import expand, load_config
from fffexp.errors import UserError
from fffexp.layers import FF, FFF, Forest, NoisyTopKMoE, SparseFF, SwitchMoE
from fffexp.training.losses import INVERSE_TEMPERATURE


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_pieces_are_merged_from_below(tmp_path: Path) -> None:
    write(tmp_path / "base/a.yaml", "{x: {class_path: A, init_args: {p: 1, q: 2}}, y: {class_path: A, init_args: {}}}")
    write(tmp_path / "base/b.yaml", "{configs: [a.yaml], x: {init_args: {q: 3}}, z: [1, 2]}")
    whole = write(tmp_path / "c.yaml", "{configs: [base/b.yaml], y: {class_path: B}, z: [3]}")
    assert load_config(whole) == {
        "x": {"class_path": "A", "init_args": {"p": 1, "q": 3}},
        "y": {"class_path": "B"},  # another class takes nothing of the first
        "z": [3],
    }


def test_arguments_may_stand_beside_a_class_or_without_it(tmp_path: Path) -> None:
    write(tmp_path / "plain.yaml", "model: {layer: {class_path: L, init_args: {w: 1}}, noise: 2}")
    write(tmp_path / "task.yaml", "model: {class_path: T, init_args: {network: n}}")
    expected = {"layer": {"class_path": "L", "init_args": {"w": 1}}, "noise": 2, "network": "n"}
    for order in ("plain.yaml, task.yaml", "task.yaml, plain.yaml"):
        whole = write(tmp_path / "whole.yaml", f"configs: [{order}]")
        assert load_config(whole) == {"model": {"class_path": "T", "init_args": expected}}, order


def test_a_command_line_gets_what_the_file_means(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.yaml", "x: 1")
    whole = write(tmp_path / "whole.yaml", "{configs: [plain.yaml], y: 2}")
    args = expand(["fit", f"--config={plain}", f"--config={whole}", "--config", str(whole), "--x=3"])
    assert args[:2] == ["fit", f"--config={plain}"]
    assert (args[3], args[5]) == ("--config", "--x=3")
    assert yaml.safe_load(args[2].removeprefix("--config=")) == yaml.safe_load(args[4]) == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("configs: [there.yaml]", "there.yaml cannot be read"),
        ("configs: [mine.yaml]", "includes itself"),
        ("configs: other.yaml", "configs must be a list of paths"),
    ],
)
def test_mistakes(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path / "mine.yaml", text))


@pytest.mark.parametrize(
    ("recipe", "layer"),
    [
        ("ff", FF),
        ("fff", FFF),
        ("fff", Forest),
        ("moe", NoisyTopKMoE),
        ("sparse_ff", SparseFF),
        ("switch", SwitchMoE),
    ],
)
def test_the_defaults_in_python_are_those_of_the_recipes(recipe: str, layer: type[FF]) -> None:
    weights = load_config(CONFIGS / "recipe" / f"{recipe}.yaml")["model"].get("aux_weights", {})
    temperature = weights.pop("inverse_temperature", None)
    assert {name: value for name, value in weights.items() if value} == dict(layer.default_aux_weights)
    if temperature:
        ends = {"start": INVERSE_TEMPERATURE(0.0), "end": INVERSE_TEMPERATURE(1.0)}
        assert temperature["init_args"] == pytest.approx(ends)


def test_tuned_numbers_stand_in_the_recipes_alone() -> None:
    for path in CONFIGS.rglob("*.yaml"):
        if "recipe" not in path.relative_to(CONFIGS).parts:
            text = path.read_text()
            assert not [name for name in ("lr:", "aux_weights", "label_smoothing", "noise") if name in text], path
