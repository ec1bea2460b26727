"""Typed functions as commands: `run_command(function, ["--depths", "2", "5", "--peers"])`.

A command is a plain function whose name stands in the table of cli.py. A parameter without a default is positional,
any other an option of its name, which is never abbreviated: `list[T]` and `list[T] | None` take several values after
it, `bool` none, and each field of a default that is a dataclass is an option of its own. jsonargparse parses and checks
all else. The docstring is the help; what the function returns is ignored. The module is imported for `--help`: import
torch and the like inside the function.
"""

import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentError, ArgumentParser

from fffexp.errors import UserError, one_line, refuse

if TYPE_CHECKING:  # to a type checker they are what they hold
    NonNegativeInt: TypeAlias = int
    PositiveInt: TypeAlias = int
    PositiveFloat: TypeAlias = float
else:
    from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

__all__ = ["NonNegativeInt", "PositiveFloat", "PositiveInt", "check_file", "run_command"]


def run_command(function: Callable[..., object], args: Sequence[str], name: str = "") -> None:
    """Call a function with what a command line says after the command's name; a mistake in it is a UserError."""
    parser = command_parser(function, name)
    try:
        values = parser.parse_args(list(args)).as_dict()
    except ArgumentError as error:
        raise UserError(f"{one_line(str(error))} (see {parser.prog} --help)") from error
    for name, parameter in inspect.signature(function).parameters.items():
        if is_dataclass(group := parameter.default) and not isinstance(group, type):
            values[name] = type(group)(**{each.name: values.pop(each.name) for each in fields(group)})
    function(**values)


def command_parser(function: Callable[..., object], name: str = "") -> ArgumentParser:
    """The parser of a function's command line."""
    text = parse_docstring(inspect.getdoc(function) or "").description
    parser = ArgumentParser(prog=f"fffexp {name}".strip(), description=text, exit_on_error=False, allow_abbrev=False)
    for each, kind, default, about in _parameters(function):
        options: dict[str, Any] = {"help": about} | ({} if default is inspect.Parameter.empty else {"default": default})
        lists = [member for member in (kind, *typing.get_args(kind)) if typing.get_origin(member) is list]
        several = {"type": typing.get_args(lists[0])[0], "nargs": "+"} if lists else {"type": kind}
        options |= {"action": "store_true"} if kind is bool else several
        parser.add_argument(f"--{each}" if "default" in options else each, **options)
    return parser


def _parameters(function: Callable[..., object], group: object = None) -> Iterator[tuple[str, Any, Any, str]]:
    # name, type, default and help of each; of a dataclass those of its fields, whose defaults the group has
    texts = {param.arg_name: param.description for param in parse_docstring(inspect.getdoc(function) or "").params}
    hints = typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        default = parameter.default if group is None else getattr(group, name)
        if is_dataclass(default):
            yield from _parameters(hints[name], default)
        else:
            yield name, hints[name], default, texts.get(name) or ""


def check_file(option: str, path: Path | None, suffix: str = "") -> None:
    """Refuse a file that cannot be written, or has another ending, before minutes are spent on its content."""
    if path is None:
        return
    refuse((not path.name.endswith(suffix), f"{option} {path}: name a file that ends in {suffix}"))
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written ({error.strerror}): name another file") from error
    if not existed:
        path.unlink()
