"""A task and its data in one file of a user's, through the command line."""

import json
from pathlib import Path

import pytest
from processes import CONFIGS, enter, with_store, write_yaml

from fffexp.cli import main
from fffexp.training.experiment import Context, build, run

OWN = '''
import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from fffexp import Task
from fffexp.models.mlp import MLP, LayerFactory


class MyTask(Task):
    """A mean squared error to minimise."""

    def __init__(self, layer: LayerFactory, features: int = 5, **kwargs):
        super().__init__(**kwargs)
        self.network = MLP(layer, (features,), 1)

    def loss(self, batch):
        outputs = self(batch[0]).squeeze(1)
        return F.mse_loss(outputs, batch[1]), outputs, batch[1]


class MyData(LightningDataModule):
    def __init__(self, rows: int = 256):
        super().__init__()
        x = torch.randn(rows, 5)
        self.rows = TensorDataset(x, x.sum(1))

    def train_dataloader(self):
        return DataLoader(self.rows, 32, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.rows, 64)

    test_dataloader = val_dataloader
'''


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    enter(with_store(tmp_path), monkeypatch)
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    layer = ["--model.layer=FFF", "--model.layer.depth=2", "--model.layer.leaf_width=4"]
    return ["fit", "--model=own.MyTask", "--data=own.MyData", *layer, "--trainer.max_epochs=8"]


def test_a_task_and_data_of_ones_own_are_fitted(arguments: list[str]) -> None:
    task = build(arguments).task
    assert (task.monitor, task.mode, task.unit_monitor) == ("val/loss", "min", False)
    result = run([*arguments, "--model.optimizer=Adam", "--model.optimizer.lr=0.05"], Context(quiet=True))
    assert result is not None
    assert result.params["layer"] == "FFF"
    assert 0 < result.metrics["test/loss"] == pytest.approx(result.metrics["val/loss"], rel=1e-4)
    assert result.metrics["val/loss"] < 2.5, "half of what the mean gives"
    assert {"epochs_to_best", "speed/latency_b1_ms", "stability/val_monitor_std"} <= set(result.metrics)
    assert "test/accuracy" not in result.metrics


def test_it_takes_a_recipe(arguments: list[str]) -> None:
    result = run([*arguments, f"--config={CONFIGS}/recipe/weights/fff.yaml"], Context(quiet=True))
    assert result is not None
    assert result.params["aux_weights.importance"] == 0.1


LAYER = """

from torch import nn

from fffexp.layers import FeedforwardLayer


class Wide(FeedforwardLayer):
    def __init__(self, in_features: int, out_features: int, neurons: int = 4) -> None:
        super().__init__(in_features, out_features)
        self.neurons = neurons
        self.both = nn.Sequential(nn.Linear(in_features, neurons), nn.Tanh(), nn.Linear(neurons, out_features))

    @property
    def training_width(self) -> int:
        return self.neurons

    @property
    def flops_per_sample(self) -> int:
        return 2 * self.neurons * (self.in_features + self.out_features)

    def forward(self, x):
        return self.both(x)
"""


def test_a_study_minimises_what_a_task_of_ones_own_monitors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(with_store(tmp_path), monkeypatch)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text(OWN + LAYER)  # not own.py, which this process has imported
    lr = {"keys": ["model.optimizer.init_args.lr"]}
    write_yaml(tmp_path / "base.yaml", {
        "model": {"class_path": "mine.MyTask", "init_args": {"optimizer": {"class_path": "torch.optim.Adam"}}},
        "data": {"class_path": "mine.MyData"},
        "trainer": {"max_epochs": 3},
    })  # fmt: skip
    write_yaml(tmp_path / "wide.yaml", {"model": {"layer": {"class_path": "mine.Wide"}}})
    write_yaml(tmp_path / "study.yaml", {
        "name": "mine",
        "configs": ["base.yaml"],
        "objectives": {"val/loss": "minimize"},
        "seeds": [0],
        "layers": {"mine": {"config": "wide.yaml", "space": {"lr": lr}, "points": [{"lr": 1e-6}, {"lr": 0.1}]}},
    })  # fmt: skip
    assert main(["study", "run", "study.yaml", "--jobs=1"]) == 0
    summary = json.loads((tmp_path / "outputs" / "studies" / "mine" / "summary.json").read_text())
    assert (summary["mode"], summary["monitor"]) == ("min", "val/loss")
    bad, good = summary["trials"]
    assert good["params"]["layer"] == "mine.Wide"
    assert good["values"][0] < bad["values"][0]
    assert summary["best"] == good["number"]
    assert main(["report", "mine"]) == 0
    assert "mine.Wide" in capsys.readouterr().out
