"""Coefficients by schedule."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fffexp.training.schedules import Adaptive, Schedule


def apply_schedules(task: LightningModule, progress: float) -> None:
    """Set the task's aux_weights and its layers' scheduled buffers to their values at this share of the training."""
    for name, schedule in task.schedules.items():
        value = schedule(progress) if isinstance(schedule, Schedule) else float(schedule)
        if task.aux_weights.get(name) == value:
            continue
        task.aux_weights[name] = value
        for layer in task.layers.values():
            if name in layer.annealed_buffers:
                layer.anneal(name, value)


class Schedules(Callback):
    """Sets the task's aux_weights and the layers' scheduled buffers before every step."""

    def __init__(self) -> None:
        self._entropies: list[torch.Tensor] = []
        self._restored: dict[str, float] = {}
        self._adaptive: dict[str, Adaptive] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue adaptive schedules where a resumed run left them."""
        for name, value in self._restored.items():
            pl_module.schedules[name].value = value
        self._adaptive = {n: s for n, s in pl_module.schedules.items() if isinstance(s, Adaptive)}
        self._steps = trainer.estimated_stepping_batches

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Evaluate every schedule."""
        apply_schedules(pl_module, trainer.global_step / self._steps)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Remember the entropy of this step, if a schedule adapts to it."""
        if self._adaptive:
            self._entropies += [
                layer.metrics["entropy"](layer.routing).detach()
                for layer in pl_module.layers.values()
                if "entropy" in layer.metrics
            ]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adapt, and log the aux_weights of the last step."""
        if self._entropies:
            entropy = float(torch.stack(self._entropies).mean())
            self._entropies.clear()
            for schedule in self._adaptive.values():
                schedule.observe(entropy)
        for name, value in pl_module.aux_weights.items():
            pl_module.log(f"schedule/{name}", value)

    def state_dict(self) -> dict[str, Any]:
        """Values of the adaptive schedules."""
        return {name: schedule.value for name, schedule in self._adaptive.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them until training starts."""
        self._restored = state_dict
