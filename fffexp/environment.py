"""What a number depends on besides its config: host, processor, commit, versions, threads."""

import os
import platform
import re
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch


def training_device() -> str:
    """What Lightning trains on where the config says "auto"."""
    return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def environment(threads: list[int], device: str) -> dict[str, Any]:
    """Where the numbers come from, for a results file."""
    from fffexp.kernels import build, operators

    packages = ("fffexp", "numpy", "lightning", "optuna")  # whose release may change a result
    versions = {name: next((found.version for found in distributions(name=name)), None) for name in packages}
    about = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)$", about.read_text() if about.exists() else "", re.MULTILINE)
    return {
        "cpu": named[1].strip() if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "compiler": build.compiler_version(),
        "instruction_set": torch.ops.fffexp.instruction_set() if operators.available() else None,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0") != "0",
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "host": platform.node(),
        "versions": {"python": platform.python_version()} | versions,
    }


@cache
def git_commit() -> str | None:
    """Commit that this code is of, with "-dirty" where it was changed; None where git or the repository is missing."""
    try:
        # a package installed within another repository is not of its commit
        _git("ls-files", "--error-unmatch", __file__)
        # what measures, not the results that are being written
        changed = _git("diff", "--name-only", "HEAD", "--", *(f":/{name}" for name in ("fffexp", "configs", "studies")))
        return _git("rev-parse", "HEAD") + "-dirty" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def machine() -> str:
    """What process numbers belong to: containers may share the name of their host, but not these two."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not on Linux
        return platform.node()


def peak_memory_mb() -> float | None:
    """Most memory that this process ever held; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB elsewhere
