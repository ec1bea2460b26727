"""What is tracked of an experiment beside its metrics."""

from collections import Counter
from typing import Any

import torch
from jsonargparse import Namespace

from fffexp.layers.base import SIZES
from fffexp.training.classification import ClassificationTask


def flat_params(config: Namespace, model: ClassificationTask) -> dict[str, Any]:
    """What is tracked of a config, under short flat names."""
    settings = config.model
    params: dict[str, Any] = {"layer": short(settings.layer), "seed": config.seed_everything}
    params |= {f"layer.{name}": short(value) for name, value in init_args(settings.layer).items()}
    params |= {"network": type(model.network).__name__}
    params |= {f"network.{name}": value for name, value in init_args(settings.network).items()}
    params |= total_sizes(model)
    params |= {"data": short(config.data), "data.batch_size": config.data.init_args.batch_size}
    params |= {"optimizer": short(settings.optimizer)}
    params |= {"label_smoothing": settings.label_smoothing, "input_noise_std": settings.input_noise_std}
    params |= {f"optimizer.{name}": value for name, value in init_args(settings.optimizer).items()}
    if settings.lr_scheduler is not None:
        params["lr_scheduler"] = short(settings.lr_scheduler)
        params |= {f"lr_scheduler.{name}": value for name, value in init_args(settings.lr_scheduler).items()}
    for name, value in (settings.aux_weights or {}).items():
        arguments = ", ".join(f"{k}={v}" for k, v in init_args(value).items())
        params[f"aux_weights.{name}"] = f"{short(value)}({arguments})" if arguments else value
    params |= {"max_epochs": config.trainer.max_epochs, "precision": config.trainer.precision or "32-true"}
    params["threads"] = torch.get_num_threads()
    return params


def total_sizes(model: ClassificationTask) -> dict[str, int]:
    """Sizes of all its feedforward layers together."""
    total = Counter(dict.fromkeys(SIZES, 0))
    for layer in model.layers.values():
        total.update(layer.sizes())
    return dict(total)


def init_args(value: Any) -> dict[str, Any]:
    """Arguments of a class in a config; none of anything else."""
    return dict(vars(value.get("init_args") or Namespace())) if isinstance(value, Namespace) else {}


def short(value: Any) -> Any:
    """The bare name of a class in a config; anything else as it is."""
    return value.class_path.rsplit(".", 1)[-1] if isinstance(value, Namespace) and "class_path" in value else value


def backends(model: ClassificationTask) -> str:
    """Names of the backends of its layers."""
    return ",".join(sorted({layer.inference_backend() for layer in model.layers.values()}))
