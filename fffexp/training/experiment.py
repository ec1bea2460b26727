"""One experiment: from a config to a tracked, tested run."""

import itertools
import logging
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

import fffexp.data
import fffexp.layers
import fffexp.training.schedules  # noqa: F401, with these imported their class names need no module path
from fffexp import configs, paths, tracking
from fffexp.environment import peak_memory_mb
from fffexp.errors import UserError
from fffexp.training.callbacks.checkpoint import BestCheckpoint, LastCheckpoint, RandomState
from fffexp.training.callbacks.progress import EpochLines
from fffexp.training.callbacks.routing import dead_leaves
from fffexp.training.callbacks.speed import TrainingSpeed
from fffexp.training.callbacks.stability import Stability
from fffexp.training.classification import ClassificationTask
from fffexp.training.config import check_config, check_resumable, read_checkpoint, user_errors
from fffexp.training.latency import measure
from fffexp.training.params import backends, flat_params, init_args, short, total_sizes
from fffexp.training.task import Task

LINKED = ("in_shape", "num_classes")  # from the data to the task
LATENCY_ROWS = 8192  # of the validation set, that latencies are measured on
# what a run without tuning measures beside the task's own metrics
MEASURED = (
    *("epochs_to_best", "epochs_to_fit", "stability/loss_spikes", "stability/nonfinite_steps", "stability/dead_leaves"),
    *("stability/val_monitor_std", "routing/used_leaves", "routing/usage_cv", "val/hardening_gap", "memory/peak_mb"),
    *("speed/throughput_b2048", "speed/train_samples_per_s"),
    *(
        f"speed/{kind}"
        for b in (1, 256)
        for kind in (f"latency_b{b}_ms", f"reference_latency_b{b}_ms", f"latency_b{b}_ratio")
    ),
)


@dataclass
class Context:
    """What a run is part of, beyond its config."""

    parent: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    callbacks: Sequence[Callback] = ()
    quiet: bool = False
    fresh_process: bool = False  # peak memory means this run's alone
    dry: bool = False  # parse and make everything, but train nothing


@dataclass
class Result:
    """A finished run."""

    run_id: str
    metrics: dict[str, float]  # what is monitored is that of the selected checkpoint
    params: dict[str, Any]
    sizes: dict[str, int]
    config: str  # YAML, enough to rerun it


@dataclass
class Checked:
    """What the arguments of an experiment make."""

    layer: str | None  # class name, or class path of a layer from outside
    monitor: str
    mode: str
    unit: bool  # whether what is monitored is a share, in [0, 1]
    metrics: tuple[str, ...]  # names that Result.metrics may have


