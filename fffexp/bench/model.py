"""`fffexp bench model`: the speedup of a layer beside that of the model it stands in."""

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from fffexp.bench import inference
from fffexp.bench.contenders import Point, make
from fffexp.layers import FeedforwardLayer
from fffexp.models.transformer import TransformerBlock
from fffexp.timing import interleaved, median_ratio, rotating

TOKENS = 128
HEADS = 12
CLASSES = 10
BATCHES = 8


@dataclass(frozen=True)
class ModelRecord:
    """Medians in seconds; speedups over FF of the same training width, in the layer alone and in the whole model."""

    model: str
    layer: str
    backend: str
    training_width: int
    inference_width: int
    batch_size: int
    threads: int
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


def run_point(names: Sequence[str], point: Point, batch_sizes: Sequence[int], threads: int) -> Iterator[ModelRecord]:
    """Records of an MLP and a transformer block with each layer; a batch of the block is rows of 128 tokens."""
    contenders = make(["FF", *(name for name in names if name != "FF")], point, peers=False)
    torch.set_num_threads(threads)
    dense = contenders[0].layer
    heads = HEADS if point.in_features % HEADS == 0 else 1
    bodies: dict[str, Callable[[FeedforwardLayer], nn.Module]] = {
        "MLP": MLP,
        "transformer block": lambda layer: TransformerBlock(lambda i, o: layer, point.in_features, heads),
    }
    with torch.inference_mode():
        for body, build in bodies.items():
            if body == "transformer block" and point.in_features != point.out_features:
                continue
            torch.manual_seed(0)
            skeleton = build(dense).to(point.device, point.dtype).eval()
            for batch_size in batch_sizes:
                shape: tuple[int, ...] = (batch_size, point.in_features)
                if body == "transformer block":
                    shape = (max(1, batch_size // TOKENS), min(batch_size, TOKENS), point.in_features)
                batches = [torch.randn(shape, device=point.device, dtype=point.dtype) for _ in range(BATCHES)]
                calls: dict[str, Callable[[], object]] = {}
                for contender in contenders:
                    contender.layer.eval()
                    contender.check(batches[0].flatten(0, -2))
                    model = copy.copy(skeleton)  # shares all weights but the layer's
                    model._modules = {**skeleton._modules, "layer": contender.layer}
                    calls[f"layer {contender.name}"] = rotating(contender.layer, batches)
                    calls[f"model {contender.name}"] = rotating(model, batches)
                seconds = interleaved(calls, inference.POINT_S, device=point.device, threads=threads)
                for contender in contenders:
                    name = contender.name
                    layer_s, model_s = (statistics.median(seconds[f"{part} {name}"]) for part in ("layer", "model"))
                    yield ModelRecord(
                        body,
                        name,
                        contender.backend,
                        contender.layer.training_width,
                        contender.layer.inference_width,
                        batch_size,
                        threads,
                        layer_s,
                        model_s,
                        layer_s / model_s,
                        median_ratio(seconds["layer FF"], seconds[f"layer {name}"]),
                        median_ratio(seconds["model FF"], seconds[f"model {name}"]),
                    )


def header() -> str:
    """Of the table whose rows are `row`."""
    return (
        f"{'model':20}{'layer':14}{'backend':9}{'w':>7}{'batch':>7}{'layer, ms':>11}{'model, ms':>11}"
        f"{'share':>7}{'layer x':>9}{'model x':>9}"
    )


def row(record: ModelRecord) -> str:
    """A record as a line of the table."""
    r = record
    start = f"{r.model:20}{r.layer:14}{r.backend:9}{r.training_width:7}{r.batch_size:7}"
    times = f"{1e3 * r.layer_s:11.3f}{1e3 * r.model_s:11.3f}{r.layer_share:7.0%}"
    return start + times + f"{r.layer_speedup:9.4g}{r.model_speedup:9.3g}"


def as_json(records: Sequence[ModelRecord]) -> list[dict[str, object]]:
    """For the file."""
    return [asdict(record) for record in records]
