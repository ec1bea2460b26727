import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from tolerances import assert_close
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryF1Score, MulticlassCalibrationError, MulticlassF1Score

from fffexp.errors import NonFiniteLossError
from fffexp.layers import FF, FFF, ExpertChoiceMoE, FeedforwardLayer, NoisyTopKMoE
from fffexp.models.mlp import MLP
from fffexp.training.callbacks.routing import BlockCounter, block_usage
from fffexp.training.callbacks.stability import DEVIATIONS, WINDOW, Stability, count_spikes
from fffexp.training.classification import ClassificationTask
from fffexp.training.optim import LazyAdamW
from fffexp.training.schedules import Exponential

SHAPE, CLASSES = (1, 2, 3), 3

LAYERS: dict[str, Callable[[int, int], FeedforwardLayer]] = {
    "FF": partial(FF, width=8),
    "FFF": partial(FFF, depth=2, leaf_width=4),
    "MoE": partial(NoisyTopKMoE, num_experts=4, expert_width=4, top_k=2),
}
REGULARIZERS = [
    *(("FFF", name) for name in ("hardening_mean", "hardening_sum", "load_balance", "importance")),
    *(("MoE", name) for name in ("importance", "load")),
]


def make(layer: str = "FFF", **options: Any) -> ClassificationTask:
    seed_everything(0, verbose=False)
    return ClassificationTask(LAYERS[layer], SHAPE, CLASSES, **options)


def samples(count: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, *SHAPE, generator=generator)
    return x, x.flatten(1)[:, :CLASSES].argmax(1)


def loader(x: Tensor | None = None) -> DataLoader[Any]:
    inputs, labels = samples()
    return DataLoader(TensorDataset(inputs if x is None else x, labels), batch_size=16)


def fit(
    task: ClassificationTask, train: DataLoader[Any] | None = None, epochs: int = 2, *callbacks: Callback
) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(task, train or loader(), loader())
    return trainer


def training_loss(task: ClassificationTask, **aux_weights: float) -> Tensor:
    """Of one step outside of a Trainer, with the same noise every time."""
    task.aux_weights = aux_weights
    torch.manual_seed(1)
    return task.training_step(samples(), 0)


def only_layer(task: ClassificationTask) -> Any:
    (layer,) = task.layers.values()
    return layer


class Watch(Callback):
    """Remembers the choice scale of each step, and what routing it leaves behind."""

    def __init__(self) -> None:
        self.scales: list[float] = []
        self.routings: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        layer = only_layer(pl_module)
        self.scales.append(float(layer.inverse_temperature) if hasattr(layer, "inverse_temperature") else 1.0)
        self.routings.append(layer.routing)


@pytest.mark.parametrize(
    ("layer", "known"),
    [
        ("FF", "none"),
        ("FFF", "hardening_mean, hardening_sum, importance, inverse_temperature, load_balance"),
        ("MoE", "importance, load"),
    ],
)
def test_an_unknown_coefficient_is_named_in_one_line(layer: str, known: str) -> None:
    with pytest.raises(ValueError, match="has no such auxiliary loss") as error:
        make(layer, aux_weights={"anneal": 0.1})
    message = str(error.value)
    assert message.startswith("aux_weights.anneal: ")
    assert message.endswith(f"it has {known}")
    assert "\n" not in message


