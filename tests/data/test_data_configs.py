from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from fffexp.data import InMemoryData
from fffexp.data.base import Data

FILES = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))
SHARED = {"batch_size", "seed"}


def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(Data, "data")
    return parser


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_names_a_class_and_its_arguments(path: Path) -> None:
    arguments = parser().parse_args(["--config", str(path), "--data.batch_size", "7"])
    assert set(arguments.data.init_args.as_dict()) >= SHARED
    assert arguments.data.init_args.batch_size == 7


def test_short_names_and_shared_arguments_on_the_command_line() -> None:
    line = ["--data", "Digits", "--data.seed", "3", "--data.normalize", "standard"]
    arguments = parser().parse_args(line)
    data = parser().instantiate(arguments).data
    assert isinstance(data, InMemoryData)
    assert (data.seed, data.normalize, data.in_shape) == (3, "standard", (1, 8, 8))
