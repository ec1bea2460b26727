"""Which feedforward layer: dense FF, noisy top-k MoE or FFF? Measured, with the layers to use."""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fffexp.adapt.distil import convert_feedforward
    from fffexp.adapt.pretrained import load_pretrained
    from fffexp.adapt.replace import replace_feedforward
    from fffexp.data import IDX, Arrays, Digits, FashionMNIST, Hub, ImageFolder, Table, Text
    from fffexp.layers import (
        FF,
        FFF,
        PEER,
        ExpertChoiceMoE,
        FeedforwardLayer,
        Forest,
        NoisyTopKMoE,
        Shared,
        SigmoidMoE,
        SparseFF,
        SwitchMoE,
        TreeFF,
        feedforward_layers,
    )
    from fffexp.layers.base import LayerFactory
    from fffexp.training.classification import ClassificationTask
    from fffexp.training.language_model import LanguageModelTask
    from fffexp.training.losses import anneal, auxiliary_loss
    from fffexp.training.optim import LazyAdamW
    from fffexp.training.regression import RegressionTask
    from fffexp.training.schedules import Adaptive, Constant, Exponential, Linear, Schedule, Step
    from fffexp.training.task import Task

__all__ = [
    "FF", "FFF", "IDX", "PEER", "Adaptive", "Arrays", "ClassificationTask", "Constant", "Digits", "ExpertChoiceMoE",
    "Exponential", "FashionMNIST", "FeedforwardLayer", "Forest", "Hub", "ImageFolder", "LanguageModelTask",
    "LayerFactory", "LazyAdamW", "Linear", "NoisyTopKMoE", "RegressionTask", "Schedule", "Shared", "SigmoidMoE",
    "SparseFF", "Step", "SwitchMoE", "Table", "Task", "Text", "TreeFF", "anneal", "auxiliary_loss",
    "convert_feedforward", "feedforward_layers", "load_pretrained", "replace_feedforward",
]  # fmt: skip

# imported when first asked for: torch and lightning take seconds, which --help and reports should not pay
_HOMES = {
    "adapt.distil": ("convert_feedforward",),
    "adapt.pretrained": ("load_pretrained",),
    "adapt.replace": ("replace_feedforward",),
    "data": ("IDX", "Arrays", "Digits", "FashionMNIST", "Hub", "ImageFolder", "Table", "Text"),
    "layers": (
        "FF",
        "FFF",
        "PEER",
        "ExpertChoiceMoE",
        "FeedforwardLayer",
        "Forest",
        "NoisyTopKMoE",
        "Shared",
        "SigmoidMoE",
        "SparseFF",
        "SwitchMoE",
        "TreeFF",
        "feedforward_layers",
    ),
    "layers.base": ("LayerFactory",),
    "training.classification": ("ClassificationTask",),
    "training.language_model": ("LanguageModelTask",),
    "training.losses": ("anneal", "auxiliary_loss"),
    "training.optim": ("LazyAdamW",),
    "training.regression": ("RegressionTask",),
    "training.schedules": ("Adaptive", "Constant", "Exponential", "Linear", "Schedule", "Step"),
    "training.task": ("Task",),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("fffexp")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"fffexp.{home}"), name)
    raise AttributeError(f"module 'fffexp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "__version__", *__all__]
