"""YAML files and command lines as they are, read before anything large is imported."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from fffexp.errors import UserError


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, where YAML lets the last one win, and an alias that contains itself."""

    def construct_document(self, node: yaml.Node) -> Any:
        self.deep_construct = True  # a recursive alias is then an error
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for at, (key, _) in enumerate(node.value):
            if key.value in keys[:at]:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """The mapping that a YAML text holds.

    Raises:
        UserError: it holds no mapping, a key twice, or an alias that contains itself.
    """
    try:
        content = yaml.load(text, _StrictLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = (error.problem or "").replace("found unconstructable recursive node", "an alias contains itself")
        raise UserError(f"{source}{line}: {problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{source} is not a mapping of keys to values")
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file cannot be read, or see `parse_yaml`.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not YAML: it is not UTF-8 text") from error


def load_config(path: Path, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a YAML file, on top of those of the files that its key `configs` lists, relative to it.

    Later files win, and the file itself over them. Mappings are merged key by key, but for one that names another
    class than the one below it.

    Raises:
        UserError: a file cannot be read, or includes itself, or see `parse_yaml`.
    """
    path = path.resolve()
    if path in within:
        raise UserError(f"{path}: configs: the file includes itself")
    content = read_yaml(path)
    pieces = content.pop("configs", [])
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        raise UserError(f"{path}: configs must be a list of paths")
    settings: dict[str, Any] = {}
    for piece in pieces:
        settings = _merged(settings, load_config(path.parent / piece, (*within, path)))
    return _merged(settings, content)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for key, value in above.items():
        under = below.get(key)
        if isinstance(value, Mapping) and isinstance(under, Mapping):
            same = value.get("class_path", under.get("class_path")) == under.get("class_path")
            merged[key] = _merged(under, value) if same else value
    return merged


def expand(args: Sequence[str]) -> list[str]:
    """The command line with the settings of each --config file that lists `configs` in its place.

    Raises:
        UserError: see `load_config`.
    """
    expanded = list(args)
    for index, option in enumerate(args):
        name, equals, value = option.partition("=")
        at = index if equals else index + 1
        if name in ("--config", "-c") and at < len(args):
            path = Path(value if equals else args[at])
            if path.is_file() and "configs" in read_yaml(path):
                expanded[at] = name * bool(equals) + equals + json.dumps(load_config(path))
    return expanded


def given(args: Sequence[str]) -> dict[str, Any]:
    """What a command line of `fffexp fit` sets, its --config files included, by dotted keys without `init_args`.

    Raises:
        UserError: a --config file cannot be read, or see `parse_yaml`.
    """
    settings: dict[str, Any] = {}
    for option, following in pairwise([*args, ""]):
        if option.startswith("--"):
            key, equals, value = option[2:].partition("=")
            value = value if equals else following
            if key in ("config", "c"):
                settings |= flat(load_config(Path(value)))
            else:
                settings[key.replace(".init_args", "")] = _value(value)
    return settings


def check_devices(settings: Mapping[str, Any]) -> None:
    """Refuse more than one device, before torch is imported; by what `given` returns.

    Raises:
        UserError: more than one process would train.
    """
    for key in ("trainer.devices", "trainer.num_nodes"):
        value = settings.get(key)
        several = len(value) != 1 if isinstance(value, list) else value not in (None, 0, 1, "auto")
        if several:
            raise UserError(f"{key} is {value}: a run trains on one device for now: give 1")
    strategy = settings.get("trainer.strategy", settings.get("trainer.strategy.class_path"))
    if strategy not in (None, "auto", "single_device"):
        raise UserError(f"trainer.strategy is {strategy}: a run trains on one device for now: leave it out")


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested config by their dotted keys, without `init_args`."""
    for key, value in content.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
        if isinstance(value, Mapping):
            yield from flat(value, name)
        else:
            yield name, value


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
