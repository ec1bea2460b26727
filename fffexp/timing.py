"""Latency of a network at inference, with the machine to itself."""

import fcntl
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

# One file for all processes of this machine, whoever started them.
_LOCK = Path(tempfile.gettempdir()) / "fffexp-timing.lock"
_open_lock: IO[str] | None = None
_looked = 0.0
# Less than the warm-up of a timing, which therefore outlasts the batches still under way.
LOOK_S = 0.01

# Latencies are timed beside this dense layer, so that they can be compared when the machine's speed drifts.
REFERENCE_WIDTH = 128
WARM_UP_S = 0.05
# Rounds of a timing: enough for a steady median of a fast layer, few for a slow one.
ROUNDS_S = 0.1
MIN_ROUNDS, MAX_ROUNDS = 15, 300


@contextmanager
def exclusive_timing() -> Iterator[None]:
    """Hold the machine for timing: others wait to time, and training pauses at its next batch."""
    with _lock_file() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def wait_for_timing() -> None:
    """Return once no other process of this machine is timing; meant to be called at every batch."""
    global _open_lock, _looked
    if time.monotonic() - _looked < LOOK_S:
        return
    _looked = time.monotonic()
    if _open_lock is None:
        _open_lock = _lock_file()
    fcntl.flock(_open_lock, fcntl.LOCK_SH)
    fcntl.flock(_open_lock, fcntl.LOCK_UN)


def _lock_file() -> IO[str]:
    try:  # reading is enough for a lock, and all that is allowed on another user's file
        return _LOCK.open()
    except FileNotFoundError:
        _LOCK.touch(mode=0o644)
        return _LOCK.open()


def interleaved_medians(contenders: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, run in turn after a warm-up, so that drift of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    warm_until = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < warm_until:
        for run in contenders.values():
            run()
    begun = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - begun > ROUNDS_S:
            break
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(network: nn.Module, inputs: Tensor, reference: nn.Module) -> dict[str, float]:
    """Speed metrics of a network on real inputs, interleaved with a reference.

    Args:
        network: (batch, ...) -> anything.
        inputs: (samples, ...) that batches are taken from in rotation.
        reference: takes the same inputs; its latency and the ratio to it are given beside.
    """
    modules = {"": network.eval(), "reference_": reference.eval()}
    results: dict[str, float] = {}
    with exclusive_timing(), torch.inference_mode():
        for batch_size, name in ((1, "latency_b1"), (256, "latency_b256"), (2048, "b2048")):
            batches = _batches(inputs, batch_size)
            medians = interleaved_medians(
                {prefix: partial(_run, module, itertools.cycle(batches)) for prefix, module in modules.items()}
            )
            if batch_size == 2048:
                results["speed/throughput_b2048"] = batch_size / medians[""]
                continue
            results |= {f"speed/{prefix}{name}_ms": 1e3 * seconds for prefix, seconds in medians.items()}
            results[f"speed/{name}_ratio"] = medians[""] / medians["reference_"]
    return results


def _batches(inputs: Tensor, batch_size: int) -> list[Tensor]:
    """Up to 64 different batches; data that does not fill one is repeated."""
    repeated = inputs.repeat(-(-batch_size // len(inputs)), *[1] * (inputs.dim() - 1))
    return [batch for batch in repeated.split(batch_size)[:64] if len(batch) == batch_size]


def _run(module: nn.Module, batches: Iterator[Tensor]) -> None:
    module(next(batches))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
