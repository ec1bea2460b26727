"""`make data`: Fashion-MNIST into data/fashion_mnist, from Debian's package where apt is there, else the hub."""

import gzip
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from fffexp.data.hub import Hub
from fffexp.data.idx import FILES, IDX
from fffexp.errors import UserError

TARGET = Path("data/fashion_mnist")
PACKAGE = "dataset-fashion-mnist"


def main() -> int:
    """Fetch, unless it is there."""
    try:
        print(f"{TARGET} is {fetch(TARGET)}")
    except UserError as error:
        print(f"make data: {error}", file=sys.stderr)
        return 2
    return 0


def fetch(folder: Path) -> str:
    """Bring the four files into a folder, in place of damaged ones; "complete" if all were there, or from where."""
    if _is_whole(folder):
        return "complete"
    with tempfile.TemporaryDirectory() as made:
        source = "Debian's package" if _from_debian(Path(made)) else _from_hub(Path(made))
        if not _is_whole(Path(made)):
            raise UserError(f"what {source} holds is damaged: try again")
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*-ubyte*"):
            old.unlink()
        shutil.copytree(made, folder, dirs_exist_ok=True)
    return f"from {source}"


def _is_whole(folder: Path) -> bool:
    try:
        return [len(IDX(str(folder)).load(part)[1]) for part in ("train", "test")] == [60_000, 10_000]
    except UserError:
        return False


def _from_debian(folder: Path) -> bool:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return False
    # download and unpack, which needs no root and installs nothing
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        if subprocess.run(["apt-get", "download", PACKAGE], cwd=place, capture_output=True).returncode:
            print(f"apt-get cannot download {PACKAGE} (apt-get update may help); trying the hub", file=sys.stderr)
            return False
        subprocess.run(["dpkg-deb", "-x", *Path(place).glob("*.deb"), place], check=True)
        for file in Path(place).rglob("*-ubyte.gz"):
            shutil.copy(file, folder)
    return True


def _from_hub(folder: Path) -> str:
    rows = {part: Hub("fashion_mnist").load(part) for part, _ in FILES}
    for (part, kind), name in FILES.items():
        inputs, labels = rows[part]
        array = (labels if kind == "labels" else (inputs.squeeze(1) * 255).round()).byte().numpy()
        header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, dtype=">i4").tobytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return "the Hugging Face hub"


if __name__ == "__main__":
    sys.exit(main())
