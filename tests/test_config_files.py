"""YAML and command lines as they are."""

from pathlib import Path

import pytest

from fffexp.configs import given, parse_yaml, read_yaml
from fffexp.errors import UserError


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: 'a' is given twice"),
        ("a: {b: 1, b: 2}", "'b' is given twice"),
        ("a: &a [*a]", "an alias contains itself"),
        ("a: &a {b: *a}", "an alias contains itself"),
        ("- 1", "not a mapping"),
        ("", "not a mapping"),
        ("a: [", "line 1"),
        ("a:\tb:\tc", "file.yaml"),
    ],
)
def test_what_is_refused(text: str, named: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_yaml(text, "file.yaml")
    assert named in str(raised.value)
    assert str(raised.value).startswith("file.yaml")
    assert "\n" not in str(raised.value)


def test_aliases_and_merges_are_fine() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, x: 2}\nc: *a", "f")["b"] == {"x": 2}


def test_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4")
    with pytest.raises(UserError, match="UTF-8"):
        read_yaml(tmp_path / "latin.yaml")


def test_what_a_command_line_sets(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "model: {layer: {class_path: x.FFF, init_args: {depth: 3}}}\ntrainer: {devices: 1}"
    )
    args = [f"--config={tmp_path / 'a.yaml'}", "--model.layer.init_args.depth", "4", "--trainer.max_epochs=5"]
    settings = given(args)
    assert settings == {
        "model.layer.class_path": "x.FFF",
        "model.layer.depth": 4,
        "trainer.devices": 1,
        "trainer.max_epochs": 5,
    }
