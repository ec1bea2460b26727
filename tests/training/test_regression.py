"""Regression: the squared error and its metrics."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fffexp.layers import FF, FFF
from fffexp.training.regression import RegressionTask


def rows(outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=generator)
    return x, x[:, :1] * torch.arange(1, outputs + 1) + 0.5


@pytest.mark.parametrize("outputs", [1, 2])
def test_loss_and_metrics_against_their_definitions(outputs: int) -> None:
    torch.manual_seed(0)
    task = RegressionTask(partial(FFF, depth=2, leaf_width=4), (3,), outputs).eval()
    x, y = rows(outputs)
    loss, *found = task.loss((x, y))
    error = (task.network(x) - y).detach().double()
    metrics = {name: float(metric(*found)) for name, metric in task.make_metrics().items()}
    unexplained = error.square().sum(0) / (y - y.mean(0)).double().square().sum(0)
    assert float(loss) == pytest.approx(float(error.square().mean()), rel=1e-5)
    assert metrics["mse"] == pytest.approx(float(error.square().mean()), rel=1e-5)
    assert metrics["mae"] == pytest.approx(float(error.abs().mean()), rel=1e-5)
    assert metrics["r2"] == pytest.approx(float(1 - unexplained.mean()), rel=1e-4)
    assert task.predict_step((x, y), 0).shape == (64, outputs)


def test_what_is_monitored_is_minimised() -> None:
    from lightning.pytorch import Trainer

    torch.manual_seed(0)
    task = RegressionTask(partial(FF, width=16), (3,), 1, optimizer=partial(torch.optim.AdamW, lr=0.02))
    loader = DataLoader(TensorDataset(*rows(1)), batch_size=16)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=40, accelerator="cpu", enable_model_summary=False, **quiet)  # type: ignore[arg-type]
    trainer.fit(task, loader, loader)
    assert float(trainer.callback_metrics[task.monitor]) < 0.1
    assert float(trainer.callback_metrics["val/r2"]) > 0.9
    assert task.mode == "min"


def test_another_network() -> None:
    def network(layer: object, in_shape: object, outputs: int) -> nn.Module:
        return nn.Linear(3, outputs)

    task = RegressionTask(None, (3,), 2, network=network)
    assert task.loss(rows(2))[1].shape == (64, 2)


def test_one_row_has_no_r2() -> None:
    metrics = RegressionTask(None, (3,), 1, network=lambda *_: nn.Linear(3, 1)).make_metrics()
    found = {name: float(metric(torch.tensor([[1.0]]), torch.tensor([[3.0]]))) for name, metric in metrics.items()}
    assert (found["mse"], found["mae"]) == (4, 2)
    assert math.isnan(found["r2"])