def test_k_1_is_refused_unless_there_is_one_expert() -> None:
    with pytest.raises(ValueError, match=r"top_k is 1: .*Switch gate"):
        ClassificationTask(partial(NoisyTopKMoE, num_experts=4, expert_width=2, top_k=1), SHAPE, CLASSES)
    ClassificationTask(partial(NoisyTopKMoE, num_experts=1, expert_width=2, top_k=1), SHAPE, CLASSES)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_is_checked(smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing is"):
        make(label_smoothing=smoothing)


def test_class_weights_weigh_the_loss_of_each_class() -> None:
    task, (x, y) = make("FF", class_weights=[1.0, 0.0, 3.0]), samples()
    log_p, weights = task.network(x).detach().double().log_softmax(1), torch.tensor([1.0, 0.0, 3.0])[y]
    expected = -(log_p[torch.arange(len(y)), y] * weights).sum() / weights.sum()
    assert float(task.eval().loss((x, y))[0]) == pytest.approx(float(expected), rel=1e-5)
    assert "class_weights" not in task.state_dict()


@pytest.mark.parametrize("weights", [[], [1.0, 2.0], [1.0, 1.0, -1.0], [0.0] * 3, [1.0, math.nan, 1.0], [math.inf] * 3])
def test_class_weights_are_checked(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="give 3 numbers that are not negative"):
        make("FF", class_weights=weights)


def test_further_metrics_get_probabilities() -> None:
    metrics = {"f1": partial(MulticlassF1Score, average="macro"), "calibration": MulticlassCalibrationError}
    task, (x, y) = make("FF", metrics=metrics).eval(), samples()
    _, *found = task.loss((x, y))
    results = {name: float(metric(*found)) for name, metric in task.make_metrics().items()}
    logits = task.network(x).detach()
    predicted = logits.argmax(1)
    f1 = [
        2 * float(((predicted == c) & (y == c)).sum()) / max(1, float((predicted == c).sum() + (y == c).sum()))
        for c in range(CLASSES)
    ]
    assert results["f1"] == pytest.approx(sum(f1) / CLASSES, abs=1e-6)
    assert results["accuracy"] == pytest.approx(float((predicted == y).double().mean()))
    confidence, bins = logits.softmax(1).amax(1), 15
    gaps = [
        float((confidence[inside] - (predicted == y)[inside].float()).sum().abs())
        for b in range(bins)
        if (inside := (confidence > b / bins) & (confidence <= (b + 1) / bins)).any()
    ]
    assert results["calibration"] == pytest.approx(sum(gaps) / len(y), abs=1e-5)


def test_an_optimizer_that_takes_no_sparse_gradients_is_named() -> None:
    sparse = partial(FFF, depth=2, leaf_width=4, trained="chosen_leaf")
    with pytest.raises(ValueError, match=r"AdamW takes no sparse gradients: give fffexp\.LazyAdamW"):
        ClassificationTask(sparse, SHAPE, CLASSES)
    ClassificationTask(sparse, SHAPE, CLASSES, optimizer=LazyAdamW)


def test_input_noise_is_added_in_training_alone() -> None:
    task = make("FF", input_noise_std=0.5).train()
    seen: list[Tensor] = []
    task.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x, y = samples(20_000)
    task.loss((x, y))
    task.eval()(x)
    noise = seen[0] - x
    assert float(noise.std()) == pytest.approx(0.5, rel=0.02)
    assert abs(float(noise.mean())) < 0.01
    assert torch.equal(seen[1], x)
    with pytest.raises(ValueError, match="input_noise_std is -1"):
        make(input_noise_std=-1.0)


@pytest.mark.parametrize("layer", LAYERS)
def test_network_is_the_layer_on_flattened_samples(layer: str) -> None:
    network = MLP(LAYERS[layer], SHAPE, CLASSES).eval()
    x, _ = samples()
    assert (network.layer.in_features, network.layer.out_features) == (math.prod(SHAPE), CLASSES)
    assert_close(network(x), network.layer(x.reshape(48, -1)))


@pytest.mark.parametrize("layer", LAYERS)
def test_loss_without_coefficients_is_the_cross_entropy(layer: str) -> None:
    task = make(layer, label_smoothing=0.1)
    loss = training_loss(task)
    only_layer(task).routing = None
    x, y = samples()
    torch.manual_seed(1)
    assert_close(loss, F.cross_entropy(task(x), y, label_smoothing=0.1))


@pytest.mark.parametrize(("layer", "name"), REGULARIZERS)
def test_a_coefficient_adds_its_regulariser(layer: str, name: str) -> None:
    task = make(layer)
    plain = training_loss(task)
    only_layer(task).routing = None
    loss = training_loss(task, **{name: 0.3})
    term = only_layer(task).aux_losses[name](only_layer(task).routing)
    assert float(term.detach()) > 0
    assert_close(loss, plain + 0.3 * term)
    deciding = [p for n, p in task.named_parameters() if "node" in n or "gate" in n]
    found = torch.autograd.grad(loss - plain, deciding)
    assert all(g.any() for g in found), "the regulariser has no say in training"


def test_every_regulariser_is_tested() -> None:
    assert {name: set(only_layer(make(name)).aux_losses) for name in LAYERS} == {
        layer: {name for owner, name in REGULARIZERS if owner == layer} for layer in LAYERS
    }


def test_validation_measures_soft_accuracy_and_leaves_decisions_alone() -> None:
    task = make()
    layer = only_layer(task)
    torch.nn.init.normal_(layer.node_weight)
    torch.nn.init.normal_(layer.leaves.output_bias, std=2)
    x, y = samples()
    task.eval()
    hard = float((task(x).argmax(1) == y).float().mean())
    layer.routing_mode = "soft"
    soft = float((task(x).argmax(1) == y).float().mean())
    layer.routing_mode = "auto"
    assert hard != soft, "the test cannot tell them apart"
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (metrics,) = trainer.validate(task, loader(), verbose=False)
    assert layer.routing_mode == "auto"
    assert metrics["val/accuracy"] == pytest.approx(hard, abs=1e-6)
    assert metrics["val/soft_accuracy"] == pytest.approx(soft, abs=1e-6)
    assert metrics["val/hardening_gap"] == pytest.approx(soft - hard, abs=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_fit(layer: str) -> None:
    aux_weights = {
        "FF": {},
        "FFF": {"inverse_temperature": Exponential(1, 50), "hardening_mean": 0.01},
        "MoE": {"importance": 0.1, "load": 0.1},
    }[layer]
    task, watch = make(layer, aux_weights=aux_weights, optimizer=partial(torch.optim.Adam, lr=0.03)), Watch()
    before = float(training_loss(task).detach())
    only_layer(task).routing = None
    trainer = fit(task, None, 8, watch)
    assert trainer.global_step == 24
    assert watch.routings == [None] * 24
    assert only_layer(task).routing is None
    assert float(trainer.callback_metrics["train/loss"]) < 0.8 * before
    assert ("val/soft_accuracy" in trainer.callback_metrics) == (layer == "FFF")
    if layer == "FFF":
        # the last of 24 steps stands at progress 23/24
        expected = [50 ** (step / 24) for step in range(24)]
        assert watch.scales == pytest.approx(expected, rel=1e-6)
        assert float(only_layer(task).inverse_temperature) == pytest.approx(expected[-1], rel=1e-6)


def test_a_non_finite_loss_stops_training_at_its_step() -> None:
    x, _ = samples()
    x[16:32] = math.nan  # the second of three batches
    task = make()
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at step 1 \(epoch 0\)"):
        fit(task, loader(x))
    assert all(p.isfinite().all() for p in task.parameters()), "it reached the weights"


def test_stability_reports_the_course() -> None:
    task = make()
    trainer = fit(task, None, 3)
    (stability,) = (c for c in cast(Any, trainer).callbacks if isinstance(c, Stability))
    results = stability.results()
    assert 1 <= results["epochs_to_best"] <= 3
    assert 1 <= results["epochs_to_fit"] <= 3
    assert results["stability/loss_spikes"] == 0
    assert results["stability/nonfinite_steps"] == 0
    assert len(stability.state_dict()["losses"]) == 9


def test_count_spikes() -> None:
    # 0, 1, 0, 1, ...: median 1/2 and deviation 1/2 in every window, so above 3 is a spike
    losses = np.tile([0.0, 1.0], WINDOW)
    edge = 0.5 + DEVIATIONS * 0.5
    assert count_spikes(losses) == 0
    assert count_spikes(losses[:WINDOW]) == 0
    for position, value, expected in (
        (WINDOW - 1, edge + 9, 0),  # no full window before it
        (WINDOW, edge + 0.01, 1),
        (WINDOW + 50, edge - 0.01, 0),
        (WINDOW + 50, edge + 0.01, 1),
        (len(losses) - 1, edge + 0.01, 1),
        (WINDOW + 50, -9.0, 0),  # downwards is no spike
    ):
        made = losses.copy()
        made[position] = value
        assert count_spikes(made) == expected, (position, value)
    two = losses.copy()
    two[[WINDOW + 10, WINDOW + 60]] = edge + 1
    assert count_spikes(two) == 2
    assert count_spikes(np.array([])) == 0


def test_a_row_counts_once_for_a_block() -> None:
    torch.manual_seed(0)
    layer = ExpertChoiceMoE(6, 4, 5, 3)
    nn.init.normal_(layer.gate_weight)
    layer(torch.randn(60, 6))
    x = torch.randn(40, 6)
    weights = torch.softmax(x @ layer.gate_weight.T, dim=1)
    taken = weights >= layer.cutoff
    counter = BlockCounter({"layer": layer.eval()})
    layer(x)
    counts = counter.finish()["layer"]
    dropped = (~taken.any(1)).sum()
    assert len(set(taken.sum(1).tolist())) > 2, "rows of different numbers of experts"
    assert (counts >= taken.sum(0)).all()
    assert counts.sum() == taken.sum() + dropped  # whose first expert is read, for nothing
    assert counter.rows["layer"] == 40


def test_block_usage() -> None:
    # 1 in 2000 is less than the thousandth that counts as use
    assert block_usage(torch.tensor([1999, 1, 0, 0]), 2000)["used_leaves"] == 1
    assert block_usage(torch.tensor([999, 1, 0, 0]), 1000)["used_leaves"] == 2
    # two experts a sample: it is the share of the samples that counts, not that of the rows sent
    assert block_usage(torch.tensor([1000, 999, 1]), 1000)["used_leaves"] == 3
    assert block_usage(torch.tensor([5, 5, 5, 5]), 20)["usage_cv"] == 0
    # one of four: shares 1, 0, 0, 0 with mean 1/4 and deviation sqrt(3)/4
    assert_close(block_usage(torch.tensor([8, 0, 0, 0]), 8)["usage_cv"], torch.tensor(math.sqrt(3)))
    assert block_usage(torch.zeros(4, dtype=torch.long), 0)["used_leaves"] == 0


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": MulticlassF1Score}, "'loss' is the name of the loss"),
        ({"f1": BinaryF1Score}, "threshold"),
        ({"f1": partial(MulticlassF1Score, average="none")}, "metrics.f1: .* gives more than a number"),
    ],
)
def test_metrics_that_do_not_fit(metrics: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassificationTask(partial(FF, width=4), (3,), 5, metrics=metrics)
