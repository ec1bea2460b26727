"""What the framework costs beside a bare PyTorch loop."""

import logging
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from fffexp.bench.contenders import layer_class, public_layers
from fffexp.data import FashionMNIST
from fffexp.data.base import InMemoryData
from fffexp.models.mlp import MLP
from fffexp.timing import interleaved, median_ratio
from fffexp.training.classification import ClassificationTask
from fffexp.training.experiment import BARE


def compare(layers: Sequence[str], epochs: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Rows of a table: medians of epochs of Fashion-MNIST with layers of width 128, in a bare loop and in a fit.

    The ratio is the median of the paired ones. Arguments are those of the command; no layers are all public ones.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data, rows = FashionMNIST(), []
    data.setup()
    for name in layers or public_layers():
        made = partial(layer_class(name).sized, depth=4, leaf_width=8, top_k=2), data.in_shape, data.num_classes
        torch.manual_seed(0)
        network = MLP(*made)
        torch.manual_seed(0)
        task = ClassificationTask(*made, optimizer=torch.optim.AdamW)
        calls = {"bare": partial(_bare, network, data, epochs), "fit": partial(_fit, task, data, epochs)}
        seconds = interleaved(calls, 0.0, threads=threads, rounds=(rounds, rounds), block_s=0)
        medians = {f"{way}, s": statistics.median(spent) for way, spent in seconds.items()}
        rows.append({"layer": name, **medians, "ratio": median_ratio(seconds["fit"], seconds["bare"])})
    return rows


def _bare(network: MLP, data: InMemoryData, epochs: int) -> None:
    optimizer, batches = torch.optim.AdamW(network.parameters()), data.train_dataloader()
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            network.layer.routing = None
            optimizer.step()


def _fit(task: ClassificationTask, data: InMemoryData, epochs: int) -> None:
    Trainer(max_epochs=epochs, accelerator="cpu", limit_val_batches=0, **BARE).fit(task, datamodule=data)
