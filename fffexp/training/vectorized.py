"""Many seeds of one experiment trained at once: the parameters get a seed axis, and one pass serves all.

A seed gives what `fffexp fit --seed_everything SEED` would: the same split, initialisation, order of the rows and
selection on validation. At the widths of arXiv 2308.14711, table 1, ten seeds take the time of three.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, ModelSummary, ProgressBar
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from fffexp.data.base import ClassificationData, Rows
from fffexp.data.batches import Batches
from fffexp.errors import UserError
from fffexp.timing import wait_for_timing
from fffexp.training.callbacks.averaging import WeightAveraging
from fffexp.training.callbacks.routing import BlockCounter, block_usage, dead_leaves
from fffexp.training.callbacks.schedules import apply_schedules
from fffexp.training.callbacks.stability import count_spikes, late_deviation
from fffexp.training.classification import ClassificationTask
from fffexp.training.config import user_errors
from fffexp.training.experiment import Context, ExperimentCLI
from fffexp.training.losses import weighted_aux_losses
from fffexp.training.params import flat_params
from fffexp.training.schedules import Adaptive

Parameters = dict[str, Tensor]
_MONITORED = ("train/accuracy", "val/accuracy")
# Options of a trainer that are not followed, and their defaults.
_PLAIN = {
    "gradient_clip_val": None,
    "accumulate_grad_batches": 1,
    "precision": "32-true",
    "max_steps": -1,
    "limit_train_batches": 1.0,
    "limit_val_batches": 1.0,
    "overfit_batches": 0.0,
    "check_val_every_n_epoch": 1,
    "val_check_interval": 1.0,
}
# An average is made here too, and the others change nothing that is trained.
_CALLBACKS = (WeightAveraging, Checkpoint, LearningRateMonitor, ModelSummary, ProgressBar)
# Rows of an evaluation pass.
EVALUATION_ROWS = 8192


@dataclass
class Replica:
    """What came of one seed; accuracies with hard decisions and averaged weights, where there are, epochs from 1."""

    seed: int
    train_accuracy: float | None  # the best of all epochs; None if it was not to be measured
    epochs_to_fit: int | None
    val_accuracy: float  # the best of all epochs
    epochs_to_best: int
    test_accuracy: float | None  # of the weights that were best on validation; None if it was not to be read
    used_blocks: int | None  # leaves or experts that 0.1% of the validation set reaches, in the layer that uses fewest
    epochs: int
    val_accuracy_std: float  # over the last quarter of the epochs
    loss_spikes: int  # steps whose loss leaves the course of those before
    nonfinite_steps: int  # steps whose loss was not finite
    dead_blocks: int | None  # leaves or experts that no training sample reaches, at the selected weights

    def metrics(self) -> dict[str, float]:
        """Those that fit tracks, under its names; its training accuracy is that of the steps and is left out."""
        found = {
            "val/accuracy": self.val_accuracy,
            "test/accuracy": self.test_accuracy,
            "epochs_to_best": self.epochs_to_best,
            "routing/used_leaves": self.used_blocks,
            "stability/val_monitor_std": self.val_accuracy_std,
            "stability/loss_spikes": self.loss_spikes,
            "stability/dead_leaves": self.dead_blocks,
        }
        return {name: float(value) for name, value in found.items() if value is not None}


class _Loss(nn.Module):
    """The loss as the forward pass of a module, which is what functional_call calls."""

    def __init__(self, task: ClassificationTask) -> None:
        super().__init__()
        self.task = task

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, predicted, _ = self.task.loss((x, y))
        total = loss + weighted_aux_losses(self.task.layers.values(), self.task.aux_weights)
        self.task.on_after_backward()  # routing holds tensors of the seed axis
        return total, (predicted == y).sum()


def _one(loss: _Loss, parameters: Parameters, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """What torch.vmap would give for a seed axis of length 1, on the layers' own kernels."""
    found = functional_call(loss, {name: p[0] for name, p in parameters.items()}, tuple(part[0] for part in batch))
    return tuple(part.unsqueeze(0) for part in found)


