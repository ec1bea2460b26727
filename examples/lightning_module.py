"""Trees in your own LightningModule: digits, read row by row.

python examples/lightning_module.py
"""

from functools import partial
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from fffexp import FFF, anneal, auxiliary_loss, replace_feedforward


class Digits(lightning.LightningModule):
    """A transformer of two blocks, whose MLPs are trees."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.network = nn.Sequential(
            nn.Linear(8, 64), nn.TransformerEncoder(block, 2), nn.Flatten(), nn.Linear(8 * 64, 10)
        )
        replace_feedforward(self.network, partial(FFF, depth=4, leaf_width=16))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        anneal(self, self.global_step / self.trainer.estimated_stepping_batches)
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels) + auxiliary_loss(self)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean())


def main() -> None:
    lightning.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    train, test = random_split(TensorDataset(images, torch.tensor(digits.target)), [1437, 360])
    trainer = lightning.Trainer(max_epochs=30, logger=False, enable_checkpointing=False, accelerator="cpu")
    model = Digits()
    trainer.fit(model, DataLoader(train, batch_size=128, shuffle=True))
    (result,) = trainer.test(model, DataLoader(test, batch_size=360))
    print(f"test accuracy {100 * result['accuracy']:.1f}%")


if __name__ == "__main__":
    main()
