"""`fffexp bench fit`: what the framework costs beside a bare PyTorch loop."""

import logging
import statistics
import time

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from fffexp.data import FashionMNIST
from fffexp.data.base import ClassificationData
from fffexp.layers import FF, FFF, FeedforwardLayer, NoisyTopKMoE
from fffexp.models.mlp import MLP, LayerFactory
from fffexp.timing import exclusive_timing
from fffexp.training.classification import ClassificationTask


def fit(epochs: int = 1, rounds: int = 5, threads: int = 1) -> None:
    """Time epochs of Fashion-MNIST in a Lightning fit and in a bare loop, in turn.

    Args:
        epochs: epochs of one timing.
        rounds: timings of each; the median of the paired ratios is printed.
        threads: threads of torch.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(threads)
    data = FashionMNIST()
    data.setup()
    layers: dict[str, LayerFactory] = {
        "FF w=128": lambda i, o: FF(i, o, 128),
        "NoisyTopKMoE 8x16 k=2": lambda i, o: NoisyTopKMoE(i, o, 8, 16),
        "FFF d=4 l=8": lambda i, o: FFF(i, o, 4, 8),
    }
    print("training passes alone, without validation, checkpoints and tracking")
    print(f"{'layer':24}{'bare, s':>10}{'fit, s':>10}{'ratio':>8}   (medians of {rounds}, {threads} threads)")
    for name, factory in layers.items():
        pairs = [(_bare(data, factory, epochs), _lightning(data, factory, epochs)) for _ in range(rounds)]
        bare, fitted = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"{name:24}{bare:10.3f}{fitted:10.3f}{ratio:8.3f}")


def _bare(data: ClassificationData, factory: LayerFactory, epochs: int) -> float:
    torch.manual_seed(0)
    network = MLP(factory, data.in_shape, data.num_classes)
    layer = network.layer
    assert isinstance(layer, FeedforwardLayer)
    optimizer = torch.optim.AdamW(network.parameters())
    batches = data.train_dataloader()
    with exclusive_timing():
        start = time.perf_counter()
        for _ in range(epochs):
            for x, y in batches:
                optimizer.zero_grad()
                F.cross_entropy(network(x), y).backward()
                layer.routing = None
                optimizer.step()
        return time.perf_counter() - start


def _lightning(data: ClassificationData, factory: LayerFactory, epochs: int) -> float:
    torch.manual_seed(0)
    task = ClassificationTask(factory, data.in_shape, data.num_classes, optimizer=torch.optim.AdamW)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    start = time.perf_counter()
    trainer.fit(task, datamodule=data)
    return time.perf_counter() - start
