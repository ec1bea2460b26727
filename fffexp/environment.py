"""What a number depends on besides its config: host, processor, commit, versions, threads."""

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch


def training_device() -> str:
    """What Lightning trains on where the config says "auto"."""
    return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def environment(threads: list[int], device: str) -> dict[str, Any]:
    """Where the numbers come from."""
    from fffexp.kernels import build, operators

    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "compiler": build.compiler_version(),
        "instruction_set": torch.ops.fffexp.instruction_set() if operators.available() else None,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0") != "0",
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parents[1])]
    done = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if done.returncode:
        return None  # installed without its repository
    # what measures, not the results that are being written
    measuring = [*git, "diff", "--quiet", "HEAD", "--", "fffexp", "configs"]
    changed = subprocess.run(measuring, capture_output=True, check=False).returncode
    return done.stdout.strip() + ("-dirty" if changed else "")
