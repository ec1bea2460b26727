import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fffexp.data import Hub
from fffexp.data.hub import REPOSITORIES
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
def test_each_data_set_offline(name: str, image: str, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_other_columns_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    split = hub_split(images(30, (1, 28, 28)), "picture", "label", 10)
    monkeypatch.setattr("fffexp.data.hub.fetch", lambda *_: split)
    with pytest.raises(UserError, match="ylecun/mnist has no column image or img but picture, label"):
        Hub("mnist").setup()


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


def test_a_known_name_takes_no_more() -> None:
    with pytest.raises(UserError, match="mnist is known whole: leave out all but its name, or give ylecun/mnist"):
        Hub("mnist", target="label")


def save(folder: Path, features: dict[str, Any] | None = None, **splits: dict[str, list[Any]]) -> Path:
    """A data set on disk: of one split if it is named `alone`."""
    datasets = pytest.importorskip("datasets", reason="the extra hub is not installed")
    kinds = datasets.Features(features) if features else None
    made = {name: datasets.Dataset.from_dict(columns, features=kinds) for name, columns in splits.items()}
    (made["alone"] if "alone" in made else datasets.DatasetDict(made)).save_to_disk(folder)
    return folder


def columns(rows: int) -> dict[str, list[Any]]:
    return {
        "age": list(range(rows)),
        "colour": [("red", "green")[row % 2] for row in range(rows)],
        "income": [float(row) for row in range(rows)],
        "label": [row % 3 for row in range(rows)],
    }


def error(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        Hub(str(folder), **options).setup()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_columns_of_a_table_on_disk(tmp_path: Path) -> None:
    data = Hub(str(save(tmp_path, train=columns(60), test=columns(9))))
    assert (data.in_shape, data.num_classes) == ((4,), 3)
    data.setup()
    assert [len(y) for _, y in (data.train_data, data.val_data, data.test_data)] == [54, 6, 9]
    assert data.test_data[0].tolist() == [[row, row, float(row % 2 != 0), float(row % 2 == 0)] for row in range(9)]
    chosen = Hub(str(tmp_path), inputs=["age"], target="income", normalize="standard")
    assert (chosen.in_shape, chosen.num_outputs) == ((1,), 1)
    chosen.setup()
    assert chosen.decode(chosen.test_data[1])["income"] == pytest.approx(range(9), abs=1e-4)
    assert Hub(str(tmp_path), target=["income", "age"]).num_outputs == 2


def test_splits_on_disk(tmp_path: Path) -> None:
    alone = Hub(str(save(tmp_path / "alone", alone=columns(60))))
    named = save(tmp_path / "named", all=columns(60), validation=columns(9))
    assert Hub(str(tmp_path / "alone"), train_split="all").num_classes == 3
    held_out = Hub(str(named), train_split="all", test_split=None)
    apart = Hub(str(named), train_split="all", test_split="validation")
    sizes = []
    for data in (alone, held_out, apart):
        data.setup()
        sizes.append([len(y) for _, y in (data.train_data, data.val_data, data.test_data)])
    assert sizes == [[44, 4, 12], [44, 4, 12], [54, 6, 9]]
    assert "has no split 'train', it has all, validation" in error(named)
    assert "has no split 'test'" in error(named, train_split="all")


def test_images_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra hub is not installed")
    pixels = images(30, (1, 5, 4))
    hub_split(pixels, "picture", "label", 3).save_to_disk(tmp_path / "a")
    data = Hub(str(tmp_path / "a"))
    assert (data.in_shape, data.num_classes, data.class_names) == ((1, 5, 4), 3, ["0", "1", "2"])
    data.setup()
    every = torch.cat([x for x, _ in (data.train_data, data.val_data, data.test_data)])
    assert {x.tobytes() for x in (every * 255).round().byte().numpy()} == {x.tobytes() for x in pixels}
    assert Hub(str(tmp_path / "a"), size=(8, 6), mode="RGB").in_shape == (3, 8, 6)
    for x, y in (data.train_data, data.test_data):
        labels = {row.tobytes(): number % 3 for number, row in enumerate(pixels)}
        assert [labels[row.tobytes()] for row in (x * 255).round().byte().numpy()] == y.tolist()
    # names of classes in the order of the data set, also of those without rows
    kinds = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["z", "a", "none"])}
    other = [Image.fromarray(each[0]) for each in pixels]
    folder = save(tmp_path / "b", kinds, alone={"picture": other, "kind": [0, 1] * 15})
    assert Hub(str(folder), target="kind").class_names == ["z", "a", "none"]
    assert "name what to predict by --data.target" in error(folder)
    assert "column 'kind' has no value" in error(
        save(tmp_path / "c", kinds, alone={"picture": other, "kind": [0, 1, -1] * 10}), target="kind"
    )


def test_bad_images_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra hub is not installed")
    kinds = {"image": datasets.Image(), "label": datasets.Value("int64")}
    good = [Image.fromarray(each[0]) for each in images(30, (1, 5, 4))]
    for number, (bad, message) in enumerate(
        (
            (
                Image.fromarray(np.zeros((5, 5), np.uint8)),
                "row 8: the image has the shape (5, 5), and that of row 1 (5, 4)",
            ),
            (None, "row 8: column 'image' has no image"),
            ({"bytes": b"no image", "path": None}, "row 8 cannot be read as an image"),
        )
    ):
        rows = [bad if row == 7 else image for row, image in enumerate(good)]
        folder = save(tmp_path / str(number), kinds, alone={"image": rows, "label": [0, 1] * 15})
        assert message in error(folder)


def test_bad_tables_on_disk(tmp_path: Path) -> None:
    save(tmp_path / "a", train=columns(60), test=columns(60))
    for options, message in (
        ({"target": "none"}, "has no column 'none' (--data.target)"),
        ({"inputs": ["none"]}, "has no column 'none' (--data.inputs)"),
        ({"target": "colour", "kind": "regression"}, "row 1: column 'colour' holds 'red' where a number is due"),
    ):
        assert message in error(tmp_path / "a", **options)
    spoiled = columns(60) | {"age": [None if row == 7 else row for row in range(60)]}
    assert "row 8: column 'age' has no value" in error(save(tmp_path / "b", alone=spoiled))
    (tmp_path / "c").mkdir()
    assert f"{tmp_path}/c cannot be fetched from disk (FileNotFoundError)" in error(tmp_path / "c")
