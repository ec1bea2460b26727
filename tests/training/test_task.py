"""A task in a Trainer of anybody's, with the options that people give it."""

import math
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, EarlyStopping, LearningRateFinder
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError, Metric

from fffexp import ClassificationTask, Task
from fffexp.errors import UserError
from fffexp.layers import FFF
from fffexp.training.callbacks.speed import TrainingSpeed
from fffexp.training.callbacks.stability import Stability
from fffexp.training.optim import OneCycle
from fffexp.training.schedules import Adaptive, Exponential

ROWS, BATCH, END = 96, 16, 50.0
TREE = partial(FFF, depth=2, leaf_width=4)
HARDEN: dict[str, Any] = {"inverse_temperature": Exponential(1.0, END), "importance": 0.1}
OPTIMIZER = partial(torch.optim.AdamW, lr=0.02)
CYCLE: dict[str, Any] = {"optimizer": OPTIMIZER, "lr_scheduler": partial(OneCycle, total_steps=None)}


class Data(LightningDataModule):
    """Sums of six numbers, with a batch size that a finder may change."""

    def __init__(self, batch_size: int = BATCH) -> None:
        super().__init__()
        self.batch_size = batch_size
        x = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(0))
        self.rows = TensorDataset(x, x[:, :3].sum(1))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, self.batch_size)

    test_dataloader = val_dataloader


class Regression(Task):
    """One file of a user's: what is minimised is the loss."""

    def __init__(self, layer: Any = TREE, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.network = nn.Sequential(layer(6, 1), nn.Flatten(0))

    def make_metrics(self) -> dict[str, Metric]:
        return {"mae": MeanAbsoluteError()}

    def loss(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        outputs = self(batch[0])
        return F.mse_loss(outputs, batch[1]), outputs, batch[1]


class Scales(Callback):
    """The inverse temperature and the learning rate of each step."""

    def __init__(self) -> None:
        self.scales: list[float] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        (layer,) = pl_module.layers.values()
        self.scales.append(float(layer.inverse_temperature))
        self.rates.append(optimizer.param_groups[0]["lr"])


def fit(folder: Path, task: Task | None = None, *callbacks: Callback, **options: Any) -> tuple[Trainer, Scales]:
    seed_everything(0, verbose=False)
    scales = Scales()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=[scales, *callbacks], num_sanity_val_steps=0,
        **{"max_epochs": 4, **quiet, **options},
    )  # fmt: skip
    trainer.fit(task or Regression(aux_weights=HARDEN, **CYCLE), Data())
    return trainer, scales


def results(trainer: Trainer) -> dict[str, float]:
    watching = [c for c in trainer.callbacks if isinstance(c, (Stability, TrainingSpeed))]  # type: ignore[attr-defined]
    return {name: value for callback in watching for name, value in callback.results().items()}


def test_a_regression_in_one_file(tmp_path: Path) -> None:
    task = Regression(aux_weights=HARDEN, **CYCLE)
    trainer, _ = fit(tmp_path, task, max_epochs=30)
    metrics = trainer.callback_metrics
    for name in ("train/loss", "train/mae", "val/loss", "val/mae", "val/soft_loss", "val/soft_mae"):
        assert name in metrics, name
    assert float(metrics["val/loss"]) < 1.0 < float(Data().rows.tensors[1].var())
    gap = float(metrics["val/soft_loss"] - metrics["val/loss"])
    assert float(metrics["val/hardening_gap"]) == pytest.approx(gap)
    assert results(trainer)["epochs_to_best"] <= 30
    (tested,) = trainer.test(task, Data(), verbose=False)
    assert tested["test/loss"] == pytest.approx(float(metrics["val/loss"]), rel=1e-5)
    assert not Regression().unit_monitor
    assert ClassificationTask(TREE, (6,), 3).unit_monitor


@pytest.mark.parametrize(
    ("options", "steps", "validations"),
    [
        ({}, 24, 4),
        ({"val_check_interval": 0.5}, 24, 8),
        ({"check_val_every_n_epoch": 2}, 24, 2),
        ({"overfit_batches": 1}, 4, 4),
        ({"accumulate_grad_batches": 3}, 8, 4),
        ({"max_steps": 10}, 10, 1),
        ({"limit_val_batches": 0}, 24, 0),
    ],
)
def test_the_tree_ends_hardened(options: dict[str, Any], steps: int, validations: int, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*schedule of.*")
        trainer, scales = fit(tmp_path, None, **options)
    assert trainer.global_step == steps
    assert scales.scales == pytest.approx([END ** (step / steps) for step in range(steps)], rel=1e-5)
    assert scales.rates[-1] < 0.02 / 20, "the learning rate went down"
    found = results(trainer)
    assert ("epochs_to_best" in found) == bool(validations)
    if validations:
        assert 1 <= found["epochs_to_best"] <= 4
        assert options.get("check_val_every_n_epoch") is None or found["epochs_to_best"] in (2, 4)
        stability = next(c for c in trainer.callbacks if isinstance(c, Stability))  # type: ignore[attr-defined]
        assert len(stability.state_dict()["validated"]) == validations


class Pause(Callback):
    def on_validation_batch_end(self, *_: Any) -> None:
        time.sleep(1.0)  # long beside the training, on a busy machine too


def test_the_clock_goes_on_after_a_validation_within_an_epoch(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, None, Pause(), max_epochs=1, val_check_interval=0.5)
    watch = next(c for c in trainer.callbacks if isinstance(c, TrainingSpeed))  # type: ignore[attr-defined]
    assert ROWS / 1.0 < watch.results()["speed/train_samples_per_s"] < math.inf


def test_a_training_that_ends_by_time_hardens(tmp_path: Path) -> None:
    _, scales = fit(tmp_path, Regression(aux_weights=HARDEN), max_epochs=-1, max_time={"seconds": 1})
    assert scales.scales[-1] > END / 1.5


def test_a_training_without_a_known_end_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"no known end, so that the schedule of inverse_temperature stays"):
        fit(tmp_path, Regression(aux_weights=HARDEN), EarlyStopping("val/loss", min_delta=10.0), max_epochs=-1)
    with pytest.raises(UserError, match="there is no end of the training, which a schedule of the learning rate needs"):
        fit(tmp_path, None, max_epochs=-1)


def test_a_training_that_stops_early_says_so(tmp_path: Path) -> None:
    stopping = EarlyStopping("val/loss", min_delta=10.0, patience=1)
    with pytest.warns(UserWarning, match="training stopped after .* of the schedule of inverse_temperature"):
        fit(tmp_path, None, stopping, max_epochs=40)


def test_a_learning_rate_finder_sets_the_peak_and_uses_up_no_schedule(tmp_path: Path) -> None:
    finder = LearningRateFinder(min_lr=1e-4, max_lr=0.1, num_training_steps=30)
    adaptive = Adaptive(1.0, 2.0, 64.0, target=0.0)
    task = Regression(aux_weights={**HARDEN, "hardening_mean": adaptive}, **CYCLE)
    _, scales = fit(tmp_path, task, finder)
    assert task.lr is not None
    assert max(scales.rates[-24:]) == pytest.approx(task.lr, rel=1e-2)
    assert scales.scales[-24:] == pytest.approx([END ** (step / 24) for step in range(24)], rel=1e-5)
    assert adaptive.value == 16.0, "raised after each of the four epochs that were trained"


def test_a_batch_size_finder_changes_the_length_of_the_schedules(tmp_path: Path) -> None:
    finder = BatchSizeFinder(steps_per_trial=1, init_val=4, max_trials=2)
    task = Regression(aux_weights=HARDEN, **CYCLE)
    trainer, scales = fit(tmp_path, task, finder)
    steps = trainer.global_step
    assert steps != 24
    assert scales.scales[-steps:] == pytest.approx([END ** (step / steps) for step in range(steps)], rel=1e-5)
    assert trainer.lr_scheduler_configs[0].scheduler.total_steps == steps


def test_a_fused_optimizer_is_clipped_in_bfloat16(tmp_path: Path) -> None:
    task = Regression(optimizer=partial(torch.optim.AdamW, fused=True), aux_weights=HARDEN)
    trainer, _ = fit(tmp_path, task, precision="bf16-mixed", gradient_clip_val=0.5)
    assert trainer.global_step == 24


@pytest.mark.parametrize("mode", ["hard", "soft", "auto"])
def test_nobody_resets_a_routing_mode(mode: Any, tmp_path: Path) -> None:
    task = Regression(aux_weights=HARDEN)
    (layer,) = task.layers.values()
    layer.routing_mode = mode
    seen: set[str] = set()
    layer.register_forward_pre_hook(lambda module, _: seen.add(module.routing_mode) if module.training else None)
    fit(tmp_path, task, max_epochs=1)
    assert seen == {mode}
    assert layer.routing_mode == mode


def test_a_routing_mode_survives_an_error_in_validation(tmp_path: Path) -> None:
    task = Regression(aux_weights=HARDEN)
    (layer,) = task.layers.values()

    def fail(module: Any, _: Any) -> None:
        if module.routing_mode == "soft":
            raise ZeroDivisionError

    layer.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, task, max_epochs=1)
    assert layer.routing_mode == "auto"
    assert len(layer._forward_pre_hooks) == 1, "the counting ones are gone"


