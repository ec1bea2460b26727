"""What this machine can do, measured in the run that reports shares of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fffexp.timing import exclusive_timing, synchronize

REPEATS = 20
GEMM_SIZE = 2048
READ_BYTES = 2**30


@dataclass(frozen=True)
class Limits:
    """Best of 20 products of 2048 x 2048 matrices and of 20 reads of 1 GiB."""

    gemm_flops_per_s: float
    read_bytes_per_s: float


def measure_limits(dtype: torch.dtype, device: str) -> Limits:
    """With the threads that torch is set to, and the machine to itself."""
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(dtype) for _ in range(2))
    # in float32 whatever the dtype: a sum in bfloat16 would be bound by its arithmetic
    memory = torch.ones(READ_BYTES // 4, device=device)
    with exclusive_timing():
        gemm, read = _best(lambda: a @ b, device), _best(memory.sum, device)
    return Limits(2 * GEMM_SIZE**3 / gemm, READ_BYTES / read)


def _best(run: Callable[[], object], device: str) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def last_level_cache_bytes() -> int:
    """Of the processor; 32 MiB where it does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 * 2**20)
