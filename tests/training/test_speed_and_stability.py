"""The callbacks that watch speed and stability, in a real Trainer."""

import itertools
import math
import time
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fffexp.layers import FF, FFF
from fffexp.training.callbacks.routing import dead_leaves
from fffexp.training.callbacks.speed import TrainingSpeed
from fffexp.training.callbacks.stability import Stability
from fffexp.training.classification import ClassificationTask

SAMPLES, BATCH = 48, 16


def loader() -> "DataLoader[tuple[Tensor, ...]]":
    x = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=BATCH)


def train(epochs: int, *callbacks: Callback, layer: Any = None) -> dict[type, Any]:
    """Callbacks of the task after a training, by class."""
    seed_everything(0, verbose=False)
    task = ClassificationTask(layer or partial(FF, width=8), (6,), 3, optimizer=partial(torch.optim.Adam, lr=0.01))
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        callbacks=list(callbacks),
    )
    trainer.fit(task, loader(), loader())
    return {type(c): c for c in trainer.callbacks}  # type: ignore[attr-defined] # set by a connector


class Sleep(Callback):
    """Takes time where it does not count, and some where it does."""

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(0.01)

    def on_validation_batch_end(self, *_: Any) -> None:
        time.sleep(0.2)


def test_training_speed_leaves_out_validation_and_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    def pause() -> None:
        time.sleep(0.1)

    monkeypatch.setattr("fffexp.training.callbacks.speed.wait_for_timing", pause)
    epochs = 3
    begun = time.perf_counter()
    (speed,) = train(epochs, Sleep())[TrainingSpeed].results().values()
    passed = time.perf_counter() - begun
    batches = epochs * SAMPLES // BATCH
    left_out = batches * (0.1 + 0.2)
    seconds = epochs * SAMPLES / speed
    assert batches * 0.01 < seconds < passed - left_out


def test_training_speed_without_training() -> None:
    assert TrainingSpeed().results() == {}


def follow(values: Sequence[float], train_values: Sequence[float] | None = None, mode: str = "max") -> dict[str, float]:
    """Results for values of the monitored metric after each epoch."""
    trainer: Any = SimpleNamespace(callback_metrics={})
    task: Any = SimpleNamespace(monitor="val/score", mode=mode, trainer=trainer)
    stability = Stability(task)
    state = {
        "epochs": len(values),
        "losses": [1.0] * 10,
        "spikes": 0,
        "nonfinite_steps": 0,
        "fitted": list(enumerate(train_values or values, 1)),
        "validated": list(enumerate(values, 1)),
    }
    stability.load_state_dict(state)
    assert stability.state_dict() == state
    return stability.results()


def test_epochs_are_counted_from_1_to_the_first_of_the_best() -> None:
    results = follow([0.5, 0.9, 0.7, 0.9], [0.6, 0.7, 0.8, 0.8])
    assert results["epochs_to_best"] == 2
    assert results["epochs_to_fit"] == 3
    assert follow([0.5, 0.3, float("nan"), 0.3], mode="min")["epochs_to_best"] == 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.5], 0.0),  # the last quarter is one epoch
        ([0.0] * 6 + [0.4, 0.6], math.sqrt(0.02)),  # 0.4 and 0.6: deviations 0.1, over n - 1
        ([0.9] + [0.5] * 7, 0.0),
        ([0.5], 0.0),
    ],
)
def test_val_monitor_std_is_over_the_last_quarter(values: list[float], expected: float) -> None:
    assert follow(values)["stability/val_monitor_std"] == pytest.approx(expected)


class Follow(Callback):
    """What Stability should have seen."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.val: list[float] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.val.append(float(trainer.callback_metrics["val/accuracy"]))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch:
            self.train.append(float(trainer.callback_metrics["train/accuracy"]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.train.append(float(trainer.callback_metrics["train/accuracy"]))


def test_stability_follows_every_epoch_and_not_the_sanity_check() -> None:
    follower = Follow()
    stability = train(5, follower)[Stability]
    state = stability.state_dict()
    assert state["validated"] == list(enumerate(follower.val, 1))
    assert state["fitted"] == list(enumerate(follower.train, 1))
    assert len(follower.val) == len(follower.train) == 5
    assert len(state["losses"]) == 5 * SAMPLES // BATCH


def spoilt_at(step: int) -> Any:
    """Makes an FF whose output bias has an infinite gradient at that step."""

    def make(in_features: int, out_features: int) -> FF:
        layer, steps = FF(in_features, out_features, 8), itertools.count(1)
        bias = list(layer.parameters())[-1]
        bias.register_hook(lambda gradient: gradient * math.inf if next(steps) == step else gradient)
        return layer

    return make


def test_a_step_with_a_non_finite_gradient_is_counted() -> None:
    assert train(1)[Stability].results()["stability/nonfinite_steps"] == 0
    # the last step, or the next one would meet weights that are not finite
    watch = Norms()
    results = train(1, watch, layer=spoilt_at(SAMPLES // BATCH))[Stability].results()
    assert results["stability/nonfinite_steps"] == 1
    assert 0 < watch.norm < math.inf, "the mean of the finite ones"


class Norms(Callback):
    norm = math.nan

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.norm = float(trainer.callback_metrics["stability/grad_norm"])


def test_dead_leaves() -> None:
    seed_everything(0, verbose=False)
    task = ClassificationTask(partial(FFF, depth=2, leaf_width=2), (1,), 2)
    (layer,) = task.layers.values()
    assert isinstance(layer, FFF)
    with torch.no_grad():
        # the root sends x >= 0 right, both nodes below it x >= 1
        layer.node_weight.fill_(1.0)
        layer.node_bias.copy_(torch.tensor([0.0, -1.0, -1.0]))
    for inputs, dead in (([-1.0, 0.5, 2.0], 1), ([-1.0], 3), ([0.5, 2.0], 2)):
        # below 0 nothing is above 1, so one leaf can never be reached
        assert dead_leaves(task, torch.tensor(inputs).unsqueeze(1).split(2)) == {"stability/dead_leaves": dead}
    assert dead_leaves(ClassificationTask(partial(FF, width=2), (1,), 2), [torch.zeros(3, 1)]) == {}
