"""`make data`, with stand-ins for Debian's tools, its mirror and the hub."""

import functools
import gzip
import hashlib
import io
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fffexp.data import IDX, Text, fetch, hub
from fffexp.data.fetch import DATA_SETS, main
from fffexp.errors import UserError

ROWS = {"train": 60_000, "t10k": 10_000}
TEXT = b"Lari \\Lari\\ prop. n.\n   A suborder of birds.\n" * 100


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only programs on the path; the packages hold images of one pixel, and a short text."""
    for name in ("dataset-fashion-mnist", "dict-gcide", "bin"):
        (tmp_path / name).mkdir()
    for part, rows in ROWS.items():
        for name, shape in (("images-idx3", (rows, 1, 1)), ("labels-idx1", (rows,))):
            header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
            content = header + (np.arange(rows) % 10).astype("u1").tobytes()
            # read by content, not by name
            (tmp_path / "dataset-fashion-mnist" / f"{part}-{name}-ubyte.gz").write_bytes(content)
    (tmp_path / "dict-gcide" / "gcide.dict.dz").write_bytes(gzip.compress(TEXT))
    bin = tmp_path / "bin"
    script(bin / "apt-get", 'test "$1" = download && echo "$2" > package.deb')
    script(bin / "dpkg-deb", f'cp -r "{tmp_path}/$(cat "$2")"/* "$3"')
    monkeypatch.setenv("PATH", f"{bin}:/usr/bin:/bin")
    monkeypatch.setattr(fetch, "GCIDE", hashlib.sha256(TEXT).hexdigest())
    monkeypatch.chdir(tmp_path)
    return bin


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network."""

    def no_hub(path: str, *_: object) -> None:
        raise UserError(f"{path} cannot be fetched")

    def no_mirror(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(hub, "fetch", no_hub)
    monkeypatch.setattr("urllib.request.urlopen", no_mirror)


def test_what_is_missing_or_damaged_is_fetched(tools: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("data")
    for spoil in (None, "fashion_mnist/train-images-idx3-ubyte.gz", "fashion_mnist/t10k-labels-idx1-ubyte.gz"):
        if spoil:
            (folder / spoil).write_bytes(b"\x00")
        assert main() == 0
        assert "data/fashion_mnist is from Debian's package" in capsys.readouterr().out
    for content in (b"", TEXT[:-1], b"x" + TEXT[1:]):
        (folder / "gcide" / "gcide.txt").write_bytes(content)
        assert main() == 0
        assert capsys.readouterr().out.splitlines() == [
            "data/fashion_mnist is complete", "data/gcide is from Debian's package", "data/python is complete",
        ]  # fmt: skip
    assert main() == 0
    assert "data/gcide is complete" in capsys.readouterr().out
    assert len(IDX(str(folder / "fashion_mnist")).load("test")[1]) == 10_000
    assert Text("data/gcide", context=16).vocab_size == 256
    assert (folder / "gcide" / "gcide.txt").read_bytes() == TEXT


@pytest.mark.usefixtures("unreachable")
def test_out_of_reach_is_one_line_each(tools: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script(tools / "apt-get", "exit 100")
    assert main() == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("make data: fashion_mnist: apt-get cannot download dataset-fashion-mnist")
    assert first.endswith("; zalando-datasets/fashion_mnist cannot be fetched")
    assert second.startswith("make data: gcide: apt-get cannot download dict-gcide (apt-get update may help); http://")
    assert second.endswith("cannot be fetched (no route to host): check the network connection")
    assert [path.name for path in Path("data").iterdir()] == ["python"], "which needs no network"


@pytest.mark.usefixtures("unreachable")
def test_a_damaged_package_replaces_nothing(tools: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset-fashion-mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"\x00")
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"mine")
    with pytest.raises(UserError, match="what Debian's package holds is damaged"):
        fetch.fetch(DATA_SETS["fashion_mnist"], folder)
    assert (folder / "train-images-idx3-ubyte.gz").read_bytes() == b"mine"


def package(content: bytes) -> bytes:
    """A Debian package with this gcide.dict.dz."""
    files = io.BytesIO()
    with tarfile.open(fileobj=files, mode="w:xz") as archive:
        entry = tarfile.TarInfo("./usr/share/dictd/gcide.dict.dz")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    made = b"!<arch>\n"
    for name, member in (("debian-binary", b"2.0"), ("data.tar.xz", files.getvalue())):
        header = f"{name:16}{0:<12}{0:<6}{0:<6}{'100644':8}{len(member):<10}`\n"
        made += header.encode() + member + b"\n" * (len(member) % 2)
    return made


def test_without_debians_tools_a_mirror_serves(
    tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    asked: list[Any] = []

    def mirror(url: str, **_: object) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(package(gzip.compress(TEXT)))

    monkeypatch.setattr("urllib.request.urlopen", mirror)
    assert fetch.fetch(DATA_SETS["gcide"], Path("data/gcide")) == "from a mirror of Debian"
    assert asked == [fetch.MIRROR]
    assert Path("data/gcide/gcide.txt").read_bytes() == TEXT


def test_another_edition_of_debians_is_not_taken(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = (Path("dict-gcide") / "gcide.dict.dz").read_bytes()
    (Path("dict-gcide") / "gcide.dict.dz").write_bytes(gzip.compress(TEXT + b"more"))
    monkeypatch.setattr("shutil.which", functools.partial(which, tools))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(package(original)))
    script(tools / "apt-get", f"cp {Path.cwd()}/other.deb package.deb")
    Path("other.deb").write_bytes(package(gzip.compress(TEXT + b"more")))
    assert fetch.fetch(DATA_SETS["gcide"], Path("data/gcide")) == "from a mirror of Debian"
    Path("data/gcide/gcide.txt").unlink()
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(package(gzip.compress(b"x"))))
    with pytest.raises(UserError, match="what a mirror of Debian holds is damaged, or another edition"):
        fetch.fetch(DATA_SETS["gcide"], Path("data/gcide"))


def which(tools: Path, name: str) -> str | None:
    """There is apt-get alone."""
    return str(tools / name) if name == "apt-get" else None


@pytest.mark.slow
def test_the_real_gcide(gcide: Path) -> None:
    data = Text(str(gcide))
    data.setup()
    parts = (data.train_data, data.val_data, data.test_data)
    assert [len(part.tokens) for part in parts] == [35_957_089, 1_997_616, 1_997_616]
    inputs, _, num_bytes = next(iter(data.val_dataloader()))
    assert inputs.shape == (16, 256)
    assert num_bytes.tolist() == [256] * 16
    assert "[1913 Webster]" in data.decode(data.test_data.tokens[:5000].tolist())


def test_python_sources_are_those_of_torch(tmp_path: Path) -> None:
    folder = tmp_path / "python"
    assert fetch.fetch(DATA_SETS["python"], folder) == "from the files of torch"
    assert fetch.fetch(DATA_SETS["python"], folder) == "complete"
    text = (folder / "python.txt").read_bytes()
    assert Path(torch.nn.__file__).read_bytes() in text
    (folder / "python.txt").write_bytes(text[:-1])
    assert fetch.fetch(DATA_SETS["python"], folder) == "from the files of torch", "a part of a file is fetched again"
    assert (folder / "python.txt").read_bytes() == text
