"""`make data`: Fashion-MNIST into data/fashion_mnist, from Debian's package where apt is there, else the hub."""

import gzip
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from fffexp.data.hub import Hub
from fffexp.errors import UserError

TARGET = Path("data/fashion_mnist")
PACKAGE = "dataset-fashion-mnist"


def main() -> int:
    """Fetch, unless it is there."""
    if len(list(TARGET.glob("*-ubyte.gz"))) == 4:
        print(f"{TARGET} is complete")
        return 0
    TARGET.mkdir(parents=True, exist_ok=True)
    try:
        source = "Debian's package" if _from_debian() else _from_hub()
    except UserError as error:
        print(f"make data: {error}", file=sys.stderr)
        return 2
    print(f"{TARGET}: from {source}")
    return 0


def _from_debian() -> bool:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return False
    # download and unpack, which needs no root and installs nothing
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        if subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, capture_output=True).returncode:
            print(f"apt-get cannot download {PACKAGE} (apt-get update may help); trying the hub", file=sys.stderr)
            return False
        (package,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
        for file in Path(folder).rglob("*-ubyte.gz"):
            shutil.copy(file, TARGET / file.name)
    return True


def _from_hub() -> str:
    hub = Hub("fashion_mnist")
    for part, prefix in (("train", "train"), ("test", "t10k")):
        inputs, labels = hub.load(part)  # type: ignore[arg-type] # both are parts
        images = (inputs.squeeze(1) * 255).round().byte().numpy()
        _write(TARGET / f"{prefix}-images-idx3-ubyte.gz", images)
        _write(TARGET / f"{prefix}-labels-idx1-ubyte.gz", labels.byte().numpy())
    return "the Hugging Face hub"


def _write(path: Path, array: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> None:
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, dtype=">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


if __name__ == "__main__":
    sys.exit(main())
