"""How the layers use their leaves and experts."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from fffexp.layers import FeedforwardLayer
from fffexp.routing.blocks import block_counts
from fffexp.training.callbacks.stability import reading_interval


class RoutingMonitor(Callback):
    """Logs entropies over training and the usage of blocks under hard decisions over the validation set.

    With several layers each quantity is logged per layer too, as `name/layer`.
    """

    def __init__(self) -> None:
        self._readings: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self._counter = BlockCounter({})

    @torch.no_grad()
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # before the task clears the routing of the step
        if trainer.fit_loop.epoch_loop.batch_idx % reading_interval(trainer) == 0:
            for path, layer in pl_module.layers.items():
                for name, metric in layer.metrics.items() if layer.routing is not None else ():
                    self._readings[name][path].append(metric(layer.routing))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, readings in self._readings.items():
            _log(pl_module, name, {path: torch.stack(values).mean() for path, values in readings.items()})
        self._readings.clear()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counter = BlockCounter(pl_module.layers)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._counter.finish()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counts, rows = self._counter.finish(), self._counter.rows
        usage = {path: block_usage(counts[path], rows[path]) for path in counts}
        for name in ("used_leaves", "usage_cv"):
            _log(pl_module, name, {path: values[name] for path, values in usage.items()})


class BlockCounter:
    """Counts, by hooks, the rows that hard passes send to each leaf or expert, by the path of the layer."""

    def __init__(self, layers: Any) -> None:
        self.counts: dict[str, Tensor] = {}
        self.rows: Counter[str] = Counter()
        self._hooks = [
            layer.register_forward_pre_hook(partial(self._count, path))
            for path, layer in layers.items()
            if layer.num_experts > 1
        ]

    def _count(self, path: str, layer: FeedforwardLayer, inputs: tuple[Tensor, ...]) -> None:
        if layer.hard:
            blocks = layer.route(inputs[0])
            self.counts[path] = block_counts(_once(blocks), layer.num_experts) + self.counts.get(path, 0)
            self.rows[path] += len(blocks)

    def finish(self) -> dict[str, Tensor]:  # (blocks,) rows of each block, by layer
        for hook in self._hooks:
            hook.remove()
        return self.counts


def _once(blocks: Tensor) -> Tensor:
    """(rows, k) blocks of each row -> all of them, each once for a row: a row may name one several times."""
    ordered = blocks.sort(1).values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return ordered[first]


@torch.inference_mode()
def dead_leaves(task: LightningModule, inputs: Iterable[Tensor]) -> dict[str, float]:
    """How many leaves or experts no row of these inputs reaches, over all layers; nothing where there is no choice."""
    counter = BlockCounter(task.eval().layers)
    for batch in inputs:
        task(batch)
    dead = [float((counts == 0).sum()) for counts in counter.finish().values()]
    return {"stability/dead_leaves": sum(dead)} if dead else {}


def block_usage(counts: Tensor, rows: int) -> dict[str, Tensor]:
    """(blocks,) rows sent to each block, of so many -> blocks in use, coefficient of variation of the shares."""
    shares = counts.cpu().double() / max(rows, 1)  # not every device has float64
    variation = shares.std(correction=0) / shares.mean().clamp_min(1e-12)
    # a leaf is in use if at least a thousandth of the samples reaches it
    return {"used_leaves": (shares >= 0.001).sum().float(), "usage_cv": variation.float()}


def _log(pl_module: LightningModule, name: str, values: Mapping[str, Tensor]) -> None:
    if values:
        pl_module.log(f"routing/{name}", float(torch.stack(list(values.values())).mean()))
    if len(values) > 1:
        pl_module.log_dict({f"routing/{name}/{path}": float(value) for path, value in values.items()})
