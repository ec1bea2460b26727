"""A fit from its config to what is tracked, saved and can be run again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from mlflow.entities import Run
from processes import CONFIGS, artifact, client, digits, enter, history, runs, with_store

from fffexp.cli import main
from fffexp.data import Digits
from fffexp.errors import NonFiniteLossError, UserError
from fffexp.layers import FFF
from fffexp.training.classification import ClassificationTask
from fffexp.training.experiment import Context, Result, run

PARAMS = {
    *("layer", "seed", "data", "optimizer", "optimizer.lr", "optimizer.weight_decay"),
    *("training_width", "training_size", "inference_width", "inference_size", "parameters", "flops_per_sample"),
}
LAYER_PARAMS = {
    "ff": {"width", "activation", "dropout"},
    "moe": {"num_experts", "expert_width", "top_k", "activation", "dropout", "trainable"},
    "fff": {"depth", "leaf_width", "region_leak", "trained", "detach_router_input", "activation", "dropout"},
}
OVER_TIME = {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "stability/grad_norm"}
FINAL = {
    *("test/accuracy", "test/loss", "epochs_to_best", "epochs_to_fit"),
    *("stability/val_monitor_std", "stability/loss_spikes", "stability/nonfinite_steps"),
    *("speed/latency_b1_ms", "speed/latency_b256_ms", "speed/throughput_b2048", "speed/train_samples_per_s"),
    *("speed/reference_latency_b1_ms", "speed/reference_latency_b256_ms"),
    *("speed/latency_b1_ratio", "speed/latency_b256_ratio"),
}
ROUTED = {"routing/used_leaves", "routing/usage_cv"}
LAYER_OVER_TIME = {
    "ff": set(),
    "moe": {*ROUTED, "routing/gate_entropy", "schedule/importance", "schedule/load"},
    "fff": {
        *ROUTED,
        *("routing/entropy", "val/soft_accuracy", "val/soft_loss", "val/hardening_gap"),
        *("schedule/inverse_temperature", "schedule/importance"),
    },
}
EPOCHS = 3


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_store(tmp_path_factory.mktemp("experiment"))


@pytest.fixture(autouse=True)
def in_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(workplace, monkeypatch)


def fit(*args: str, layer: str = "fff", epochs: int = EPOCHS, **context: Any) -> Result:
    result = run(digits(layer, *args, epochs=epochs), Context(quiet=True, **context))
    assert result is not None
    return result


def newest(folder: Path) -> Run:
    return runs(folder)[-1]


@pytest.fixture(scope="module")
def fits(workplace: Path) -> Iterator[dict[str, Result]]:
    """A fit of each layer."""
    with pytest.MonkeyPatch.context() as patch:
        enter(workplace, patch)
        yield {layer: fit("--name=all", layer=layer) for layer in LAYER_PARAMS}


@pytest.mark.parametrize("layer", LAYER_PARAMS)
def test_what_is_tracked(layer: str, fits: dict[str, Result], workplace: Path) -> None:
    ours = client(workplace).get_run(fits[layer].run_id)
    assert ours.info.status == "FINISHED"
    assert client(workplace).get_experiment(ours.info.experiment_id).name == "all"
    assert {f"layer.{name}" for name in LAYER_PARAMS[layer]} == {p for p in ours.data.params if p.startswith("layer.")}
    assert set(ours.data.params) >= PARAMS
    assert ours.data.params["seed"] == "0"
    assert ours.data.params["data"] == "Digits"
    assert ours.data.params["training_width"] == "128"
    blocked = {"stability/dead_leaves"} if layer != "ff" else set()
    expected = OVER_TIME | FINAL | LAYER_OVER_TIME[layer] | blocked
    assert set(ours.data.metrics) == expected | {"val/best_accuracy"}
    for name in OVER_TIME | LAYER_OVER_TIME[layer]:
        assert len(history(workplace, ours.info.run_id, name)) == EPOCHS, name
    for name in FINAL | blocked:
        assert len(history(workplace, ours.info.run_id, name)) == 1, name
    assert 1 <= ours.data.metrics["epochs_to_best"] <= EPOCHS
    assert ours.data.metrics["val/best_accuracy"] == max(history(workplace, ours.info.run_id, "val/accuracy"))
    assert set(ours.data.tags) >= {"layer", "data", "backend", "git_commit", "host", "torch"}
    assert ours.data.tags["layer"] == ours.data.params["layer"]


def test_what_the_fff_metrics_say(fits: dict[str, Result], workplace: Path) -> None:
    run_id = fits["fff"].run_id
    rows = zip(
        *(history(workplace, run_id, f"val/{name}") for name in ("soft_accuracy", "accuracy", "hardening_gap")),
        strict=True,
    )
    for soft, hard, gap in rows:
        assert gap == pytest.approx(soft - hard, abs=1e-6)
    scale = history(workplace, run_id, "schedule/inverse_temperature")
    assert scale == sorted(scale)
    assert scale[0] >= 1
    assert scale[-1] < 300
    assert min(history(workplace, run_id, "routing/used_leaves")) >= 1
    assert max(history(workplace, run_id, "routing/used_leaves")) <= 16
    params = client(workplace).get_run(run_id).data.params
    assert {name: int(params[name]) for name in fits["fff"].sizes} == FFF(64, 10, 4, 8).sizes()


def test_a_config_of_the_artifacts_reruns_the_run(fits: dict[str, Result], workplace: Path) -> None:
    first = fits["moe"]  # whose training draws noise
    config = artifact(workplace, first.run_id, "config.yaml")
    again = run(["fit", f"--config={config}"], Context(quiet=True))
    assert again is not None
    assert again.run_id != first.run_id
    for name in ("train/loss", "val/loss", "val/accuracy"):
        assert history(workplace, again.run_id, name) == pytest.approx(
            history(workplace, first.run_id, name), rel=1e-5
        ), name
    for name in ("val/accuracy", "test/accuracy", "epochs_to_best"):
        assert again.metrics[name] == pytest.approx(first.metrics[name])
    assert again.params == first.params


@pytest.mark.parametrize("layer", LAYER_PARAMS)
def test_the_saved_checkpoint_is_the_best_and_has_the_tested_accuracy(
    layer: str, fits: dict[str, Result], workplace: Path
) -> None:
    (path,) = artifact(workplace, fits[layer].run_id, "checkpoint").iterdir()
    saved = torch.load(path, weights_only=True)
    best = history(workplace, fits[layer].run_id, "epochs_to_best")[0]
    assert saved["epoch"] + 1 == best
    task = ClassificationTask.load_from_checkpoint(path, weights_only=True).eval()
    data = Digits(seed=0)
    data.setup()
    for (x, y), metric in ((data.val_data, "val/accuracy"), (data.test_data, "test/accuracy")):
        with torch.no_grad():
            accuracy = float((task(x).argmax(1) == y).double().mean())
        assert accuracy == pytest.approx(fits[layer].metrics[metric], abs=1e-6)


def test_a_checkpoint_fills_the_layer_alone(fits: dict[str, Result], workplace: Path) -> None:
    (path,) = artifact(workplace, fits["fff"].run_id, "checkpoint").iterdir()
    state = torch.load(path, weights_only=True)["state_dict"]
    layer = FFF(64, 10, depth=4, leaf_width=8).eval()
    prefix = "network.layer."
    layer.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    data = Digits()
    data.setup()
    x, y = data.test_data
    with torch.no_grad():
        accuracy = float((layer(x.flatten(1)).argmax(1) == y).double().mean())
    assert accuracy == pytest.approx(fits["fff"].metrics["test/accuracy"], abs=1e-6)


def test_the_other_subcommands_take_the_checkpoint(
    fits: dict[str, Result], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = artifact(workplace, fits["fff"].run_id, "checkpoint").iterdir()
    config = artifact(workplace, fits["fff"].run_id, "config.yaml")
    before = len(runs(workplace))
    settings = yaml.safe_load(config.read_text())
    for key in ("test", "ckpt_path", "weights_only"):
        settings.pop(key, None)
    (workplace / "other.yaml").write_text(yaml.safe_dump(settings))
    for command, metric in (("validate", "val/accuracy"), ("test", "test/accuracy")):
        assert main([command, "--config=other.yaml", f"--ckpt_path={path}"]) == 0
        output = capsys.readouterr().out
        (line,) = (line for line in output.splitlines() if metric in line)
        shown = next(float(word) for word in line.replace("│", " ").split() if word[0].isdigit())
        assert shown == pytest.approx(fits["fff"].metrics[metric], abs=1e-5)
    assert main(["predict", "--config=other.yaml", f"--ckpt_path={path}"]) == 0
    assert len(runs(workplace)) == before, "only fit is tracked"


def test_without_test(workplace: Path) -> None:
    result = fit("--test=false", layer="ff", epochs=1)
    assert "test/accuracy" not in result.metrics
    assert "test/accuracy" not in newest(workplace).data.metrics


class InterruptAt(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize("layer", ["ff", "fff"])  # whose training draws nothing but the order of the samples
def test_an_interrupted_fit_goes_on_from_its_last_checkpoint(
    layer: str, fits: dict[str, Result], workplace: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(layer=layer, callbacks=[InterruptAt(2)])
    interrupted = newest(workplace)
    assert interrupted.info.status == "FAILED"
    assert len(history(workplace, interrupted.info.run_id, "val/accuracy")) == 2, "what it had measured is kept"
    last = Path("outputs/checkpoints") / interrupted.info.run_id / "last.ckpt"
    resumed = fit(f"--ckpt_path={last}", layer=layer)
    for name in ("epochs_to_best", "epochs_to_fit", "stability/loss_spikes"):
        assert resumed.metrics[name] == fits[layer].metrics[name], name
    for name in ("val/accuracy", "test/accuracy"):
        assert resumed.metrics[name] == pytest.approx(fits[layer].metrics[name]), name
    whole = history(workplace, fits[layer].run_id, "train/loss")
    assert history(workplace, resumed.run_id, "train/loss")[-1] == pytest.approx(whole[-1], rel=1e-5)


def test_a_finished_fit_can_be_trained_longer(workplace: Path) -> None:
    # without a schedule, which would be over
    args = ["--model.lr_scheduler=null", "--test=false"]
    short = fit(*args, layer="ff", epochs=2)
    last = Path("outputs/checkpoints") / short.run_id / "last.ckpt"
    longer = fit(*args, f"--ckpt_path={last}", layer="ff", epochs=4)
    whole = fit(*args, layer="ff", epochs=4)
    assert len(history(workplace, longer.run_id, "val/loss")) == 2
    assert longer.metrics["epochs_to_best"] == whole.metrics["epochs_to_best"]
    assert longer.metrics["val/accuracy"] == pytest.approx(whole.metrics["val/accuracy"])


def test_a_fit_that_was_moved_keeps_its_best(workplace: Path) -> None:
    args = ["--model.lr_scheduler=null", "--test=false"]
    short = fit(*args, layer="ff", epochs=8)
    moved = (Path("outputs/checkpoints") / short.run_id).rename(workplace / "moved")
    spoilt = [*args, "--model.input_noise_std=1000", f"--ckpt_path={moved / 'last.ckpt'}"]
    longer = fit(*spoilt, layer="ff", epochs=10)
    assert longer.metrics["val/accuracy"] == short.metrics["val/accuracy"]
    for best in moved.glob("epoch*"):
        best.unlink()
    with pytest.raises(UserError, match="the best of that run, is not there"):
        fit(*spoilt, layer="ff", epochs=12)


def test_a_schedule_is_not_trained_beyond_its_end() -> None:
    short = fit("--test=false", layer="ff", epochs=2)
    last = Path("outputs/checkpoints") / short.run_id / "last.ckpt"
    with pytest.raises(UserError, match="OneCycle was begun for"):
        fit(f"--ckpt_path={last}", layer="ff", epochs=4)


def test_a_non_finite_loss_fails_the_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = [f"--config={CONFIGS / piece}.yaml" for piece in ("data/digits", "layer/ff")]
    high = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e30", "--trainer.max_epochs=2"]
    assert main(["fit", *configs, *high]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fffexp: the loss is ")
    assert " at step " in line
    assert newest(workplace).info.status == "FAILED"
    assert "test/accuracy" not in newest(workplace).data.metrics


@pytest.mark.parametrize("layer", LAYER_PARAMS)
def test_mixed_precision(layer: str) -> None:
    mixed, full = (fit(f"--trainer.precision={precision}", layer=layer) for precision in ("bf16-mixed", "32-true"))
    assert mixed.metrics["test/loss"] != full.metrics["test/loss"]
    assert mixed.metrics["test/loss"] == pytest.approx(full.metrics["test/loss"], rel=0.1)


def test_without_validation_the_last_weights_are_tested() -> None:
    result = fit("--trainer.limit_val_batches=0", "--model.optimizer.lr=0.05")
    assert "val/accuracy" not in result.metrics
    assert result.metrics["test/accuracy"] > 0.4, "chance is 0.1"


def test_fast_dev_run() -> None:
    result = fit("--trainer.fast_dev_run=true", epochs=50)
    assert result.metrics["epochs_to_best"] == 1
    assert result.metrics["test/accuracy"] < 0.6, "one step does not train"


def test_an_exception_of_the_program_fails_the_run(workplace: Path) -> None:
    class BrokenCallback(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise NonFiniteLossError("made up")

    with pytest.raises(NonFiniteLossError):
        fit(layer="ff", callbacks=[BrokenCallback()])
    assert newest(workplace).info.status == "FAILED"
