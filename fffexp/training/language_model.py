"""Language modelling: cross-entropy of the next token, selected by bits per byte."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from fffexp.errors import refuse
from fffexp.layers.base import LayerFactory
from fffexp.models.gpt import GPT
from fffexp.training.task import Task, from_data

# what the cache holds at most where the decoding of one more token is timed: tokens, and scalars, a gibibyte of float32
TIMED_CONTEXT, CACHE_SCALARS = 64, 2**28


class LanguageModelTask(Task):
    """Cross-entropy of (tokens, next tokens, bytes that these stand for), for a network of a layer, causal throughout.

    A sample of the speed metrics is one token, decoded after up to 64 others that a key-value cache holds.

    Args:
        layer: which feedforward layer, with all but its in_features and out_features; None for a network without.
        in_shape: (context,), the tokens of a sample; linked to the data.
        vocab_size: number of different tokens; linked to the data.
        network: which network, with all but its layer, in_shape and vocab_size; GPT unless given.
        kwargs: see Task; tokens take no input noise.
    """

    monitor, mode = "val/bits_per_byte", "min"

    def __init__(
        self,
        layer: LayerFactory | None,
        in_shape: Sequence[int],
        vocab_size: int,
        network: Callable[[LayerFactory | None, Sequence[int], int], nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        refuse((self.input_noise_std > 0, "input_noise_std: tokens take no noise: leave it out"))
        self.network = (network or GPT)(layer, in_shape, from_data("vocab_size", vocab_size))
        if not isinstance(self.network, GPT):
            self._try(torch.zeros(1, *in_shape, dtype=torch.long), vocab_size)
        self.check()

    def _try(self, tokens: Tensor, vocab_size: int) -> None:
        wanted = f"a language model's network takes (samples, context) tokens and gives {vocab_size} logits for each"
        name, training = type(self.network).__name__, self.network.training
        try:
            with torch.no_grad():
                shape = tuple(self.network.eval()(tokens).shape)
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"network: {wanted}; {name} fails on them: {error}") from error
        refuse((shape != (*tokens.shape, vocab_size), f"network: {wanted}; {name} gives {shape} for {len(tokens)}"))
        self.network.train(training)

    def make_metrics(self) -> dict[str, Metric]:
        return {"bits_per_byte": BitsPerByte(), "perplexity": Perplexity()}

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        tokens, following, num_bytes = batch
        logits = self(tokens).float()
        nats = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none").unflatten(0, tokens.shape)
        counts = torch.stack([torch.full_like(num_bytes, tokens.shape[1]), num_bytes], 1)
        return nats.mean(), nats.detach().sum(1), counts

    def timed(self, rows: Tensor, batch_size: int) -> Callable[[], object]:
        network = self.network
        if not isinstance(network, GPT):
            return super().timed(rows, batch_size)
        scalars = 2 * batch_size * len(network.blocks) * network.embedding.embedding_dim  # of a token in the cache
        context = max(1, min(rows.shape[1], TIMED_CONTEXT, CACHE_SCALARS // scalars))
        tokens = rows.repeat(math.ceil(batch_size / len(rows)), 1)[:batch_size, :context]
        caches = network.make_caches(batch_size, context)
        for place in range(context):  # all at once would make their logits at once: gigabytes, with a large vocabulary
            network(tokens[:, place : place + 1], caches)

        # at another place of the second half in each call, for one token would always take the same leaves
        def decode(place: int) -> Tensor:
            for cache in caches:
                cache.length = place
            return network(tokens[:, place : place + 1], caches)

        following = itertools.cycle(range(context // 2, context)).__next__
        return lambda: decode(following())


class _PerUnit(Metric):
    # (samples,) nats of a sample, over what column `unit` of (samples, units) counts in it
    is_differentiable, higher_is_better, unit = False, False, 0
    nats: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "count"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, nats: Tensor, counts: Tensor) -> None:
        self.nats += nats.sum()
        self.count += counts[:, self.unit].sum()

    def compute(self) -> Tensor:
        return self.nats / self.count


class Perplexity(_PerUnit):
    """exp of the mean loss of a token, of (samples,) nats and (samples, 2) tokens and bytes."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class BitsPerByte(_PerUnit):
    """Bits of loss for each byte of the text, of (samples,) nats and (samples, 2) tokens and bytes."""

    unit = 1

    def compute(self) -> Tensor:
        return super().compute() / math.log(2)