class Replicas:
    """The same experiment with several seeds; the optimizer must treat each element for itself, as AdamW does.

    Args:
        args: of `fffexp fit`, without a seed.
        seeds: one replica each.

    Attributes:
        config: YAML, enough to rerun the first seed alone.
        params: what is tracked of it.

    Raises:
        UserError: a mistake in the arguments, or something that cannot have a seed axis.
    """

    def __init__(self, args: Sequence[str], seeds: Sequence[int]) -> None:
        self.seeds = list(seeds)
        with user_errors():
            experiments = [
                ExperimentCLI(["fit", *args, f"--seed_everything={seed}"], Context(quiet=True, dry=True))
                for seed in self.seeds
            ]
        self.config: str = experiments[0].resolved_yaml
        self.params = flat_params(experiments[0].resolved, experiments[0].model)
        trainer = experiments[0].trainer
        self.device = trainer.strategy.root_device
        self.task: ClassificationTask = experiments[0].model.to(self.device)
        self.noise, self.task.input_noise_std = self.task.input_noise_std, 0.0  # added here, for all seeds at once
        if not trainer.max_epochs or trainer.max_epochs < 0:
            raise UserError(
                f"trainer.max_epochs is {trainer.max_epochs}: training of many seeds at once needs at least 1"
            )
        self.epochs = trainer.max_epochs
        self.data: list[ClassificationData] = [experiment.datamodule for experiment in experiments]
        self.averaging = _averaging(trainer.callbacks)  # type: ignore[attr-defined] # set by a connector
        if any(isinstance(schedule, Adaptive) for schedule in self.task.schedules.values()):
            raise UserError("an Adaptive schedule differs from seed to seed: use another, or fffexp fit")
        if any(layer.sparse_gradients for layer in self.task.layers.values()):
            raise UserError("sparse gradients have no seed axis: use fffexp fit")
        _refuse(trainer)
        own = [dict(experiment.model.network.named_parameters()) for experiment in experiments]
        self.parameters: Parameters = {
            name: torch.stack([each[name].detach().to(self.device) for each in own]).requires_grad_() for name in own[0]
        }
        self.averaged: Parameters | None = None

    def train(
        self,
        patience: int | None = None,
        fit_matters: bool = True,
        train_accuracy: bool = True,
        test: bool = True,
    ) -> list[Replica]:
        """Train all, then read the test set once, if at all.

        Args:
            patience: a seed's training stops once its validation accuracy has not improved for so many epochs.
            fit_matters: a better training accuracy counts as well.
            train_accuracy: whether it is measured, at the cost of an evaluation of the training set an epoch.
            test: whether the test set is read.

        Raises:
            UserError: the seeds' training parts differ in size, or their learning rates would.
        """
        for data in self.data:
            data.setup()
            for part in ("train_data", "val_data", "test_data"):
                setattr(data, part, tuple(rows.to(self.device) for rows in getattr(data, part)))
        if len({len(data.train_data[0]) for data in self.data}) > 1:
            raise UserError("the seeds' training parts differ in size, so that their batches do: use fffexp fit")
        task, optimizer = self.task, self.task.optimizer(list(self.parameters.values()))
        epoch = 0
        loaders = [
            Batches(*data.train_data, data.batch_size, seed=data.seed, epoch=lambda: epoch, device=self.device)
            for data in self.data
        ]
        steps = len(loaders[0]) * self.epochs
        scheduler, interval = task.scheduler(optimizer, lambda: steps) if task.lr_scheduler else (None, None)
        plateau = scheduler if isinstance(scheduler, ReduceLROnPlateau) else None
        if plateau is not None and (len(self.seeds) > 1 or plateau.monitor not in _MONITORED):
            raise UserError(
                f"a plateau differs from seed to seed: give one seed, and monitor {' or '.join(_MONITORED)}"
            )
        loss = _Loss(task)
        vectorised = len(self.seeds) > 1
        losses = (
            torch.vmap(partial(functional_call, loss), randomness="different") if vectorised else partial(_one, loss)
        )
        best = _Best(self.seeds)
        live = list(range(len(self.seeds)))  # whose training goes on
        at = torch.tensor(live, device=self.device)  # the same, where the losses are
        step = 0
        course = torch.full((len(self.seeds), steps), torch.nan, device=self.device)
        for epoch in range(self.epochs):
            task.train()
            for layer in task.layers.values():
                layer.vectorized = vectorised
            prefixed = {f"task.network.{name}": p for name, p in self.parameters.items()}
            right = torch.zeros_like(at)
            for parts in zip(*loaders, strict=True):
                wait_for_timing()
                x, y = (torch.stack(rows) for rows in zip(*parts, strict=True))
                _add_noise(x, self.noise)
                apply_schedules(task, step / steps)
                optimizer.zero_grad()
                # the faster kernels of attention have no seed axis, or fail with one (on CUDA, torch 2.11)
                with sdpa_kernel(SDPBackend.MATH) if vectorised else nullcontext():
                    loss_S, right_S = losses(prefixed, (x, y))
                right += right_S
                course[at, step] = loss_S.detach()
                loss_S.sum().backward()
                optimizer.step()
                self._average(step)
                step += 1
                if scheduler is not None and interval == "step":
                    scheduler.step()
            self._observe(best, live, epoch + 1, train_accuracy)
            if plateau is not None:
                in_training = float(right[0] / len(self.data[0].train_data[0]))
                plateau.step(in_training if plateau.monitor == "train/accuracy" else best.course[0][-1])
            elif scheduler is not None and interval == "epoch":
                scheduler.step()
            if patience is not None:
                rows = [r for r, i in enumerate(live) if not best.stalled(i, epoch + 1, patience, fit_matters)]
                if not rows:
                    break
                if len(rows) < len(live):
                    self._keep(rows, optimizer)
                    live, loaders = [live[r] for r in rows], [loaders[r] for r in rows]
                    at = at[rows]
        return [
            self._replica(index, best, course[index, : len(best.course[index]) * steps // self.epochs], test)
            for index in range(len(self.seeds))
        ]

    def _keep(self, rows: list[int], optimizer: Optimizer) -> None:
        """Go on with these rows of the seed axis alone."""
        old = self.parameters
        self.parameters = {name: p.detach()[rows].requires_grad_() for name, p in old.items()}
        (group,) = optimizer.param_groups
        group["params"] = list(self.parameters.values())
        for name, p in self.parameters.items():
            state = optimizer.state.pop(old[name], {})
            # a step has no seed axis
            optimizer.state[p] = {k: v[rows] if isinstance(v, Tensor) and v.dim() else v for k, v in state.items()}
        if self.averaged is not None:
            self.averaged = {name: average[rows] for name, average in self.averaged.items()}

    def _average(self, step: int) -> None:
        if self.averaging is None:
            return
        if self.averaged is None:
            self.averaged = {name: p.detach().clone() for name, p in self.parameters.items()}
            return
        for name, average in self.averaged.items():
            average.lerp_(self.parameters[name].detach(), self.averaging.share(step))

    @torch.no_grad()
    def _observe(self, best: "_Best", live: Sequence[int], epoch: int, train_accuracy: bool) -> None:
        weights = self.averaged or self.parameters
        for row, index in enumerate(live):
            data = self.data[index]
            mine = {name: p[row].detach() for name, p in weights.items()}
            train = self._accuracy(mine, data.train_data) if train_accuracy else None
            best.observe(index, epoch, train, self._accuracy(mine, data.val_data), mine)

    def _accuracy(self, weights: Parameters, rows: Rows) -> float:
        self._evaluate()
        right = 0
        for x, y in zip(*(part.split(EVALUATION_ROWS) for part in rows), strict=True):
            right += int((functional_call(self.task.network, weights, (x,)).argmax(1) == y).sum())
        return right / len(rows[1])

    def _evaluate(self) -> None:
        self.task.eval()
        for layer in self.task.layers.values():
            layer.vectorized = False

    @torch.no_grad()
    def _replica(self, index: int, best: "_Best", losses: Tensor, test: bool) -> Replica:
        weights, data = best.weights[index], self.data[index]
        train = best.train[index] if best.train[index][1] else None
        self._evaluate()
        self.task.network.load_state_dict(weights, strict=False)  # buffers stay
        return Replica(
            seed=self.seeds[index],
            train_accuracy=train[0] if train else None,
            epochs_to_fit=train[1] if train else None,
            val_accuracy=best.val[index][0],
            epochs_to_best=best.val[index][1],
            test_accuracy=self._accuracy(weights, data.test_data) if test else None,
            used_blocks=self._used(data.val_data[0]),
            epochs=len(best.course[index]),
            val_accuracy_std=late_deviation(best.course[index]),
            loss_spikes=count_spikes(losses[losses.isfinite()].cpu().double().numpy()),
            nonfinite_steps=int((~losses.isfinite()).sum()),
            dead_blocks=self._dead(data.train_data[0]),
        )

    def _used(self, x: Tensor) -> int | None:
        counter = BlockCounter(self.task)
        for rows in x.split(EVALUATION_ROWS):
            self.task(rows)
        counts = counter.finish()
        used = (block_usage(count, counter.rows[path])["used_leaves"] for path, count in counts.items())
        return int(min(used)) if counts else None

    def _dead(self, x: Tensor) -> int | None:
        dead = dead_leaves(self.task, x.split(EVALUATION_ROWS))
        return int(dead["stability/dead_leaves"]) if dead else None


def _add_noise(x_SB: Tensor, deviation: float) -> None:
    """Normal noise, drawn once for a step and rolled by another amount for each seed: drawing is slow."""
    if deviation:
        drawn = torch.randn(x_SB[0].numel(), device=x_SB.device)
        shifts = torch.randint(len(drawn), (len(x_SB),)).tolist()
        for x_B, shift in zip(x_SB, shifts, strict=True):
            x_B.add_(drawn.roll(shift).view_as(x_B), alpha=deviation)


class _Best:
    """The best accuracies of each seed so far, their epochs, and the weights that were best on validation."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.train, self.val = [[(-1.0, 0)] * len(seeds) for _ in range(2)]
        self.course: list[list[float]] = [[] for _ in seeds]  # of the validation accuracy
        self.weights: list[Parameters] = [{} for _ in seeds]

    def observe(self, index: int, epoch: int, train: float | None, val: float, weights: Parameters) -> None:
        if train is not None and train > self.train[index][0]:
            self.train[index] = train, epoch
        self.course[index].append(val)
        if val > self.val[index][0]:
            self.val[index] = val, epoch
            self.weights[index] = {name: p.clone() for name, p in weights.items()}

    def stalled(self, index: int, epoch: int, patience: int, fit_matters: bool) -> bool:
        last = max(self.val[index][1], self.train[index][1] if fit_matters else 0)
        return epoch - last >= patience


def _refuse(trainer: Trainer) -> None:
    """Options of the trainer that are not followed here."""
    for name, plain in _PLAIN.items():
        value = getattr(trainer, name)
        if (type(value), value) != (type(plain), plain):
            raise UserError(f"trainer.{name} is {value}, which training of many seeds at once does not follow")
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # set by a connector
        if not isinstance(callback, _CALLBACKS):
            raise UserError(f"{type(callback).__name__} is a callback that training of many seeds at once cannot have")


def _averaging(callbacks: Sequence[Callback]) -> WeightAveraging | None:
    return next((callback for callback in callbacks if isinstance(callback, WeightAveraging)), None)
