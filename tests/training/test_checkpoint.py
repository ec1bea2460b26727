"""What a run saves, and how it goes on from there."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import digits, enter, history, runs, with_store

from fffexp.cli import main
from fffexp.errors import UserError
from fffexp.training.callbacks.checkpoint import RandomState
from fffexp.training.experiment import Context, Result, run

CHECKPOINTS = Path("outputs/checkpoints")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_store(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(autouse=True)
def in_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(workplace, monkeypatch)


def fit(*args: str, layer: str = "ff", epochs: int = 3, **context: Any) -> Result:
    result = run(digits(layer, "--test=false", *args, epochs=epochs), Context(quiet=True, **context))
    assert result is not None
    return result


class InterruptAt(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


def interrupted(*args: str, at: int, layer: str = "ff", epochs: int = 3, **context: Any) -> Path:
    """Checkpoint of a fit that was interrupted at the start of an epoch."""
    with pytest.raises(KeyboardInterrupt):
        fit(*args, layer=layer, epochs=epochs, callbacks=[InterruptAt(at), *context.pop("callbacks", ())], **context)
    return CHECKPOINTS / runs(Path.cwd())[-1].info.run_id / "last.ckpt"


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def test_each_finished_epoch_is_saved_and_the_best_beside() -> None:
    spoilt = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0", "--model.lr_scheduler=null"]
    result = fit(*spoilt, epochs=3)  # nothing improves after the first
    folder = CHECKPOINTS / result.run_id
    last, best = folder / "last.ckpt", folder / "epoch=0-step=5.ckpt"
    assert {*folder.iterdir()} == {last, best}
    assert torch.load(last, weights_only=True)["epoch"] == 2
    assert torch.load(best, weights_only=True)["epoch"] == 0


def test_a_noisy_run_that_is_resumed_equals_the_uninterrupted_one(workplace: Path) -> None:
    whole = fit(layer="moe")
    last = interrupted(at=2, layer="moe")
    torch.manual_seed(5)  # whatever else has been drawn
    resumed = fit(f"--ckpt_path={last}", layer="moe")
    expected, got = weights(CHECKPOINTS / whole.run_id / "last.ckpt"), weights(last)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert resumed.metrics["val/accuracy"] == whole.metrics["val/accuracy"]
    assert history(workplace, resumed.run_id, "train/loss")[-1] == history(workplace, whole.run_id, "train/loss")[-1]


def test_a_checkpoint_within_an_epoch_goes_on_at_its_batch() -> None:
    class AtStep(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 7:
                raise KeyboardInterrupt

    whole = fit(layer="moe")  # 5 batches an epoch, on a one-cycle schedule
    saving = ModelCheckpoint("outputs/within", "{step}", every_n_train_steps=7)
    with pytest.raises(KeyboardInterrupt):
        fit(layer="moe", callbacks=[saving, AtStep()])
    folder = CHECKPOINTS / runs(Path.cwd())[-1].info.run_id
    within = Path("outputs/within/step=7.ckpt").rename(folder / "within.ckpt")
    fit(f"--ckpt_path={within}", layer="moe")
    expected, got = weights(CHECKPOINTS / whole.run_id / "last.ckpt"), weights(folder / "last.ckpt")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_another_optimizer_is_refused_on_resume_and_used_by_a_new_training() -> None:
    last = interrupted(at=1)
    with pytest.raises(UserError, match=r"model\.optimizer\.lr .*--init_from"):
        fit(f"--ckpt_path={last}", "--model.optimizer.lr=1e-5")
    tuned = fit(f"--init_from={last}", "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0", epochs=1)
    before, after = weights(last), weights(CHECKPOINTS / tuned.run_id / "last.ckpt")
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(UserError, match="give one of the two"):
        fit(f"--init_from={last}", f"--ckpt_path={last}")
    with pytest.raises(UserError, match="does not fit the config"):
        fit(f"--init_from={last}", layer="fff")


def test_a_finished_run_that_is_resumed_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    last = CHECKPOINTS / fit(epochs=1).run_id / "last.ckpt"
    assert main([*digits("ff"), f"--ckpt_path={last}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "all its 1 epochs" in line
    assert "--init_from" in line


def damage(kind: str, good: bytes, path: Path) -> None:
    if kind == "only the version":
        torch.save({"pytorch-lightning_version": "2.6"}, path)
    elif kind == "flipped bits":
        path.write_bytes(good[: len(good) // 2] + bytes(b ^ 255 for b in good[len(good) // 2 :]))
    elif kind == "truncated":
        path.write_bytes(good[:-200])
    elif kind == "a pickle that acts":
        path.write_bytes(b"cos\nsystem\n(S'touch outputs/acted'\ntR.")
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize("kind", ["only the version", "flipped bits", "truncated", "a pickle that acts", "empty"])
def test_a_damaged_checkpoint(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    good, bad = interrupted(at=1).read_bytes(), Path("outputs/bad.ckpt")
    capfd.readouterr()
    damage(kind, good, bad)
    for option in ("--ckpt_path", "--init_from"):
        assert main([*digits("ff"), f"{option}={bad}"]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert "outputs/bad.ckpt is damaged" in line
    assert not Path("outputs/acted").exists()


def test_all_generators_go_on() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    torch.save(RandomState().state_dict(), "outputs/random.pt")
    before = draw()
    assert draw() != before
    state = RandomState()
    state.load_state_dict(torch.load("outputs/random.pt", weights_only=True))
    state.on_train_start(Trainer(logger=False), LightningModule())
    assert draw() == before


def test_the_best_checkpoint_holds_its_own_metrics() -> None:
    result = fit("--model.optimizer.lr=0.05", epochs=3)
    (path,) = (CHECKPOINTS / result.run_id).glob("epoch=*.ckpt")
    saved = torch.load(path, weights_only=True)
    (best,) = (state for key, state in saved["callbacks"].items() if key.startswith("BestCheckpoint"))
    assert saved["epoch"] + 1 == result.metrics["epochs_to_best"] > 1, "else nothing was replaced"
    assert best["metrics"]["val/accuracy"] == pytest.approx(result.metrics["val/accuracy"])
    assert best["metrics"]["val/accuracy"] == pytest.approx(float(best["best_model_score"]))