def test_a_loss_outside_of_a_trainer() -> None:
    batch = next(iter(Data().train_dataloader()))
    loss, outputs, targets = Regression().loss(batch)
    loss.backward()
    assert outputs.shape == targets.shape == (BATCH,)


def test_a_task_built_in_python_is_loaded_with_its_arguments_given_again(tmp_path: Path) -> None:
    x = torch.randn(32, 6)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8)
    task = ClassificationTask(TREE, (6,), 3, label_smoothing=0.2, aux_weights=HARDEN, **CYCLE)
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path, barebones=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(task, loader, loader)
    path = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["hyper_parameters"]["label_smoothing"] == 0.2
    again = ClassificationTask.load_from_checkpoint(path, layer=TREE, weights_only=True)
    assert again.label_smoothing == 0.2
    assert torch.equal(again.eval()(x), task.eval()(x))
    with pytest.raises(TypeError, match="layer"):
        ClassificationTask.load_from_checkpoint(path)


def test_one_cycle_goes_up_to_the_learning_rate_of_the_optimizer() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedule, rates = OneCycle(optimizer, total_steps=10), []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < 10:
            schedule.step()
    assert max(rates) == pytest.approx(0.3)
    assert rates[0] == pytest.approx(0.3 / 25)


class Bare(Regression):
    """No metrics: outputs and targets may be anything, here numbers without a batch."""

    def make_metrics(self) -> dict[str, Metric]:
        return {}

    def loss(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, *_ = super().loss(batch)
        return loss, loss.detach(), loss.detach()


def test_a_task_without_metrics_may_give_outputs_of_any_shape(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, Bare())
    assert {"train/loss", "val/loss"} <= trainer.callback_metrics.keys()
