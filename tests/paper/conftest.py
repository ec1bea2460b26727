"""The studies of the paper on data of the same form as Fashion-MNIST, small enough to train on in a test."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from fffexp.paper import studies

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two easy classes as IDX files in place of Fashion-MNIST, and short trainings; the folder of the studies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FFFEXP_OUTPUTS", str(tmp_path / "outputs"))
    generator = np.random.default_rng(0)
    root = tmp_path / "small"
    root.mkdir()
    for part, rows in (("train", 200), ("t10k", 40)):
        labels = (np.arange(rows) % 2).astype(np.uint8)
        images = (generator.integers(0, 40, (rows, 28, 28)) + 150 * labels[:, None, None]).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
            (root / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    for name in ("configs", "studies"):
        shutil.copytree(ROOT / name, tmp_path / name)
    config = tmp_path / "configs/data/fashion_mnist.yaml"
    data = yaml.safe_load(config.read_text())
    data["data"]["init_args"] |= {"root": str(root), "batch_size": 50}
    config.write_text(yaml.safe_dump(data))
    folder = tmp_path / "studies/paper"
    for path in folder.glob("*.yaml"):
        study = yaml.safe_load(path.read_text())
        study["overrides"] = study.get("overrides", {}) | {"trainer.max_epochs": 4}
        path.write_text(yaml.safe_dump(study, sort_keys=False))
    monkeypatch.setattr(studies, "FOLDER", folder)
    return folder
