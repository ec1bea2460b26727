"""Seeds trained at once against the same seeds trained by `fffexp fit`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from processes import enter, with_store
from torch import Tensor

from fffexp.errors import UserError
from fffexp.training import experiment, vectorized
from fffexp.training.classification import ClassificationTask
from fffexp.training.experiment import Context, Result, run

CONFIGS = Path(__file__).parents[2] / "configs"
PLAIN = "--trainer.callbacks=null"  # no average of the weights
NOISE = "--model.input_noise_std=0.2", "--model.label_smoothing=0.1"
FOREST = (
    "--model.layer=Forest", "--model.layer.trees=2", "--model.layer.depth=2", "--model.layer.leaf_width=4",
    "--model.layer.master_width=8",
)  # fmt: skip
VIT = (
    "--model.network=fffexp.models.ViT", "--model.network.features=16", "--model.network.num_blocks=1",
    "--model.network.input_dropout=0",
)  # fmt: skip
SGD = "--model.optimizer=torch.optim.SGD", "--model.lr_scheduler=null"
ADAFACTOR = "--model.optimizer=torch.optim.Adafactor", "--model.optimizer.lr=0.01", "--model.lr_scheduler=null"
PLATEAU = (
    "--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.mode=max",
    "--model.lr_scheduler.monitor=val/accuracy", "--model.lr_scheduler.patience=0",
)  # fmt: skip


def train_seeds(*args: Any, **options: Any) -> list[Result]:
    return list(vectorized.train_seeds(*args, **options))


def arguments(layer: str, *more: str) -> list[str]:
    return [
        f"--config={CONFIGS}/experiment/digits_{layer}.yaml",
        "--trainer.max_epochs=8",
        "--data.batch_size=200",
        *more,
    ]


def alone(args: list[str], seed: int) -> dict[str, float]:
    result = run(["fit", *args, f"--seed_everything={seed}"], Context(quiet=True))
    assert result is not None
    return result.metrics


def same(seed: Result, expected: dict[str, float]) -> None:
    """Everything that both report, but for times."""
    shared = {name: value for name, value in expected.items() if not name.startswith("speed/")}
    assert seed.metrics.keys() >= shared.keys()
    found = {name: seed.metrics[name] for name in shared}
    assert found == pytest.approx(shared, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "more"),
    [
        ("ff", ()), ("ff", (PLAIN,)), ("fff", ()), ("moe", ()), ("switch", ()), ("fff", FOREST),
        ("ff", ("--model.layer.dropout=0.3", *NOISE)),
        ("fff", ("--model.layer.dropout=0.3", "--model.layer.region_leak=0.2", *NOISE)),
        ("fff", ("--model.aux_weights.hardening_mean=0.1", "--model.aux_weights.load_balance=0.1")),
        ("moe", ("--model.aux_weights.load=0.1", *NOISE)),
        ("switch", NOISE),
        ("ff", ("--trainer.gradient_clip_val=0.1",)),
        ("ff", ("--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=0.5")),
        ("ff", ("--model.lr_scheduler=torch.optim.lr_scheduler.StepLR", "--model.lr_scheduler.step_size=1")),
    ],
    ids=str,
)  # fmt: skip
def test_a_seed_gives_what_fit_gives(
    layer: str,
    more: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    enter(with_store(tmp_path), monkeypatch)
    args = arguments(layer, *more)
    seeds = train_seeds(args, [0, 5], test=True)
    assert "one after another" not in capsys.readouterr().err
    for seed, number in zip(seeds, (0, 5), strict=True):
        same(seed, alone(args, number))


WEIGHT = "--model.aux_weights.importance"
INCREASING = (f"{WEIGHT}=Adaptive", f"{WEIGHT}.start=0.1", f"{WEIGHT}.factor=1.1", f"{WEIGHT}.maximum=1")
LAZY = ("--model.layer.trained=chosen_leaf", "--model.optimizer=fffexp.LazyAdamW", "--model.aux_weights=null")
STOP = "--trainer.callbacks"
STOPPING = (f"{STOP}=EarlyStopping", f"{STOP}.monitor=val/accuracy", f"{STOP}.mode=max")


@pytest.mark.parametrize(
    ("layer", "more", "reason"),
    [
        ("ff", ADAFACTOR, "Adafactor is not known to update each element for itself"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("ff", PLATEAU, "ReduceLROnPlateau differs from seed to seed"),
                ("moe", ("--model.layer.dropout=0.3",), "NoisyTopKMoE cannot run under torch.vmap"),
                ("fff", INCREASING, "an Adaptive"),
                ("fff", LAZY, "LazyAdamW is not known"),
                ("ff", STOPPING, "EarlyStopping is not known"),
                ("ff", (*VIT, "--model.network.input_dropout=0.5"), None),
            )
        ),
    ],
    ids=str,
)
def test_what_cannot_be_trained_at_once_is_trained_one_after_another(
    layer: str,
    more: tuple[str, ...],
    reason: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    enter(with_store(tmp_path), monkeypatch)
    args = arguments(layer, *more, "--trainer.max_epochs=2")
    seeds = train_seeds(args, [0, 5], test=True)
    if reason is not None:
        assert f"seeds are trained one after another: {reason}" in capsys.readouterr().err
    same(seeds[1], alone(args, 5))


def test_seeds_of_other_sizes_are_trained_one_after_another(capsys: pytest.CaptureFixture[str]) -> None:
    train_seeds(arguments("ff", "--trainer.max_epochs=1"), [0, 2], test=False)
    assert "trained one after another: " in capsys.readouterr().err


@pytest.mark.parametrize("more", [ADAFACTOR, SGD])
def test_seeds_do_not_mix(more: tuple[str, ...]) -> None:
    args = arguments("ff", *more, "--trainer.max_epochs=2")
    assert train_seeds(args, [0, 5], test=True)[0].metrics == train_seeds(args, [0, 6], test=True)[0].metrics


def test_seeds_of_a_transformer_train_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments("fff", *VIT, "--trainer.max_epochs=2")
    both, (single,) = (train_seeds(args, seeds, test=False) for seeds in ([0, 5], [5]))
    assert both[1].metrics == pytest.approx(single.metrics, abs=1e-4)
    assert not capsys.readouterr().err


class OwnStep(ClassificationTask):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 2 * super().training_step(batch, batch_idx)


class Draws(ClassificationTask):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


@pytest.mark.parametrize(("task", "reason"), [(OwnStep, "own training_step"), (Draws, "vmap")])
def test_a_task_that_does_more_is_trained_one_after_another(
    task: type, reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = experiment.build

    def build(args: Any) -> Any:
        found = built(args)
        found.task.__class__ = task
        return found

    monkeypatch.setattr(vectorized, "build", build)
    assert len(train_seeds(arguments("ff", "--trainer.max_epochs=1"), [0, 5], test=False)) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same() -> None:
    args = arguments("fff")
    gpu = train_seeds(args, [0, 5], test=True)
    cpu = train_seeds([*args, "--trainer.accelerator=cpu"], [0, 5], test=True)
    for there, here in zip(gpu, cpu, strict=True):
        assert there.metrics["val/accuracy"] == pytest.approx(here.metrics["val/accuracy"], abs=0.01)


@pytest.mark.parametrize("fit", ["measured", "awaited"])
def test_patience_ends_the_training(fit: str) -> None:
    # a learning rate of 0 improves nothing after the first epoch
    args = arguments("ff", *SGD, PLAIN, "--model.optimizer.lr=0")
    seeds = train_seeds(args, [0, 1], test=False, patience=2, fit=fit)
    found = [(s.metrics["epochs"], s.metrics["epochs_to_best"], s.metrics["epochs_to_fit"]) for s in seeds]
    assert found == [(3, 1, 1)] * 2


def test_a_better_fit_counts_where_asked_to() -> None:
    args = arguments("ff", PLAIN, "--trainer.max_epochs=12", "--trainer.limit_val_batches=1")
    stopped, went_on = (train_seeds(args, [0, 1], test=False, patience=2, fit=fit) for fit in ("measured", "awaited"))
    assert all(a.metrics["epochs"] <= b.metrics["epochs"] for a, b in zip(stopped, went_on, strict=True))
    assert all(s.metrics["epochs"] >= s.metrics["epochs_to_fit"] for s in went_on)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), (PLAIN,)])
def test_a_seed_stops_by_itself(more: tuple[str, ...]) -> None:
    args = arguments("ff", "--trainer.max_epochs=40", *more)
    single = [train_seeds(args, [number], test=True, patience=3)[0] for number in (0, 5, 1)]
    assert len({seed.metrics["epochs"] for seed in single}) > 1, "they stop at different epochs"
    for mine, other in zip(single, train_seeds(args, [0, 5, 1], test=True, patience=3), strict=True):
        assert other.metrics == pytest.approx(mine.metrics, abs=1e-5)


def test_the_fit_is_measured_as_on_validation() -> None:
    (seed, _) = train_seeds(arguments("fff", "--trainer.max_epochs=3"), [0, 5], test=False, fit="measured")
    assert 0.3 < seed.metrics["train/accuracy"] <= 1
    with torch.no_grad():
        x, y = seed.data.train_data  # type: ignore[attr-defined] # of ours
        right = (seed.task.eval()(x).argmax(1) == y).float().mean()
    if seed.metrics["epochs_to_best"] == seed.metrics["epochs_to_fit"]:
        assert float(right) == pytest.approx(seed.metrics["train/accuracy"], abs=1e-5)


def test_divergence_is_reported() -> None:
    wild = [*SGD, PLAIN, "--model.optimizer.lr=1e30", "--trainer.max_epochs=2"]
    assert all(
        s.metrics["stability/nonfinite_steps"] > 0 for s in train_seeds(arguments("ff", *wild), [0, 1], test=False)
    )


def test_the_test_set_is_read_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "test", None)
    for seed in train_seeds(arguments("ff", "--trainer.max_epochs=1"), [0, 5], test=False):
        assert "test/accuracy" not in seed.metrics


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--model.layer.depth=-1"], "depth is -1"), (["--trainer.limit_val_batches=0"], "nothing is validated")],
)
def test_mistakes(more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_seeds(arguments("fff", *more), [0, 5], test=False)


def test_a_seed_is_given_before_the_next_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    build = experiment.build

    def counted(args: Any) -> Any:
        made.append(args[-1])
        return build(args)

    monkeypatch.setattr(vectorized, "build", counted)
    mixing = ("--model.optimizer=torch.optim.Adafactor", "--model.optimizer.lr=0.01", "--model.lr_scheduler=null")
    found = vectorized.train_seeds(arguments("ff", *mixing, "--trainer.max_epochs=1"), [0, 5], test=False)
    next(found)
    before = len(made)
    next(found)
    assert len(made) == before + 1, "both were trained before the first was given"
