"""Language models: the loss, bits per byte, causality, decoding with a cache."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from tolerances import assert_close
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fffexp.layers import FF, FFF, FeedforwardLayer, NoisyTopKMoE, SwitchMoE
from fffexp.models import GPT, MLP
from fffexp.training.language_model import TIMED_CONTEXT, LanguageModelTask

CONTEXT, VOCABULARY = 12, 17
LAYERS: dict[str, Callable[[int, int], FeedforwardLayer] | None] = {
    "none": None,
    "FF": partial(FF, width=8),
    "MoE": partial(NoisyTopKMoE, num_experts=4, expert_width=4),
    "Switch": partial(SwitchMoE, num_experts=4, expert_width=4),
    "FFF": partial(FFF, depth=2, leaf_width=4),
}


def model(layer: str = "FFF") -> GPT:
    torch.manual_seed(0)
    return GPT(LAYERS[layer], (CONTEXT,), VOCABULARY, features=16, heads=2)


def task(layer: str = "FFF", vocabulary: int = VOCABULARY, **options: Any) -> LanguageModelTask:
    torch.manual_seed(0)
    return LanguageModelTask(
        LAYERS[layer], (CONTEXT,), vocabulary, network=partial(GPT, features=16, heads=2), **options
    )


def tokens(rows: int = 5, length: int = CONTEXT) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layer", LAYERS)
def test_decoding_with_a_cache_equals_the_full_pass(layer: str) -> None:
    network, x = model(layer).double().eval(), tokens()
    whole = network(x)
    assert whole.shape == (5, CONTEXT, VOCABULARY)
    for prompt in (1, 4, CONTEXT):
        caches = network.make_caches(5)
        pieces = [network(x[:, :prompt], caches)]
        pieces += [network(x[:, place : place + 1], caches) for place in range(prompt, CONTEXT)]
        assert_close(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize("layer", LAYERS)
def test_no_token_sees_a_later_one(layer: str) -> None:
    network, x = model(layer).double().eval(), tokens()
    changed = x.clone()
    changed[:, 7] = (x[:, 7] + 1) % VOCABULARY
    difference = (network(changed) - network(x)).abs().amax((0, 2))
    assert not difference[:7].any()
    assert (difference[7:] > 0).all(), "and each later one sees it"


def test_the_order_of_the_tokens_before_counts() -> None:
    network = model().double().eval()
    here, there = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 1, 3]])
    assert (network(here)[:, -1] - network(there)[:, -1]).abs().max() > 1e-6


def test_several_tokens_after_others_are_refused() -> None:
    network, caches = model(), model().make_caches(5)
    network(tokens(length=3), caches)
    with pytest.raises(ValueError, match="2 tokens follow 3 in the cache; give one"):
        network(tokens(length=2), caches)


def test_greedy_generation_equals_a_loop_of_full_passes() -> None:
    network = model().double().eval()
    for _ in range(40):  # a model of some certainty, so that no two tokens tie
        for parameter in network.parameters():
            parameter.data.mul_(1.02)
    made, text = network.generate([3, 1], CONTEXT - 2, temperature=0), [3, 1]
    while len(text) < CONTEXT:
        text.append(int(network(torch.tensor([text]))[0, -1].argmax()))
    assert made == text[2:]
    long = network.generate([3, 1], 5 * CONTEXT, temperature=0)
    assert len(long) == 5 * CONTEXT
    assert long[: CONTEXT - 2] == made, "past the context generation goes on, from its last half"
    assert len(network.generate([*range(VOCABULARY)] * 2, 3)) == 3, "a prompt longer than the context"
    with pytest.raises(ValueError, match="prompt is empty"):
        network.generate([], 3)


def test_sampling_follows_the_probabilities() -> None:
    network = model().eval()
    torch.nn.init.zeros_(network.classifier.weight)
    with torch.no_grad():
        network.classifier.bias.copy_(torch.where(torch.arange(VOCABULARY) < 2, torch.tensor(0.0), -math.inf))
        network.classifier.bias[1] = math.log(3)
    torch.manual_seed(0)
    made = network.generate([0], 500)
    assert sum(made) / 500 == pytest.approx(0.75, abs=0.08), "four standard errors"


def test_loss_and_metrics_against_their_definitions() -> None:
    made = task("FF").eval()
    x, y, num_bytes = tokens(), tokens().flip(1), torch.tensor([20, 12, 30, 17, 24])
    loss, *found = made.loss((x, y, num_bytes))
    log_p = made.network(x).detach().double().log_softmax(2)
    nats = -sum(float(log_p[i, t, y[i, t]]) for i in range(5) for t in range(CONTEXT))
    assert float(loss) == pytest.approx(nats / (5 * CONTEXT), rel=1e-5)
    metrics = {name: float(metric(*found)) for name, metric in made.make_metrics().items()}
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / (5 * CONTEXT)), rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / 103, rel=1e-5)


def data(rows: int = 64) -> DataLoader[Any]:
    x = torch.arange(rows)[:, None].add(torch.arange(CONTEXT + 1)) % VOCABULARY  # the next token is known for certain
    return DataLoader(TensorDataset(x[:, :-1], x[:, 1:], torch.full((rows,), CONTEXT)), batch_size=16)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_language_model_learns_and_reports(layer: str) -> None:
    made = task(layer, optimizer=partial(torch.optim.AdamW, lr=0.01))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=20, accelerator="cpu", enable_model_summary=False, **options)  # type: ignore[arg-type]
    trainer.fit(made, data(), data())
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["val/bits_per_byte"] < 0.5 < math.log2(VOCABULARY)
    assert metrics["val/bits_per_byte"] == pytest.approx(metrics["val/loss"] / math.log(2), rel=1e-5)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(metrics["val/loss"]), rel=1e-5)
    assert ("val/hardening_gap" in metrics) == (layer == "FFF")
    assert all(part.numel() <= 16 * 2 for part in made.loss(next(iter(data())))[1:]), "little is kept of a batch"


class Flat(nn.Module):
    """A network of tokens that gives one row of logits for a sample."""

    def __init__(self, layer: Any, in_shape: Any, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x).mean(1)


@pytest.mark.parametrize(
    ("network", "says"), [(MLP, "MLP fails on them: x is torch.int64"), (Flat, rf"Flat gives \(1, {VOCABULARY}\)")]
)
def test_a_network_of_another_kind_is_refused(network: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"takes .samples, context. tokens and gives {VOCABULARY} logits.*{says}"):
        LanguageModelTask(LAYERS["FF"], (CONTEXT,), VOCABULARY, network=network)


def test_input_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens take no noise"):
        task(input_noise_std=0.1)


@pytest.mark.parametrize("length", [6, CONTEXT])
def test_what_is_timed_is_a_token_of_the_full_pass(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = task().double().eval(), tokens(3, length)
    given: list[tuple[int, ...]] = []
    hook = made.network.register_forward_pre_hook(lambda _, args: given.append(tuple(args[0].shape)))
    call = made.timed(x, 4)
    context = min(length, TIMED_CONTEXT)
    # rows that do not fill a batch are repeated; one token at a time, for few logits at once
    assert given == [(4, 1)] * context
    whole = made.network(x)
    for _ in range(2):
        for place in range(context // 2, context):
            out: Any = call()
            assert_close(out[:3, 0], whole[:, place])
            assert given[-1] == (4, 1)
    hook.remove()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPT(None, (3, 4), 5), r"a sample has shape \(3, 4\); a GPT takes"),
        (lambda: GPT(None, (4,), 5, features=15), "heads is 4, which does not divide the 15 features"),
        (lambda: GPT(None, (4,), 5, features=12), "rotary positions need an even number"),
        (lambda: GPT(None, (4,), 5, num_blocks=0), "num_blocks is 0"),
    ],
)
def test_sizes_that_do_not_fit(make: Callable[[], GPT], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
