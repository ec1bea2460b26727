"""Typed functions as commands."""

from pathlib import Path
from typing import Any, Literal

import pytest

from fffexp.commandline import NonNegativeInt, PositiveInt, check_file, command_parser, run_command
from fffexp.errors import UserError, hide_password

seen: dict[str, Any] = {}


def command(
    file: Path,
    depths: list[NonNegativeInt] = [2, 5],  # noqa: B006 # as commands are written
    layers: list[str] | None = None,
    kind: Literal["a", "b"] = "a",
    jobs: PositiveInt = 1,
    limit: float | None = None,
    peers: bool = False,
) -> None:
    """Do it.

    Args:
        file: to read.
        depths: of trees.
        peers: others too.
    """
    seen.update(locals())


def test_values_are_parsed() -> None:
    args = ["x.yaml", "--depths", "3", "4", "--layers", "FF", "FFF", "--kind", "b", "--limit=0.5", "--peers"]
    run_command(command, args)
    assert seen["file"] == Path("x.yaml")
    assert (seen["depths"], seen["layers"], seen["kind"]) == ([3, 4], ["FF", "FFF"], "b")
    assert (seen["jobs"], seen["limit"], seen["peers"]) == (1, 0.5, True)


def test_defaults() -> None:
    run_command(command, ["x.yaml"])
    assert (seen["depths"], seen["layers"], seen["peers"], seen["limit"]) == ([2, 5], None, False, None)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ([], "file"),
        (["x", "--depths", "-1"], "depths"),
        (["x", "--depths", "a"], "depths"),
        (["x", "--kind", "c"], "kind"),
        (["x", "--jobs", "0"], "jobs"),
        (["x", "--job", "1"], "--job"),
        (["x", "--peers", "true"], "true"),
        (["x", "y"], "y"),
    ],
)
def test_a_mistake_is_one_line(args: list[str], named: str) -> None:
    with pytest.raises(UserError) as raised:
        run_command(command, args, "do it")
    assert named in str(raised.value)
    assert "fffexp do it --help" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_help_is_the_docstring() -> None:
    text = command_parser(command, "do").format_help()
    for part in ("fffexp do", "Do it.", "of trees.", "others too."):
        assert part in text


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--json"):
        check_file("--json", tmp_path)
    with pytest.raises(UserError, match=r"\.json"):
        check_file("--json", tmp_path / "x.txt", ".json")
    check_file("--json", tmp_path / "new" / "x.json", ".json")
    assert not (tmp_path / "new" / "x.json").exists()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:se@cr/et@host/x", "postgresql://me:***@host/x"),
        ("at http://u:p@h:5000/, or later", "at http://u:***@h:5000/, or later"),
        ("postgresql://h/x?user=u&password=p&a=b", "postgresql://h/x?user=u&password=***&a=b"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9"),
        ("sqlite:///outputs/mlflow.db", "sqlite:///outputs/mlflow.db"),
    ],
)
def test_passwords_are_hidden(url: str, shown: str) -> None:
    assert hide_password(url) == shown
