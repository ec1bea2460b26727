"""Small data sets as IDX files."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np


def write_idx(path: Path, array: "np.ndarray[Any, Any]") -> None:
    """Bytes as a gzipped IDX file."""
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, dtype=">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype("u1").tobytes(), 1))


def write_fashion(folder: Path, train: int = 600, test: int = 100) -> Path:
    """Random files of the same form as Fashion-MNIST's, but few rows, where the configs look below a folder."""
    root, random = folder / "data" / "fashion_mnist", np.random.default_rng(0)
    root.mkdir(parents=True)
    for part, rows in (("train", train), ("t10k", test)):
        write_idx(root / f"{part}-images-idx3-ubyte.gz", random.integers(0, 256, (rows, 28, 28)))
        write_idx(root / f"{part}-labels-idx1-ubyte.gz", random.integers(0, 10, rows))
    return root
