"""One process of a machine times at once, and all that is timed goes through one interleaved timer."""

import itertools
import os
import statistics
import sys
import tempfile
import threading
import time
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

# wait_for_timing looks at the lock this often: less than a warm-up, which therefore outlasts batches still under way.
LOOK_S = 0.01
WARM_UP_S = 0.05

_holder: int | None = None  # the thread of this process that holds the lock
_looked = 0.0


def lock_path() -> Path:
    """One file for all processes of this machine, whoever started them; FFFEXP_TIMING_LOCK names another."""
    return Path(os.environ.get("FFFEXP_TIMING_LOCK") or Path(tempfile.gettempdir()) / "fffexp-timing.lock")


@contextmanager
def exclusive_timing(shared: bool = False) -> Iterator[None]:
    """Hold the machine for timing: others wait to time, and training pauses at its next batch.

    Shared with all who train, it only waits for those who time. Within itself it does nothing.
    """
    global _holder
    if _holder == threading.get_ident():
        yield
        return
    path = lock_path()
    with ExitStack() as stack:
        if sys.platform == "win32":  # no shared locks: those who train take turns for a moment
            stack.enter_context(FileLock(path))
        else:
            import fcntl  # filelock has no locks that are shared, or that several users may have in /tmp

            if not path.exists():
                path.touch(mode=0o644)
            # reading is enough for a lock, and all that is allowed on another user's file
            fcntl.flock(stack.enter_context(path.open()), fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        _holder = None if shared else threading.get_ident()
        try:
            yield
        finally:
            _holder = None


def wait_for_timing() -> None:
    """Return once nobody else on this machine is timing; meant to be called at every batch."""
    global _looked
    if time.monotonic() - _looked >= LOOK_S:
        with exclusive_timing(shared=True):
            _looked = time.monotonic()


def synchronize(device: str | torch.device) -> None:
    """Wait for the work of this device, so that the clock sees it."""
    device = torch.device(device)
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    seconds: float = 2.0,
    *,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    rounds: tuple[int, int] = (5, 101),
    block_s: float = 0.01,
) -> dict[str, list[float]]:
    """Seconds of each call, by its name, in each round; drift of the machine's speed meets all calls alike.

    With the machine to itself, after a warm-up, all calls run in turn, round after round, until the seconds have
    passed: at least `rounds[0]` of them and at most `rounds[1]`.

    Args:
        device: where the calls work; its work belongs to the time.
        threads: of torch during the timing; None leaves them.
        block_s: in a round a call is repeated for about so long, and the mean counts; 0: one call a round.
    """
    wait = torch.device(device).type != "cpu"
    timers = {name: timeit.Timer(partial(_and_wait, call, device) if wait else call) for name, call in calls.items()}
    spent: dict[str, list[float]] = {name: [] for name in calls}
    with exclusive_timing(), ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads or torch.get_num_threads())
        warm = [[timer.timeit(1) for timer in timers.values()] for _ in _rounds(2, sys.maxsize, WARM_UP_S)]
        repeats = [max(1, round(block_s / max(each, 1e-9))) for each in map(min, zip(*warm, strict=True))]
        for _ in _rounds(*rounds, seconds):
            for (name, timer), times in zip(timers.items(), repeats, strict=True):
                spent[name].append(timer.timeit(times) / times)
    return spent


def _rounds(fewest: int, most: int, seconds: float) -> Iterator[int]:
    end = time.perf_counter() + seconds
    return itertools.takewhile(lambda done: done < fewest or time.perf_counter() <= end, range(most))


def _and_wait(call: Callable[[], object], device: str | torch.device) -> None:
    call()
    synchronize(device)


def rotating(call: Callable[[Any], object], inputs: Iterable[Any]) -> Callable[[], object]:
    """The call on the next of the inputs, again and again, so that no cache holds what only one of them needs."""
    following = itertools.cycle(inputs).__next__
    return lambda: call(following())


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median of the ratios of the rounds: what disturbed a round disturbed both."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
