"""MNIST-like data sets from IDX files on disk, gzipped or not."""

import gzip
import math
import struct
import zlib
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from typing_extensions import override

from fffexp.data.base import InMemoryData, Kind, Part, Rows, pixels
from fffexp.errors import UserError, refuse

FILES: dict[tuple[Part, Kind], str] = {
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte",
    ("test", "labels"): "t10k-labels-idx1-ubyte",
}
# the third byte of an IDX file; all are big endian
DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
DIMENSIONS: dict[Kind, int] = {"images": 3, "labels": 1}
FETCH = "fetch it again (make data)"


class IDX(InMemoryData):
    """A folder with the four files of the MNIST family (MNIST, Fashion-MNIST, KMNIST, EMNIST, ...).

    They are named {train,t10k}-{images-idx3,labels-idx1}-ubyte or, with a dot, train-images.idx3-ubyte, each
    with or without .gz. Bytes are brought to [0, 1]; other types are taken as they are.

    Args:
        root: The folder; left out, `data/` below the current one.
        num_classes: Labels are 0 to num_classes - 1.
    """

    folders: ClassVar[tuple[str, ...]] = ("data",)

    def __init__(self, root: str | None = None, num_classes: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root, self.num_classes = root, num_classes
        self._files = _find(self.folders if root is None else (root,))
        self.in_shape = (1, *_read(self._files["train", "images"], "images", header_alone=True)[1][1:])

    @override
    def source(self, part: Part, kind: Kind) -> str:
        return str(self._files[part, kind])

    @override
    def load(self, part: Part) -> Rows:
        images, labels = (read_idx(self._files[part, kind], kind) for kind in DIMENSIONS)
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
    dtype, shape, body = _read(path, kind)
    size = math.prod(shape) * dtype.itemsize
    problem = "is truncated" if len(body) < size else "is too long"
    refuse((len(body) != size, f"{path} {problem}, it holds {len(body)} bytes of data instead of {size}: {FETCH}"))
    return np.frombuffer(body, dtype).reshape(shape).astype(dtype.newbyteorder("="))


# type and shape of the array in an IDX file, and its bytes unless they are not wanted
def _read(path: Path, kind: Kind, header_alone: bool = False) -> tuple[np.dtype[Any], tuple[int, ...], bytes]:
    wanted = DIMENSIONS[kind]
    try:
        # by content, not by name: browsers and tools unpack a file and keep its .gz, or the other way round
        with path.open("rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            magic, sizes, body = file.read(4), file.read(4 * wanted), b"" if header_alone else file.read()
    except EOFError as error:
        raise UserError(f"{path} is truncated, its gzip stream ends early: {FETCH}") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): {FETCH}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): fix its permissions, or {FETCH}") from error
    zeros, code, dimensions = struct.unpack(">HBB", magic.ljust(4, b"\0"))
    other = next((k for k, n in DIMENSIONS.items() if n == dimensions), "neither images nor labels")
    counts = f"should hold {kind} ({wanted} dimensions) but has {dimensions} (as for {other})"
    refuse(
        (len(magic) < 4, f"{path} is truncated, it holds {len(magic)} bytes in all: {FETCH}"),
        (zeros or code not in DTYPES, f"{path} is not an IDX file, it begins with 0x{magic.hex()}: {FETCH}"),
        (dimensions != wanted, f"{path} {counts}: the file has the wrong name; rename it, or {FETCH}"),
        (len(sizes) < 4 * wanted, f"{path} is truncated, its header ends early: {FETCH}"),
    )
    return np.dtype(DTYPES[code]), struct.unpack(f">{dimensions}I", sizes), body


# the four files, all in the first folder that has any of them
def _find(folders: tuple[str, ...]) -> dict[tuple[Part, Kind], Path]:
    for folder in map(Path, folders):
        found = {
            key: path
            for key, name in FILES.items()
            for end, form in product((".gz", ""), (name.replace("-idx", ".idx"), name))  # the last that is there
            if (path := folder / (form + end)).is_file()
        }
        if missing := [name for key, name in FILES.items() if found and key not in found]:
            raise UserError(f"{folder / missing[0]}[.gz] is missing: {FETCH}, or give --data.root FOLDER")
        if found:
            return found
    raise UserError(
        f"no IDX files (train-images-idx3-ubyte[.gz], ...) in {', '.join(folders)}:"
        " run make data, or give --data.root FOLDER"
    )
