"""One experiment: from a config to a tracked, tested run."""

import itertools
import logging
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

import fffexp.data
import fffexp.layers
import fffexp.training.language_model
import fffexp.training.regression
import fffexp.training.schedules  # noqa: F401 # with these imported the names of their classes need no module path
from fffexp import configs, paths, tracking
from fffexp.environment import peak_memory_mb
from fffexp.errors import handling, refuse
from fffexp.layers.base import SIZES
from fffexp.training import config as checks
from fffexp.training.callbacks.checkpoint import BestCheckpoint, LastCheckpoint, RandomState
from fffexp.training.callbacks.routing import dead_leaves
from fffexp.training.callbacks.speed import EpochLines, TrainingSpeed
from fffexp.training.callbacks.stability import Stability
from fffexp.training.classification import ClassificationTask
from fffexp.training.latency import measure
from fffexp.training.predictions import continuation, write_table
from fffexp.training.task import Task

LINKED = ("in_shape", "num_classes", "num_outputs", "vocab_size")  # from the data to the task
# options of a Trainer that neither writes nor prints
BARE: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)
LATENCY_ROWS = 8192  # of the validation set, that latencies are measured on
# what a run without tuning measures beside the task's own metrics
MEASURED = (
    "epochs_to_best", "epochs_to_fit", "stability/loss_spikes", "stability/nonfinite_steps", "stability/dead_leaves",
    "stability/val_monitor_std", "routing/used_leaves", "routing/usage_cv", "val/hardening_gap", "memory/peak_mb",
    "speed/latency_b1_ms", "speed/reference_latency_b1_ms", "speed/latency_b1_ratio", "speed/throughput_b2048",
    "speed/latency_b256_ms", "speed/reference_latency_b256_ms", "speed/latency_b256_ratio", "speed/train_samples_per_s",
)  # fmt: skip


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
    """What the arguments of a fit make, and the result of its training."""

    task: Task
    data: LightningDataModule
    trainer: Trainer
    config: str  # YAML, enough to rerun it
    params: dict[str, Any]  # that are tracked
    run_id: str = ""
    backend: str = ""  # of inference
    metrics: dict[str, float] = field(default_factory=dict)  # what is monitored is that of the selected checkpoint

    @property
    def sizes(self) -> dict[str, int]:
        return {name: self.params[name] for name in SIZES}

    @property
    def measurable(self) -> list[str]:  # metrics that a run may have
        own = ("loss", *self.task.make_metrics())
        return [*(f"{stage}{name}" for stage in ("train/", "val/", "test/", "val/soft_") for name in own), *MEASURED]


