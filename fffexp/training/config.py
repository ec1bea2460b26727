"""What the config of an experiment says: what is tracked of it, and its mistakes, each refused in one line."""

import re
import sysconfig
import traceback
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
from fffexp.errors import InvalidConfigError, NonFiniteLossError, UserError, one_line, refuse
from fffexp.layers.base import SIZES
from fffexp.training.task import Task

CONFIG = "fffexp_config"  # key of the config in a checkpoint
# least values of options of the trainer; those of the length may also be -1, for no limit
LEAST = {"max_epochs": 1, "max_steps": 1, "accumulate_grad_batches": 1, "gradient_clip_val": 0}


def flat_params(config: Namespace, task: Task) -> dict[str, Any]:
    """What is tracked of a config, under short flat names: layer, layer.depth, optimizer, optimizer.lr, ..."""
    params = {"layer": None, "seed": config.seed_everything, "task": short(config.model), "optimizer": "AdamW"}
    for name, value in init_args(config.model).items():
        if isinstance(value, Mapping):  # aux_weights
            for key, each in value.items():
                arguments = ", ".join(f"{inner}={argument}" for inner, argument in init_args(each).items())
                params[f"{name}.{key}"] = f"{short(each)}({arguments})" if arguments else short(each)
        elif value is not None:
            inner = {f"{name}.{key}": short(each) for key, each in init_args(value).items() if each is not None}
            params |= {name: short(value)} | inner
    return {
        **params,
        "network": type(task.network).__name__,
        **{name: sum(layer.sizes()[name] for layer in task.layers.values()) for name in SIZES},
        "data": short(config.data),
        "data.batch_size": init_args(config.data).get("batch_size"),
        "max_epochs": config.trainer.max_epochs,
        "precision": config.trainer.precision or "32-true",
        "threads": torch.get_num_threads(),
    }


def init_args(value: Any) -> dict[str, Any]:
    """Arguments of a class in a config; none of anything else."""
    return dict(vars(value.get("init_args") or Namespace())) if isinstance(value, Namespace) else {}


def short(value: Any) -> Any:
    """The bare name of a class in a config, or the class path of one from elsewhere; anything else as it is."""
    if not (isinstance(value, Namespace) and "class_path" in value):
        return value
    package, *_, name = value.class_path.split(".")
    return name if package in ("fffexp", "torch", "lightning") else value.class_path


def check_config(config: Namespace) -> None:
    """Raise UserError for what neither jsonargparse nor Lightning refuses, or not in one line."""
    name, seed, both = config.name, config.seed_everything, config.get("init_from") and config.ckpt_path
    known = re.fullmatch(r"\w[\w .+=-]{0,99}", name)
    # not by link_arguments, which would override a value of the user's without a word
    other = init_args(config.data).get("seed", 0) not in (0, seed)
    refuse(
        (not known, f"name is {name[:40]!r}: give up to 100 letters, digits, spaces, or . _ - + ="),
        (not 0 <= seed < 2**32, f"seed_everything is {seed}: give 0 to {2**32 - 1}"),
        (both, "init_from starts a new training and ckpt_path resumes one: give one of the two"),
        (other, "data.init_args.seed is linked to seed_everything and cannot be given: leave it out"),
    )
    for key, least in LEAST.items():
        value, unlimited = config.trainer[key], ", or -1 for no limit" * key.startswith("max_")
        fits = value is None or value >= least or (unlimited and value == -1)
        refuse((not fits, f"trainer.{key} is {value}: give at least {least}{unlimited}"))


def read_checkpoint(key: str, path: str) -> dict[str, Any]:
    """A checkpoint of Lightning's; UserError if it is not there, or damaged, or something else."""
    refuse((not Path(path).is_file(), f"{key}: {path} is not there; give the path of a checkpoint"))
    try:
        with warnings.catch_warnings(action="ignore"):  # of what it may be instead
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{key}: {path}: {error.strerror}") from error
    except Exception:  # torch says it in many ways
        content = None
    whole = isinstance(content, dict) and {"pytorch-lightning_version", "state_dict", "loops"} <= content.keys()
    refuse((not whole, f"{key}: {path} is damaged, or no checkpoint that fffexp fit wrote: give another"))
    return content


def check_checkpoint(config: Namespace, resolved: str, subcommand: str) -> None:
    """Raise UserError for a checkpoint that is missing or damaged, or cannot be resumed as the config says.

    That is one of a training which is complete, or which had another optimizer, for Lightning restores that.
    """
    if config.ckpt_path is None:
        missing = f"ckpt_path is missing: give the checkpoint to {subcommand} by --ckpt_path"
        return refuse((subcommand != "fit", missing))
    checkpoint = read_checkpoint("ckpt_path", config.ckpt_path)
    if subcommand != "fit":
        return
    begun, anew = "ckpt_path: that training", "start a new training from its weights by --init_from"
    texts = (checkpoint.get(CONFIG, resolved), resolved)
    before, now = (dict(flat(parse_yaml(text, "config").get("model") or {})) for text in texts)
    for name in sorted(name for name in {*before, *now} if name.startswith(("optimizer", "lr_scheduler"))):
        old, new = before.get(name), now.get(name)
        changed = f"{begun} began with model.{name} {old}, which cannot become {new}"
        refuse((old != new, f"{changed}: leave it as it was, or {anew}"))
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    for unit, done in (("steps", checkpoint["global_step"]), ("epochs", epochs)):
        limit = config.trainer[f"max_{unit}"]
        ended = limit is not None and 0 <= limit <= done
        refuse((ended, f"{begun} has all its {done} {unit}: raise trainer.max_{unit}, or {anew}"))


@contextmanager
def user_errors() -> Iterator[None]:
    """Tell mistakes in arguments, and errors in the user's own code, from faults of the program."""
    try:
        yield
    except (UserError, NonFiniteLossError):
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        if isinstance(error, MisconfigurationException):
            missing = "backend found" in message or "accelerator is not available" in message
            raise InvalidConfigError("trainer.accelerator: give auto or cpu: " * missing + message) from error
        if "loading state_dict" in message:
            raise UserError(f"the checkpoint does not fit the config: {str(error).splitlines()[1].strip()}") from error
        if message.startswith("Early stopping conditioned on metric"):
            raise UserError(message) from error
        if (own := _own_code(error)) is not None:
            raise own from error
        # layers, schedules and the task check their arguments as they are made
        callers = [frame.name for frame in traceback.extract_tb(error.__traceback__)][:-1]
        if isinstance(error, ArgumentError) or (isinstance(error, ValueError) and "instantiate_classes" in callers):
            raise InvalidConfigError(one_line(str(error))) from error
        raise


def _own_code(error: BaseException | None) -> UserError | None:
    # as file and line, if it was raised in a file below the current folder that is not part of a package
    here, package = Path.cwd(), Path(fffexp.__file__).parent
    installed = [package, *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))]
    while error is not None:
        for frame in () if isinstance(error, UserError) else reversed(traceback.extract_tb(error.__traceback__)):
            file = Path(frame.filename)
            if file.is_absolute() and file.is_relative_to(here) and not any(map(file.is_relative_to, installed)):
                text = " ".join(str(error).split())
                return UserError(f"{file.relative_to(here)}, line {frame.lineno}: {type(error).__name__}: {text}")
        error = error.__cause__ or error.__context__
    return None
