"""Several seeds of one experiment trained at once: the parameters get a seed axis, and one pass serves all seeds.

Lightning runs the training. Each seed gives what `fffexp fit --seed_everything SEED` gives: the same split,
initialisation, order of samples, random numbers and selection on validation. Where an experiment cannot run so, the
seeds are trained one after another.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    WeightAveraging,
)
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils.data import default_collate
from typing_extensions import override

from fffexp.errors import UserError
from fffexp.layers import FeedforwardLayer
from fffexp.layers.random import seed_generators
from fffexp.timing import wait_for_timing
from fffexp.training.callbacks.checkpoint import RandomState
from fffexp.training.callbacks.progress import EpochLines
from fffexp.training.callbacks.routing import dead_leaves
from fffexp.training.callbacks.schedules import Schedules
from fffexp.training.callbacks.stability import count_spikes, late_deviation
from fffexp.training.experiment import build, interruptible
from fffexp.training.losses import weighted_aux_losses
from fffexp.training.schedules import Adaptive
from fffexp.training.task import Task

# Each element is updated from its own gradients alone. Others, such as Adafactor or Muon, would mix the seeds.
ELEMENTWISE = frozenset({"SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD"})
# They save or print single runs.
LEFT_OUT = Checkpoint, RandomState, EpochLines
# They average each element for itself, or change nothing that is trained.
FOLLOWED = WeightAveraging, LearningRateMonitor, ModelSummary, ProgressBar
# How the names begin of what a task may override: the rest of it is not called where seeds are trained at once.
OVERRIDABLE = ("forward", "validation_step", "on_validation_epoch", "test", "on_test", "predict", "on_predict")


class NotVectorizable(Exception):
    """The seeds of an experiment cannot be trained at once."""


@dataclass
class Seed:
    """One seed: what it is made of, and the course of its training.

    Attributes:
        task: with the selected weights, after training.
        data: its own split and order of samples.
        config: YAML that reruns it.
        params: that are tracked of it.
        generator: of random numbers, in the state in which the training of this seed alone would begin.
        result: metrics after training.
    """

    task: Task
    data: LightningDataModule
    trainer: Trainer
    config: str
    params: dict[str, Any]
    generator: torch.Generator
    result: dict[str, float] = field(default_factory=dict)
    logged: Mapping[str, Any] = field(default_factory=dict)  # last
    # (epoch from 1, value) of the monitored metric, on validation and on the training data
    validated: list[tuple[int, float]] = field(default_factory=list)
    fitted: list[tuple[int, float]] = field(default_factory=list)
    candidate: dict[str, Tensor] = field(default_factory=dict)  # what was validated last
    best: dict[str, Tensor] = field(default_factory=dict)
    epochs: int = 0  # trained
    steps: int | None = None  # at its own stop, before that of all

    def move(self, batch: Any, device: torch.device, dataloader_idx: int = 0) -> Any:
        """A batch of its data, where the task is."""
        batch = self.data.on_before_batch_transfer(batch, dataloader_idx)
        batch = self.data.transfer_batch_to_device(batch, device, dataloader_idx)
        return self.data.on_after_batch_transfer(batch, dataloader_idx)

    def train_batches(self) -> Iterator[Any]:
        """One epoch of training data."""
        return (self.move(batch, self.task.device) for batch in self.data.train_dataloader())

    def first_best(self, course: Sequence[tuple[int, float]]) -> int:
        """Index of the first of the best values."""
        sign = 1 if self.task.mode == "max" else -1
        return int(np.argmax(np.nan_to_num([sign * value for _, value in course], nan=-np.inf)))


def train_seeds(
    args: Sequence[str],
    seeds: Sequence[int],
    *,
    test: bool,
    patience: int | None = None,
    measure_fit: bool = False,
    fit_counts: bool = False,
) -> Iterator[Seed]:
    """Train an experiment with several seeds and select each on validation; a seed is given as soon as it is done.

    Args:
        args: of `fffexp fit`, without a seed.
        seeds: one training each.
        test: whether the test set is read, once for each seed, with the selected weights.
        patience: a seed stops when the monitored metric has not improved for so many epochs. The training goes on
            until all have stopped; results of a seed are those up to its own stop.
        measure_fit: measure the monitored metric on the training data after each epoch as on validation: the best is
            reported as `train/NAME`, its epoch as `epochs_to_fit`.
        fit_counts: patience ends only when that has not improved either.

    Yields:
        The seeds in their order; `result` has the metrics of the selected weights and of the training, under the names
        of a single fit, and `epochs`.

    Raises:
        UserError: a mistake in the arguments.
    """
    options = {"patience": patience, "measure_fit": measure_fit, "fit_counts": fit_counts}
    if len(seeds) > 1:
        try:
            made = [_make(args, seed) for seed in seeds]
            _check(made)
            yield from _train(made, _Together(made), _SeedData(made), test, options)
            return
        except NotVectorizable as reason:
            print(f"seeds are trained one after another: {reason}", file=sys.stderr)
    for number in seeds:
        seed = _make(args, number)
        yield from _train([seed], seed.task, seed.data, test, options)


def _make(args: Sequence[str], number: int) -> Seed:
    built = build(["fit", *args, f"--seed_everything={number}"])
    built.data.prepare_data()
    built.data.setup("fit")
    device = built.trainer.strategy.root_device
    generator = torch.Generator(device)
    generator.set_state(torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state())
    return Seed(*built, generator)


def _train(
    seeds: list[Seed], module: LightningModule, data: LightningDataModule, test: bool, options: Mapping[str, Any]
) -> list[Seed]:
    trainer, selection = seeds[0].trainer, _Selection(seeds, **options)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined] # set by a connector
    # first, for an averaging takes its weights back at the end of a validation
    trainer.callbacks = [selection, *(c for c in callbacks if not isinstance(c, LEFT_OUT))]  # type: ignore[attr-defined]
    interruptible(trainer, module, data, {})
    for seed in seeds:
        selection.finish(seed, test)
    return seeds


def _check(seeds: Sequence[Seed]) -> None:
    """Refuse what is known to mix seeds, or to differ between them.

    Raises:
        NotVectorizable: with the reason.
    """
    task, trainer = seeds[0].task, seeds[0].trainer
    optimizer = task.optimizer([nn.Parameter(torch.zeros(1))])
    kind = type(optimizer)
    if kind.__name__ not in ELEMENTWISE or kind is not getattr(torch.optim, kind.__name__, None):
        raise NotVectorizable(f"{kind.__name__} is not known to update each element for itself")
    if task.lr_scheduler is not None:
        scheduler = task.scheduler(optimizer, lambda: 100)[0]
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise NotVectorizable(f"{type(scheduler).__name__} differs from seed to seed")
    if any(isinstance(schedule, Adaptive) for schedule in task.schedules.values()):
        raise NotVectorizable("an Adaptive schedule differs from seed to seed")
    for layer in task.layers.values():
        if not layer.vectorizable:
            raise NotVectorizable(f"{type(layer).__name__} cannot run under torch.vmap as it is configured")
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise NotVectorizable(f"precision {trainer.precision} scales the losses of all seeds by one number")
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # set by a connector
        if not isinstance(callback, LEFT_OUT + FOLLOWED):
            raise NotVectorizable(f"{type(callback).__name__} is not known to treat each seed for itself")
    classes = type(task).__mro__
    own = {name for cls in classes[: classes.index(Task)] for name in vars(cls)}
    for name in sorted(own):
        if callable(getattr(LightningModule, name, None)) and not name.startswith(("__", *OVERRIDABLE)):
            raise NotVectorizable(f"{type(task).__name__} has its own {name}")
    if len({len(seed.data.train_dataloader()) for seed in seeds}) > 1:
        raise NotVectorizable("the numbers of training batches differ")
    buffers = [dict(seed.task.named_buffers()) for seed in seeds]
    if any(not torch.equal(each[name], buffers[0][name]) for each in buffers[1:] for name in each):
        raise NotVectorizable("buffers of the network differ from seed to seed")


class _Selection(EarlyStopping):
    """Follows each seed: losses, metrics, best weights, patience.

    An EarlyStopping because Lightning calls those when all metrics of an epoch are there.
    """

    def __init__(self, seeds: Sequence[Seed], patience: int | None, measure_fit: bool, fit_counts: bool) -> None:
        super().__init__(seeds[0].task.monitor)
        self.seeds, self.epochs_without, self.measure_fit, self.fit_counts = seeds, patience, measure_fit, fit_counts
        self.fit_name = f"train/{self.monitor.partition('/')[2]}"
        self.losses: list[Tensor] = []  # (seeds,) of each step

    def live(self) -> list[Seed]:
        """Seeds that have not stopped."""
        return [seed for seed in self.seeds if seed.steps is None]

    @override
    def on_train_batch_end(  # type: ignore[override] # outputs are those of our modules
        self, trainer: Trainer, pl_module: LightningModule, outputs: Mapping[str, Tensor], batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["losses"] if "losses" in outputs else outputs["loss"].detach()[None])

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for seed in self.live():
            seed.candidate = {name: value.clone() for name, value in seed.task.state_dict().items()}
            if self.measure_fit:
                seed.fitted.append((trainer.current_epoch + 1, self._fit_of(seed)))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for seed in self.live():
            if pl_module is seed.task:
                seed.logged = trainer.callback_metrics
            seed.validated.append((trainer.current_epoch + 1, float(seed.logged[self.monitor])))
            if seed.first_best(seed.validated) == len(seed.validated) - 1:
                seed.best = seed.candidate

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for seed in self.live():
            if pl_module is seed.task:
                seed.logged = trainer.callback_metrics
            epoch = seed.epochs = trainer.current_epoch + 1
            if not self.measure_fit and self.fit_name in seed.logged:
                seed.fitted.append((epoch, float(seed.logged[self.fit_name])))
            if self.epochs_without is not None:
                courses = [seed.validated, *([seed.fitted] if self.fit_counts else [])]
                best = max((course[seed.first_best(course)][0] for course in courses if course), default=epoch)
                if epoch - best >= self.epochs_without:
                    seed.steps = len(self.losses)
        trainer.should_stop = trainer.should_stop or not self.live()

    @torch.no_grad()
    def _fit_of(self, seed: Seed) -> float:
        metrics = seed.task.make_metrics()
        metric = metrics[self.fit_name.partition("/")[2]].to(seed.task.device)
        for batch in seed.train_batches():
            _, outputs, targets = seed.task.loss(batch)
            metric.update(outputs, targets)
        return float(metric.compute())

    def finish(self, seed: Seed, test: bool) -> None:
        """Select the weights of a seed and measure them."""
        if not seed.validated:
            raise UserError(f"{self.monitor} was never measured: training of seeds needs validation")
        seed.task.load_state_dict(seed.best)
        trainer, index = seed.trainer, self.seeds.index(seed)
        trainer.callbacks, trainer.loggers = [], []  # type: ignore[attr-defined] # set by a connector
        metrics: dict[str, Any] = {}
        metrics |= trainer.validate(seed.task, datamodule=seed.data, verbose=False)[0]
        losses = torch.stack(self.losses)[: seed.steps, index].double().cpu().numpy()
        metrics |= {
            "epochs": seed.epochs,
            "epochs_to_best": seed.validated[seed.first_best(seed.validated)][0],
            "stability/val_monitor_std": late_deviation([value for _, value in seed.validated]),
            "stability/loss_spikes": count_spikes(losses[np.isfinite(losses)]),
            "stability/nonfinite_steps": (~np.isfinite(losses)).sum(),
        }
        if seed.fitted:
            metrics["epochs_to_fit"], best_fit = seed.fitted[seed.first_best(seed.fitted)]
            if self.measure_fit:
                metrics[self.fit_name] = best_fit
        metrics |= dead_leaves(seed.task, map(seed.task.inputs, seed.train_batches()))
        if test:
            metrics |= trainer.test(seed.task, datamodule=seed.data, verbose=False)[0]
        seed.result = {name: float(value) for name, value in metrics.items()}


class _SeedData(LightningDataModule):
    """Data of all seeds, each from its own data module."""

    def __init__(self, seeds: Sequence[Seed]) -> None:
        super().__init__()
        self.seeds = seeds

    def _loaders(self, name: str) -> CombinedLoader:
        for seed in self.seeds:
            seed.data.trainer = self.trainer
        return CombinedLoader([getattr(seed.data, name)() for seed in self.seeds], "min_size")

    @override
    def train_dataloader(self) -> CombinedLoader:
        return self._loaders("train_dataloader")

    @override
    def val_dataloader(self) -> CombinedLoader:
        return self._loaders("val_dataloader")

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return [seed.move(each, device, dataloader_idx) for seed, each in zip(self.seeds, batch, strict=True)]


class _Objective(nn.Module):
    """A task's training loss as the forward pass of a module, which is what functional_call calls."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task, self.layers = task, list(task.layers.values())

    def forward(self, batch: Any, aux_weights: Mapping[str, float]) -> tuple[Tensor, Tensor, Tensor]:
        loss, outputs, targets = self.task.loss(batch)
        total = loss + weighted_aux_losses(self.layers, aux_weights)
        for layer in self.layers:
            layer.routing = None
        return total, outputs.detach(), targets


