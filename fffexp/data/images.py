"""Folders of images by class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from typing_extensions import override

from fffexp.data.base import InMemoryData, Kind, Part, Rows, pixels
from fffexp.errors import UserError, refuse

Pixels = np.ndarray[Any, Any]
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "La", "RGBa")


class ImageFolder(InMemoryData):
    """Images in one folder a class: in `train/`, `test/` and, if there is one, `val/`; or all in one place.

    Without `train/` a fifth is held out for the test, and without `val/` a part of the rest for validation. A class
    is named by its folder, in which images may lie at any depth; hidden files are skipped, any other is an image.

    Args:
        root: Folder with `train/` and `test/`, or with the folders of the classes.
        size: Height and width to which each image is brought: scaled, and its longer side cut equally at both ends.
        mode: RGB or, in greys, L.
        kwargs: see InMemoryData. All images are held in memory, each pixel in 4 bytes a channel.
    """

    def __init__(self, root: str, size: tuple[int, int] = (32, 32), mode: Literal["RGB", "L"] = "RGB", **kwargs: Any):
        super().__init__(**kwargs)
        refuse(
            (min(size) < 1, f"size is {list(size)}: give a height and a width of at least 1"),
            (mode not in ("RGB", "L"), f"mode is {mode!r}: give RGB or L"),
        )
        self.root, self.size, self.mode = Path(root), size, mode
        self.in_shape = (3 if mode == "RGB" else 1, *size)
        fix = "give --data.root FOLDER, with a folder for each class in it"
        refuse((not self.root.is_dir(), f"{root} is no folder: {fix}"))
        self.parted = (self.root / "train").is_dir()
        test = self.root / "test"
        refuse((self.parted and not test.is_dir(), f"{root} has train/ but no test/: make one, or give {root}/train"))
        self.class_names = _folders(self._place("train"))
        self.num_classes = len(self.class_names)
        few = f"{self._place('train')} has {self.num_classes} folders in it, which are the classes"
        refuse((self.num_classes < 2, f"{few}: {fix}"))

    @override
    def source(self, part: Part, kind: Kind) -> str:
        return str(self._place(part))

    @override
    def load(self, part: Part) -> Rows | None:
        if not self.parted and part == "test":
            return None
        files = self._files(part)
        if part == "train":
            validation = self._files("val") if (self.root / "val").is_dir() and self.parted else []
            self._validation = len(validation)
            files += validation
        images = np.stack([self._image(path) for path, _ in files])
        return channels_first(images), torch.tensor([label for _, label in files])

    @override
    def split(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not self._validation:
            return super().split(targets)
        rows = torch.arange(len(targets))
        return rows[: -self._validation], rows[-self._validation :]

    def _place(self, part: str) -> Path:
        return self.root / part if self.parted else self.root

    def _files(self, part: str) -> list[tuple[Path, int]]:
        # the images, with their labels
        place = self._place(part)
        names = _folders(place)
        unknown = next((name for name in names if name not in self.class_names), None)
        refuse((unknown is not None, f"{place}/{unknown} is a class that {self._place('train')} does not have"))
        found = []
        for name in names:
            inside = (path for path in sorted((place / name).rglob("*")) if path.is_file())
            visible = [path for path in inside if not any(each[0] == "." for each in path.relative_to(place).parts)]
            refuse((not visible and part == "train", f"{place / name} has no images in it: add some, or remove it"))
            found += [(path, self.class_names.index(name)) for path in visible]
        refuse((not found, f"{place} has no images in it: add folders of classes with some"))
        return found

    def _image(self, path: Path) -> Pixels:
        try:
            with Image.open(path) as image:
                return prepare(image, self.size, self.mode, str(path))
        except UserError:
            raise
        except Exception as error:  # each format has its own
            problem = " ".join(str(error).split()).replace(f" '{path}'", "")
            raise UserError(f"{path} cannot be read as an image ({problem}): remove or replace it") from error


def prepare(image: Image.Image, size: tuple[int, int] | None, mode: str | None, name: str) -> Pixels:
    """The bytes of an image, (height, width) or (height, width, channels), brought to a size and a mode if given.

    It is turned upright, scaled, and its longer side cut equally at both ends.
    """
    deep = f"{name} has pixels of mode {image.mode}, not of 8 bits: convert it"
    refuse((image.mode not in EIGHT_BITS, deep))
    upright = ImageOps.exif_transpose(image)
    converted = upright.convert(mode) if mode else upright
    return np.asarray(ImageOps.fit(converted, size[::-1], Image.Resampling.BILINEAR) if size else converted)


def channels_first(images: Pixels) -> Tensor:
    """Images (rows, height, width) or (rows, height, width, channels) as float32 (rows, channels, height, width)."""
    inputs = pixels(images)
    return inputs.unsqueeze(1) if inputs.ndim == 3 else inputs.movedim(-1, 1).contiguous()


def _folders(place: Path) -> Sequence[str]:
    return sorted(path.name for path in place.iterdir() if path.is_dir() and path.name[0] != ".")
