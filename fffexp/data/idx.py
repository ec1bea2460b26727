"""MNIST-like data sets from IDX files on disk, gzipped or not."""

import gzip
import math
import struct
import zlib
from io import BufferedIOBase
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fffexp.data.base import ClassificationData, Kind, Part, Rows, pixels
from fffexp.errors import UserError

# the third byte of an IDX file; all are big endian
DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
DIMENSIONS: dict[Kind, int] = {"images": 3, "labels": 1}
FETCH = "fetch it again (make data)"


class IDX(ClassificationData):
    """A folder with the four files of the MNIST family (MNIST, Fashion-MNIST, KMNIST, EMNIST, ...).

    They are named {train,t10k}-{images-idx3,labels-idx1}-ubyte or, with a dot, train-images.idx3-ubyte, each
    with or without .gz. Bytes are brought to [0, 1]; other types are taken as they are.

    Args:
        root: The folder; left out, `data/` below the current one.
        num_classes: Labels are 0 to num_classes - 1.

    Raises:
        UserError: a file is missing, cannot be read or does not fit the others.
    """

    folders: ClassVar[tuple[str, ...]] = ("data",)

    def __init__(self, root: str | None = None, num_classes: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.num_classes = num_classes
        self._files = _find(self.folders if root is None else (root,))
        _, shape = read_header(self._files["train", "images"], "images")
        self.in_shape = (1, *shape[1:])

    def source(self, part: Part, kind: Kind) -> str:
        """The path of the file."""
        return str(self._files[part, kind])

    def load(self, part: Part) -> Rows:
        """Inputs (rows, 1, height, width) and labels (rows,)."""
        images = read_idx(self._files[part, "images"], "images")
        labels = read_idx(self._files[part, "labels"], "labels")
        if labels.dtype.kind == "f":
            raise UserError(f"{self.source(part, 'labels')} holds {labels.dtype}, not whole numbers: {FETCH}")
        return pixels(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


class FashionMNIST(IDX):
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): 60,000 + 10,000 images of 28 x 28 pixels, 10 classes.

    Without `root` it is looked for in `data/`, then where Debian's package dataset-fashion-mnist puts it.
    """

    folders = ("data/fashion_mnist", "data", "/usr/share/datasets/fashion-mnist")


def read_idx(path: Path, kind: Kind) -> np.ndarray[Any, Any]:
    """The array in an IDX file, in native byte order; `kind` says how many dimensions it must have."""
    with _open(path) as file:
        dtype, shape = _header(path, file, kind)
        body = _read(path, file, -1)
    expected = math.prod(shape) * dtype.itemsize
    if len(body) != expected:
        problem = "is truncated" if len(body) < expected else "is too long"
        raise UserError(f"{path} {problem}, it holds {len(body)} bytes of data instead of {expected}: {FETCH}")
    return np.frombuffer(body, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def read_header(path: Path, kind: Kind) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Type and shape of the array in an IDX file, without reading the array."""
    with _open(path) as file:
        return _header(path, file, kind)


def _header(path: Path, file: BufferedIOBase, kind: Kind) -> tuple[np.dtype[Any], tuple[int, ...]]:
    magic = _read(path, file, 4)
    if len(magic) < 4:
        raise UserError(f"{path} is truncated, it holds {len(magic)} bytes in all: {FETCH}")
    zeros, code, dimensions = struct.unpack(">HBB", magic)
    if zeros or code not in DTYPES:
        raise UserError(f"{path} is not an IDX file, it begins with 0x{magic.hex()}: {FETCH}")
    if dimensions != DIMENSIONS[kind]:
        other = next((k for k, n in DIMENSIONS.items() if n == dimensions), "neither images nor labels")
        raise UserError(
            f"{path} should hold {kind} ({DIMENSIONS[kind]} dimensions) but has {dimensions}"
            f" (as for {other}): the file has the wrong name; rename it, or {FETCH}"
        )
    sizes = _read(path, file, 4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise UserError(f"{path} is truncated, its header ends early: {FETCH}")
    return np.dtype(DTYPES[code]), struct.unpack(f">{dimensions}I", sizes)


def _open(path: Path) -> BufferedIOBase:
    """By content, not by name: browsers and tools unpack a file and keep its .gz, or the other way round."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        return gzip.GzipFile(path) if packed else path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): fix its permissions, or {FETCH}") from error


def _read(path: Path, file: BufferedIOBase, size: int) -> bytes:
    try:
        return file.read(size)
    except EOFError as error:
        raise UserError(f"{path} is truncated, its gzip stream ends early: {FETCH}") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): {FETCH}") from error


def _find(folders: tuple[str, ...]) -> dict[tuple[Part, Kind], Path]:
    """The four files, all in the first folder that has any of them."""
    for folder in map(Path, folders):
        paths = {key: _path(folder, *key) for key in KEYS}
        if not any(paths.values()):
            continue
        for (part, kind), path in paths.items():
            if path is None:
                name = f"{PREFIXES[part]}-{kind}-idx{DIMENSIONS[kind]}-ubyte[.gz]"
                raise UserError(f"{folder / name} is missing: {FETCH}, or give --data.root FOLDER")
        return {key: path for key, path in paths.items() if path}
    raise UserError(
        f"no IDX files (train-images-idx3-ubyte[.gz], ...) in {', '.join(folders)}:"
        " run make data, or give --data.root FOLDER"
    )


KEYS: tuple[tuple[Part, Kind], ...] = (
    ("train", "images"),
    ("train", "labels"),
    ("test", "images"),
    ("test", "labels"),
)
PREFIXES: dict[Part, str] = {"train": "train", "test": "t10k"}


def _path(folder: Path, part: Part, kind: Kind) -> Path | None:
    names = [f"{PREFIXES[part]}-{kind}{mark}idx{DIMENSIONS[kind]}-ubyte{end}" for end in ("", ".gz") for mark in "-."]
    return next((path for name in names if (path := folder / name).is_file()), None)