class _Together(LightningModule):
    """Several tasks as one: its parameters are theirs, stacked, and theirs are views of these."""

    def __init__(self, seeds: Sequence[Seed]) -> None:
        super().__init__()
        # in a tuple, so that their parameters are not this module's too
        self.held = (seeds, _Objective(seeds[0].task))
        self.schedules, self.aux_weights = seeds[0].task.schedules, dict[str, float]()
        own = [dict(seed.task.named_parameters()) for seed in seeds]
        self.names = list(own[0])
        self.stacked = nn.ParameterList(
            nn.Parameter(torch.stack([each[name].detach() for each in own]), own[0][name].requires_grad)
            for name in self.names
        )
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        # an average of the weights copies the module: its tasks are not needed
        return {**super().__getstate__(), "held": ((), None)}

    @property
    def seeds(self) -> Sequence[Seed]:
        """Those that have not stopped, and those that have."""
        return self.held[0]

    @property
    def layers(self) -> dict[str, FeedforwardLayer]:
        """Of all seeds; the schedules set them."""
        return {f"{i}.{path}": m for i, seed in enumerate(self.seeds) for path, m in seed.task.layers.items()}

    @override
    def configure_callbacks(self) -> Sequence[Callback]:
        return [Schedules()]

    @override
    def configure_optimizers(self) -> Any:
        task = self.seeds[0].task
        optimizer = task.optimizer(self.parameters())
        if task.lr_scheduler is None:
            return optimizer
        scheduler, interval = task.scheduler(optimizer, lambda: self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": scheduler, "interval": interval}]

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient of each seed by its own norm."""
        if not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        gradients = [
            p.grad.flatten(1) if p.grad.dim() > 1 else p.grad[:, None] for p in self.stacked if p.grad is not None
        ]
        norm_S = torch.stack([gradient.norm(dim=1) for gradient in gradients]).norm(dim=0)
        for gradient in gradients:
            gradient.mul_((gradient_clip_val / (norm_S + 1e-6)).clamp(max=1)[:, None])

    @override
    def on_fit_start(self) -> None:
        """Tie the tasks to the stacked parameters, where they are now, and read what they log."""
        for i, seed in enumerate(self.seeds):
            seed.task.to(self.device)
            own = dict(seed.task.named_parameters())
            for name, stacked in zip(self.names, self.stacked, strict=True):
                own[name].data = stacked.data[i]
            seed.logged = logged = dict[str, Any]()

            def log(name: str, value: Any, *_: Any, logged: dict[str, Any] = logged, **__: Any) -> None:
                logged[name] = value

            seed.task.log = log  # type: ignore[method-assign]

    def _mode(self, training: bool) -> None:
        for seed in self.seeds:
            seed.task.train(training)
        for layer in self.layers.values():
            layer.vectorized = training

    @override
    def on_train_start(self) -> None:
        self._mode(training=True)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        wait_for_timing()

    @override
    def training_step(self, batches: Sequence[Any], batch_idx: int) -> dict[str, Tensor]:
        def objective(parameters: dict[str, Tensor], batch: Any) -> Any:
            return functional_call(self.held[1], parameters, (batch, self.aux_weights))

        parameters = {f"task.{name}": p for name, p in zip(self.names, self.stacked, strict=True)}
        try:
            batch = default_collate(list(batches))
            # the faster kernels of attention have no seed axis, or fail with one (on CUDA, torch 2.11)
            with seed_generators([seed.generator for seed in self.seeds]), sdpa_kernel(SDPBackend.MATH):
                found: tuple[Tensor, Tensor, Tensor] = torch.vmap(objective, randomness="error")(parameters, batch)
        except RuntimeError as error:  # batches of other sizes, or what torch.vmap does not take
            raise NotVectorizable(str(error).partition("\n")[0]) from error
        total_S = found[0]
        self.steps.append((total_S.detach(), *found[1:]))
        return {"loss": total_S.sum(), "losses": total_S.detach()}

    @override
    def on_train_epoch_end(self) -> None:
        """Measure each seed as its task does."""
        losses, outputs, targets = zip(*self.steps, strict=True)
        self.steps.clear()
        for seed, loss, output, target in zip(
            self.seeds, torch.stack(losses, 1), torch.cat(outputs, 1), torch.cat(targets, 1), strict=True
        ):
            seed.task.log("train/loss", loss.mean())
            for name, metric in seed.task.make_metrics().items():
                seed.task.log(f"train/{name}", metric.to(self.device)(output, target))

    @override
    def on_validation_start(self) -> None:
        self._mode(training=False)

    @override
    def on_validation_end(self) -> None:
        self._mode(training=True)

    @override
    def on_validation_epoch_start(self) -> None:
        for seed in self.seeds:
            seed.task.on_validation_epoch_start()

    @override
    def validation_step(self, batches: Sequence[Any], batch_idx: int) -> None:
        for seed, batch in zip(self.seeds, batches, strict=True):
            seed.task.validation_step(batch, batch_idx)

    @override
    def on_validation_epoch_end(self) -> None:
        for seed in self.seeds:
            seed.task.on_validation_epoch_end()

    @override
    def on_fit_end(self) -> None:
        self._mode(training=False)
        for seed in self.seeds:
            del seed.task.log
