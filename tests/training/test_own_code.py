"""Tasks, data and layers of the user's, by class path, and Lightning's own parts beside ours."""

from pathlib import Path

import pytest
import torch
from processes import CONFIGS, digits, enter, history, runs, started, with_store

from fffexp.cli import main
from fffexp.training.experiment import Context, Result, build, run

OWN = """
import torch, torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fffexp.layers import FeedforwardLayer, FF
from fffexp.models.mlp import LayerFactory
from fffexp.training.task import Task

class Sines(LightningDataModule):
    def __init__(self, rows: int = 64):
        super().__init__()
        x = torch.linspace(-1, 1, rows)[:, None]
        self.rows = TensorDataset(x, torch.sin(3 * x))
    def train_dataloader(self): return DataLoader(self.rows, 16, shuffle=True)
    def val_dataloader(self): return DataLoader(self.rows, 64)

class Regression(Task):
    def __init__(self, layer: LayerFactory, slip: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.network = layer(1, 1)
        self.slip = slip
    def loss(self, batch):
        x, y = batch
        if self.slip:
            x @ torch.zeros(3)
        outputs = self(x)
        return F.mse_loss(outputs, y), outputs.detach(), y

class Wide(FF):
    def __init__(self, in_features: int, out_features: int, neurons: int = 6):
        super().__init__(in_features, out_features, neurons)

class Unmade(Task):
    def __init__(self, **kwargs):
        raise KeyError("oh")
    def loss(self, batch): ...
"""


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(OWN.splitlines(), 1) if text in line)


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the user's module in the current folder; another in each test, for modules stay imported."""
    enter(with_store(tmp_path), monkeypatch)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(OWN)
    return name


def fit(*args: str) -> Result:
    result = run(["fit", *args, "--trainer.max_epochs=2"], Context(quiet=True))
    assert result is not None
    return result


@pytest.fixture
def task(own: str) -> list[str]:
    layer = ["--model.layer=FFF", "--model.layer.depth=2", "--model.layer.leaf_width=3"]
    return [f"--data={own}.Sines", f"--model={own}.Regression", *layer]


def test_a_task_and_data_of_the_user(task: list[str], own: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = fit(*task)
    assert result.params["task"] == f"{own}.Regression"
    assert result.params["data"] == f"{own}.Sines"
    assert result.metrics["val/loss"] == min(history(Path.cwd(), result.run_id, "val/loss"))
    assert result.metrics["speed/latency_b1_ms"] > 0
    assert "stability/dead_leaves" in result.metrics
    assert "test is left out" in capsys.readouterr().err, "there is no test_dataloader"
    checked = build(["fit", *task])
    assert checked.params["layer"] == "FFF"
    assert (checked.task.monitor, checked.task.mode, checked.task.unit_monitor) == ("val/loss", "min", False)
    assert {*result.metrics} - {*checked.measurable} <= {"memory/peak_mb"}


def test_a_layer_from_elsewhere(own: str) -> None:
    result = run([*digits("ff")[:2], f"--model.layer={own}.Wide", "--model.layer.neurons=7", "--trainer.max_epochs=1"])
    assert result is not None
    assert result.params["layer"] == f"{own}.Wide"
    assert result.params["layer.neurons"] == 7
    assert result.params["training_width"] == 7


@pytest.mark.slow
def test_no_path_needs_to_be_set(task: list[str], tmp_path: Path) -> None:
    with started("fit", *task, "--trainer.max_epochs=1", folder=tmp_path) as process:
        assert process.wait() == 0, process.errors()
    assert [r.info.status for r in runs(tmp_path)] == ["FINISHED"]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--model.slip=true"], [f".py, line {line_of('torch.zeros(3)')}: RuntimeError"]),
        (["--model=OWN.Unmade"], [f".py, line {line_of('KeyError')}: KeyError: 'oh'"]),
        (["--model=OWN.Nix"], ["no attribute 'Nix'"]),
        (["--model=nonesuch.Net"], ["No module named 'nonesuch'"]),
        (["--model=null"], ["model"]),
    ],
)
def test_an_error_in_the_users_code(
    args: list[str], named: list[str], task: list[str], own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *task, *(arg.replace("OWN", own) for arg in args), "--trainer.max_epochs=1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for part in named:
        assert part in line


def test_building_without_training() -> None:
    made = build(digits("fff", epochs=3))
    assert made.trainer.max_epochs == 3
    assert made.task.layers.keys() == {"layer"}
    made.data.setup("fit")
    assert not list(Path("outputs/checkpoints").glob("*"))


def test_the_users_loggers_are_kept() -> None:
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=outputs/csv", "--trainer.logger.name=mine"]
    result = run([*digits("ff"), *logger], Context(quiet=True))
    assert result is not None
    folder = Path("outputs/csv/mine/version_0")
    assert "val/accuracy" in (folder / "metrics.csv").read_text()
    assert "layer: FF\n" in (folder / "hparams.yaml").read_text()
    assert history(Path.cwd(), result.run_id, "val/accuracy")


def test_a_second_model_checkpoint_saves_below_the_outputs(tmp_path: Path) -> None:
    result = run([*digits("ff"), "--trainer.callbacks=ModelCheckpoint"], Context(quiet=True))
    assert result is not None
    folder = tmp_path / "outputs/checkpoints" / result.run_id
    saved = {path.relative_to(folder) for path in folder.rglob("*.ckpt")}
    assert saved == {Path("last.ckpt"), Path("epoch=0-step=5.ckpt"), Path("checkpoints/epoch=0-step=5.ckpt")}
    assert {p.name for p in tmp_path.iterdir() if p.suffix != ".py"} <= {"outputs", "__pycache__"}


@pytest.mark.parametrize(
    ("option", "printed"),
    [
        ("--trainer.profiler=simple", "Profiler Report"),
        ("--trainer.callbacks=TQDMProgressBar", "Epoch 0"),
        ("--trainer.enable_progress_bar=true", "Epoch 0"),
        ("--trainer.enable_checkpointing=false", "test/accuracy"),
        ("--trainer.limit_test_batches=0", "test is left out"),
        ("--trainer.limit_val_batches=0", "test/accuracy"),
    ],
)
def test_options_of_lightning_work(
    option: str,
    printed: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert main([*digits("ff"), option]) == 0
    assert printed in "".join([*capfd.readouterr(), caplog.text])
    assert [r.info.status for r in runs(tmp_path)] == ["FINISHED"]


def test_outputs_can_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFFEXP_OUTPUTS", "elsewhere")
    result = run([*digits("ff"), "--test=false"], Context(quiet=True))
    assert result is not None
    assert (tmp_path / "elsewhere/checkpoints" / result.run_id / "last.ckpt").is_file()
    assert not Path("outputs/checkpoints").exists()
    assert torch.load(tmp_path / "elsewhere/checkpoints" / result.run_id / "last.ckpt", weights_only=True)


def test_the_config_pieces_need_no_class_path_of_the_task() -> None:
    pieces = [f"--config={CONFIGS / piece}.yaml" for piece in ("layer/fff", "model/one_cycle", "data/digits")]
    assert build(["fit", *pieces, "--model.layer.depth=3"]).params["layer"] == "FFF"
