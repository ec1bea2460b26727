from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fffexp.data import ImageFolder
from fffexp.errors import UserError

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def fill(place: Path, count: int, shape: tuple[int, int] = (8, 8)) -> Path:
    """So many images of each class, each of one colour, the class; no two of a class are quite the same."""
    for name, colour in COLOURS.items():
        (place / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = np.full((*shape, 3), colour, np.uint8)
            pixels[0, 0] = number
            Image.fromarray(pixels).save(place / name / f"{number:02}.png")
    return place


@pytest.fixture
def parted(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    fill(root / "train", 10)
    fill(root / "test", 3)
    return root


def folder(root: Path, **options: Any) -> ImageFolder:
    data = ImageFolder(str(root), **({"size": (8, 8)} | options))
    data.setup()
    return data


def error(root: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        folder(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sizes(data: ImageFolder) -> list[int]:
    return [len(y) for _, y in (data.train_data, data.val_data, data.test_data)]


def test_folders_of_parts(parted: Path) -> None:
    data = folder(parted)
    assert (data.in_shape, data.num_classes, data.class_names) == ((3, 8, 8), 3, ["blue", "green", "red"])
    assert sizes(data) == [27, 3, 9]
    for inputs, labels in (data.train_data, data.val_data, data.test_data):
        # the centre has the colour of the class, whose channel is 2 for blue
        assert inputs[:, :, 4, 4].argmax(1).tolist() == (2 - labels).tolist()
        assert (float(inputs.min()), float(inputs.max())) == (0, 1)
    assert data.decode(torch.tensor([2, 0])) == {"class": ["red", "blue"]}
    fill(parted / "val", 2)
    with_val = folder(parted)
    assert sizes(with_val) == [30, 6, 9]
    assert with_val.val_data[1].tolist() == [0, 0, 1, 1, 2, 2]


def test_one_folder_is_split(tmp_path: Path) -> None:
    data = folder(fill(tmp_path, 10))
    assert sizes(data) == [22, 2, 6]
    images = {x.numpy().tobytes() for xs, _ in (data.train_data, data.val_data, data.test_data) for x in xs}
    assert len(images) == 30


def shown(root: Path) -> torch.Tensor:
    """The first red image of the test, (channels, height, width)."""
    return folder(root).test_data[0][6]


def test_sizes_and_modes(parted: Path) -> None:
    grey = folder(parted, size=(6, 5), mode="L")
    assert grey.in_shape == grey.train_data[0].shape[1:] == (1, 6, 5)
    pixels = np.zeros((30, 90, 3), np.uint8)
    pixels[:, :30], pixels[:, 60:] = 255, 255  # black in the middle third, which is what is left
    path = parted / "test" / "red" / "00.png"
    Image.fromarray(pixels).save(path)
    assert shown(parted)[:, :, 1:-1].max() == 0
    assert shown(parted).mean() < 0.05
    for mode in ("P", "RGBA", "L", "1", "CMYK"):
        Image.fromarray(pixels).convert(mode).save(path, "tiff" if mode == "CMYK" else "png")
        assert shown(parted)[:, :, 1:-1].max() == 0


def test_an_image_is_turned_upright(parted: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees to the right when shown
    image.save(parted / "test" / "red" / "00.png", exif=exif)
    assert shown(parted)[:, :, 4:].min() == 1
    assert shown(parted)[:, :, :4].max() == 0


def test_hidden_files_are_skipped_and_folders_may_be_deep(parted: Path) -> None:
    (parted / "train" / "red" / ".DS_Store").write_bytes(b"x")
    (parted / "train" / ".git").mkdir()
    deep = parted / "train" / "red" / "more"
    deep.mkdir()
    (parted / "train" / "red" / "00.png").rename(deep / "00.png")
    assert sizes(folder(parted)) == [27, 3, 9]


def test_bad_images(parted: Path) -> None:
    path = parted / "train" / "green" / "03.png"
    whole = path.read_bytes()
    for content in (b"", b"no image", whole[:40], whole[:-30]):
        path.write_bytes(content)
        assert f"{path} cannot be read as an image" in error(parted)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(path)
    assert f"{path} has pixels of mode I;16, not of 8 bits" in error(parted)


def test_bad_folders(parted: Path, tmp_path: Path) -> None:
    assert "absent is no folder" in error(tmp_path / "absent")
    assert "root/train has 0 folders in it" in error_without(parted / "train")
    (parted / "test" / "pink").mkdir()
    fill(parted / "train", 10)
    assert f"{parted}/test/pink is a class that {parted}/train does not have" in error(parted)
    (parted / "test" / "pink").rename(parted / "train" / "pink")
    assert "train/pink has no images in it" in error(parted)
    (parted / "train" / "pink").rmdir()
    (parted / "test").rename(parted / "later")
    assert "has train/ but no test/" in error(parted)
    (parted / "test").mkdir()
    assert "root/test has no images in it" in error(parted)


def error_without(place: Path) -> str:
    """The error after all folders of a part were removed."""
    for path in sorted(place.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return error(place.parent)


@pytest.mark.parametrize(
    ("options", "message"), [({"size": (0, 8)}, "size is [0, 8]"), ({"mode": "X"}, "give RGB or L")]
)
def test_bad_arguments(parted: Path, options: dict[str, Any], message: str) -> None:
    assert message in error(parted, **options)
