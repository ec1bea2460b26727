"""What is tracked of an experiment beside its metrics."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from jsonargparse import Namespace

from fffexp.layers.base import SIZES
from fffexp.training.task import Task

OURS = ("fffexp", "torch", "lightning")  # packages whose classes are known by their bare names


def flat_params(config: Namespace, task: Task) -> dict[str, Any]:
    """What is tracked of a config, under short flat names: layer, layer.depth, optimizer, optimizer.lr, ..."""
    params: dict[str, Any] = {"layer": None, "seed": config.seed_everything, "task": short(config.model)}
    for name, value in init_args(config.model).items():
        if isinstance(value, Mapping):  # aux_weights
            params |= {f"{name}.{key}": _call(inner) for key, inner in value.items()}
        elif value is not None or name == "layer":
            params |= {name: short(value)} | {
                f"{name}.{key}": short(inner) for key, inner in init_args(value).items() if inner is not None
            }
    params["network"] = type(task.network).__name__
    params |= total_sizes(task)
    params |= {"data": short(config.data), "data.batch_size": init_args(config.data).get("batch_size")}
    params["optimizer"] = params.get("optimizer", "AdamW")
    params |= {"max_epochs": config.trainer.max_epochs, "precision": config.trainer.precision or "32-true"}
    params["threads"] = torch.get_num_threads()
    return params


def total_sizes(task: Task) -> dict[str, int]:
    """Sizes of all its feedforward layers together."""
    total = Counter(dict.fromkeys(SIZES, 0))
    for layer in task.layers.values():
        total.update(layer.sizes())
    return dict(total)


def init_args(value: Any) -> dict[str, Any]:
    """Arguments of a class in a config; none of anything else."""
    return dict(vars(value.get("init_args") or Namespace())) if isinstance(value, Namespace) else {}


def short(value: Any) -> Any:
    """The bare name of a class in a config, or the class path of one from elsewhere; anything else as it is."""
    if not (isinstance(value, Namespace) and "class_path" in value):
        return value
    package, _, name = value.class_path.partition(".")
    return name.rsplit(".", 1)[-1] if package in OURS else value.class_path


def _call(value: Any) -> Any:
    arguments = ", ".join(f"{name}={inner}" for name, inner in init_args(value).items())
    return f"{short(value)}({arguments})" if arguments else short(value)


def backends(task: Task) -> str:
    """Names of the backends of its layers."""
    return ",".join(sorted({layer.inference_backend() for layer in task.layers.values()}))
