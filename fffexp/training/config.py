"""Arguments of an experiment: what is linked among them, and mistakes, told in one line."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fffexp.errors import InvalidConfigError, UserError, one_line
from fffexp.training.params import short


def check_yaml(args: Sequence[str]) -> None:
    """Read each --config, for jsonargparse does not say which of several files it could not read.

    Raises:
        UserError: one is not YAML, or not a mapping.
    """
    for flag, value in zip(args, [*args[1:], ""], strict=True):
        path = Path(flag.removeprefix("--config=") if flag.startswith("--config=") else value)
        if (flag == "--config" or flag.startswith("--config=")) and path.is_file():
            try:
                content = yaml.safe_load(path.read_text())
                if not isinstance(content, dict):
                    raise UserError(f"{path} is not a mapping of keys to values")
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def check_checkpoint(path: Path) -> None:
    """Make sure that it is one of ours.

    Raises:
        UserError: it is not.
    """
    if not path.is_file():
        raise UserError(f"ckpt_path: {path} is not there; give the path of a checkpoint")
    try:
        known = "pytorch-lightning_version" in torch.load(path, map_location="meta", weights_only=True)
    except OSError as error:
        raise UserError(f"ckpt_path: {path}: {error.strerror}") from error
    except Exception:  # torch says it in many ways
        known = False
    if not known:
        raise UserError(f"ckpt_path: {path} is no checkpoint that fffexp fit wrote")


def link_learning_rate(args: Sequence[str], model: Namespace) -> None:
    """A one-cycle schedule overrides the optimizer's: one that is given alone is meant for both."""

    def given(name: str) -> bool:
        return any(re.match(rf"--model\.{name}(=|$)", arg.replace(".init_args", "")) for arg in args)

    if short(model.lr_scheduler) == "OneCycleLR" and given("optimizer.lr") and not given("lr_scheduler.max_lr"):
        model.lr_scheduler.init_args.max_lr = model.optimizer.init_args.lr


@contextmanager
def user_errors() -> Iterator[None]:
    """Tell mistakes in arguments from faults of the program."""
    try:
        yield
    except ArgumentError as error:
        raise InvalidConfigError(one_line(str(error))) from error
    except MisconfigurationException as error:
        raise InvalidConfigError(" ".join(str(error).split())) from error
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise UserError(f"the checkpoint does not fit the config: {str(error).splitlines()[1].strip()}") from error
    except ValueError as error:
        if isinstance(error, UserError) or not _from_constructor(error):
            raise
        raise InvalidConfigError(one_line(str(error))) from error


def _from_constructor(error: ValueError) -> bool:
    # layers, schedules and the task check their arguments as they are made
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        if traceback.tb_frame.f_code.co_name == "instantiate_classes":
            return True
        traceback = traceback.tb_next
    return False
