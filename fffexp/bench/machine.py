"""What this machine can do, measured in the run that reports shares of it."""

import timeit
from collections.abc import Callable
from pathlib import Path

import torch

from fffexp.timing import exclusive_timing, synchronize

REPEATS, GEMM_SIZE, READ_BYTES = 20, 2048, 2**30


def measure_limits(dtype: torch.dtype, device: str) -> dict[str, float]:
    """Best of 20 products of 2048 x 2048 matrices and of 20 reads of 1 GiB, with the machine to itself."""
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(dtype) for _ in range(2))
    # in float32 whatever the dtype: a sum in bfloat16 would be bound by its arithmetic
    memory = torch.ones(READ_BYTES // 4, device=device)
    with exclusive_timing():
        gemm, read = _best(lambda: a @ b, device), _best(memory.sum, device)
    return {"gemm_flops_per_s": 2 * GEMM_SIZE**3 / gemm, "read_bytes_per_s": READ_BYTES / read}


def _best(run: Callable[[], object], device: str) -> float:
    return min(timeit.repeat(lambda: (run(), synchronize(device)), number=1, repeat=REPEATS))


def last_level_cache_bytes() -> int:
    """Of the processor; 32 MiB where it does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 * 2**20)
