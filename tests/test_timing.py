"""Timings: who waits for whom, and what is measured."""

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fffexp.timing import (
    LOOK_S,
    exclusive_timing,
    interleaved,
    lock_path,
    median_ratio,
    rotating,
    synchronize,
    wait_for_timing,
)


@pytest.fixture(autouse=True)
def own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may be timing on this machine."""
    monkeypatch.setenv("FFFEXP_TIMING_LOCK", str(tmp_path / "timing.lock"))
    time.sleep(LOOK_S)  # who has just looked does not look again


def test_all_processes_of_a_machine_share_a_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FFFEXP_TIMING_LOCK")
    assert lock_path() == Path(tempfile.gettempdir()) / "fffexp-timing.lock"


def test_calls_run_in_turn() -> None:
    calls: list[str] = []
    seconds = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.05, block_s=0)
    assert calls == ["a", "b"] * (len(calls) // 2)
    assert list(seconds) == ["a", "b"]
    assert len(seconds["a"]) == len(seconds["b"])


@pytest.mark.parametrize(("pause", "rounds"), [(0.0, 20), (0.03, 5)])
def test_rounds(pause: float, rounds: int) -> None:
    seconds = interleaved({"a": lambda: time.sleep(pause)}, 60.0 if not pause else 0.1, rounds=(5, 20), block_s=0)
    assert len(seconds["a"]) == rounds
    assert min(seconds["a"]) >= pause


def test_a_short_call_is_repeated_in_a_round_and_a_long_one_is_not() -> None:
    calls: Counter[str] = Counter()

    def call(name: str, pause: float) -> None:
        calls[name] += 1
        time.sleep(pause)

    seconds = interleaved({"a": lambda: call("a", 1e-4), "b": lambda: call("b", 0.2)}, 0.0, rounds=(3, 3))
    assert calls["a"] > 5 * calls["b"]
    assert all(1e-4 <= each < 0.2 for each in seconds["a"]), "it is the time of one call"


def test_the_threads_of_torch_are_set_for_the_timing_alone() -> None:
    before, during = torch.get_num_threads(), []
    interleaved({"a": lambda: during.append(torch.get_num_threads())}, 0.0, threads=before + 1)
    assert set(during) == {before + 1}
    assert torch.get_num_threads() == before


def test_the_median_ignores_a_pause() -> None:
    rounds = iter(range(10**6))
    seconds = interleaved({"a": lambda: time.sleep(0.05 * (next(rounds) % 100 == 99))}, 0.5, rounds=(5, 300), block_s=0)
    assert statistics.median(seconds["a"]) < 0.01
    assert median_ratio([1.0, 1.0, 100.0], [2.0, 2.0, 1.0]) == 0.5


def test_inputs_rotate() -> None:
    got: list[int] = []
    run = rotating(got.append, [1, 2, 3])
    for _ in range(5):
        run()
    assert got == [1, 2, 3, 1, 2]


@pytest.mark.parametrize(("device", "waits"), [("cpu", []), ("mps", ["mps"]), ("cuda:1", ["cuda:1"])])
def test_the_clock_waits_for_the_device_of_the_work(
    device: str, waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[str] = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: waited.append(str(device)))
    synchronize(device)
    assert waited == waits
    waited.clear()
    times = interleaved({"a": lambda: None}, 0.0, device=device)
    assert set(waited) == set(waits)
    assert len(waited) >= len(waits) * len(times["a"])


HOLD = """
import sys
from fffexp.timing import exclusive_timing
with exclusive_timing():
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder() -> Iterator["subprocess.Popen[str]"]:
    """Another process that is timing until it reads a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "FFFEXP_TIMING_LOCK": str(lock_path())},
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def time_exclusively() -> None:
    with exclusive_timing():
        pass


def test_one_process_times_and_training_pauses(holder: "subprocess.Popen[str]") -> None:
    threads = [threading.Thread(target=target, daemon=True) for target in (time_exclusively, wait_for_timing)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    assert all(thread.is_alive() for thread in threads)
    assert holder.stdin
    holder.stdin.write("\n")
    holder.stdin.flush()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_a_killed_process_holds_nobody_up(holder: "subprocess.Popen[str]") -> None:
    holder.kill()
    holder.wait()
    thread = threading.Thread(target=time_exclusively, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def test_training_does_not_hold_up_timing() -> None:
    wait_for_timing()
    thread = threading.Thread(target=time_exclusively, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def test_who_times_may_time_and_train_within() -> None:
    thread = threading.Thread(target=nested, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def nested() -> None:
    with exclusive_timing(), exclusive_timing():
        wait_for_timing()
