"""One experiment: from a config to a tracked, tested run."""

import logging
import resource
import shutil
import signal
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import fffexp.data
import fffexp.layers
import fffexp.training.schedules  # noqa: F401, with these imported their class names need no module path
from fffexp import paths, tracking
from fffexp.data.base import EVALUATION_ROWS, ClassificationData
from fffexp.errors import UserError
from fffexp.training.callbacks.progress import EpochLines
from fffexp.training.callbacks.routing import dead_leaves
from fffexp.training.callbacks.speed import TrainingSpeed
from fffexp.training.callbacks.stability import Stability
from fffexp.training.classification import ClassificationTask
from fffexp.training.config import check_checkpoint, check_yaml, link_learning_rate, user_errors
from fffexp.training.latency import measure
from fffexp.training.params import backends, flat_params, short, total_sizes

# what hardware is present, which seed is set and how to buy more is not news on every run
for _package in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_package).setLevel(logging.WARNING)
# Lightning's own use of torch, which we cannot mend
warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning)
# validate, test and predict have no use for the callback that wrote the checkpoint
warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`", UserWarning)


@dataclass
class Context:
    """What a run is part of, beyond its config."""

    parent: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    callbacks: Sequence[Callback] = ()
    quiet: bool = False
    fresh_process: bool = False  # peak memory means this run's alone
    dry: bool = False


@dataclass
class Result:
    """What came of a run."""

    run_id: str
    metrics: dict[str, float]  # val/accuracy is that of the selected checkpoint
    params: dict[str, Any]
    sizes: dict[str, int]
    config: str  # YAML, enough to rerun it


class ExperimentCLI(LightningCLI):
    """LightningCLI with data linked to the model, tracking, and a last measurement of the best checkpoint."""

    def __init__(self, args: Sequence[str], context: Context) -> None:
        self.context = context
        self._args, self._wanted = args, args[0]
        self.result: Result | None = None
        strict = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            ClassificationTask,
            ClassificationData,
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
            args=list(args),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links, and what is ours."""
        parser.link_arguments("data.in_shape", "model.in_shape", apply_on="instantiate")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.add_argument("--name", type=str, default="default", help="MLflow experiment that runs go to")
        parser.add_argument(
            "--tracking_uri",
            type=str | None,
            default=None,
            help="MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db in outputs/)",
        )
        parser.add_argument(
            "--test",
            type=bool,
            default=True,
            help="read the test set once, with the best checkpoint, after fit",
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # static there, all four built
        """Only what was asked for: each subcommand costs a parser."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name == self._wanted}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, without the warning about arguments given from Python; the data takes the seed of the run."""
        self.config = parser.parse_args(args)
        config = self.config[self._wanted]
        if config.seed_everything < 0:
            raise UserError(f"seed_everything is {config.seed_everything}: give 0 or more")
        # not by link_arguments, which would override a value of the user's without a word
        if config.data.init_args.seed not in (0, config.seed_everything):
            raise UserError("data.init_args.seed is linked to seed_everything and cannot be given: leave it out")

    def _parse_ckpt_path(self) -> None:
        # a checkpoint gives weights; the config stays what --config says
        pass

    def before_instantiate_classes(self) -> None:
        """Keep what was resolved: all that a rerun needs."""
        parser, config = self._parser(self.subcommand), self.config[self.subcommand]
        if self.subcommand != "fit" and config.ckpt_path is None:
            raise UserError(f"ckpt_path is missing: give the checkpoint to {self.subcommand} by --ckpt_path")
        if config.ckpt_path is not None:
            check_checkpoint(Path(config.ckpt_path))
        if self.subcommand == "fit":
            link_learning_rate(self._args, config.model)
        self.resolved: Namespace = config
        # without what a rerun has anew: where it is tracked, which may hold a password
        self.resolved_yaml: str = parser.dump(Namespace({**config, "tracking_uri": None}), skip_none=True)
        if not isinstance(config.seed_everything, bool):
            config.data.init_args.seed = config.seed_everything

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the checkpoint that selects on validation, and the callbacks of the context."""
        self.checkpoint = BestCheckpoint(
            monitor="val/accuracy", mode="max", save_last=True, save_on_train_epoch_end=True
        )
        extra: list[Callback] = [*self.context.callbacks]
        if self.subcommand == "fit":
            extra.append(self.checkpoint)
        if not self.context.quiet:
            extra.append(EpochLines())
        return self._instantiate_trainer(dict(self._get(self.config_init, "trainer")), extra)

    def fit(self, model: ClassificationTask, datamodule: ClassificationData, **kwargs: Any) -> None:
        """Train, select on validation, measure, test once."""
        if self.context.dry:
            return
        config = self.resolved
        client, experiment = tracking.open_store(paths.tracking_uri(config.tracking_uri), config.name)
        params = flat_params(config, model)
        tags = {
            "layer": params["layer"],
            "data": params["data"],
            "backend": backends(model),
            **self.context.tags,
        }
        name = f"{params['layer']} {params['training_width']} seed {params['seed']}"
        with tracking.run(client, experiment, name, tags, self.context.parent) as run:
            run.params(params)
            run.text(self.resolved_yaml, "config.yaml")
            self.trainer.logger = logger = tracking.RunLogger(run)
            # a resumed run goes on in its folder
            resumed = kwargs.get("ckpt_path")
            self.checkpoint.dirpath = str(Path(resumed).parent if resumed else paths.checkpoints() / run.id)
            try:
                _interruptible(self.trainer, model, datamodule, kwargs)
                metrics = self._finish(model, datamodule, run)
            finally:
                logger.flush()
            run.metrics(metrics, self.trainer.global_step)
        if "val/best_accuracy" in metrics:
            metrics["val/accuracy"] = metrics["val/best_accuracy"]
        self.result = Result(run.id, metrics, params, total_sizes(model), self.resolved_yaml)

    def predict(self, model: ClassificationTask, datamodule: ClassificationData, **kwargs: Any) -> None:
        """Print the class of each test input, a line each."""
        for classes in self.trainer.predict(model, datamodule=datamodule, **kwargs) or []:
            assert isinstance(classes, torch.Tensor)
            print(*classes.tolist(), sep="\n")

    def _finish(self, model: ClassificationTask, datamodule: ClassificationData, run: tracking.Run) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if best := self.checkpoint.best_model_path:
            model.load_state_dict(torch.load(best, weights_only=True)["state_dict"])
            run.file(Path(best), "checkpoint")
            assert self.checkpoint.best_model_score is not None
            metrics["val/best_accuracy"] = float(self.checkpoint.best_model_score)
            if self.context.parent is not None:  # a study keeps its checkpoints with the runs alone
                shutil.rmtree(self.checkpoint.dirpath or "")
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined] # set by a connector
            if isinstance(callback, (Stability, TrainingSpeed)):
                metrics |= callback.results()
        metrics |= self._measure(model, datamodule)
        if self.context.fresh_process:
            metrics["memory/peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if self.resolved.test:
            self.trainer.logger = False  # type: ignore[assignment] # logged with the rest
            (tested,) = self.trainer.test(model, datamodule=datamodule, verbose=False)
            metrics |= {key: float(value) for key, value in tested.items()}
        return metrics

    def _measure(self, model: ClassificationTask, datamodule: ClassificationData) -> dict[str, float]:
        device, precision = model.device, self.trainer.precision_plugin
        train, val = (precision.convert_input(x.to(device)) for x, _ in (datamodule.train_data, datamodule.val_data))
        with precision.forward_context():
            return dead_leaves(model, train.split(EVALUATION_ROWS)) | measure(model.network, val)


class BestCheckpoint(ModelCheckpoint):
    """Goes on where the resumed checkpoint lies now; if its path has changed, Lightning forgets the best so far."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """With the paths of today.

        Raises:
            UserError: the best checkpoint does not lie beside the one that is resumed.
        """
        folder = Path(self.dirpath or "")

        def here(path: str) -> str:
            return str(folder / Path(path).name) if path else path

        paths = {name: here(state_dict[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = paths["best_model_path"]
        if best and not Path(best).is_file():
            raise UserError(
                f"ckpt_path: {best}, the best of that run, is not there: put it back, or resume from another"
            )
        kept = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": kept, "dirpath": self.dirpath})


def _interruptible(trainer: Trainer, model: ClassificationTask, data: ClassificationData, kwargs: Any) -> None:
    # Lightning turns Ctrl-C into SystemExit(1) and ignores further ones; a study has to tell them apart
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


def run(args: Sequence[str], context: Context | None = None) -> Result | None:
    """Run a subcommand of LightningCLI, args[0]; a result if it was fit.

    Raises:
        UserError: a mistake in the arguments, the configs or the data, in one line.
    """
    with user_errors():
        check_yaml(args)
        return ExperimentCLI(args, context or Context()).result


def check(args: Sequence[str]) -> str:
    """Parse the arguments and make data and model, without training; the name of the layer's class.

    Raises:
        UserError: a mistake in them, in one line.
    """
    with user_errors():
        return str(short(ExperimentCLI(args, Context(quiet=True, dry=True)).resolved.model.layer))