class ExperimentCLI(LightningCLI):
    """LightningCLI with any task and data, tracking, and a last measurement of the best checkpoint."""

    result: Result  # of fit

    def __init__(self, args: Sequence[str], context: Context) -> None:
        self.context, self._wanted, self._given = context, args[0], configs.given(args)
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
                **{"accelerator": "auto", "devices": 1, "num_sanity_val_steps": 0},
                **dict.fromkeys(("enable_model_summary", "logger", "enable_progress_bar"), False),
                "log_every_n_steps": 1,  # metrics are logged by the epoch; a longer interval only warns of short ones
            },
            parser_kwargs={**strict, self._wanted: strict},
            args=configs.expand(args),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"model": {"class_path": f"{ClassificationTask.__module__}.{ClassificationTask.__name__}"}})
        for name in LINKED:  # left out where task or data have no such thing
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        options: list[tuple[str, Any, str]] = [
            ("name", "default", "MLflow experiment that runs go to"),
            ("tracking_uri", None, "MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db in outputs/)"),
            ("test", True, "read the test set once, with the best checkpoint, after fit"),
            ("init_from", None, "checkpoint whose weights a new training starts from; --ckpt_path resumes one"),
        ]
        if self._wanted == "predict":
            options += [
                ("out", None, "CSV file for the predictions of the test inputs (default: lines on stdout)"),
                ("prompt", None, "text that a language model continues, in the place of predictions"),
                ("new_tokens", 200, "length of that continuation"),
                ("temperature", 1.0, "its randomness: 0 takes the likeliest token"),
            ]
        for option, default, text in options:
            kind: Any = str | None if default is None else type(default)
            parser.add_argument(f"--{option}", type=kind, default=default, help=text)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # called on the instance
        # the wanted one alone: building a parser takes a second
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name == self._wanted}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # without the warning about arguments given from Python
        self.config = parser.parse_args(args)
        checks.check_config(self.config[self._wanted])

    def _parse_ckpt_path(self) -> None:
        pass  # a checkpoint gives weights; the config stays what --config says

    def before_instantiate_classes(self) -> None:
        config = self.resolved = self.config[self._wanted]
        # all that a rerun needs, without what it has anew: where it is tracked, which may hold a password;
        # the parser of a subcommand has no public name
        parser, rerun = self._parser(self._wanted), Namespace({**config, "tracking_uri": None})
        self.resolved_yaml: str = parser.dump(rerun, skip_none=True)
        config.weights_only = True  # whatever a checkpoint from elsewhere may hold
        checks.check_checkpoint(config, self.resolved_yaml, self._wanted)
        if "seed" in checks.init_args(config.data) and not isinstance(config.seed_everything, bool):
            config.data.init_args.seed = config.seed_everything

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        for name in LINKED:
            twice = f"model.{name}" in self._given and hasattr(self.datamodule, name)
            refuse((twice, f"model.{name} is linked to data.{name} and cannot be given: leave it out"))
        config = dict(self.config_init[self._wanted].trainer)
        given = config["callbacks"] if isinstance(config["callbacks"], list) else [config["callbacks"]]
        config["enable_progress_bar"] |= any(isinstance(callback, ProgressBar) for callback in given)
        config["default_root_dir"] = config["default_root_dir"] or str(paths.outputs())
        self.best = BestCheckpoint(self.model.monitor, self.model.mode)
        self.last = LastCheckpoint(paths.outputs(), self.resolved_yaml)
        extra = [*self.context.callbacks]
        if self._wanted == "fit":
            self.model.check()
        if self._wanted == "fit" and not self.context.dry:
            saving = config["enable_checkpointing"] is not False and not config["fast_dev_run"]
            extra += [RandomState(), *[self.best] * (saving and self.has_batches("val")), *[self.last] * saving]
        if not self.context.quiet and not config["enable_progress_bar"]:
            extra.append(EpochLines())
        trainer = self._instantiate_trainer(config, extra)  # the public method above takes no callbacks
        several = f"{trainer.world_size} devices: a run trains on one for now: give --trainer.devices 1"
        refuse((trainer.world_size > 1, several))
        return trainer

    def has_batches(self, stage: str) -> bool:
        found = any(is_overridden(f"{stage}_dataloader", part) for part in (self.datamodule, self.model))
        return found and self.config_init[self._wanted].trainer[f"limit_{stage}_batches"] != 0

    def fit(self, model: Task, datamodule: LightningDataModule, **kwargs: Any) -> None:
        config, params, trainer = self.resolved, checks.flat_params(self.resolved, model), self.trainer
        self.result = Result(model, datamodule, trainer, self.resolved_yaml, params)
        if self.context.dry:
            nothing = f"nothing is validated, so that there is no {model.monitor}: see trainer.limit_val_batches"
            return refuse((not self.has_batches("val"), nothing))
        if config.init_from:
            model.load_state_dict(checks.read_checkpoint("init_from", config.init_from)["state_dict"])
        store = tracking.open_store(paths.tracking_uri(config.tracking_uri), config.name)
        backend = ",".join(sorted({layer.inference_backend() for layer in model.layers.values()}))
        tags = {"layer": params["layer"], "data": params["data"], "backend": backend, **self.context.tags}
        name = f"{params['layer']} {params['training_width']} seed {params['seed']}"
        with tracking.Run(*store, name, tags, self.context.parent) as run:
            run.params(params)
            run.text(self.resolved_yaml, "config.yaml")
            for logger in (loggers := trainer.loggers):
                logger.log_hyperparams(params)
            trainer.loggers = [run, *loggers]
            resumed = kwargs.get("ckpt_path")  # a resumed run goes on in its folder
            folder = Path(resumed).parent if resumed else paths.outputs("checkpoints", run.id)
            self.last.folder, self.best.dirpath = folder, str(folder)
            interruptible(trainer, model, datamodule, kwargs)
            metrics = {**self.best.metrics}
            if path := self.best.best_model_path:
                model.load_state_dict(torch.load(path, map_location=model.device, weights_only=True)["state_dict"])
                run.file(Path(path), "checkpoint")
            for callback in trainer.callbacks:  # type: ignore[attr-defined] # set by a connector
                if isinstance(callback, (Stability, TrainingSpeed)):
                    metrics |= callback.results()
            metrics |= self._measure(model)
            if self.context.fresh_process and (peak := peak_memory_mb()) is not None:
                metrics["memory/peak_mb"] = peak
            if config.test and not self.has_batches("test"):
                print("no batches to test on (trainer.limit_test_batches): the test is left out", file=sys.stderr)
            elif config.test:
                trainer.loggers = loggers  # ours gets it with the rest
                (tested,) = trainer.test(model, datamodule=datamodule, verbose=False, weights_only=True)
                metrics |= {key: float(value) for key, value in tested.items()}
            named = {model.monitor: model.monitor.replace("/", "/best_", 1)}
            finals = {named.get(n, n): v for n, v in metrics.items() if n in named or n not in self.best.metrics}
            run.log_metrics(finals, trainer.global_step)
            if self.context.parent is not None and not run.lacking:  # a study keeps its checkpoints with the runs alone
                shutil.rmtree(folder, ignore_errors=True)
        self.result.run_id, self.result.backend, self.result.metrics = run.id, backend, metrics

    def predict(self, model: Task, datamodule: LightningDataModule, ckpt_path: str, **kwargs: Any) -> None:
        config, given = self.resolved, self._given.keys()
        if config.prompt is None:
            text = hasattr(datamodule, "encode")
            stray = next((name for name in ("new_tokens", "temperature") if name in given), None)
            none = self.trainer.limit_predict_batches == 0
            refuse(
                (text, "a language model predicts by continuing a text: give --prompt"),
                (stray is not None, f"{stray} is of a text that --prompt begins: give that, or leave {stray} out"),
                (none, "trainer.limit_predict_batches is 0, so that nothing is predicted: leave it out"),
            )
            options = {**kwargs, "ckpt_path": ckpt_path, "return_predictions": True}
            outputs: Any = self.trainer.predict(model, datamodule=datamodule, **options)
            return write_table(datamodule, torch.cat(outputs), config.out)
        refuse(
            (config.out is not None, "out is for a table of predictions, and --prompt prints a text: give one of them")
        )
        model.load_state_dict(checks.read_checkpoint("ckpt_path", ckpt_path)["state_dict"])
        datamodule.prepare_data()
        datamodule.setup("predict")
        print(continuation(model, datamodule, config.prompt, config.new_tokens, config.temperature))

    def _measure(self, model: Task) -> dict[str, float]:
        train = self.trainer.train_dataloader
        rows: list[Tensor] = []
        with self.trainer.precision_plugin.forward_context():
            for inputs in self._inputs(model, self.trainer.val_dataloaders or train):
                if sum(map(len, rows)) >= LATENCY_ROWS or (rows and inputs.shape[1:] != rows[0].shape[1:]):
                    break
                rows.append(inputs)
            dead = dead_leaves(model, self._inputs(model, train))
            return dead | (measure(model.network, partial(model.timed, torch.cat(rows)[:LATENCY_ROWS])) if rows else {})

    def _inputs(self, model: Task, loader: Any) -> Iterator[Tensor]:
        loader = loader[0] if isinstance(loader, (list, tuple)) else loader
        for batch in itertools.islice(loader, int(min(self.trainer.num_training_batches, 2**31))):
            inputs = model.inputs(self.trainer.strategy.batch_to_device(batch))
            yield self.trainer.precision_plugin.convert_input(inputs)


