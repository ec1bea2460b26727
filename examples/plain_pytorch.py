"""Trees in a transformer of plain PyTorch: digits, read row by row.

python examples/plain_pytorch.py
"""

import math
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn

from fffexp import FFF, anneal, auxiliary_loss, replace_feedforward

EPOCHS, BATCH_SIZE = 15, 128


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16  # (1797, 8, 8)
    labels = torch.tensor(digits.target)
    train, test = torch.randperm(len(labels)).split([1437, 360])

    block = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 64), nn.TransformerEncoder(block, 2), nn.Flatten(), nn.Linear(8 * 64, 10))
    for each in replace_feedforward(model, partial(FFF, depth=4, leaf_width=16)):
        print(
            each.name, f"{each.old_sizes['inference_size']} -> {each.new_sizes['inference_size']} neurons for a token"
        )

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps = EPOCHS * math.ceil(len(train) / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    step = 0
    model.train()
    for _ in range(EPOCHS):
        for rows in train[torch.randperm(len(train))].split(BATCH_SIZE):
            anneal(model, step / steps)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            (loss + auxiliary_loss(model)).backward()
            optimizer.step()
            schedule.step()
            step += 1

    model.eval()  # hard routing: one leaf for each token
    with torch.inference_mode():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
    print(f"test accuracy {100 * accuracy:.1f}%")


if __name__ == "__main__":
    main()
