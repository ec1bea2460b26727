"""Weights and temperatures by schedule."""

import warnings
from math import inf
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from torch import Tensor

from fffexp.training.schedules import Adaptive, Constant


class Schedules(Callback):
    """Sets the task's aux_weights and the layers' scheduled buffers before every step.

    The progress of a training is the largest share that is over of what ends it: its steps (max_epochs, max_steps), its
    epochs where their length is not known, its time (max_time). A warning says if nothing ends it, and if it ended
    before the schedules did.
    """

    def __init__(self) -> None:
        self._entropies: list[Tensor] = []
        self._values: dict[str, float] = {}  # of adaptive schedules
        self._progress = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        schedules = pl_module.schedules.items()
        self._adaptive = {name: schedule for name, schedule in schedules if isinstance(schedule, Adaptive)}
        for name, schedule in self._adaptive.items():  # a resumed run goes on where it was
            schedule.value = self._values.get(name, schedule.value)
        moving = [name for name, schedule in schedules if not isinstance(schedule, Constant)]
        self._moving, self._steps = ", ".join(moving), trainer.estimated_stepping_batches
        callbacks = trainer.callbacks  # type: ignore[attr-defined] # set by a connector
        self._timers = [each for each in callbacks if isinstance(each, Timer) and each.time_remaining() is not None]
        if moving and self._steps == inf and not self._timers and (trainer.max_epochs or -1) < 0:
            warnings.warn(
                f"the training has no known end, so that the schedule of {self._moving} stays at its start "
                "and nothing hardens: give trainer.max_epochs, max_steps or max_time",
                stacklevel=2,
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        shares = [trainer.global_step / self._steps]
        if self._steps == inf and (trainer.max_epochs or -1) > 0:
            shares.append(trainer.current_epoch / trainer.max_epochs)
        times = [(timer.time_elapsed(), timer.time_remaining()) for timer in self._timers]
        shares += [elapsed / max(elapsed + left, 1e-9) for elapsed, left in times]
        self._progress = min(max(shares), 1.0)
        for name, schedule in pl_module.schedules.items():
            value = schedule(self._progress)
            if pl_module.aux_weights.get(name) != value:
                pl_module.aux_weights[name] = value
                for layer in pl_module.layers.values():
                    if name in layer.annealed_buffers:
                        layer.anneal(name, value)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._adaptive:
            self._entropies += [
                layer.metrics["entropy"](layer.routing).detach()
                for layer in pl_module.layers.values()
                if "entropy" in layer.metrics and layer.routing is not None
            ]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._entropies:
            entropy = float(torch.stack(self._entropies).mean())
            self._entropies.clear()
            for name, schedule in self._adaptive.items():
                schedule.observe(entropy)
                self._values[name] = schedule.value
        pl_module.log_dict({f"schedule/{name}": value for name, value in pl_module.aux_weights.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._moving and trainer.global_step < self._steps < inf and self._progress < 0.9:
            warnings.warn(
                f"training stopped after {self._progress:.0%} of the schedule of {self._moving}: "
                "trees are not hardened; for a hardened one train to the end, with trainer.max_epochs near this length",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"values": dict(self._values), "entropies": [float(entropy) for entropy in self._entropies]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._values = dict(state_dict["values"])
        self._entropies = [torch.tensor(entropy) for entropy in state_dict["entropies"]]
