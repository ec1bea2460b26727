"""Weights and temperatures by schedule."""

import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from fffexp.training.schedules import Adaptive, Constant, Schedule


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
    """Sets the task's aux_weights and the layers' scheduled buffers before every step.

    The progress of a training is the largest share that is over of what ends it: its steps (max_epochs, max_steps), its
    epochs where their length is not known, its time (max_time). A warning says if nothing ends it, and if it ended
    before the schedules did.
    """

    def __init__(self) -> None:
        self._entropies: list[torch.Tensor] = []
        self._values: dict[str, float] = {}  # of adaptive schedules
        self._adaptive: dict[str, Adaptive] = {}
        self._steps = float("inf")
        self._progress = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue adaptive schedules where a resumed run left them."""
        self._adaptive = {n: s for n, s in pl_module.schedules.items() if isinstance(s, Adaptive)}
        for name, schedule in self._adaptive.items():
            schedule.value = self._values.get(name, schedule.value)
        self._steps = trainer.estimated_stepping_batches
        self._timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined] # set by a connector
        self._moving = [
            name
            for name, schedule in pl_module.schedules.items()
            if isinstance(schedule, Schedule) and not isinstance(schedule, (Adaptive, Constant))
        ]
        timed = any(timer.time_remaining() is not None for timer in self._timers)
        if self._moving and self._steps == float("inf") and not timed and (trainer.max_epochs or -1) < 0:
            warnings.warn(
                f"the training has no known end, so that the schedule of {', '.join(self._moving)} stays at its start "
                "and nothing hardens: give trainer.max_epochs, max_steps or max_time",
                stacklevel=2,
            )

    def _share(self, trainer: Trainer) -> float:
        shares = [trainer.global_step / self._steps]
        if self._steps == float("inf") and (trainer.max_epochs or -1) > 0:
            shares.append(trainer.current_epoch / trainer.max_epochs)
        for timer in self._timers:
            if (left := timer.time_remaining()) is not None:
                elapsed = timer.time_elapsed()
                shares.append(elapsed / max(elapsed + left, elapsed, 1e-9))
        return min(max(shares), 1.0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Evaluate every schedule."""
        self._progress = self._share(trainer)
        apply_schedules(pl_module, self._progress)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Remember the entropy of this step, if a schedule adapts to it."""
        if self._adaptive:
            self._entropies += [
                layer.metrics["entropy"](layer.routing).detach()
                for layer in pl_module.layers.values()
                if "entropy" in layer.metrics and layer.routing is not None
            ]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adapt, and log the aux_weights of the last step."""
        if self._entropies:
            entropy = float(torch.stack(self._entropies).mean())
            self._entropies.clear()
            for name, schedule in self._adaptive.items():
                schedule.observe(entropy)
                self._values[name] = schedule.value
        for name, value in pl_module.aux_weights.items():
            pl_module.log(f"schedule/{name}", value)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the training was stopped before its schedules ended."""
        known = self._steps < float("inf")
        if self._moving and known and trainer.global_step < self._steps and self._progress < 0.9:
            warnings.warn(
                f"training stopped after {self._progress:.0%} of the schedule of {', '.join(self._moving)}: "
                "trees are not hardened; for a hardened one train to the end, with trainer.max_epochs near this length",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Values of the adaptive schedules, and what they have seen of this epoch."""
        return {"values": dict(self._values), "entropies": [float(entropy) for entropy in self._entropies]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them until training starts."""
        self._values = dict(state_dict["values"])
        self._entropies = [torch.tensor(entropy) for entropy in state_dict["entropies"]]
