"""The speedup of a layer beside that of the model it stands in."""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fffexp.bench.contenders import Point, make, public_layers
from fffexp.bench.records import Timed, describe
from fffexp.layers import FeedforwardLayer
from fffexp.models.transformer import TransformerBlock
from fffexp.timing import interleaved, median_ratio, rotating

TOKENS = 128
HEADS = 12
CLASSES = 10
BATCHES = 8


@dataclass(kw_only=True)
class ModelRecord(Timed):
    """Medians in seconds; speedups over FF of the same training width, in the layer alone and in the whole model."""

    model: str
    layer_s: float
    model_s: float
    layer_share: float
    layer_speedup: float
    model_speedup: float


class MLP(nn.Module):
    """An MLP of one feedforward layer between a projection of the input and a classifier."""

    def __init__(self, layer: FeedforwardLayer) -> None:
        super().__init__()
        self.first = nn.Linear(layer.in_features, layer.in_features)
        self.layer = layer
        self.classifier = nn.Linear(layer.out_features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., classes)."""
        output: Tensor = self.classifier(self.layer(torch.relu(self.first(x))))
        return output


def _block(layer: FeedforwardLayer) -> nn.Module:
    features = layer.in_features
    return TransformerBlock(lambda i, o: layer, features, HEADS if features % HEADS == 0 else 1)


BODIES: dict[str, Callable[[FeedforwardLayer], nn.Module]] = {"MLP": MLP, "transformer block": _block}


def run_point(
    names: Sequence[str],
    point: Point,
    batch_sizes: Sequence[int],
    threads: Sequence[int],
    done: Callable[[Mapping[str, Any]], bool] = lambda timed: False,
    seconds: float = 2.0,
) -> Iterator[ModelRecord]:
    """Records of an MLP and a transformer block with each layer; a batch of the block is rows of 128 tokens."""
    dense = next(iter(public_layers()))
    contenders = make([dense, *(name for name in names if name != dense)], point)
    for (body, build), batch_size, count in itertools.product(BODIES.items(), batch_sizes, threads):
        if body != "MLP" and point.in_features != point.out_features:
            continue
        timed = {c.name: describe("model", c, point, batch_size, count) | {"model": body} for c in contenders}
        wanted = [c.name for c in contenders if not done(timed[c.name])]
        if not wanted:
            continue
        rows = (batch_size,) if body == "MLP" else (max(1, batch_size // TOKENS), min(batch_size, TOKENS))
        batches = [torch.randn(*rows, point.in_features).to(point.device, point.dtype) for _ in range(BATCHES)]
        calls: dict[str, Callable[[], object]] = {}
        with torch.inference_mode():
            for c in contenders:
                model = build(c.layer).to(point.device, point.dtype).eval()
                c.check(batches[0].flatten(0, -2))
                calls |= {f"layer {c.name}": rotating(c.layer, batches), f"model {c.name}": rotating(model, batches)}
            spent = interleaved(calls, seconds, device=point.device, threads=count)
        for name in wanted:
            layer_s, model_s = (statistics.median(spent[f"{part} {name}"]) for part in ("layer", "model"))
            over = [median_ratio(spent[f"{part} {dense}"], spent[f"{part} {name}"]) for part in ("layer", "model")]
            yield ModelRecord(
                **timed[name],
                layer_s=layer_s,
                model_s=model_s,
                layer_share=layer_s / model_s,
                layer_speedup=over[0],
                model_speedup=over[1],
            )


def row(r: Mapping[str, Any]) -> dict[str, Any]:
    """A record as a row of the table; times in microseconds."""
    return {
        "model": r["model"],
        "layer": r["layer"],
        "backend": r["backend"],
        "width": r["training_width"],
        "batch": r["batch_size"],
        "threads": r["threads"],
        "layer, us": 1e6 * r["layer_s"],
        "model, us": 1e6 * r["model_s"],
        "layer's share": r["layer_share"],
        "layer x FF": r["layer_speedup"],
        "model x FF": r["model_speedup"],
    }
