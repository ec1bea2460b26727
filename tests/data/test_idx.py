import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fffexp.data import IDX, FashionMNIST
from fffexp.errors import UserError

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
FILES = {
    "train-images-idx3-ubyte": (40, 4, 3),
    "train-labels-idx1-ubyte": (40,),
    "t10k-images-idx3-ubyte": (10, 4, 3),
    "t10k-labels-idx1-ubyte": (10,),
}


def encode(array: np.ndarray[Any, Any]) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, CODES[array.dtype.str[1:]], array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write(folder: Path, dtype: str = "u1", packed: bool = False, dot: bool = False) -> dict[str, Any]:
    """The four files with random images and labels 0 to 9; returns their arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    arrays = {}
    for name, shape in FILES.items():
        kind = dtype if "images" in name else "u1"
        low, high = (0, 10) if "labels" in name else (0, 256) if kind == "u1" else (-100, 100)
        arrays[name] = random.integers(low, high, shape).astype(kind)
        data = encode(arrays[name])
        name = name.replace("s-idx", "s.idx") if dot else name
        (folder / (name + ".gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)
    return arrays


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "idx")
    return tmp_path / "idx"


def error(root: Path | None, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        IDX(str(root) if root else None, **kwargs).setup()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", CODES)
def test_round_trip(tmp_path: Path, dtype: str, packed: bool, dot: bool) -> None:
    arrays = write(tmp_path, dtype, packed, dot)
    data = IDX(str(tmp_path))
    assert (data.in_shape, data.num_classes) == ((1, 4, 3), 10)
    data.setup()
    images = arrays["t10k-images-idx3-ubyte"].astype(np.float32) / (255 if dtype == "u1" else 1)
    assert torch.equal(data.test_data[0], torch.from_numpy(images).unsqueeze(1))
    assert data.test_data[1].tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()
    rows = torch.cat(data.split(torch.zeros(40)))
    assert torch.cat([data.train_data[1], data.val_data[1]]).tolist() == [
        arrays["train-labels-idx1-ubyte"][row] for row in rows
    ]
    assert (len(data.train_data[1]), len(data.val_data[1])) == (36, 4)


def test_content_says_whether_a_file_is_packed(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(path.read_bytes()))
    labels = folder / "train-labels-idx1-ubyte"
    labels.rename(folder / "train-labels-idx1-ubyte.gz")
    IDX(str(folder)).setup()


def test_folders_are_searched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FashionMNIST, "folders", FashionMNIST.folders[:2])
    with pytest.raises(UserError, match=r"in data/fashion_mnist, data: run make data, or give --data\.root"):
        FashionMNIST()
    write(tmp_path / "data")
    assert FashionMNIST().source("train", "images") == "data/train-images-idx3-ubyte"
    assert IDX().source("train", "images") == "data/train-images-idx3-ubyte"
    write(tmp_path / "data" / "fashion_mnist")
    assert FashionMNIST().source("test", "labels") == "data/fashion_mnist/t10k-labels-idx1-ubyte"


@pytest.mark.slow
def test_the_real_fashion_mnist(fashion_mnist: Path) -> None:
    data = FashionMNIST(str(fashion_mnist), normalize="standard")
    assert data.in_shape == (1, 28, 28)
    data.setup()
    parts = (data.train_data, data.val_data, data.test_data)
    assert [len(y) for _, y in parts] == [54_000, 6_000, 10_000]
    assert torch.cat([y for _, y in parts]).bincount().tolist() == [7_000] * 10
    assert data.train_data[0].shape == (54_000, 1, 28, 28)
    assert data.train_data[0].mean().abs() < 1e-4


def test_no_files(tmp_path: Path) -> None:
    assert f"in {tmp_path}: run make data" in error(tmp_path)
    assert "make data" in error(tmp_path / "absent")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    message = error(folder)
    assert f"{folder / name}[.gz] is missing" in message
    assert "make data" in message


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("length", [0, 3, 7, 17, -1])
def test_a_truncated_file_is_named(tmp_path: Path, name: str, packed: bool, length: int) -> None:
    write(tmp_path, packed=packed)
    path = tmp_path / (name + ".gz" if packed else name)
    path.write_bytes(path.read_bytes()[:length])
    message = error(tmp_path)
    assert message.startswith(f"{path} is truncated")
    assert "make data" in message


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, packed=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[-20] ^= 0xFF
    path.write_bytes(content)
    assert str(path) in error(tmp_path)


def test_a_file_with_more_than_its_header_tells(folder: Path) -> None:
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes() + b"x")
    assert f"{path} is too long" in error(folder)


def test_a_wrong_magic_number(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(b"<!DOCTYPE html>")
    assert f"{path} is not an IDX file, it begins with 0x3c21444f" in error(folder)


@pytest.mark.parametrize("part", ["train", "t10k"])
def test_swapped_files(folder: Path, part: str) -> None:
    images, labels = folder / f"{part}-images-idx3-ubyte", folder / f"{part}-labels-idx1-ubyte"
    labels.rename(folder / "x")
    images.rename(labels)
    (folder / "x").rename(images)
    message = error(folder)
    assert f"{images} should hold images (3 dimensions) but has 1 (as for labels)" in message
    assert "wrong name" in message
    (folder / f"{part}-images-idx3-ubyte").write_bytes(labels.read_bytes())
    assert f"{labels} should hold labels (1 dimensions) but has 3 (as for images)" in error(folder)


def test_counts_differ(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes(encode(np.zeros(39, "u1")))
    message = error(folder)
    assert f"{folder / 'train-images-idx3-ubyte'} has 40 rows" in message
    assert f"{folder / 'train-labels-idx1-ubyte'} has 39 targets" in message


def test_train_and_test_images_of_different_shapes(folder: Path) -> None:
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes(encode(np.zeros((10, 5, 5), "u1")))
    assert f"{path} has rows of shape (1, 5, 5), not (1, 4, 3)" in error(folder)


@pytest.mark.parametrize(("dtype", "label"), [("u1", 10), ("i1", -1)])
def test_labels_out_of_range(folder: Path, dtype: str, label: int) -> None:
    path = folder / "t10k-labels-idx1-ubyte"
    labels = np.zeros(10, dtype)
    labels[3] = label
    path.write_bytes(encode(labels))
    assert f"{path} has the label {label} in row 3, outside 0 to 9" in error(folder)


def test_num_classes_widens_the_range(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte").write_bytes(encode(np.full(10, 46, "u1")))
    IDX(str(folder), num_classes=47).setup()


def test_labels_that_are_no_whole_numbers(folder: Path) -> None:
    path = folder / "train-labels-idx1-ubyte"
    path.write_bytes(encode(np.zeros(40, "f4")))
    assert f"{path} holds float32, not whole numbers" in error(folder)


# 1e300 is finite in float64 but not in the float32 that training uses
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_non_finite_pixels(folder: Path, value: float) -> None:
    path = folder / "train-images-idx3-ubyte"
    images = np.zeros((40, 4, 3), "f8")
    images[5, 1, 1] = value
    path.write_bytes(encode(images))
    assert f"{path} has a NaN or inf in row 5" in error(folder)


def test_no_rows(folder: Path) -> None:
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes(encode(np.zeros((0, 4, 3), "u1")))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(encode(np.zeros(0, "u1")))
    assert f"{path} is empty" in error(folder)
