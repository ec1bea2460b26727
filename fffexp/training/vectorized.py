"""Several seeds of one experiment trained at once: the parameters get a seed axis, and one pass serves all seeds.

Lightning runs the training. Each seed gives what `fffexp fit --seed_everything SEED` gives: the same split,
initialisation, order of samples, random numbers and selection on validation. Where an experiment cannot run so, the
seeds are trained one after another.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, callbacks
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate

from fffexp.errors import refuse
from fffexp.layers import FeedforwardLayer
from fffexp.layers.random import seed_generators
from fffexp.timing import wait_for_timing
from fffexp.training.callbacks.routing import dead_leaves
from fffexp.training.callbacks.schedules import Schedules
from fffexp.training.callbacks.stability import Course
from fffexp.training.experiment import Result, build, interruptible
from fffexp.training.schedules import Adaptive
from fffexp.training.task import Task

# Each element is updated from its own gradients alone. Others, such as Adafactor or Muon, would mix the seeds.
ELEMENTWISE = frozenset({"SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD"})
# They change nothing that is trained. Checkpoints, of single runs, are left out; an average is of each element.
WATCHING = (callbacks.LearningRateMonitor, callbacks.ModelSummary, callbacks.ProgressBar, callbacks.Checkpoint)
# How the names begin of what a task may override: the rest of it is not called where seeds are trained at once.
OVERRIDABLE = ("__", "forward", "validation_step", "on_validation_epoch", "test", "on_test", "predict", "on_predict")


class NotVectorizable(Exception):
    """The seeds of an experiment cannot be trained at once."""


class _Seed(Course):
    def __init__(self, args: Sequence[str], number: int) -> None:
        self.result = build(["fit", *args, f"--seed_everything={number}"])
        self.task, self.data, self.trainer = self.result.task, self.result.data, self.result.trainer
        super().__init__(self.task.mode)
        self.data.prepare_data()
        self.data.setup("fit")
        device = self.trainer.strategy.root_device
        # in the state in which the training of this seed alone would begin
        self.generator = torch.Generator(device)
        self.generator.set_state(torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state())
        self.logged: dict[str, Any] = {}
        self.candidate = self.selected = dict[str, Tensor]()  # weights that were validated last, and the best of them
        self.epochs = 0  # trained
        self.steps: int | None = None  # at its own stop, before that of all

    def log(self, name: str, value: Any, *_: Any, **__: Any) -> None:
        self.logged[name] = value

    def move(self, batch: Any, device: torch.device, dataloader_idx: int = 0) -> Any:
        batch = self.data.on_before_batch_transfer(batch, dataloader_idx)
        batch = self.data.transfer_batch_to_device(batch, device, dataloader_idx)
        return self.data.on_after_batch_transfer(batch, dataloader_idx)

    def train_batches(self, trainer: Trainer) -> Iterator[Any]:  # those of an epoch of the trainer that trained
        batches = islice(self.data.train_dataloader(), int(min(trainer.num_training_batches, 2**31)))
        return (self.move(batch, self.task.device) for batch in batches)


def train_seeds(
    args: Sequence[str],
    seeds: Sequence[int],
    *,
    test: bool,
    patience: int | None = None,
    fit: Literal["ignored", "measured", "awaited"] = "ignored",
) -> Iterator[Result]:
    """Train an experiment with several seeds and select each on validation; a seed is given as soon as it is done.

    Its task has the selected weights; its metrics are those of a single fit, and `epochs`.

    Args:
        args: of `fffexp fit`, without a seed.
        test: whether the test set is read, once for each seed, with the selected weights.
        patience: a seed stops when the monitored metric has not improved for so many epochs. The training goes on
            until all have stopped; results of a seed are those up to its own stop.
        fit: "measured" after each epoch by the monitored metric on the training data, as on validation: the best is
            reported as `train/NAME`, its epoch as `epochs_to_fit`; "awaited" by the patience too.
    """
    selection = partial(_Selection, patience=patience, fit=fit)
    if len(seeds) > 1:
        try:
            made = [_Seed(args, seed) for seed in seeds]
            _check(made)
            yield from selection(made).train(_Together(made), None, test)
            return
        except NotVectorizable as reason:
            print(f"seeds are trained one after another: {reason}", file=sys.stderr)
    for number in seeds:
        seed = _Seed(args, number)
        yield from selection([seed]).train(seed.task, seed.data, test)


def _check(seeds: Sequence[_Seed]) -> None:
    # what is known to mix seeds, or to differ between them
    task, trainer, name = seeds[0].task, seeds[0].trainer, type(seeds[0].task).__name__
    made = task.make_optimizer([nn.Parameter(torch.zeros(1))])
    optimizer, scheduler = type(made["optimizer"]), made.get("lr_scheduler", {}).get("scheduler")
    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    known = optimizer.__name__ in ELEMENTWISE and optimizer is getattr(torch.optim, optimizer.__name__, None)
    others = [c for c in trainer.callbacks if not isinstance(c, (callbacks.WeightAveraging, *WATCHING))]  # type: ignore[attr-defined] # set by a connector
    classes = type(task).__mro__[: type(task).__mro__.index(Task)]
    own = sorted({hook for cls in classes for hook in vars(cls) if hasattr(LightningModule, hook)})
    first, *buffers = (dict(seed.task.named_buffers()) for seed in seeds)
    same = all(torch.equal(each[key], first[key]) for each in buffers for key in each)
    scales = getattr(trainer.precision_plugin, "scaler", None) is not None
    reasons = {
        f"{optimizer.__name__} is not known to update each element for itself": not known,
        f"{type(scheduler).__name__} differs from seed to seed": plateau,
        "an Adaptive schedule differs from seed to seed": any(isinstance(s, Adaptive) for s in task.schedules.values()),
        **{
            f"{type(layer).__name__} cannot run under torch.vmap as it is configured": True
            for layer in task.layers.values()
            if not layer.vectorizable
        },
        f"precision {trainer.precision} scales the losses of all seeds by one number": scales,
        **{f"{type(c).__name__} is not known to treat each seed for itself": True for c in others},
        **{f"{name} has its own {hook}": not hook.startswith(OVERRIDABLE) for hook in own},
        "the numbers of training batches differ": len({len(seed.data.train_dataloader()) for seed in seeds}) > 1,
        "buffers of the network differ from seed to seed": not same,
    }
    if reason := next(filter(reasons.get, reasons), None):
        raise NotVectorizable(reason)


class _Selection(callbacks.EarlyStopping):
    # follows each seed: losses, metrics, best weights, patience; an EarlyStopping because Lightning calls those when
    # all metrics of an epoch are there
    def __init__(self, seeds: Sequence[_Seed], patience: int | None, fit: str) -> None:
        super().__init__(seeds[0].task.monitor)
        self.epochs_without, self.measure_fit, self.fit_counts = patience, fit != "ignored", fit == "awaited"
        self.seeds = self.live = seeds  # all, and those that have not stopped
        self.name = f"train/{self.monitor.partition('/')[2]}"
        self.losses: list[Tensor] = []  # (seeds,) of each step

    def train(self, module: LightningModule, data: LightningDataModule | None, test: bool) -> Iterator[Result]:
        trainer: Any = self.seeds[0].trainer  # whose callbacks a connector sets
        # first, for an averaging takes its weights back at the end of a validation
        trainer.callbacks = [self, *(c for c in trainer.callbacks if not isinstance(c, callbacks.Checkpoint))]
        interruptible(trainer, module, data, {})
        for index, seed in enumerate(self.seeds):
            refuse((not seed.validated, f"{self.monitor} was never measured: training of seeds needs validation"))
            seed.task.load_state_dict(seed.selected)
            seed.trainer.callbacks, seed.trainer.loggers = [], []  # type: ignore[attr-defined] # set by a connector
            losses = torch.stack(self.losses)[: seed.steps, index].double()
            finite = losses.isfinite()
            seed.losses, seed.nonfinite_steps = losses[finite].tolist(), int((~finite).sum())
            (metrics,) = seed.trainer.validate(seed.task, datamodule=seed.data, verbose=False)
            metrics = {**metrics, **seed.results(), "epochs": seed.epochs}
            if self.measure_fit:
                metrics[self.name] = seed.best(seed.fitted)[1]
            seed.data.trainer = trainer  # of which the order of its batches, and so which they are, depends
            metrics |= dead_leaves(seed.task, map(seed.task.inputs, seed.train_batches(trainer)))
            if test:
                metrics |= seed.trainer.test(seed.task, datamodule=seed.data, verbose=False)[0]
            seed.result.metrics = {name: float(value) for name, value in metrics.items()}
            yield seed.result

    def on_train_batch_end(  # type: ignore[override] # outputs are those of our modules
        self, trainer: Trainer, pl_module: LightningModule, outputs: Mapping[str, Tensor], batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["losses"] if "losses" in outputs else outputs["loss"].detach()[None])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for seed in () if trainer.sanity_checking else self.live:
            seed.candidate = {name: value.clone() for name, value in seed.task.state_dict().items()}
            if self.measure_fit:
                passes = map(seed.task.loss, seed.train_batches(trainer))
                measured = seed.task.measure("train/", *zip(*passes, strict=True))
                seed.fitted.append((trainer.current_epoch + 1, float(measured[self.name])))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for seed in () if trainer.sanity_checking else self.live:
            logged = trainer.callback_metrics if pl_module is seed.task else seed.logged
            seed.validated.append((trainer.current_epoch + 1, float(logged[self.monitor])))
            if seed.best(seed.validated) is seed.validated[-1]:
                seed.selected = seed.candidate

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for seed in self.live:
            logged = trainer.callback_metrics if pl_module is seed.task else seed.logged
            epoch = seed.epochs = trainer.current_epoch + 1
            if not self.measure_fit and self.name in logged:
                seed.fitted.append((epoch, float(logged[self.name])))
            courses = filter(None, [seed.validated, seed.fitted if self.fit_counts else []])
            best = max((seed.best(course)[0] for course in courses), default=epoch)
            if self.epochs_without is not None and epoch - best >= self.epochs_without:
                seed.steps = len(self.losses)
        self.live = [seed for seed in self.live if seed.steps is None]
        trainer.should_stop = trainer.should_stop or not self.live


class _Objective(nn.Module):
    # a task's training loss as the forward pass of a module, which is what functional_call calls
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        found = self.task.training_loss(batch)
        self.task.on_after_backward()
        return found


class _Together(LightningModule):
    # several tasks and their data as one: its parameters are theirs, stacked, and theirs are views of these
    def __init__(self, seeds: Sequence[_Seed]) -> None:
        super().__init__()
        task, alike = seeds[0].task, zip(*(seed.task.parameters() for seed in seeds), strict=True)
        self.seeds, self.schedules, self.aux_weights = seeds, task.schedules, task.aux_weights
        self.objective = (_Objective(task),)  # in a tuple, so that its parameters are not this module's too
        self.names = [f"task.{name}" for name, _ in task.named_parameters()]  # in the objective
        self.stacked = nn.ParameterList(
            nn.Parameter(torch.stack(parameters).detach(), parameters[0].requires_grad) for parameters in alike
        )
        self.steps: list[tuple[Tensor, ...]] = []

    def __getstate__(self) -> dict[str, Any]:
        # an average of the weights copies the module: its tasks are not needed
        return {**super().__getstate__(), "seeds": (), "objective": ()}

    @property
    def layers(self) -> dict[str, FeedforwardLayer]:
        return {f"{i}.{path}": m for i, seed in enumerate(self.seeds) for path, m in seed.task.layers.items()}

    def _loaders(self, name: str) -> CombinedLoader:
        for seed in self.seeds:
            seed.data.trainer = self.trainer
        return CombinedLoader([getattr(seed.data, name)() for seed in self.seeds], "min_size")

    def train_dataloader(self) -> CombinedLoader:
        return self._loaders("train_dataloader")

    def val_dataloader(self) -> CombinedLoader:
        return self._loaders("val_dataloader")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return [seed.move(each, device, dataloader_idx) for seed, each in zip(self.seeds, batch, strict=True)]

    def configure_callbacks(self) -> Sequence[Callback]:
        return [Schedules()]

    def configure_optimizers(self) -> Any:
        return self.seeds[0].task.make_optimizer(self.parameters(), self.trainer)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # of each seed by its own norm
        if not gradient_clip_val or gradient_clip_algorithm == "value":
            return self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        gradients = [p.grad.flatten(1) if p.dim() > 1 else p.grad[:, None] for p in self.stacked if p.grad is not None]
        norm_S = torch.stack([gradient.norm(dim=1) for gradient in gradients]).norm(dim=0)
        for gradient in gradients:
            gradient.mul_((gradient_clip_val / (norm_S + 1e-6)).clamp(max=1)[:, None])

    def on_fit_start(self) -> None:
        # ties the tasks to the stacked parameters, where they are now
        for i, seed in enumerate(self.seeds):
            for parameter, stacked in zip(seed.task.to(self.device).parameters(), self.stacked, strict=True):
                parameter.data = stacked.data[i]
            seed.task.kept_layers = seed.task.layers
            seed.task.log = seed.log  # type: ignore[method-assign] # tasks log to their seed, not to this module

    def _mode(self, training: bool) -> None:
        for seed in self.seeds:
            seed.task.train(training)
        for layer in self.layers.values():
            layer.vectorized = training

    def on_train_start(self) -> None:
        self._mode(training=True)

    on_validation_end = on_train_start

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        wait_for_timing()

    def training_step(self, batches: Sequence[Any], batch_idx: int) -> dict[str, Tensor]:
        parameters = dict(zip(self.names, self.stacked, strict=True))
        loss = partial(torch.func.functional_call, *self.objective)
        try:
            # the faster kernels of attention have no seed axis, or fail with one (on CUDA, torch 2.11)
            with seed_generators([seed.generator for seed in self.seeds]), sdpa_kernel(SDPBackend.MATH):
                total_S, *found = torch.vmap(loss, randomness="error")(parameters, (default_collate(list(batches)),))
        except RuntimeError as error:  # batches of other sizes, or what torch.vmap does not take
            raise NotVectorizable(str(error).partition("\n")[0]) from error
        self.steps.append((total_S.detach(), *found))
        return {"loss": total_S.sum(), "losses": total_S.detach()}

    def on_train_epoch_end(self) -> None:
        losses, outputs, targets = zip(*self.steps, strict=True)
        self.steps.clear()
        by_seed = torch.stack(losses, 1), torch.cat(outputs, 1), torch.cat(targets, 1)
        for seed, *measured in zip(self.seeds, *by_seed, strict=True):
            seed.task.log_dict(seed.task.measure("train/", *((each,) for each in measured)))

    def on_validation_epoch_start(self) -> None:
        self._mode(training=False)

    def validation_step(self, batches: Sequence[Any], batch_idx: int) -> None:
        for seed, batch in zip(self.seeds, batches, strict=True):
            seed.task.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        for seed in self.seeds:
            seed.task.on_validation_epoch_end()

    def on_fit_end(self) -> None:
        self._mode(training=False)
        for seed in self.seeds:
            del seed.task.log
