"""Seeds trained at once against the same seeds trained by `fffexp fit`."""

from pathlib import Path

import pytest
import torch
from processes import enter, with_store

from fffexp.errors import UserError
from fffexp.training.experiment import Context, run
from fffexp.training.vectorized import Replicas, _add_noise, _Best

CONFIGS = Path(__file__).parents[1] / "configs"


def arguments(layer: str, *more: str) -> list[str]:
    return [
        f"--config={CONFIGS}/experiment/digits_{layer}.yaml",
        "--trainer.max_epochs=3",
        "--data.batch_size=100",
        *more,
    ]


AVERAGED = (
    '--trainer.callbacks=[{"class_path": "fffexp.training.callbacks.averaging.WeightAveraging", '
    '"init_args": {"decay": 0.9}}]'
)
STEPS = "--model.lr_scheduler=torch.optim.lr_scheduler.StepLR", "--model.lr_scheduler.step_size=1"


@pytest.mark.parametrize(
    ("layer", "more"),
    [("ff", ()), ("ff", (AVERAGED,)), ("ff", STEPS), ("fff", ()), ("fff", (AVERAGED,)), ("moe", ()), ("switch", ())],
)
def test_a_seed_gives_what_fit_gives(
    layer: str, more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(with_store(tmp_path), monkeypatch)
    monkeypatch.setattr("fffexp.layers.moe.normal_like", torch.zeros_like)  # a gate's noise is drawn in another order
    args = arguments(layer, *more)
    replicas = Replicas(args, [0, 5]).train()
    assert [r.seed for r in replicas] == [0, 5]
    for replica in replicas:
        alone = run(["fit", *args, f"--seed_everything={replica.seed}"], Context(quiet=True))
        assert alone is not None
        metrics = alone.metrics
        # sums in another order: a row of 288 may be a tie
        assert replica.val_accuracy == pytest.approx(metrics["val/accuracy"], abs=0.004)
        assert replica.test_accuracy == pytest.approx(metrics["test/accuracy"], abs=0.004)
        assert (replica.epochs_to_best, replica.epochs) == (metrics["epochs_to_best"], 3)
        assert replica.val_accuracy_std == pytest.approx(metrics["stability/val_monitor_std"], abs=0.004)
        assert replica.loss_spikes == pytest.approx(metrics["stability/loss_spikes"], abs=1)
        assert replica.dead_blocks == metrics.get("stability/dead_leaves")
        if layer == "ff":
            assert replica.used_blocks is None
        else:
            assert replica.used_blocks is not None
            assert 1 < replica.used_blocks <= 16


@pytest.mark.parametrize("layer", ["fff", "moe", "switch"])
def test_a_seed_alone_runs_on_the_kernels_and_gives_the_same(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fffexp.layers.moe.normal_like", torch.zeros_like)
    both = Replicas(arguments(layer), [0, 5]).train()
    monkeypatch.setattr(torch, "vmap", None)
    (alone,) = Replicas(arguments(layer), [5]).train()
    assert alone.val_accuracy == pytest.approx(both[1].val_accuracy, abs=0.004)
    assert alone.test_accuracy == pytest.approx(both[1].test_accuracy, abs=0.004)


def test_seeds_of_a_transformer_train_at_once() -> None:
    vit = ["--model.network=fffexp.models.ViT", "--model.network.features=16", "--model.network.num_blocks=1"]
    args = arguments("fff", *vit, "--model.network.input_dropout=0")
    both, (alone,) = (Replicas(args, seeds).train(test=False) for seeds in ([0, 5], [5]))
    assert alone.val_accuracy == pytest.approx(both[1].val_accuracy, abs=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same() -> None:
    args = arguments("fff")
    gpu = Replicas(args, [0, 5])
    assert gpu.device.type == "cuda"
    cpu = Replicas([*args, "--trainer.accelerator=cpu"], [0, 5])
    for there, here in zip(gpu.train(), cpu.train(), strict=True):
        assert there.val_accuracy == pytest.approx(here.val_accuracy, abs=0.01)


def test_noise_differs_between_seeds() -> None:
    # with equal splits, initialisation and order: only the gates' noise is left
    replicas = Replicas(arguments("moe"), [0, 0]).train()
    assert replicas[0] != replicas[1]


def test_input_noise_is_that_of_the_task_and_differs_between_seeds() -> None:
    x = torch.zeros(3, 50, 1, 8, 8)
    _add_noise(x, 0.2)
    flat = x.flatten(1)
    assert flat.std(dim=1) == pytest.approx(0.2, abs=0.01)
    assert (torch.corrcoef(flat) - torch.eye(3)).abs().max() < 0.1
    _add_noise(before := x.clone(), 0.0)
    assert torch.equal(before, x)
    noisy = Replicas(arguments("ff", "--model.input_noise_std=1.0"), [0, 0]).train()
    assert noisy[0] != noisy[1]
    assert noisy[0] != Replicas(arguments("ff"), [0, 0]).train()[0]


def test_patience_ends_the_training() -> None:
    # a learning rate of 0 improves nothing after the first epoch
    frozen = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0", "--model.lr_scheduler=null"]
    replicas = Replicas([*arguments("ff", *frozen), "--trainer.max_epochs=9"], [0, 1]).train(patience=2)
    assert [(r.epochs, r.epochs_to_best, r.epochs_to_fit) for r in replicas] == [(3, 1, 1)] * 2


def test_a_better_fit_can_be_left_out_of_patience() -> None:
    best = _Best([0, 1])
    for epoch, train in enumerate((0.5, 0.6, 0.7), start=1):
        best.observe(0, epoch, train, 0.5, {})
        best.observe(1, epoch, 0.5, 0.5, {})
    assert best.stalled(0, 3, 2, fit_matters=False)
    assert not best.stalled(0, 3, 2, fit_matters=True), "the training accuracy was better just now"
    assert best.stalled(1, 3, 2, fit_matters=True)
    assert best.stalled(0, 5, 2, fit_matters=True)


@pytest.mark.parametrize("averaged", [False, True])
def test_a_seed_stops_by_itself(averaged: bool) -> None:
    args = arguments("ff", "--trainer.max_epochs=40", *([AVERAGED] if averaged else []))
    alone = [Replicas(args, [seed]).train(patience=3)[0] for seed in (0, 5, 1)]
    assert len({replica.epochs for replica in alone}) > 1, "they stop at different epochs"
    for mine, other in zip(alone, Replicas(args, [0, 5, 1]).train(patience=3), strict=True):
        assert (other.epochs, other.epochs_to_best) == (mine.epochs, mine.epochs_to_best)
        assert other.test_accuracy == pytest.approx(mine.test_accuracy, abs=0.004)
        assert other.loss_spikes == pytest.approx(mine.loss_spikes, abs=1)


PLATEAU = [
    "--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.mode=max",
    "--model.lr_scheduler.patience=0", "--model.lr_scheduler.threshold=0.02", "--trainer.max_epochs=6",
]  # fmt: skip


@pytest.mark.parametrize("monitor", ["train/accuracy", "val/accuracy"])
def test_a_plateau_is_that_of_fit(monitor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(with_store(tmp_path), monkeypatch)
    args = arguments("ff", *PLATEAU, f"--model.lr_scheduler.monitor={monitor}", "--model.lr_scheduler.factor=0.01")
    (replica,) = Replicas(args, [0]).train()
    alone = run(["fit", *args, "--seed_everything=0"], Context(quiet=True))
    assert alone is not None
    assert replica.val_accuracy == pytest.approx(alone.metrics["val/accuracy"], abs=0.004)
    assert replica.val_accuracy_std == pytest.approx(alone.metrics["stability/val_monitor_std"], abs=0.004)
    other = [a.replace("factor=0.01", "factor=0.9") for a in args]
    assert Replicas(other, [0]).train()[0] != replica, "the plateau was met"


def test_a_plateau_differs_from_seed_to_seed() -> None:
    for seeds, monitor in (([0, 1], "val/accuracy"), ([0], "val/loss")):
        with pytest.raises(UserError, match="a plateau differs from seed to seed"):
            Replicas(arguments("ff", *PLATEAU, f"--model.lr_scheduler.monitor={monitor}"), seeds).train()


def test_divergence_is_told() -> None:
    wild = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e30", "--model.lr_scheduler=null"]
    replicas = Replicas(arguments("ff", *wild), [0, 1]).train()
    assert all(r.nonfinite_steps > 0 for r in replicas)
    assert not any(r.nonfinite_steps for r in Replicas(arguments("ff"), [0, 1]).train())


@pytest.mark.parametrize(
    ("seeds", "more", "message"),
    [
        ([0, 2], [], "training parts differ in size"),
        ([0], ["--model.aux_weights.load_balance=Adaptive", "--model.aux_weights.load_balance.start=0.1",
               "--model.aux_weights.load_balance.factor=1.1",
               "--model.aux_weights.load_balance.maximum=1"], "Adaptive"),
        ([0], ["--model.layer.depth=-1"], "depth is -1"),
        ([0], ["--trainer.gradient_clip_val=1"], "trainer.gradient_clip_val is 1"),
        ([0], ["--trainer.limit_train_batches=2"], "trainer.limit_train_batches is 2"),
        ([0], ["--trainer.max_epochs=-1"], "trainer.max_epochs is -1"),
        ([0], ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/accuracy"],
         "EarlyStopping is a callback"),
        ([0], ["--model.layer.trained=chosen_leaf", "--model.optimizer=fffexp.LazyAdamW", "--model.aux_weights=null"],
         "sparse gradients have no seed axis"),
    ],
)  # fmt: skip
def test_mistakes(seeds: list[int], more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Replicas(arguments("fff", *more), seeds).train()
