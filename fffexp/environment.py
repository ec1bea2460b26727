"""What a number depends on besides its config: host, processor, commit, versions, threads."""

import os
import platform
import socket
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# Packages whose release may change a result.
PACKAGES = ("fffexp", "numpy", "lightning", "optuna")


def training_device() -> str:
    """What Lightning trains on where the config says "auto"."""
    return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def environment(threads: list[int], device: str) -> dict[str, Any]:
    """Where the numbers come from, for a results file."""
    from fffexp.kernels import build, operators

    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "compiler": build.compiler_version(),
        "instruction_set": torch.ops.fffexp.instruction_set() if operators.available() else None,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0") != "0",
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "host": host(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def host() -> str:
    """Name of this machine."""
    return socket.gethostname()


@cache
def git_commit() -> str | None:
    """Commit that this code is of, with "-dirty" where it was changed; None where git or the repository is missing."""
    package = Path(__file__).parent
    try:
        # a package installed within another repository is not of its commit
        _git("ls-files", "--error-unmatch", __file__)
        commit = _git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None
    # what measures, not the results that are being written
    changed = ["git", "-C", str(package.parent), "diff", "--quiet", "HEAD", "--", "fffexp", "configs", "studies"]
    return commit + ("-dirty" if subprocess.run(changed, capture_output=True, check=False).returncode else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def peak_memory_mb() -> float | None:
    """Most memory that this process ever held; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB elsewhere


@cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
