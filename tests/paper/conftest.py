"""Data of the same form as Fashion-MNIST, small enough to train on in a test."""

import gzip
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fffexp.paper import cells, table1, table2, table3
from fffexp.paper.runs import Training

SHORT = ["--trainer.max_epochs=4", "--data.batch_size=50"]


def _shortened(training: Callable[..., Training], more: list[str], *of: Any) -> Training:
    how = training(*of)
    return how._replace(args=[*how.args, *more])


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two easy classes as IDX files where the configs look for Fashion-MNIST; trainings are short."""
    generator = np.random.default_rng(0)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "small"
    root.mkdir()
    for part, rows in (("train", 200), ("t10k", 40)):
        labels = (np.arange(rows) % 2).astype(np.uint8)
        images = (generator.integers(0, 40, (rows, 28, 28)) + 150 * labels[:, None, None]).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
            (root / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    monkeypatch.setitem(cells.DATA, "fashion_mnist", [*cells.DATA["fashion_mnist"], f"--data.root={root}"])
    longer = ["--trainer.max_epochs=20", "--model.optimizer.lr=0.02"]
    for table, more in ((table1, []), (table2, longer), (table3, [])):
        monkeypatch.setattr(table, "training", partial(_shortened, table.training, [*SHORT, *more]))
    return root
