"""`make data`: real data into data/, from Debian's packages where apt is there, else from elsewhere."""

import gzip
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fffexp.data.hub import Hub
from fffexp.data.idx import FILES, IDX
from fffexp.errors import UserError

# the edition of Debian 12, 39,952,321 bytes: bits per byte of different texts cannot be compared
GCIDE = "802beb667e1fb666203e750f1faea60d5c202ac5430c2083c4180494609f10a7"
MIRROR = "http://deb.debian.org/debian/pool/main/d/dict-gcide/dict-gcide_0.48.5+nmu2_all.deb"


@dataclass(frozen=True)
class DataSet:
    """One that `make data` fetches.

    Args:
        files: how the names of its files in data/ look; what else is there stays.
        is_whole: whether a folder holds all of it, undamaged.
        sources: by name, in the order to try: each fills a folder, or raises a UserError.
    """

    files: str
    is_whole: Callable[[Path], bool]
    sources: Mapping[str, Callable[[Path], None]]


def main() -> int:
    """Fetch each that is not there; the exit status."""
    status = 0
    for name, data in DATA_SETS.items():
        folder = Path("data") / name
        try:
            print(f"{folder} is {fetch(data, folder)}")
        except UserError as error:
            print(f"make data: {name}: {error}", file=sys.stderr)
            status = 2
    return status


def fetch(data: DataSet, folder: Path) -> str:
    """Bring a data set into a folder, in place of damaged files; "complete" if it was there, or from where."""
    if data.is_whole(folder):
        return "complete"
    problems = []
    for source, bring in data.sources.items():
        with tempfile.TemporaryDirectory() as made:
            try:
                bring(Path(made))
            except UserError as error:
                problems.append(str(error))
                continue
            if data.is_whole(Path(made)):
                folder.mkdir(parents=True, exist_ok=True)
                for old in folder.glob(data.files):
                    old.unlink()
                for file in Path(made).iterdir():
                    shutil.copy(file, folder)
                return f"from {source}"
            problems.append(f"what {source} holds is damaged, or another edition")
    raise UserError("; ".join(problems))


def _by_apt(folder: Path, package: str, take: Callable[[Path, Path], None]) -> None:
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)  # apt downloads as a user of its own
        there = shutil.which("apt-get")
        if not there or subprocess.run([there, "download", package], cwd=place, capture_output=True).returncode:
            raise UserError(f"apt-get cannot download {package} (apt-get update may help)" if there else "no apt-get")
        (downloaded,) = Path(place).glob("*.deb")
        _unpack(downloaded, Path(place))
        take(Path(place), folder)


def _by_mirror(folder: Path, url: str, take: Callable[[Path, Path], None]) -> None:
    with tempfile.TemporaryDirectory() as place:
        package = Path(place) / "package.deb"
        try:
            with urllib.request.urlopen(url, timeout=60) as response, package.open("wb") as file:
                shutil.copyfileobj(response, file)
            _unpack(package, Path(place))
        except OSError as error:  # urllib's own are such
            problem = getattr(error, "reason", error)
            raise UserError(f"{url} cannot be fetched ({problem}): check the network connection") from error
        take(Path(place), folder)


def _unpack(package: Path, into: Path) -> None:
    # needs no root and installs nothing; without Debian's tool: an ar archive, which behind 8 bytes has headers of 60
    # (name; from 48 on, size), each before contents of an even length
    if shutil.which("dpkg-deb"):
        subprocess.run(["dpkg-deb", "-x", package, into], check=True)
        return
    with package.open("rb") as archive:
        archive.seek(8)
        while header := archive.read(60):
            content = archive.read(int(header[48:58]))
            archive.seek(len(content) % 2, io.SEEK_CUR)
            if header.startswith(b"data.tar"):
                with tarfile.open(fileobj=io.BytesIO(content)) as files:
                    for member in filter(tarfile.TarInfo.isfile, files):  # by their bare names, so none ends elsewhere
                        if (packed := files.extractfile(member)) is not None:
                            (into / Path(member.name).name).write_bytes(packed.read())


def _fashion_is_whole(folder: Path) -> bool:
    try:
        return [len(IDX(str(folder)).load(part)[1]) for part in ("train", "test")] == [60_000, 10_000]
    except UserError:
        return False


def _take_fashion(unpacked: Path, folder: Path) -> None:
    for file in unpacked.rglob("*-ubyte.gz"):
        shutil.copy(file, folder)


def _fashion_from_hub(folder: Path) -> None:
    data = Hub("fashion_mnist")
    rows = {part: data.load(part) for part, _ in FILES}
    for (part, kind), name in FILES.items():
        found = rows[part]
        assert found is not None  # it has both parts
        inputs, labels = found
        array = (labels if kind == "labels" else (inputs.squeeze(1) * 255).round()).byte().numpy()
        header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, dtype=">i4").tobytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))


def _gcide_is_whole(folder: Path) -> bool:
    file = folder / "gcide.txt"
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == GCIDE


def _take_gcide(unpacked: Path, folder: Path) -> None:
    for file in unpacked.rglob("gcide.dict.dz"):  # which is gzip
        with gzip.open(file) as packed, (folder / "gcide.txt").open("wb") as text:
            shutil.copyfileobj(packed, text)


def _python_files() -> list[Path]:
    home = Path(torch.__file__).parent
    # but for what differs between its builds
    return sorted(path for path in home.rglob("*.py") if path != home / "version.py")


def _python_is_whole(folder: Path) -> bool:
    file = folder / "python.txt"
    return file.is_file() and file.stat().st_size == sum(path.stat().st_size for path in _python_files())


def _python_from_torch(folder: Path) -> None:
    with (folder / "python.txt").open("wb") as text:
        for path in _python_files():
            text.write(path.read_bytes())


DATA_SETS = {
    "fashion_mnist": DataSet(
        "*-ubyte*",
        _fashion_is_whole,
        {
            "Debian's package": partial(_by_apt, package="dataset-fashion-mnist", take=_take_fashion),
            "the Hugging Face hub": _fashion_from_hub,
        },
    ),
    "gcide": DataSet(
        "gcide.txt",
        _gcide_is_whole,
        {
            "Debian's package": partial(_by_apt, package="dict-gcide", take=_take_gcide),
            "a mirror of Debian": partial(_by_mirror, url=MIRROR, take=_take_gcide),
        },
    ),
    # 46 MB of source code that are on every machine: another kind of text
    "python": DataSet("python.txt", _python_is_whole, {"the files of torch": _python_from_torch}),
}

if __name__ == "__main__":
    sys.exit(main())