class ExperimentCLI(LightningCLI):
    """LightningCLI with any task and data, tracking, and a last measurement of the best checkpoint."""

    def __init__(self, args: Sequence[str], context: Context) -> None:
        self.context = context
        self._wanted, self._given = args[0], configs.given(args)
        self.result: Result | None = None
        strict = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            Task,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,  # it writes to a folder; the run keeps the config as an artifact
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults={
                "accelerator": "auto",
                "devices": 1,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "logger": False,
                "log_every_n_steps": 1,  # metrics are logged by the epoch; a longer interval only warns of short ones
                "enable_progress_bar": False,
            },
            parser_kwargs={**strict, self._wanted: strict},
            args=configs.expand(args),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links, which are left out where task or data have no such thing, and what is ours."""
        parser.set_defaults({"model": {"class_path": f"{ClassificationTask.__module__}.{ClassificationTask.__name__}"}})
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        parser.add_argument("--name", type=str, default="default", help="MLflow experiment that runs go to")
        parser.add_argument(
            "--tracking_uri",
            type=str | None,
            default=None,
            help="MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db in outputs/)",
        )
        parser.add_argument(
            "--test", type=bool, default=True, help="read the test set once, with the best checkpoint, after fit"
        )
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="checkpoint whose weights a new training starts from; --ckpt_path resumes a training instead",
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # called on the instance
        """The wanted one alone: building a parser takes a second."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name == self._wanted}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, without the warning about arguments given from Python; the data takes the seed of the run."""
        self.config = parser.parse_args(args)
        config = self.config[self._wanted]
        check_config(config)
        # not by link_arguments, which would override a value of the user's without a word
        if init_args(config.data).get("seed", 0) not in (0, config.seed_everything):
            raise UserError("data.init_args.seed is linked to seed_everything and cannot be given: leave it out")

    def _parse_ckpt_path(self) -> None:
        # a checkpoint gives weights; the config stays what --config says
        pass

    def before_instantiate_classes(self) -> None:
        """Keep what was resolved: all that a rerun needs."""
        parser, config = self._parser(self.subcommand), self.config[self.subcommand]
        if self.subcommand != "fit" and config.ckpt_path is None:
            raise UserError(f"ckpt_path is missing: give the checkpoint to {self.subcommand} by --ckpt_path")
        self.resolved: Namespace = config
        # without what a rerun has anew: where it is tracked, which may hold a password
        self.resolved_yaml: str = parser.dump(Namespace({**config, "tracking_uri": None}), skip_none=True)
        config.weights_only = True  # whatever a checkpoint from elsewhere may hold
        if config.ckpt_path is not None:
            checkpoint = read_checkpoint("ckpt_path", config.ckpt_path)
            if self.subcommand == "fit":
                check_resumable(checkpoint, config, self.resolved_yaml)
        if "seed" in init_args(config.data) and not isinstance(config.seed_everything, bool):
            config.data.init_args.seed = config.seed_everything

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the checkpoints, random state and progress lines, and the callbacks of the context."""
        for name in LINKED:
            if f"model.{name}" in self._given and hasattr(self.datamodule, name):
                raise UserError(f"model.{name} is linked to data.{name} and cannot be given: leave it out")
        config = dict(self._get(self.config_init, "trainer"))
        given = config["callbacks"] or []
        config["callbacks"] = given if isinstance(given, list) else [given]
        config["enable_progress_bar"] |= any(isinstance(callback, ProgressBar) for callback in config["callbacks"])
        config["default_root_dir"] = config["default_root_dir"] or str(paths.outputs())
        extra: list[Callback] = [*self.context.callbacks]
        self.best: BestCheckpoint | None = None
        self.last = LastCheckpoint(paths.outputs(), self.resolved_yaml)
        if self.subcommand == "fit":
            extra.append(RandomState())
            if config["enable_checkpointing"] is not False and not config["fast_dev_run"]:
                if self._has("val"):
                    self.best = BestCheckpoint(self.model.monitor, self.model.mode)
                    extra.append(self.best)
                extra.append(self.last)
        if not self.context.quiet and not config["enable_progress_bar"]:
            extra.append(EpochLines())
        trainer = self._instantiate_trainer(config, extra)
        if trainer.world_size > 1:
            raise UserError(f"{trainer.world_size} devices: a run trains on one for now: give --trainer.devices 1")
        return trainer

    def _has(self, stage: str) -> bool:
        """Whether there are batches to evaluate on in this stage."""
        loader = f"{stage}_dataloader"
        limited = self._get(self.config_init, "trainer")[f"limit_{stage}_batches"] == 0
        return not limited and any(is_overridden(loader, part) for part in (self.datamodule, self.model))

    def fit(self, model: Task, datamodule: LightningDataModule, **kwargs: Any) -> None:
        """Train, select on validation, measure, test once."""
        if self.context.dry:
            return
        config = self.resolved
        if config.init_from:
            model.load_state_dict(read_checkpoint("init_from", config.init_from)["state_dict"])
        client, experiment = tracking.open_store(paths.tracking_uri(config.tracking_uri), config.name)
        params = flat_params(config, model)
        tags = {"layer": params["layer"], "data": params["data"], "backend": backends(model), **self.context.tags}
        name = f"{params['layer']} {params['training_width']} seed {params['seed']}"
        with tracking.Run(client, experiment, name, tags, self.context.parent) as run:
            run.params(params)
            run.text(self.resolved_yaml, "config.yaml")
            loggers = self.trainer.loggers
            for logger in loggers:
                logger.log_hyperparams(params)
            self.trainer.loggers = [run, *loggers]
            # a resumed run goes on in its folder
            resumed = kwargs.get("ckpt_path")
            folder = Path(resumed).parent if resumed else paths.outputs("checkpoints", run.id)
            self.last.folder = folder
            if self.best is not None:
                self.best.dirpath = str(folder)
            try:
                interruptible(self.trainer, model, datamodule, kwargs)
                metrics = self._finish(model, datamodule, run, loggers)
            finally:
                run.save()
            stage, _, monitored = model.monitor.partition("/")
            finals = {(f"{stage}/best_{monitored}" if n == model.monitor else n): v for n, v in metrics.items()}
            over_time = () if self.best is None else self.best.metrics.keys() - {model.monitor}
            run.metrics({n: v for n, v in finals.items() if n not in over_time}, self.trainer.global_step)
            if self.context.parent is not None:  # a study keeps its checkpoints with the runs alone
                shutil.rmtree(folder, ignore_errors=True)
        self.result = Result(run.id, metrics, params, total_sizes(model), self.resolved_yaml)

    def predict(self, model: Task, datamodule: LightningDataModule, **kwargs: Any) -> None:
        """Print what is predicted for each test input, a line each."""
        for outputs in self.trainer.predict(model, datamodule=datamodule, **kwargs) or []:
            assert isinstance(outputs, Tensor)
            print(*outputs.tolist(), sep="\n")

    def _finish(
        self, model: Task, datamodule: LightningDataModule, run: tracking.Run, loggers: list[Logger]
    ) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if self.best is not None and self.best.best_model_path:
            path = Path(self.best.best_model_path)
            model.load_state_dict(torch.load(path, map_location=model.device, weights_only=True)["state_dict"])
            run.file(path, "checkpoint")
            metrics |= self.best.metrics
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined] # set by a connector
            if isinstance(callback, (Stability, TrainingSpeed)):
                metrics |= callback.results()
        metrics |= self._measure(model)
        if self.context.fresh_process and (peak := peak_memory_mb()) is not None:
            metrics["memory/peak_mb"] = peak
        if self.resolved.test and not self._has("test"):
            print("there are no batches to test on (trainer.limit_test_batches): the test is left out", file=sys.stderr)
        elif self.resolved.test:
            self.trainer.loggers = loggers  # ours gets it with the rest
            (tested,) = self.trainer.test(model, datamodule=datamodule, verbose=False, weights_only=True)
            metrics |= {key: float(value) for key, value in tested.items()}
        return metrics

    def _measure(self, model: Task) -> dict[str, float]:
        train = self.trainer.train_dataloader
        evaluated = self.trainer.val_dataloaders or train
        rows: list[Tensor] = []
        with self.trainer.precision_plugin.forward_context():
            for inputs in self._inputs(model, evaluated):
                if sum(map(len, rows)) >= LATENCY_ROWS or (rows and inputs.shape[1:] != rows[0].shape[1:]):
                    break
                rows.append(inputs)
            dead = dead_leaves(model, self._inputs(model, train))
            return dead | (measure(model.network, torch.cat(rows)[:LATENCY_ROWS]) if rows else {})

    def _inputs(self, model: Task, loader: Any) -> Iterator[Tensor]:
        """What the network takes of each batch of a loader, where the network is."""
        loader = loader[0] if isinstance(loader, (list, tuple)) else loader
        for batch in itertools.islice(loader, int(min(self.trainer.num_training_batches, 2**31))):
            inputs = model.inputs(self.trainer.strategy.batch_to_device(batch))
            yield self.trainer.precision_plugin.convert_input(inputs)


def interruptible(trainer: Trainer, model: LightningModule, data: LightningDataModule, kwargs: Any) -> None:
    """Fit; Ctrl-C raises KeyboardInterrupt, where Lightning raises SystemExit(1) and ignores further ones."""
    before = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(model, datamodule=data, **kwargs)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


class _News(logging.Filter):
    """Leaves out what Lightning says on every run: the hardware, the seed, how to buy more, why training ended."""

    SAME = (
        *("GPU available", "TPU available", "HPU available", "Seed set to", "\N{ELECTRIC LIGHT BULB}", "`Trainer."),
        *("Loading `train_dataloader`", "The following callbacks returned"),
    )

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.SAME)


_NEWS = _News()


def _parsed(args: Sequence[str], context: Context) -> ExperimentCLI:
    for module in ("fabric.utilities.rank_zero", "fabric.utilities.seed", "pytorch.utilities.rank_zero"):
        logging.getLogger(f"lightning.{module}").addFilter(_NEWS)
    # Lightning's own use of torch
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning)
    # a resumed run goes on in its folder
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty", UserWarning)
    # validate, test and predict have no use for the callback that wrote the checkpoint
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`", UserWarning)
    with user_errors():
        return ExperimentCLI(args, context)


def run(args: Sequence[str], context: Context | None = None) -> Result | None:
    """Run a subcommand of LightningCLI, args[0]; a result if it was fit.

    Raises:
        UserError: a mistake in the arguments, the configs or the data, in one line.
    """
    return _parsed(args, context or Context()).result


def check(args: Sequence[str]) -> Checked:
    """Parse the arguments and make data and task, without training.

    Raises:
        UserError: a mistake in them, in one line.
    """
    cli = _parsed(args, Context(quiet=True, dry=True))
    task: Task = cli.model
    if not cli._has("val"):
        raise UserError(f"nothing is validated, so that there is no {task.monitor}: see trainer.limit_val_batches")
    names = [f"{stage}/{name}" for stage in ("train", "val", "test") for name in ("loss", *task.make_metrics())]
    soft = [name.replace("val/", "val/soft_") for name in names if name.startswith("val/")]
    layer = short(init_args(cli.resolved.model).get("layer"))
    return Checked(layer, task.monitor, task.mode, task.unit_monitor, (*names, *soft, *MEASURED))


class Built(NamedTuple):
    """What the arguments of a fit make; the config reruns it, the parameters are those that are tracked."""

    task: Task
    data: LightningDataModule
    trainer: Trainer
    config: str
    params: dict[str, Any]


def build(args: Sequence[str]) -> Built:
    """Task, data and trainer that the arguments of `fffexp fit` make, without training.

    Raises:
        UserError: a mistake in them, in one line.
    """
    cli = _parsed(args, Context(quiet=True, dry=True))
    return Built(cli.model, cli.datamodule, cli.trainer, cli.resolved_yaml, flat_params(cli.resolved, cli.model))
