"""What every test process gets: one thread, a timing lock of its own, Triton's interpreter where there is no GPU."""

import getpass
import os
import signal
import tempfile
from pathlib import Path

# read when torch is imported. Threads that wait for each other make tiny layers ten times slower on a busy machine
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
CACHE = Path(tempfile.gettempdir()) / f"fffexp-tests-{getpass.getuser()}"
CACHE.mkdir(exist_ok=True)
# tests that time run beside each other: none looks at how fast anything is
os.environ["FFFEXP_TIMING_LOCK"] = str(CACHE / f"timing-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}.lock")

import pytest  # noqa: E402
import torch  # noqa: E402
from filelock import FileLock  # noqa: E402

# a shell has what it runs in the background ignore Ctrl-C, and so would the programs that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by whichever test comes first


def fetched(name: str) -> Path:
    """Folder of a real data set of `make data`, fetched once; for tests that are slow."""
    from fffexp.data.fetch import DATA_SETS, fetch
    from fffexp.errors import UserError

    with FileLock(CACHE / f"{name}.lock"):
        try:
            fetch(DATA_SETS[name], CACHE / name)
        except UserError as error:
            pytest.skip(f"{name} cannot be fetched: {error}")
    return CACHE / name


@pytest.fixture(scope="session")
def fashion_mnist() -> Path:
    return fetched("fashion_mnist")


@pytest.fixture(scope="session")
def gcide() -> Path:
    return fetched("gcide")