def interruptible(trainer: Trainer, model: LightningModule, data: LightningDataModule | None, kwargs: Any) -> None:
    """Fit; Ctrl-C raises KeyboardInterrupt, where Lightning raises SystemExit(1) and ignores further ones."""
    try:
        with handling(signal.getsignal(signal.SIGINT), signal.SIGINT):  # type: ignore[arg-type] # a handler
            trainer.fit(model, datamodule=data, **kwargs)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise


def _is_news(record: logging.LogRecord) -> bool:
    # not the hardware, the seed, how to buy more, why training ended
    hardware = ("GPU available", "TPU available", "HPU available", "Seed set to", "\N{ELECTRIC LIGHT BULB}")
    others = (
        "`Trainer.",
        "Loading `train_dataloader`",
        "The following callbacks returned",
        "Restoring states",
        "Loaded m",
    )
    return not record.getMessage().startswith(hardware + others)


def run(args: Sequence[str], context: Context | None = None) -> Result | None:
    """Run a subcommand of LightningCLI, args[0]; a result if it was fit. UserError: a mistake in what was given."""
    for module in ("fabric.utilities.rank_zero", "fabric.utilities.seed", "pytorch.utilities.rank_zero"):
        logging.getLogger(f"lightning.{module}").addFilter(_is_news)
    for message, category in (
        ("`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning),  # Lightning's own use of torch
        ("Checkpoint directory .* exists and is not empty", UserWarning),  # a resumed run goes on in its folder
        # validate, test and predict have no use for callbacks, and weights are averaged already
        ("Be aware that when using `ckpt_path`|You're using the WeightAveraging callback, but", UserWarning),
    ):
        warnings.filterwarnings("ignore", message, category)
    with checks.user_errors():
        return getattr(ExperimentCLI(args, context or Context()), "result", None)


def build(args: Sequence[str]) -> Result:
    """What the arguments of `fffexp fit` make, without training. UserError: a mistake, or nothing is validated."""
    result = run(args, Context(quiet=True, dry=True))
    assert result is not None
    return result
