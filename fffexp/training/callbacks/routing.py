"""How the layers use their leaves and experts."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import partial

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fffexp.layers import FeedforwardLayer
from fffexp.routing.blocks import block_counts
from fffexp.training.callbacks.stability import reading_interval

# A leaf is in use if at least this share of the samples reaches it.
IN_USE = 0.001


class RoutingMonitor(Callback):
    """Logs entropies over training and the usage of blocks under hard decisions over the validation set.

    With several layers each quantity is logged per layer too, as `name/layer`.
    """

    def __init__(self) -> None:
        self._readings: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self._counter: BlockCounter | None = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Read the routing of a step before the task clears it."""
        if trainer.fit_loop.epoch_loop.batch_idx % reading_interval(trainer):
            return
        with torch.no_grad():
            for path, layer in pl_module.layers.items():
                for name, metric in layer.metrics.items() if layer.routing is not None else ():
                    self._readings[name][path].append(metric(layer.routing))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's means."""
        for name, by_layer in self._readings.items():
            means = {path: torch.stack(values).mean() for path, values in by_layer.items()}
            log_by_layer(pl_module, f"routing/{name}", means)
        self._readings.clear()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count which blocks the hard passes use."""
        self._counter = BlockCounter(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        if self._counter is not None:
            self._counter.finish()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the usage."""
        assert self._counter is not None
        counts, rows = self._counter.finish(), self._counter.rows
        usage = {path: block_usage(counts[path], rows[path]) for path in counts if rows[path]}
        for name in ("used_leaves", "usage_cv"):
            log_by_layer(pl_module, f"routing/{name}", {path: values[name] for path, values in usage.items()})


class BlockCounter:
    """Counts, by hooks, the rows that hard passes send to each leaf or expert."""

    def __init__(self, task: LightningModule) -> None:
        self._counts: dict[str, Tensor] = {}
        self.rows: Counter[str] = Counter()
        self._hooks: list[RemovableHandle] = []
        for path, layer in task.layers.items():
            if layer.num_experts > 1:
                self._counts[path] = torch.zeros(layer.num_experts, dtype=torch.long, device=task.device)
                self._hooks.append(layer.register_forward_pre_hook(partial(self._count, path)))

    def _count(self, path: str, layer: FeedforwardLayer, inputs: tuple[Tensor, ...]) -> None:
        if layer.hard:
            blocks = layer.route(inputs[0])
            self._counts[path] += block_counts(blocks, layer.num_experts)
            self.rows[path] += len(blocks)

    def finish(self) -> dict[str, Tensor]:
        """Stop counting; (blocks,) rows per block, by layer."""
        while self._hooks:
            self._hooks.pop().remove()
        return self._counts


def dead_leaves(task: LightningModule, inputs: Iterable[Tensor]) -> dict[str, float]:
    """How many leaves or experts no row of these inputs reaches, over all layers; nothing where there is no choice."""
    task.eval()
    counter = BlockCounter(task)
    with torch.inference_mode():
        for batch in inputs:
            task(batch)
    counts = counter.finish()
    return {"stability/dead_leaves": float(sum((c == 0).sum() for c in counts.values()))} if counts else {}


def block_usage(counts: Tensor, rows: int) -> dict[str, Tensor]:
    """(blocks,) rows sent to each block, of so many -> blocks in use, coefficient of variation of the shares."""
    shares = counts.cpu().double() / max(rows, 1)  # not every device has float64
    return {
        "used_leaves": (shares >= IN_USE).sum().float(),
        "usage_cv": (shares.std(correction=0) / shares.mean().clamp_min(1e-12)).float(),
    }


def log_by_layer(pl_module: LightningModule, name: str, values: dict[str, Tensor]) -> None:
    """Log the mean over layers under the name, and each layer where there are several."""
    if not values:
        return
    pl_module.log(name, float(torch.stack(list(values.values())).mean()))
    if len(values) > 1:
        pl_module.log_dict({f"{name}/{path}": float(value) for path, value in values.items()})
