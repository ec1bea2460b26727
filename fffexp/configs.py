"""YAML files and command lines as they are, read before anything large is imported."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from fffexp.errors import UserError, refuse


class _StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc] # the fast one where it is
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
    """The mapping that a YAML text holds; a UserError if it holds none, a key twice, or an alias of itself."""
    try:
        content = yaml.load(text, _StrictLoader)  # a safe loader
    except yaml.YAMLError as error:
        last = text.rstrip().count("\n")  # what is missing at the end is found a line later
        line = f", line {min(mark.line, last) + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        problem = " ".join((getattr(error, "problem", None) or str(error)).split())
        problem = problem.replace("found unconstructable recursive node", "an alias contains itself")
        raise UserError(f"{source}{line}: {problem}") from error
    refuse((not isinstance(content, dict), f"{source} is not a mapping of keys to values"))
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a UserError if the file cannot be read, or see `parse_yaml`."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{path} cannot be read ({problem}): give the path of a YAML file") from error


def load_config(path: Path, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a YAML file, on top of those of the files that its key `configs` lists, relative to it.

    Later files win, and the file itself over them. Mappings are merged key by key, but for one that names another
    class than the one below it. A file that includes itself, or cannot be read, is a UserError.
    """
    path = path.resolve()
    refuse((path in within, f"{path}: configs: the file includes itself"))
    content = read_yaml(path)
    pieces = content.pop("configs", [])
    paths = isinstance(pieces, list) and all(isinstance(piece, str) for piece in pieces)
    refuse((not paths, f"{path}: configs must be a list of paths"))
    parts = (load_config(path.parent / piece, (*within, path)) for piece in pieces)
    return reduce(_merged, (*parts, content), {})


def _merged(below: Any, above: Any) -> Any:
    mappings = isinstance(below, Mapping) and isinstance(above, Mapping)
    if mappings and "class_path" in {*below, *above}:
        below, above = _with_init_args(below), _with_init_args(above)
    if not mappings or len({content["class_path"] for content in (below, above) if "class_path" in content}) > 1:
        return above
    return {**below, **above, **{key: _merged(below[key], above[key]) for key in below.keys() & above}}


def _with_init_args(content: Mapping[str, Any]) -> Mapping[str, Any]:
    # arguments that are given without their class stand beside its path, where another file names that
    arguments = {key: value for key, value in content.items() if key not in ("class_path", "init_args")}
    rest = {key: value for key, value in content.items() if key not in arguments}
    return rest | {"init_args": {**content.get("init_args", {}), **arguments}} if arguments else content


def _options(args: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    # position of the value, name and value of each `--name=value` and `--name value`
    for at, (option, following) in enumerate(pairwise([*args, ""])):
        name, equals, value = option.partition("=")
        if option.startswith("-"):
            yield (at, name, value) if equals else (at + 1, name, following)


def expand(args: Sequence[str]) -> list[str]:
    """The command line with the settings of each --config file that lists `configs` in its place."""
    expanded = list(args)
    for at, name, value in _options(args):
        if name in ("--config", "-c") and Path(value).is_file() and "configs" in read_yaml(Path(value)):
            expanded[at] = expanded[at].removesuffix(value) + json.dumps(load_config(Path(value)))
    return expanded


def given(args: Sequence[str]) -> dict[str, Any]:
    """What a command line of `fffexp fit` sets, its --config files included, by dotted keys without `init_args`.

    A UserError if a --config file cannot be read, or if more than one process would train: before torch is imported.
    """
    settings: dict[str, Any] = {}
    for _, name, value in _options(args):
        if name in ("--config", "-c"):
            settings |= flat(load_config(Path(value)))
        else:
            with suppress(yaml.YAMLError):  # else it is text
                value = yaml.safe_load(value)
            settings[name.lstrip("-").replace(".init_args", "")] = value
    for key in ("trainer.devices", "trainer.num_nodes"):
        count = settings.get(key)
        several = len(count) != 1 if isinstance(count, list) else count not in (None, 0, 1, "auto")
        refuse((several, f"{key} is {count}: a run trains on one device for now: give 1"))
    strategy = settings.get("trainer.strategy", settings.get("trainer.strategy.class_path"))
    single = strategy in (None, "auto", "single_device")
    refuse((not single, f"trainer.strategy is {strategy}: a run trains on one device for now: leave it out"))
    return settings


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested config by their dotted keys, without `init_args`."""
    for key, value in content.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
        yield from flat(value, name) if isinstance(value, Mapping) else [(name, value)]
