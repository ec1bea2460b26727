"""Mistakes in what an experiment is given, each refused in one line."""

import re
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException

import fffexp
from fffexp.configs import flat, parse_yaml
from fffexp.errors import InvalidConfigError, NonFiniteLossError, UserError, one_line

CONFIG = "fffexp_config"  # key of the config in a checkpoint
# options of the trainer, their least values, and the one that means no limit
LIMITS = (
    ("max_epochs", 1, -1),
    ("max_steps", 1, -1),
    ("accumulate_grad_batches", 1, None),
    ("gradient_clip_val", 0, None),
)
MAX_SEED = 2**32 - 1


def check_config(config: Namespace) -> None:
    """Refuse what neither jsonargparse nor Lightning refuses, or not in one line.

    Raises:
        UserError: a value out of its range.
    """
    if not re.fullmatch(r"\w[\w .+=-]{0,99}", config.name):
        raise UserError(f"name is {config.name[:40]!r}: give up to 100 letters, digits, spaces, or . _ - + =")
    if not 0 <= config.seed_everything <= MAX_SEED:
        raise UserError(f"seed_everything is {config.seed_everything}: give 0 to {MAX_SEED}")
    for name, least, unlimited in LIMITS:
        value = config.trainer[name]
        if value is not None and value != unlimited and not value >= least:
            instead = "" if unlimited is None else f", or {unlimited} for no limit"
            raise UserError(f"trainer.{name} is {value}: give at least {least}{instead}")
    if config.get("init_from") and config.ckpt_path:
        raise UserError("init_from starts a new training and ckpt_path resumes one: give one of the two")


def read_checkpoint(key: str, path: str) -> dict[str, Any]:
    """A checkpoint of Lightning's.

    Raises:
        UserError: it is not there, or damaged, or something else.
    """
    if not Path(path).is_file():
        raise UserError(f"{key}: {path} is not there; give the path of a checkpoint")
    try:
        with warnings.catch_warnings(action="ignore"):  # of what it may be instead
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{key}: {path}: {error.strerror}") from error
    except Exception:  # torch says it in many ways
        content = None
    if not (isinstance(content, dict) and {"pytorch-lightning_version", "state_dict", "loops"} <= content.keys()):
        raise UserError(f"{key}: {path} is damaged, or no checkpoint that fffexp fit wrote: give another")
    return content


def check_resumable(checkpoint: Mapping[str, Any], config: Namespace, resolved: str) -> None:
    """Refuse to resume a training that is complete, or one that had another optimizer: Lightning restores that.

    Raises:
        UserError: nothing would be trained, or not as the config says.
    """
    anew = "start a new training from its weights by --init_from"
    if CONFIG in checkpoint:
        texts = (checkpoint[CONFIG], resolved)
        before, now = (dict(flat(parse_yaml(text, "config").get("model") or {})) for text in texts)
        for name in sorted({*before, *now}):
            if name.startswith(("optimizer", "lr_scheduler")) and before.get(name) != now.get(name):
                raise UserError(
                    f"ckpt_path: that training began with model.{name} {before.get(name)}, which cannot become"
                    f" {now.get(name)}: leave it as it was, or {anew}"
                )
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if 0 <= config.trainer.max_steps <= checkpoint["global_step"]:
        raise UserError(
            f"ckpt_path: that training has all its {checkpoint['global_step']} steps: raise max_steps, or {anew}"
        )
    if 0 <= (-1 if config.trainer.max_epochs is None else config.trainer.max_epochs) <= epochs:
        raise UserError(f"ckpt_path: that training has all its {epochs} epochs: raise trainer.max_epochs, or {anew}")


@contextmanager
def user_errors() -> Iterator[None]:
    """Tell mistakes in arguments, and errors in the user's own code, from faults of the program."""
    try:
        yield
    except (UserError, NonFiniteLossError):
        raise
    except ArgumentError as error:
        if (own := _own_code(error)) is not None:
            raise own from error
        raise InvalidConfigError(one_line(str(error))) from error
    except MisconfigurationException as error:
        raise InvalidConfigError(" ".join(str(error).split())) from error
    except Exception as error:
        message = " ".join(str(error).split())
        if "loading state_dict" in message:
            raise UserError(f"the checkpoint does not fit the config: {str(error).splitlines()[1].strip()}") from error
        if message.startswith("Early stopping conditioned on metric"):
            raise UserError(message) from error
        if (own := _own_code(error)) is not None:
            raise own from error
        if isinstance(error, ValueError) and _from_constructor(error):
            raise InvalidConfigError(one_line(str(error))) from error
        raise


def _own_code(error: BaseException | None) -> UserError | None:
    """The error as file and line, if it was raised in a file below the current folder that is not part of a package."""
    installed = [Path(fffexp.__file__).parent, *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))]
    while error is not None:
        traceback, frame = error.__traceback__, None
        while traceback is not None:
            file = Path(traceback.tb_frame.f_code.co_filename)
            if file.is_absolute() and file.is_relative_to(Path.cwd()) and not any(map(file.is_relative_to, installed)):
                frame = f"{file.relative_to(Path.cwd())}, line {traceback.tb_lineno}"
            traceback = traceback.tb_next
        if frame is not None and not isinstance(error, UserError):
            return UserError(f"{frame}: {type(error).__name__}: {' '.join(str(error).split())}")
        error = error.__cause__ or error.__context__
    return None


def _from_constructor(error: ValueError) -> bool:
    # layers, schedules and the task check their arguments as they are made
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        if traceback.tb_frame.f_code.co_name == "instantiate_classes":
            return True
        traceback = traceback.tb_next
    return False
