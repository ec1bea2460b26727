"""Typed functions as commands: `run_command(function, ["--depths", "2", "5", "--peers"])`.

Write a plain function and add its name to the table in cli.py:

    def inference(layers: list[str] | None = None, depths: list[NonNegativeInt] = [2, 5], peers: bool = False) -> None:
        '''Time the layers side by side.

        Args:
            layers: class names of layers.
            ...
        '''

- A parameter without a default is positional, any other is an option of its name, which is never abbreviated.
- `list[T]` and `list[T] | None` take several values after the option, each checked as a T.
- `bool` is a flag without a value, False by default.
- Each field of a default that is a dataclass is an option of its own: `def train(setting: Setting = Setting())`.
- Any other type is parsed and checked by jsonargparse: PositiveInt, Literal, Path, `float | None`, ...
- The first line of the docstring is the description and each Args entry the help of its option.

- `*args: str` gets the command line as it is.

The module of the function is imported for `--help`: import torch and the like inside the function. A mistake of the
user's is a UserError, which ends the program with one line and exit status 2; what the function returns is ignored.
"""

import inspect
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from docstring_parser import parse as parse_docstring
from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser

from fffexp.errors import UserError, one_line

if TYPE_CHECKING:  # to a type checker they are what they hold
    NonNegativeInt: TypeAlias = int
    PositiveInt: TypeAlias = int
    NonNegativeFloat: TypeAlias = float
    PositiveFloat: TypeAlias = float
else:
    from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

__all__ = ["NonNegativeFloat", "NonNegativeInt", "PositiveFloat", "PositiveInt", "check_file", "run_command"]


def run_command(function: Callable[..., object], args: Sequence[str], name: str = "") -> None:
    """Call a function with what a command line says.

    Args:
        function: any function with annotated parameters, as described at the top of this module.
        args: the command line after the command's name.
        name: what the help calls the command, such as "study run".

    Raises:
        UserError: a mistake in the arguments, in one line.
    """
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in inspect.signature(function).parameters.values()):
        function(*args)
        return
    parser = command_parser(function, name)
    try:
        values = parser.parse_args(list(args)).as_dict()
    except ArgumentError as error:
        raise UserError(f"{one_line(str(error))} (see {parser.prog} --help)") from error
    for parameter in inspect.signature(function).parameters.values():
        group: Any = parameter.default
        if is_dataclass(group) and not isinstance(group, type):
            values[parameter.name] = type(group)(**{each.name: values.pop(each.name) for each in fields(group)})
    function(**values)


def command_parser(function: Callable[..., object], name: str = "") -> ArgumentParser:
    """The parser of a function's command line."""
    text = parse_docstring(inspect.getdoc(function) or "").description
    parser = ArgumentParser(prog=f"fffexp {name}".strip(), description=text, exit_on_error=False, allow_abbrev=False)
    _add_options(parser, function)
    return parser


def _add_options(parser: ArgumentParser, function: Callable[..., object], defaults: object = None) -> None:
    """Options of a function or, with defaults, of the fields of their dataclass."""
    texts = {param.arg_name: param.description for param in parse_docstring(inspect.getdoc(function) or "").params}
    hints = typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, default = hints[name], parameter.default if defaults is None else getattr(defaults, name)
        if is_dataclass(default):
            _add_options(parser, kind, default)
            continue
        required = default is parameter.empty
        options: dict[str, Any] = {"help": texts.get(name) or ""}
        if not required:
            options["default"] = default
        if kind is bool:
            options["action"] = ActionYesNo(no_prefix=None)  # type: ignore[arg-type] # None leaves the second option out
        elif element := _element(kind):
            options |= {"type": element, "nargs": "+"}
        else:
            options["type"] = kind
        parser.add_argument(name if required else f"--{name}", **options)


def _element(kind: Any) -> Any:
    """T of list[T] or list[T] | None; None of anything else."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next((member for member in typing.get_args(kind) if typing.get_origin(member) is list), kind)
    return typing.get_args(kind)[0] if typing.get_origin(kind) is list else None


def check_file(option: str, path: Path | None, suffix: str | None = None) -> None:
    """Refuse a file that cannot be written, before minutes are spent on its content.

    Raises:
        UserError: its folder cannot be made or written, or it has another ending.
    """
    if path is None:
        return
    if suffix and path.suffix != suffix:
        raise UserError(f"{option} {path}: name a file that ends in {suffix}")
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written ({error.strerror}): name another file") from error
