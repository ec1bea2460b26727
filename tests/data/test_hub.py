import sys
from typing import Any

import numpy as np
import pytest
import torch

from fffexp.data import Hub
from fffexp.data.hub import REPOSITORIES, Name, to_rows
from fffexp.errors import UserError


def images(rows: int, shape: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """Random uint8 pixels (rows, channels, height, width)."""
    return np.random.default_rng(0).integers(0, 256, (rows, *shape)).astype(np.uint8)


def hub_split(pixels: np.ndarray[Any, Any], image: str, label: str, classes: int) -> Any:
    """A split as the hub's: encoded PNG images, class labels, and columns that nobody asked for."""
    datasets = pytest.importorskip("datasets", reason="the extra hub is not installed")
    image_module = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    channels_last = pixels[:, 0] if pixels.shape[1] == 1 else pixels.transpose(0, 2, 3, 1)
    labels = [row % classes for row in range(len(pixels))]
    columns = {
        image: [image_module.fromarray(array) for array in channels_last],
        label: labels,
        "coarse_label": [0] * len(labels),
    }
    features = datasets.Features(
        {
            image: datasets.Image(),
            label: datasets.ClassLabel(num_classes=classes),
            "coarse_label": datasets.Value("int64"),
        }
    )
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize(
    ("name", "image", "label"),
    [
        ("mnist", "image", "label"),
        ("fashion_mnist", "image", "label"),
        ("usps", "image", "label"),
        ("svhn", "image", "label"),
        ("cifar10", "img", "label"),
        ("cifar100", "img", "fine_label"),
    ],
)
def test_each_data_set_offline(name: Name, image: str, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, in_shape, num_classes = REPOSITORIES[name][:2], *REPOSITORIES[name][2:]
    pixels = {part: images(rows, in_shape) for part, rows in (("train", 50), ("test", 20))}

    def fetch(path: str, config: str | None, part: str) -> Any:
        assert (path, config) == where
        return hub_split(pixels[part], image, label, num_classes)

    monkeypatch.setattr("fffexp.data.hub.fetch", fetch)
    data = Hub(name)
    assert (data.in_shape, data.num_classes) == (in_shape, num_classes)
    data.setup()
    assert torch.equal(data.test_data[0], torch.from_numpy(pixels["test"]).float() / 255)
    assert data.test_data[1].tolist() == [row % num_classes for row in range(20)]
    assert (len(data.train_data[1]), len(data.val_data[1])) == (45, 5)
    assert data.test_data[0].is_contiguous()


def test_unknown_columns_are_told() -> None:
    split = hub_split(images(3, (1, 4, 4)), "picture", "label", 10)
    with pytest.raises(UserError, match="owner/set has no column image or img but picture, label"):
        to_rows(split, "owner/set")


def test_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"ylecun/mnist needs .*: pip install 'fffexp\[hub\]'"):
        Hub("mnist").setup()


def test_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra hub is not installed")

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"^ylecun/mnist cannot be fetched[^\n]*$"):
        Hub("mnist").setup()


def test_an_unknown_name() -> None:
    with pytest.raises(UserError, match="give one of mnist, fashion_mnist"):
        Hub("imagenet")  # type: ignore[arg-type]
